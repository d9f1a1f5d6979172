"""What importing bidispatch costs: nothing heavy, and every public name arrives when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import bidispatch

HEAVY = ("torch", "triton", "pydantic", "ruamel", "numpy", "rich", "typer", "pynvml", "packaging", "importlib.metadata")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    found = run(
        "import sys; before = set(sys.modules); import bidispatch; "
        f"print([name for name in {HEAVY!r} if name in set(sys.modules) - before])"
    )
    assert found.strip() == "[]"


def test_planning_needs_no_torch_and_no_backend_library():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "numpy"):
            raise ImportError(f"{name} is not to be imported here")
sys.meta_path.insert(0, Refuse())
import bidispatch as bid
plan = bid.plan("sm103")
selection = plan.select("gemm", dtype="bf16", n=4096, k=4096)
for level in selection.explain(), plan.fingerprint(), plan.supported():
    assert level
print(plan.fingerprint())
"""
    assert run(code).startswith("predicted-sm103-")


@pytest.mark.parametrize("name", bidispatch.__all__)
def test_every_public_name_is_there(name):
    assert getattr(bidispatch, name) is not None
    assert name in dir(bidispatch)


def test_public_names_and_their_homes_agree():
    assert sorted(bidispatch.__all__) == sorted([*bidispatch._HOME_OF, "__version__"])


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'plna'"):
        bidispatch.plna  # noqa: B018


def test_the_plan_function_is_not_shadowed_by_its_module():
    assert run("import bidispatch.planning.plan, bidispatch as bid; print(callable(bid.plan))").strip() == "True"

"""The environment a record holds for: what must be equal, and that the code of the kernels is in it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from fakes import CPU, H200, fake

import bidispatch_backends
from bidispatch.environment import BIT_VARIABLES, _imported, code_digest, describe, hard_part
from bidispatch.registry import default_registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A backend package with a kernel in it; call it to change the kernel."""
    folder = tmp_path / "acme_kernels"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str, name: str = "gemm.py") -> None:
        (folder / name).write_text(code)
        code_digest.cache_clear()

    write("x = 1\n")
    yield write
    code_digest.cache_clear()
    sys.modules.pop("acme_kernels", None)


GEMM = fake("acme.gemm", load="acme_kernels.gemm:bind")


def code_of(*used):
    return describe(H200, used or [GEMM])["code"]


def test_a_change_in_a_kernels_file_changes_its_environment_and_undoing_it_changes_it_back(package):
    before = code_of()
    package("x = 2\n")
    assert code_of() != before
    package("x = 1\n")
    assert code_of() == before


def test_every_kernels_module_is_named(package, tmp_path):
    (tmp_path / "acme_attention.py").write_text("x = 1\n")
    other = fake("acme.mean", op="mean", load="acme_attention:bind")
    assert set(code_of(GEMM, other)) == {"acme_kernels.gemm", "acme_attention"}


@pytest.mark.parametrize(
    "line",
    [
        "import acme_kernels.fold",
        "from acme_kernels import fold",
        "from acme_kernels.fold import merge",
        "from . import fold",
        "from .fold import merge",
        "def bind():\n    from acme_kernels.fold import merge",
        "from acme_kernels import middle",
    ],
)
def test_what_a_kernel_imports_from_its_package_is_part_of_its_code_and_nothing_else_is(package, line):
    package("from .fold import merge\n", "middle.py")
    package("x = 1\n", "fold.py")
    package("x = 1\n", "other.py")
    package(line)
    before = code_of()
    package("x = 2\n", "other.py")
    assert code_of() == before
    package("x = 2\n", "fold.py")
    assert code_of() != before


@pytest.mark.parametrize("line", ["importlib.import_module(name)", "__import__(name)", "load = x.import_module"])
def test_a_kernel_that_imports_by_computed_names_is_made_of_all_in_its_folder(package, line):
    package(line)
    package("x = 1\n", "other.py")
    before = code_of()
    package("x = 2\n", "other.py")
    assert code_of() != before


def test_code_that_backends_share_is_covered(package, tmp_path):
    """A fold or a label in a package beside the kernel's own is part of what a record was made with."""
    (tmp_path / "acme_kernels" / "blas").mkdir()
    (tmp_path / "acme_kernels" / "blas" / "gemm.py").write_text("from ..fold import merge\n")
    used = fake("acme.gemm", load="acme_kernels.blas.gemm:bind")
    package("fold = 1\n", "fold.py")
    before = code_of(used)
    package("fold = 2\n", "fold.py")
    assert code_of(used) != before


def test_it_imports_no_kernel(package):
    package("raise RuntimeError('imported')\n")
    assert code_of()["acme_kernels.gemm"] != "unknown"
    assert "acme_kernels.gemm" not in sys.modules


def test_our_kernels_do_not_depend_on_other_ops_kernels():
    gemm = default_registry().get("triton.gemm")
    assert code_digest(gemm.load.partition(":")[0]) != "unknown"
    files = {file.name for file in _imported(Path(bidispatch_backends.__file__).parent, gemm.load.partition(":")[0])}
    assert {"gemm.py", "launch.py", "gemm_params.py", "numerics.py"} <= files
    assert not files & {"attention.py", "norm.py", "softmax.py"}


@pytest.mark.parametrize("name", sorted(BIT_VARIABLES))
def test_a_variable_that_changes_bits_is_hard(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    without = hard_part(describe(H200, []))
    monkeypatch.setenv(name, "1")
    assert hard_part(describe(H200, [])) != without


def test_the_device_and_library_versions_are_hard_and_the_driver_is_soft():
    used = [fake("a.gemm", libraries=("pytest", "not-installed"))]
    environment = describe(H200, used)
    assert environment["libraries"] == {"not-installed": None, "pytest": pytest.__version__}
    assert hard_part(describe(dataclasses.replace(H200, name="NVIDIA H100"), used)) != hard_part(environment)
    assert hard_part(describe(dataclasses.replace(H200, driver="1", compute_units=1), used)) == hard_part(environment)


def test_the_number_of_threads_is_hard_on_a_cpu_only():
    torch = pytest.importorskip("torch")
    assert describe(CPU, [])["threads"] == torch.get_num_threads()
    assert "threads" not in describe(H200, [])


def test_it_survives_json():
    environment = describe(H200, [fake("a.gemm")])
    assert json.loads(json.dumps(environment)) == environment


def test_the_processors_vector_instructions_and_threads_are_part_of_what_must_be_equal():
    described = hard_part(describe(CPU, [fake("a.gemm", load="fakes:bind")]))
    assert described["threads"] >= 1
    assert described["vector_instructions"]


def test_a_torch_that_does_not_import_is_warned_of_and_planning_goes_on(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch", None)  # what `import torch` then raises is an ImportError
    described = describe(CPU, [fake("a.gemm", load="fakes:bind")])
    assert "threads" not in described
    assert "does not import" in caplog.text

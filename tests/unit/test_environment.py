"""The environment a record holds for: what must be equal, and that the code of the kernels is in it."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from fakes import CPU, H200, fake

from bidispatch.environment import BIT_VARIABLES, code_digest, describe, hard_part


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


def test_a_change_in_any_file_of_a_backends_package_changes_its_environment(package):
    used = [fake("acme.gemm", load="acme_kernels.gemm:bind")]
    seen = [describe(H200, used)["code"]["acme_kernels"]]
    for code, name in (("x = 2\n", "gemm.py"), ("y = 1\n", "helpers.py"), ("y = 1\n", "renamed.py")):
        package(code, name)
        seen.append(describe(H200, used)["code"]["acme_kernels"])
    assert len(set(seen)) == 4
    package("x = 2\n")
    assert describe(H200, used)["code"]["acme_kernels"] == seen[3]


def test_every_package_of_a_backend_is_covered(package, tmp_path):
    (tmp_path / "acme_attention.py").write_text("x = 1\n")
    used = [fake("acme.gemm", load="acme_kernels.gemm:bind"), fake("acme.mean", op="mean", load="acme_attention:bind")]
    assert set(describe(H200, used)["code"]) == {"acme_kernels", "acme_attention"}


def test_code_that_backends_share_is_covered(package, tmp_path):
    """A fold or a label in a package beside the kernel's own is part of what a record was made with."""
    (tmp_path / "acme_kernels" / "blas").mkdir()
    (tmp_path / "acme_kernels" / "blas" / "gemm.py").write_text("x = 1\n")
    used = [fake("acme.gemm", load="acme_kernels.blas.gemm:bind")]
    before = describe(H200, used)["code"]
    package("fold = 2\n", "fold.py")
    assert set(before) == {"acme_kernels"}
    assert describe(H200, used)["code"] != before


def test_it_imports_no_kernel(package):
    package("raise RuntimeError('imported')\n")
    assert describe(H200, [fake("acme.gemm", load="acme_kernels.gemm:bind")])["code"]["acme_kernels"] != "unknown"
    assert "acme_kernels.gemm" not in sys.modules


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

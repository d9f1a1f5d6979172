"""The distribution as a user gets it: sdist and wheel are built, installed outside the checkout, and used there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROFILES = {path.name for path in (ROOT / "hw_profiles").glob("*.yaml")} | {"schema.json"}
OPS = "gemm=acme.gemm"
SELECT = (
    "import bidispatch as bid; s = bid.plan('sm103').select('gemm', dtype='bf16', n=64, k=64); "
    "print(*s.implementations); print(s.explain())"
)


def run(*command: str | Path, cwd: Path, code: int = 0, **environment: str) -> str:
    """Run outside the checkout, without what this process has in its environment for bidispatch; return stdout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BIDISPATCH"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr if code else done.stdout


def build(project: Path, out: Path, *options: str) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out, project, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The folder that holds the sdist, and the wheel made from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    return out


@pytest.fixture(scope="session")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="session")
def clean(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of an environment that holds the wheel and what it depends on, and nothing else."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=False)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet", "--no-compile")
    constraints = ROOT / ".ci" / "constraints.txt"
    run(*pip, *(("--constraint", constraints) if constraints.exists() else ()), wheel, cwd=home)
    return home / "bin"


def acme(folder: Path, distribution: str, code: str, entry: str = "acme") -> Path:
    """Build and unpack a third party's package with one backend; return the folder to put on the path."""
    module = distribution.replace("-", "_")
    project = folder / distribution
    (project / module).mkdir(parents=True)
    (project / module / "__init__.py").write_text(code)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "{distribution}"\nversion = "0.3"\n'
        f'[project.entry-points."bidispatch.backends"]\n{entry} = "{module}:register"\n'
    )
    out = folder / f"{distribution}-dist"
    out.mkdir()
    site = folder / f"{distribution}-site"
    with zipfile.ZipFile(build(project, out, "--wheel")) as archive:
        archive.extractall(site)  # noqa: S202 - we built it a line above
    return site


GOOD = """
from bidispatch import Implementation, Registry

def register(registry: Registry) -> None:
    registry.register(Implementation(
        "acme.gemm", "gemm", load="acme_kernels.gemm:bind", archs=("sm10*",), dtypes=("bfloat16",),
        numerics=lambda params, problem: "acme"))
"""


def test_the_wheel_holds_the_packages_and_the_profiles_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {Path(name).name for name in names if name.startswith("bidispatch/hw_profiles/")} >= PROFILES
    assert "bidispatch/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"bidispatch", "bidispatch_backends"}
    for name in ("torch_cpu", "triton"):
        assert f"{name} = bidispatch_backends.{name}:register" in entry_points
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "bidispatch").rglob("*.py")}
    backends = ROOT / "backends"
    tracked |= {str(path.relative_to(backends)) for path in backends.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == tracked


def test_the_sdist_holds_what_a_developer_needs(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"hw_profiles/{name}" for name in PROFILES} <= names
    assert {
        "README.md",
        "Makefile",
        ".ci/constraints.txt",
        "pyproject.toml",
        "tests/packaging/test_distribution.py",
    } <= names
    assert {"backends/bidispatch_backends/triton/__init__.py", "bidispatch/py.typed"} <= names
    assert not any("__pycache__" in name or name.startswith(".venv") for name in names)


def test_the_sdist_and_the_checkout_give_the_same_wheel(wheel, tmp_path):
    def content(path: Path) -> dict[str, int]:
        with zipfile.ZipFile(path) as archive:
            return {info.filename: info.CRC for info in archive.infolist() if not info.filename.endswith("RECORD")}

    assert content(build(ROOT, tmp_path, "--wheel")) == content(wheel)


def test_it_plans_outside_the_checkout_without_torch(clean, tmp_path):
    where = run(clean / "python", "-c", "import bidispatch; print(bidispatch.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(clean.parent)
    found = run(clean / "python", "-c", "import importlib.util as u; print(u.find_spec('torch'))", cwd=tmp_path)
    assert found.strip() == "None"
    content = json.loads(run(clean / "bidispatch", "plan", "--device", "sm103", "--json", cwd=tmp_path))
    assert content["device"]["arch"] == "sm103"
    assert content["fingerprint"].startswith("predicted-sm103-")
    assert content["failed_backends"] == {}
    assert {problem["op"] for problem in content["problems"]} >= {"gemm", "attention", "rms_norm"}
    assert "triton.gemm" in run(clean / "bidispatch", "plan", "--device", "sm103", cwd=tmp_path)


def test_every_profile_is_found_and_lints_clean_in_the_wheel(clean, tmp_path):
    code = "from bidispatch.profiles.load import builtin_folder; print(builtin_folder())"
    folder = Path(run(clean / "python", "-c", code, cwd=tmp_path).strip())
    assert folder.is_relative_to(clean.parent)
    files = sorted(folder.glob("*.yaml"))
    assert {path.name for path in files} == PROFILES - {"schema.json"}
    run(clean / "bidispatch", "profile", "lint", *files, cwd=tmp_path)


def test_a_third_partys_backend_is_seen_and_can_be_forced(clean, tmp_path):
    site = str(acme(tmp_path, "acme-kernels", GOOD))
    chosen, *explained = run(clean / "python", "-c", SELECT, cwd=tmp_path, PYTHONPATH=site).splitlines()
    assert chosen == "triton.gemm"
    assert any("acme.gemm: unlisted" in line for line in explained)
    forced = run(clean / "python", "-c", SELECT, cwd=tmp_path, PYTHONPATH=site, BIDISPATCH_IMPL=OPS)
    assert forced.splitlines()[0] == "acme.gemm"
    assert "[BIDISPATCH_IMPL]" in forced
    code = "from bidispatch.registry import default_registry as r; print(r().origin('acme.gemm'))"
    assert run(clean / "python", "-c", code, cwd=tmp_path, PYTHONPATH=site).strip() == "acme from acme-kernels 0.3"


def test_two_backends_of_one_name_are_an_error_that_names_both(clean, tmp_path):
    sites = [str(acme(tmp_path, name, GOOD)) for name in ("acme-kernels", "rival-kernels")]
    said = run(
        clean / "bidispatch", "plan", "--device", "sm103", cwd=tmp_path, code=3, PYTHONPATH=os.pathsep.join(sites)
    )
    assert "two backends are named 'acme'" in " ".join(said.split())
    assert "acme-kernels 0.3" in said
    assert "rival-kernels 0.3" in said


def test_a_backend_whose_import_raises_is_shown_and_fatal_only_when_forced(clean, tmp_path):
    site = str(acme(tmp_path, "broken-kernels", "raise ImportError('libacme.so: not found')\n"))
    plan = (clean / "bidispatch", "plan", "--device", "sm103", "--json")
    content = json.loads(run(*plan, cwd=tmp_path, PYTHONPATH=site))
    assert "libacme.so: not found" in json.dumps(content["failed_backends"]["acme"])
    said = run(*plan, cwd=tmp_path, code=3, PYTHONPATH=site, BIDISPATCH_IMPL=OPS)
    error = json.loads(said)["error"]
    assert error["type"] == "BackendError"
    assert "libacme.so: not found" in error["message"]

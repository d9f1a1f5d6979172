"""Fixtures for tests of the command line: running one, installing backends, writing the user's own profile."""

from __future__ import annotations

import json
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

from bidispatch.cli import main
from bidispatch.registry import default_registry

# A third party's backend on the processor: `sound` is invariant, `variant` adds a row up otherwise when M > 2.
BACKEND = """
    from bidispatch.registry import Implementation

    def implementation(name, attribute):
        return Implementation(
            "extra." + name, "mean", "extra_backend:" + attribute, ("cpu",), ("float32",),
            lambda params, problem: "extra", cuda_graph=False,
        )

    def register(registry):
        registry.register(implementation("sound", "bind_sound"))
        registry.register(implementation("variant", "bind_variant"))
        registry.register(implementation("unloadable", "no_such_function"))

    def bind_sound(context):
        def mean(x, out):
            for i in range(len(x)):
                out[i] = x[i].double().mean()
        return mean

    def bind_variant(context):
        def mean(x, out):
            half = x.shape[1] // 2 if len(x) > 2 else 0
            for i in range(len(x)):
                out[i] = (x[i, :half].clone().sum() + x[i, half:].clone().sum()) / x.shape[1]
        return mean
"""


@pytest.fixture
def cli(capsys):
    """Run a command line in this process; return exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture
def as_json(cli):
    """Run a command line with --json; return exit code and document. Anything else on stdout fails to parse."""

    def run(*words: str) -> tuple[int, dict]:
        code, out, _ = cli(*words, "--json")
        return code, json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    return run


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Install backends, as {name: source of a module with `register`}, beside the real ones, for this test."""

    def with_backends(*backends: tuple[str, str]) -> None:
        real = list(metadata.entry_points(group="bidispatch.backends"))
        added = []
        for number, (name, source) in enumerate(backends):
            module = "extra_backend" if number == 0 else f"extra_backend_{number}"
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
            monkeypatch.delitem(sys.modules, module, raising=False)
            added.append(metadata.EntryPoint(name, f"{module}:register", "bidispatch.backends"))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(metadata, "entry_points", lambda *, group: [*real, *added])
        default_registry.cache_clear()

    yield with_backends
    default_registry.cache_clear()
    sys.modules.pop("extra_backend", None)


@pytest.fixture
def own_profile(isolated):
    """Write the user's own profile for the CPU."""

    def write(text: str, name: str = "cpu") -> Path:
        path = isolated / "config" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("schema_version: 1\n" + textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def extra_backend(install) -> None:
    """Install the third party's backend `extra`: extra.sound, extra.variant and extra.unloadable, all for mean."""
    install(("extra", BACKEND))

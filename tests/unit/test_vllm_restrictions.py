"""docs/vllm-restrictions.md: every function of vLLM that reads its switch stands there, with what became of it."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from unpacked_vllm import unpacked

from bidispatch.integrations.vllm import compat
from bidispatch.integrations.vllm.mode import SWITCH

DOCUMENT = Path(__file__).parents[2] / "docs" / "vllm-restrictions.md"
MODULE = "the module"
VERDICTS = {"moot", "lifted", "stays", "not reached"}
MENTION = re.compile("batch_invarian", re.IGNORECASE)
_PLACE = re.compile(r"`([\w./]+\.py)`(?:: ((?:(?:`[\w.]+`|the module)(?:, )?)+))?")

Use = tuple[str, str]
"""A file, and a function in it; `MODULE` outside of any."""


def rows() -> list[list[str]]:
    """The cells of every row that has a verdict."""
    lines = [line.split("|")[1:-1] for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    found = [[cell.strip() for cell in cells] for cells in lines if len(cells) == 5]
    return [cells for cells in found if cells[0] != "what" and not set(cells[0]) <= {"-"}]


def listed(text: str) -> tuple[set[str], set[Use]]:
    """Files, and their functions, that the document names."""
    files, uses = set(), set()
    for file, functions in _PLACE.findall(text):
        files.add(file)
        uses |= {(file, name.strip("`")) for name in functions.split(", ") if name}
    return files, uses


def readers(root: Path) -> Iterator[Use]:
    """Every function under `root`, a folder `vllm`, that reads the switch."""
    for file in root.rglob("*.py"):
        text = file.read_text(encoding="utf-8", errors="replace")
        if SWITCH in text:
            name = file.relative_to(root).as_posix()
            yield from ((name, where) for where in _places(ast.parse(text), ()))


def _places(node: ast.AST, where: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        where = (*where, node.name)
    names = (getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "value", None))
    if any(isinstance(name, str) and name == SWITCH for name in names):
        yield ".".join(where) or MODULE
    for child in ast.iter_child_nodes(node):
        yield from _places(child, where)


def missing(root: Path) -> set[str]:
    """What the sources under `root` have and the document does not."""
    files, uses = listed(DOCUMENT.read_text(encoding="utf-8"))
    mentions = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if MENTION.search(file.read_text(encoding="utf-8", errors="replace"))
    }
    return (mentions - files) | {f"{file}: {function}" for file, function in set(readers(root)) - uses}


def test_the_list_is_complete_for_unpacked_wheels() -> None:
    wheels = unpacked()
    if not wheels:
        pytest.skip("BIDISPATCH_VLLM_SOURCES names no unpacked wheel")
    assert {version: missing(root) for version, root in wheels.items()} == {version: set() for version in wheels}


def test_the_list_is_complete_for_the_installed_vllm() -> None:
    """Its files are read, and nothing of it imported."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("no vLLM is installed")
    assert missing(Path(found.origin).parent) == set()


def test_nothing_is_listed_that_no_version_has() -> None:
    wheels = unpacked()
    minors = {version.rpartition(".")[0] for version in wheels}
    if not {f"0.{minor}" for minor in range(25, 34)} <= minors:
        pytest.skip("BIDISPATCH_VLLM_SOURCES does not name a wheel of every minor version from 0.25 to 0.33")
    _, uses = listed(DOCUMENT.read_text(encoding="utf-8"))
    assert uses - {use for root in wheels.values() for use in readers(root)} == set()


def test_each_has_a_verdict_and_a_reason() -> None:
    found = rows()
    assert len(found) > 50
    for what, where, _, verdict, why in found:
        assert verdict in VERDICTS, what
        assert why, what
        assert where.startswith("the same") or listed(where)[0], what


def test_what_is_lifted_is_what_is_patched() -> None:
    lifted = [listed(where)[1] for _, where, _, verdict, _ in rows() if verdict == "lifted"]
    assert len(lifted) == len(compat.LIFTED)
    for seam in compat.LIFTED:
        file = seam.module.removeprefix("vllm.").replace(".", "/") + ".py"
        assert any((file, seam.path) in uses for uses in lifted)


def test_what_is_not_in_the_list_is_found(tmp_path: Path) -> None:
    """Negative control: a new file, a function of a known one, and a mention."""
    for file, text in {
        "new.py": f"import envs\ndef choose():\n    return envs.{SWITCH}\n",
        "envs.py": f"class Other:\n    def read(self):\n        return '{SWITCH}'\n",
        "other.py": "def supports_batch_invariance(): return True\n",
        "sampling_params.py": f"class SamplingParams:\n    def __post_init__(self):\n        envs.{SWITCH}\n",
    }.items():
        (tmp_path / file).write_text(text)
    assert missing(tmp_path) == {"new.py", "new.py: choose", "envs.py: Other.read", "other.py"}

"""What README and docs show: profiles that lint clean, and the plan as the command prints it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bidispatch.profiles.load import lint_file
from bidispatch.registry import default_registry

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROFILES = [
    pytest.param(text, id=f"{path.name} {number}")
    for path in DOCUMENTS
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
]
EXAMPLES = ("acme.", "/home/me/")
"""Of a backend and of a folder that are a reader's own."""


def test_there_are_profiles() -> None:
    assert len(PROFILES) >= 7


@pytest.mark.parametrize("text", PROFILES)
def test_a_profile_that_is_shown_lints_clean(text: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    faults = [str(fault) for fault in lint_file(path, default_registry())]
    assert [fault for fault in faults if not any(example in fault for example in EXAMPLES)] == []


def test_the_plan_that_is_shown_is_the_one_that_is_printed(cli) -> None:
    """But for its fingerprint, which names versions of libraries."""
    code, printed, _ = cli("plan", "--device", "sm103")
    assert code == 0
    (shown,) = re.findall(r"```\n(device +sm103 .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert lines(shown) == lines(printed)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in re.sub(r"-[0-9a-f]{16}\b", "", text).strip().splitlines()]

"""What was decided about one implementation for one problem, and every reason."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHOSEN", "REJECTED", "SPARE", "UNLISTED", "Decision"]

CHOSEN = "chosen"
REJECTED = "rejected"
SPARE = "spare"
"""It fits, but every M is served by a candidate before it."""
UNLISTED = "unlisted"
"""Registered for the op, in no rule that was used."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict on one candidate."""

    implementation: str
    verdict: str
    reasons: tuple[str, ...] = ()
    source: str = ""
    """File and line, or the variable or call, that brought it up."""
    numerics: str = ""
    serves: str = ""
    """The rows it serves, such as `M <= 16`, when chosen."""

    def __str__(self) -> str:
        parts = [f"{self.implementation}: {self.verdict}"]
        if self.serves:
            parts.append(f" for {self.serves}")
        if self.reasons:
            parts.append(f", {'; '.join(self.reasons)}")
        if self.source:
            parts.append(f" [{self.source}]")
        return "".join(parts)

"""What was decided about one implementation for one problem, and every reason."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHOSEN", "REJECTED", "SPARE", "UNLISTED", "Decision", "rows_text"]

CHOSEN = "chosen"
REJECTED = "rejected"
SPARE = "spare"
"""It fits, but every M is served by a candidate before it."""
UNLISTED = "unlisted"
"""Registered for the op, in no rule that was used."""


def rows_text(rows: tuple[int, int | None]) -> str:
    """A range of M for people."""
    first, last = rows
    if last is None:
        return f"M > {first - 1}" if first > 1 else "every M"
    return f"{first} <= M <= {last}"


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict on one candidate."""

    implementation: str
    verdict: str
    reasons: tuple[str, ...] = ()
    source: str = ""
    """File and line, or the variable or call, that brought it up."""
    numerics: str = ""
    rows: tuple[int, int | None] | None = None
    """The first and the last M it serves, when chosen; last None for any more."""

    @property
    def serves(self) -> str:
        """The rows it serves, such as `1 <= M <= 16`; empty when it was not chosen."""
        return rows_text(self.rows) if self.rows else ""

    def __str__(self) -> str:
        parts = [f"{self.implementation}: {self.verdict}"]
        if self.serves:
            parts.append(f" for {self.serves}")
        if self.reasons:
            parts.append(f", {'; '.join(self.reasons)}")
        if self.source:
            parts.append(f" [{self.source}]")
        return "".join(parts)

"""What serves each layer, as rows and as the lines that the log and `bidispatch vllm report` show. Imports no vLLM."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from bidispatch.ops.schema import DTYPES
from bidispatch.planning.decisions import CHOSEN
from bidispatch.planning.overrides import IMPL_VARIABLE
from bidispatch.planning.selection import Selection
from bidispatch.profiles.profile import Profile

__all__ = ["NOT_PROMISED", "Row", "lines", "merged", "profile_json", "profile_lines", "refusals"]

NOT_PROMISED = "NOT PROMISED"


@dataclass(frozen=True, slots=True)
class Row:
    """A layer and what serves it, or why nothing does."""

    layer: str
    """Its name, numbers as `*` once rows are merged."""
    kind: str
    op: str
    dtype: str
    implementation: str
    numerics: str = ""
    level: str = ""
    evidence: str = ""
    source: str = ""
    """File and line of the profile that chose it."""
    reason: str = ""
    """Why it is not promised; empty where it is."""
    refused: bool = True
    """Whether `strict` stops for it, when it is not promised."""
    count: int = 1

    @classmethod
    def of(cls, layer: str, kind: str, selection: Selection) -> Row:
        """A layer that a selection serves."""
        chosen = [decision.source for decision in selection.decisions if decision.verdict == CHOSEN]
        return cls(
            layer,
            kind,
            selection.problem.op,
            DTYPES[selection.problem.dtype],
            ", ".join(selection.implementations),
            selection.numerics,
            selection.level.label,
            "verified" if selection.evidence else "claimed",
            ", ".join(dict.fromkeys(source for source in chosen if source)),
        )

    @classmethod
    def uncovered(
        cls, layer: str, kind: str, reason: str, *, op: str = "", by: str = "vLLM's own", refused: bool = True
    ) -> Row:
        """A layer that nothing here serves. op: what would; by: what runs it."""
        return cls(layer, kind, op, "", by, reason=reason, refused=refused)

    @property
    def promised(self) -> bool:
        """Whether its level holds."""
        return not self.reason

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("layer", "kind", "op", "dtype", "implementation", "numerics", "level", "evidence", "source", "reason")
        return {**{name: getattr(self, name) for name in names}, "promised": self.promised, "count": self.count}


def merged(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ only in the numbers of their layers as one, in order."""
    found: dict[Row, int] = {}
    for row in rows:
        key = replace(row, layer=re.sub(r"(?<=[.])[0-9]+(?=[.]|$)", "*", row.layer), count=1)
        found[key] = found.get(key, 0) + row.count
    return [replace(row, count=count) for row, count in found.items()]


def refusals(rows: Iterable[Row]) -> list[str]:
    """One line for each layer that `strict` stops for."""
    return [
        f"{row.kind} {row.layer}{f' ({row.op})' if row.op else ''}: {row.reason}"
        for row in rows
        if not row.promised and row.refused
    ]


def profile_json(profile: Profile) -> dict[str, Any]:
    """What a plan follows beside its rules, as plain data: files, and what is preferred and disabled where."""
    return {
        "name": profile.name,
        "files": list(profile.chain),
        "note": profile.note,
        "prefer": [{"implementation": name, "source": str(source)} for name, source in profile.prefer],
        "disable": [
            {"implementation": name, "reason": reason, "source": str(source)}
            for name, (reason, source) in profile.disable.items()
        ],
        "forced": os.environ.get(IMPL_VARIABLE, ""),
    }


def profile_lines(profile: Profile) -> list[str]:
    """The same for the log, above the table."""
    found = profile_json(profile)
    text = [f"profile {found['name']}: {', '.join(found['files'])}"]
    if found["note"]:
        text.append(f"  {found['note']}")
    text += [f"  prefer {each['implementation']} ({each['source']})" for each in found["prefer"]]
    text += [f"  disable {each['implementation']}: {each['reason']} ({each['source']})" for each in found["disable"]]
    if found["forced"]:
        text.append(f"  {IMPL_VARIABLE}={found['forced']}")
    return text


def lines(rows: Sequence[Row], fingerprint: str) -> list[str]:
    """The table, the reasons of what is not promised, and the plan's fingerprint."""
    head = ("kind", "op", "dtype", "implementation", "class", "level", "evidence", "layers", "source")
    cells = [
        (
            row.kind,
            row.op,
            row.dtype,
            row.implementation,
            row.numerics,
            row.level if row.promised else NOT_PROMISED,
            row.evidence,
            f"{row.layer} ({row.count})" if row.count > 1 else row.layer,
            row.source,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip_longest(head, *cells, fillvalue="")]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(each, widths, strict=True)) for each in (head, *cells)]
    reasons = [f"{NOT_PROMISED}: {row.kind} {row.layer}: {row.reason}" for row in rows if not row.promised]
    return [*(line.rstrip() for line in text), *reasons, f"fingerprint {fingerprint}"]

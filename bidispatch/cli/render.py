"""What commands print: lines, tables and JSON on stdout; warnings, errors and progress on stderr.

Nothing is read as markup: file paths, reasons and shapes hold brackets.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from bidispatch.device import Device
from bidispatch.errors import SelectionError
from bidispatch.ops.schema import DTYPES, Problem
from bidispatch.planning.decisions import CHOSEN, REJECTED, Decision
from bidispatch.planning.overrides import forced_choice
from bidispatch.planning.plan import Plan
from bidispatch.planning.selection import Selection

__all__ = [
    "PlanRow",
    "error_line",
    "json_document",
    "line",
    "log_shown",
    "plan_header",
    "plan_rows",
    "plan_table",
    "plan_unsupported",
    "progress_bar",
    "table",
    "warning",
    "why_not",
]

_out = Console(markup=False, highlight=False, emoji=False)
_err = Console(stderr=True, markup=False, highlight=False, emoji=False)


def line(text: str = "") -> None:
    """Print a line on stdout, never wrapped."""
    _out.print(text, soft_wrap=True)


def error_line(text: str) -> None:
    """Print a line on stderr."""
    _err.print(text, soft_wrap=True)


def warning(text: str) -> None:
    """Print a warning on stderr."""
    _err.print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)


def json_document(document: Mapping[str, Any]) -> None:
    """Print the one JSON document of a `--json` run. Infinities and NaN, which JSON lacks, go as text."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str] | None = None) -> None:
    """Print a table on stdout, as wide as it is: names stay whole, for eyes and for grep.

    A cell may hold several lines. `styles` colours cells that hold exactly that text.
    """
    cells = [[cell.split("\n") for cell in row] for row in rows]
    widths = [
        max(len(text) for text in [name, *(text for row in cells for text in row[index])])
        for index, name in enumerate(columns)
    ]

    def show(texts: Sequence[str], row_styles: Sequence[str]) -> None:
        words = Text("  ").join(
            Text(text.ljust(width), style=style) for text, width, style in zip(texts, widths, row_styles, strict=True)
        )
        words.rstrip()
        _out.print(words, soft_wrap=True)

    show(columns, ["bold"] * len(columns))
    for row, split in zip(rows, cells, strict=True):
        for texts in zip_longest(*split, fillvalue=""):
            show(texts, [(styles or {}).get(cell, "") for cell in row])


def progress_bar() -> Progress:
    """A progress bar on stderr: description, bar, done of total, time."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=_err,
        transient=True,
    )


class _Warnings(logging.Handler):
    """The library's log as warnings on stderr, each text once: many ops can have one cause."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._shown:
            self._shown.add(text)
            warning(text)


@contextmanager
def log_shown(*, debug: bool) -> Iterator[None]:
    """Show the library's warnings on stderr inside a `with` block; with `debug`, all of its log."""
    logger, handler = logging.getLogger("bidispatch"), _Warnings()
    level = logger.level
    if debug:
        handler.setLevel(logging.DEBUG)
        logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A row of the plan table: dtypes that are served alike share one."""

    op: str
    dtypes: tuple[str, ...]
    implementation: str
    numerics: str
    level: str
    evidence: str
    source: str


def plan_header(plan: Plan, problems: Sequence[Problem]) -> None:
    """Print what a plan rests on: device, profile, level, fingerprint of the problems, anything unusual."""
    profile = plan.profile
    lines = {
        "device": _device(plan.device),
        "profile": f"{profile.name} ({' <- '.join(profile.chain)})",
        "level": f"{plan.require.label}, trust {profile.trust}",
        "fingerprint": plan.fingerprint(problems) if problems else "",
        "note": profile.note,
    }
    for name, text in lines.items():
        if text:
            line(f"{name:<13}{text}")
    for failure in plan.registry.failures.values():
        warning(str(failure))


def _device(device: Device) -> str:
    parts = [device.arch.name]
    if device.compute_units:
        parts.append(f"{device.compute_units} compute units")
    if device.memory_bytes:
        parts.append(f"{device.memory_bytes / 2**30:.0f} GiB")
    if device.driver:
        parts.append(f"driver {device.driver}")
    if device.predicted:
        return f"{device.arch.name} ({device.arch.products}), predicted: no such GPU here"
    return f"{device.name} ({', '.join(parts)})"


def plan_rows(results: Sequence[tuple[Problem, Selection | SelectionError]]) -> list[PlanRow]:
    """Rows for what is served, in order, equal ones merged."""
    dtypes: dict[tuple[str, ...], list[str]] = {}
    for problem, selection in results:
        if isinstance(selection, Selection):
            chosen = _runs([decision for decision in selection.decisions if decision.verdict == CHOSEN])
            several = len(chosen) > 1
            row = (
                problem.op,
                "\n".join(f"{d.implementation} ({d.serves})" if several else d.implementation for d in chosen),
                selection.numerics,
                selection.level.label,
                f"verified {selection.evidence.made[:10]}" if selection.evidence else "claimed",
                "\n".join(decision.source for decision in chosen),
            )
            served = dtypes.setdefault(row, [])
            if problem.dtype not in served:
                served.append(problem.dtype)
    return [PlanRow(key[0], tuple(served), *key[1:]) for key, served in dtypes.items()]


def _runs(chosen: Sequence[Decision]) -> list[Decision]:
    """Chosen decisions, those of one implementation and source that follow each other as one."""
    runs: list[Decision] = []
    for decision in chosen:
        last = runs[-1] if runs else None
        if last and last.rows and decision.rows and (last.implementation, last.source) == _name(decision):
            runs[-1] = replace(last, rows=(last.rows[0], decision.rows[1]))
        else:
            runs.append(decision)
    return runs


def _name(decision: Decision) -> tuple[str, str]:
    return decision.implementation, decision.source


def plan_table(results: Sequence[tuple[Problem, Selection | SelectionError]]) -> None:
    """Print what serves each problem."""
    columns = ("op", "dtype", "implementation", "class", "level", "evidence", "source")
    rows = [
        (
            row.op,
            " ".join(DTYPES[dtype] for dtype in row.dtypes),
            row.implementation,
            row.numerics,
            row.level,
            row.evidence,
            row.source,
        )
        for row in plan_rows(results)
    ]
    table(columns, rows)


def plan_unsupported(results: Sequence[tuple[Problem, Selection | SelectionError]]) -> None:
    """Print what nothing serves, by name, under each reason."""
    served = {problem.op for problem, result in results if isinstance(result, Selection)}
    reasons: dict[str, list[str]] = {}
    for problem, result in results:
        if isinstance(result, SelectionError):
            name = f"{problem.op} {DTYPES[problem.dtype]}" if problem.op in served else problem.op
            names = reasons.setdefault(why_not(problem, result), [])
            if name not in names:
                names.append(name)
    if reasons:
        line("unsupported")
    for reason, names in reasons.items():
        line(f"  {', '.join(names)}: {reason}")


def why_not(problem: Problem, error: SelectionError) -> str:
    """The reason nothing serves a problem, on one line."""
    verdicts = {decision.verdict for decision in error.decisions}
    if REJECTED in verdicts and CHOSEN not in verdicts and forced_choice(problem.op) is None:
        rejected = [decision for decision in error.decisions if decision.verdict == REJECTED]
        return "; ".join(dict.fromkeys(reason for decision in rejected for reason in decision.reasons))
    first: str = str(error).partition("\n")[0]
    return first.removeprefix(f"{problem.op} is unsupported: ")

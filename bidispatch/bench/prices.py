"""What a level of invariance costs: the times that benchmarks/attention.py left, beside those of the fastest peer.

Read from `$BIDISPATCH_RESULTS_DIR`, else from benchmarks/results of the checkout this runs from, by the device's name.
"""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.errors import RecordError
from bidispatch.ops.schema import Problem

__all__ = ["COMMAND", "RESULTS_VARIABLE", "Price", "Prices", "command_for", "prices", "results_file"]

RESULTS_VARIABLE = "BIDISPATCH_RESULTS_DIR"

COMMAND = "python benchmarks/attention.py"
_CHECKOUT = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
_SWEPT = ("num_heads", "num_kv_heads", "head_dim", "kv_lora_rank", "rope_dim", "page_size")
"""Dims that the benchmark's shapes set; it leaves others at their defaults."""

_Microseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Row(BaseModel):
    """A cell at one level; what else a row has is left alone."""

    op: str
    phase: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    ours_us: _Microseconds
    impl: str
    level: str
    peers: Mapping[str, _Microseconds]


class _Results(BaseModel):
    rows: Sequence[_Row]


@dataclass(frozen=True, slots=True)
class Price:
    """Our time as a part of the fastest peer's, at one level and in one phase."""

    level: str
    phase: str
    implementation: str
    ratio: float
    """Geometric mean."""
    cells: int
    same_heads: bool
    """Whether the cells are of the problem's own heads; else they are of every shape there is."""

    def __str__(self) -> str:
        cells = f"{self.cells} cell{'' if self.cells == 1 else 's'}{'' if self.same_heads else ' of other heads'}"
        return (
            f"level {self.level}, {self.phase}: {self.ratio:.2f} of the fastest peer's time over {cells}, "
            f"{self.implementation}"
        )


@dataclass(frozen=True, slots=True)
class Prices:
    """What a file says of a problem: a price for each level, phase and implementation, and what to know of them."""

    found: tuple[Price, ...]
    notes: tuple[str, ...]


def results_file(device: Device) -> Path:
    """Where the results of this device belong, whether they are there or not."""
    chosen = os.environ.get(RESULTS_VARIABLE)
    return (Path(chosen) if chosen else _CHECKOUT) / device.slug / "attention.json"


def command_for(file: Path) -> str:
    """The command that writes a file of results: it knows the checkout's folder itself."""
    return COMMAND if file.is_relative_to(_CHECKOUT) else f"{COMMAND} --out {shlex.quote(str(file))}"


def prices(problem: Problem, file: Path) -> Prices | None:
    """The price of each level and phase that a file has for a problem's op and dtype; None without the file.

    Raises `RecordError` for a file that cannot be read or is none of the benchmark's.
    """
    try:
        rows = TypeAdapter(_Results).validate_json(file.read_bytes()).rows
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RecordError(
            f"{file} cannot be read: {error.strerror}; set {RESULTS_VARIABLE} to another folder"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise RecordError(
            f"{file} is damaged, or not from the benchmark ({f'{where}: ' if where else ''}{first['msg']}); "
            f"`{command_for(file)}` writes it anew"
        ) from error
    rows = [row for row in rows if (row.op, row.dtype) == (problem.op, problem.dtype) and row.peers]
    own = [row for row in rows if (row.heads, row.kv_heads, row.head_dim) == _heads(problem)]
    return Prices(tuple(_summaries(own or rows, same_heads=bool(own))), tuple(_notes(problem, file, rows, own)))


def _heads(problem: Problem) -> tuple[int, int, int]:
    heads = problem.size("num_heads")
    if "kv_lora_rank" in problem.dims:
        return heads, 1, problem.size("kv_lora_rank") + problem.size("rope_dim")
    return heads, problem.size("num_kv_heads"), problem.size("head_dim")


def _notes(problem: Problem, file: Path, rows: Sequence[_Row], own: Sequence[_Row]) -> Iterator[str]:
    if not rows:
        yield f"{file} has no {problem.op} in {problem.dtype} timed beside a peer: `{command_for(file)}` does that"
        return
    yield f"from {file}"
    if not own:
        heads, kv_heads, head_dim = _heads(problem)
        yield f"none of its cells has {heads}/{kv_heads} heads of {head_dim}, so those of all other heads are taken"
    plain = ops.get(problem.op).problem(problem.dtype, {dim: problem[dim] for dim in _SWEPT if dim in problem.dims})
    if extra := [f"{dim}={value}" for dim, value in problem.dims.items() if value != plain[dim]]:
        yield f"its cells are without this problem's {', '.join(extra)}"


def _summaries(rows: Sequence[_Row], *, same_heads: bool) -> Iterator[Price]:
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row.level, row.phase, _names(row)), []).append(row.ours_us / min(row.peers.values()))
    for (level, phase, names), ratios in groups.items():
        yield Price(level, phase, names, round(statistics.geometric_mean(ratios), 4), len(ratios), same_heads)


def _names(row: _Row) -> str:
    """The implementations of a row's rungs, without their params and tiles."""
    return " -> ".join(dict.fromkeys(rung.partition(" ")[0] for rung in row.impl.split(" -> ")))

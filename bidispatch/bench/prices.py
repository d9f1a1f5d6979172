"""What a level of invariance costs: the times that benchmarks/attention.py left, beside those of the fastest peer.

Read from `$BIDISPATCH_RESULTS_DIR`, else from benchmarks/results of the checkout this runs from, by the device's name.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from bidispatch.device import Device
from bidispatch.errors import RecordError
from bidispatch.ops.schema import Problem

__all__ = ["COMMAND", "Price", "prices", "results_file"]

COMMAND = "python benchmarks/attention.py"
_CHECKOUT = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


class _Row(BaseModel):
    """A cell at one level; what else a row has is left alone."""

    op: str
    phase: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    ours_us: float
    impl: str
    level: str
    peers: Mapping[str, float]


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
        shapes = "" if self.same_heads else " of other heads"
        return (
            f"level {self.level}, {self.phase}: {self.ratio:.2f} of the fastest peer's time over {self.cells} "
            f"cells{shapes}, {self.implementation}"
        )


def results_file(device: Device) -> Path | None:
    """Where the results of this device are, if they are anywhere."""
    chosen = os.environ.get("BIDISPATCH_RESULTS_DIR")
    file = (Path(chosen) if chosen else _CHECKOUT) / device.slug / "attention.json"
    return file if file.is_file() else None


def prices(problem: Problem, file: Path) -> list[Price]:
    """The price of each level and phase that a file has for a problem's op and dtype.

    Raises `RecordError` for a file that does not read as one of the benchmark's.
    """
    try:
        rows = TypeAdapter(_Results).validate_json(file.read_bytes()).rows
    except (OSError, ValidationError) as error:
        raise RecordError(f"{file} was not written by {COMMAND}: {str(error).splitlines()[0]}") from error
    rows = [row for row in rows if (row.op, row.dtype) == (problem.op, problem.dtype) and row.peers]
    own = [row for row in rows if (row.heads, row.kv_heads, row.head_dim) == _heads(problem)]
    return list(_summaries(own or rows, same_heads=bool(own)))


def _heads(problem: Problem) -> tuple[int, int, int]:
    heads = problem.size("num_heads")
    if "kv_lora_rank" in problem.dims:
        return heads, 1, problem.size("kv_lora_rank") + problem.size("rope_dim")
    return heads, problem.size("num_kv_heads"), problem.size("head_dim")


def _summaries(rows: Sequence[_Row], *, same_heads: bool) -> Iterator[Price]:
    for level, phase, implementation in dict.fromkeys((row.level, row.phase, _name(row)) for row in rows):
        cells = [row for row in rows if (row.level, row.phase, _name(row)) == (level, phase, implementation)]
        ratio = statistics.geometric_mean(row.ours_us / min(row.peers.values()) for row in cells)
        yield Price(level, phase, implementation, round(ratio, 4), len(cells), same_heads)


def _name(row: _Row) -> str:
    return row.impl.partition(" ")[0]

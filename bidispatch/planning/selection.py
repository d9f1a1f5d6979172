"""A selection: the ladder of rungs that serves one problem, all of one numerics class, and the decisions behind it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import DTYPES, SAME_DTYPE, Dim, DimValue, Problem
from bidispatch.planning.decisions import Decision
from bidispatch.registry import Rung

if TYPE_CHECKING:
    from bidispatch.records import Record
    from bidispatch.runtime.bound import BoundKernel
    from bidispatch.runtime.scratch import Scratch

__all__ = ["Selection", "explain_command", "rung_ranges", "verify_command"]

_log = logging.getLogger(__name__)
_warned = False


@dataclass(frozen=True)
class Selection:
    """What serves a problem on a device. Made by `Plan.select`; `bind` makes it callable."""

    problem: Problem
    device: Device
    rungs: tuple[Rung, ...]
    numerics: str
    level: Invariance
    decisions: tuple[Decision, ...]
    evidence: Record | None = field(default=None, compare=False)
    asked: Invariance | None = field(default=None, compare=False)
    """The level that was required in the place of the profile's."""

    @property
    def implementations(self) -> tuple[str, ...]:
        """The names of the implementations in the ladder, each once, by rising M."""
        return tuple(dict.fromkeys(rung.implementation.name for rung in self.rungs))

    @cached_property
    def ladder_key(self) -> str:
        """The ladder as canonical JSON: what a record must match to be evidence for this selection."""
        return json.dumps([{**rung.as_json(), "max_m": rung.max_m} for rung in self.rungs], sort_keys=True)

    def explain(self) -> str:
        """Every candidate with its verdict, reasons and source, as text."""
        head = f"{self.problem} on {self.device.name}: class {self.numerics}, level {self.level.label}"
        return "\n".join([head, *(f"  {decision}" for decision in self.decisions)])

    def bind(
        self,
        *,
        max_tokens: int,
        max_seqs: int = 1,
        max_seq_len: int = 0,
        max_query_len: int = 0,
        scratch: Scratch | None = None,
    ) -> BoundKernel:
        """Import the kernels, allocate their workspaces for calls up to these sizes, and return one callable.

        scratch: memory shared with kernels that never run at once with this one; without it all workspaces are its own.

        Raises `DeviceError` when planned for a device that is not here, `BackendError` when a kernel's library does
        not import.
        """
        from bidispatch.runtime.bind import bind
        from bidispatch.runtime.context import Limits

        if self.evidence is None:
            _warn_unproved(self)
        limits = Limits(max_tokens, max_seqs, max_seq_len, max_query_len or max_tokens)
        return bind(self.problem, self.device, self.rungs, limits, scratch)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "op": self.problem.op,
            "dtype": self.problem.dtype,
            "dims": dict(self.problem.dims),
            "numerics": self.numerics,
            "level": self.level.label,
            "evidence": "verified" if self.evidence else "claimed",
            "rungs": json.loads(self.ladder_key),
        }


def verify_command(problem: Problem, asked: Invariance | None = None) -> str:
    """The command that proves this problem, and no other: a record holds for exact dims. asked: as in `Selection`."""
    return " ".join(["bidispatch verify", *_named(problem, asked), "--record"])


def explain_command(problem: Problem, device: Device, asked: Invariance | None = None) -> str:
    """The command that shows what spoke for and against each candidate. asked: as in `Selection`."""
    elsewhere = ["--device", device.arch.name] if device.predicted else []
    return " ".join(["bidispatch explain", *_named(problem, asked), *elsewhere])


def _named(problem: Problem, asked: Invariance | None) -> list[str]:
    """A problem, and the level where it is not the profile's, as the command line takes them."""
    op = ops.get(problem.op)
    given = [f"--dim {dim.name}={_as_typed(problem[dim.name])}" for dim in op.dims if _differs(problem, dim)]
    level = [f"--require {asked.label}"] if asked is not None else []
    return [problem.op, "--dtype", DTYPES[problem.dtype], *given, *level]


def _differs(problem: Problem, dim: Dim) -> bool:
    default = problem.dtype if dim.default == SAME_DTYPE else dim.default
    return problem[dim.name] != default


def _as_typed(value: DimValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _warn_unproved(selection: Selection) -> None:
    """Once a process: a claim is not a proof."""
    global _warned
    if not _warned:
        _warned = True
        _log.warning(
            "%s rests on what its code claims, not on a proof on this device; `%s` proves it",
            selection.problem.op,
            verify_command(selection.problem, selection.asked),
        )


def rung_ranges(max_ms: Sequence[int | None]) -> list[tuple[int, int | None]]:
    """The rows each rung of a ladder serves, as (first, last); last None for the open end."""
    first, ranges = 1, []
    for max_m in max_ms:
        ranges.append((first, max_m))
        first = (max_m or 0) + 1
    return ranges

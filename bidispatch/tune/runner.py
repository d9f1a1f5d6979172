"""Tuning all shapes: one after another within a budget, each kept as soon as it is found. Imports torch."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidispatch.environment import describe, hard_part
from bidispatch.errors import BidispatchError, UsageError
from bidispatch.files import prepare_folder
from bidispatch.ops.schema import Problem
from bidispatch.planning.plan import Plan
from bidispatch.profiles.tiles import Searched, TunedEntry, TunedFile, read_tuned, write_tuned
from bidispatch.tune.ladder import merged
from bidispatch.tune.search import Found, Timer, contenders, search

__all__ = ["ROWS", "Outcome", "Report", "tune"]

_log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
"""The M that are timed when nobody names any."""

Progress = Callable[[int, int, str], None]
"""Told before each problem how many are done, how many there are, and what comes next."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one problem: its ladder, found now or kept, or why there is none."""

    problem: Problem
    entry: TunedEntry | None = None
    kept: bool = False
    tried: int = 0
    skipped: int = 0
    """Kernels that could not be bound or run at some M."""
    refused: tuple[str, ...] = ()
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """A run of `tune`."""

    path: Path
    outcomes: tuple[Outcome, ...]
    left: tuple[Problem, ...]
    """Not begun: the budget was over, or it was interrupted."""
    interrupted: bool
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every problem that was begun has a ladder, and no kernel gave other bits than its class."""
        return all(outcome.entry and not outcome.refused for outcome in self.outcomes)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 1),
            "left": [str(problem) for problem in self.left],
            "outcomes": [
                {
                    "problem": {"op": o.problem.op, "dtype": o.problem.dtype, "dims": dict(o.problem.dims)},
                    "entry": o.entry.model_dump(mode="json") if o.entry else None,
                    "kept": o.kept,
                    "tried": o.tried,
                    "skipped": o.skipped,
                    "refused": list(o.refused),
                    "error": o.error,
                    "seconds": round(o.seconds, 1),
                }
                for o in self.outcomes
            ],
        }


def tune(
    plan: Plan,
    problems: Sequence[Problem],
    path: Path,
    timer: Timer,
    *,
    rows: Sequence[int] = ROWS,
    only: Sequence[str] = (),
    budget: float | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Find and prove a ladder for each problem, and write `path` whole after each.

    only: implementations to try; by default all that the profile lists. budget: seconds after which no problem is
    begun. A ladder that the file has is kept where it was found in this environment, among all that is asked for; one
    found among less is found again among both, so that nothing is lost. again: finds all anew, among what is asked for.
    An interrupt ends the run, not the file.

    Raises `UsageError` where `path` cannot be written or holds ladders of another arch, `ProfileError` for a file that
    `tune` did not write.
    """
    _prepare(path, plan.device.arch.name)
    began = time.monotonic()
    tell = progress or (lambda done, total, what: None)
    outcomes: list[Outcome] = []
    interrupted = False
    for index, problem in enumerate(problems):
        if budget is not None and time.monotonic() - began > budget:
            break
        tell(index, len(problems), str(problem))
        try:
            outcomes.append(_one(plan, problem, path, timer, rows, only, again))
        except KeyboardInterrupt:
            interrupted = True
            break
    tell(len(outcomes), len(problems), "")
    left = tuple(problems[len(outcomes) :])
    return Report(path, tuple(outcomes), left, interrupted, time.monotonic() - began)


def _prepare(path: Path, arch: str) -> None:
    """Whatever speaks against the file is best known before the work."""
    try:
        prepare_folder(path.parent)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; name another file with --out") from error
    if path.exists() and (found := read_tuned(path).arch) != arch:
        raise UsageError(f"{path} has ladders of {found}, the device is {arch}; name another file with --out")


def _one(
    plan: Plan, problem: Problem, path: Path, timer: Timer, rows: Sequence[int], only: Sequence[str], again: bool
) -> Outcome:
    file = read_tuned(path) if path.exists() else None
    environment = describe(plan.device, [each for each in plan.registry if each.op == problem.op])
    same = file is not None and hard_part(dict(file.environment)) == hard_part(environment)
    known = file.find(problem) if file is not None and not again else None
    twin = file.find(_twin(problem)) if file is not None and same and not again else None
    began = time.monotonic()
    try:
        rivals = contenders(plan, problem, only)
        asked = Searched(rows=tuple(sorted(set(rows))), implementations=rivals.names)
        if known is not None and known.searched is not None:
            if known.comparisons and same and known.searched.covers(asked):
                return Outcome(problem, known, kept=True)
            if only:
                rivals = contenders(plan, problem, (*only, *known.searched.implementations))
            every_m = tuple(sorted({*asked.rows, *known.searched.rows}))
            asked = Searched(rows=every_m, implementations=rivals.names)
        like = twin if twin is not None and twin.searched is not None and twin.searched.covers(asked) else None
        found = search(plan.device, problem, rivals, asked.rows, timer, like)
    except (BidispatchError, RuntimeError) as error:  # nothing serves, or torch has no room: others may be had
        return Outcome(problem, error=str(error), seconds=time.monotonic() - began)
    entry = _entry(problem, found, asked)
    others = [other for other in file.entries if not other.serves(problem)] if file is not None else []
    if not same:
        # Launch shapes serve on, but nothing was compared in the environment that the file will name.
        others = [other.model_copy(update={"comparisons": 0}) for other in others]
    write_tuned(path, TunedFile(environment=environment, entries=[*others, entry]))
    seconds = time.monotonic() - began
    return Outcome(problem, entry, False, found.tried, found.skipped, found.refused, seconds=seconds)


def _twin(problem: Problem) -> Problem:
    """The same in bf16, where fp16 runs alike: what is known there is tried first. Itself for any other dtype."""
    if problem.dtype != "float16":
        return problem
    dims = {name: "bfloat16" if value == "float16" else value for name, value in problem.dims.items()}
    return Problem(problem.op, "bfloat16", dims)


def _entry(problem: Problem, found: Found, searched: Searched) -> TunedEntry:
    """A bias changes no choice: the entry does not name it."""
    return TunedEntry(
        op=problem.op,
        dtype=problem.dtype,
        dims={name: value for name, value in problem.dims.items() if name != "bias"},
        numerics=found.numerics,
        rungs=merged(found.steps),
        comparisons=found.comparisons,
        searched=searched,
        made=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )

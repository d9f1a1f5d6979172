"""Running a verification: every problem of a plan, and the controls. Imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from bidispatch import ops as catalogue
from bidispatch.errors import DeviceError, SelectionError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.planning.plan import Plan
from bidispatch.planning.selection import Selection
from bidispatch.verify.cases import problems_for
from bidispatch.verify.controls import run_controls
from bidispatch.verify.ladder import check_level, verify_selection
from bidispatch.verify.report import Report, Skipped, now

__all__ = ["Progress", "verify_plan"]

Progress = Callable[[int, int, str], None]
"""Told, before each step, how many steps are done, how many there are, and what comes next; after the last, ""."""


def verify_plan(
    plan: Plan,
    *,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    problems: Iterable[Problem] | None = None,
    extra: Iterable[Problem] = (),
    level: Invariance | str | None = None,
    cuda_graph: bool = False,
    classes: bool = True,
    effort: str = "quick",
    part: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> Report:
    """Check, bit by bit, what a plan selects on this machine; run controls that must be caught.

    ops, dtypes: only these of the default problems. problems: these instead. extra: these as well.
    level: what to verify; by default what each selection claims, `sequence` at most.
    cuda_graph: also compare CUDA graph replay. classes: also compare rungs, and merged weights with separate ones.
        Rungs that choose inside are run at every M in any case.
    effort: `quick`, or `full`, which also takes every M up to 512 (128 on a CPU).
    part: (i, n) checks every n-th problem from the i-th on, and all controls: n processes share a run.

    A default problem that nothing serves is listed in `Report.skipped`; one of `problems` or `extra`, or an op of
    `ops` that nothing serves at all, raises `SelectionError`. Raises `UsageError` for an op, dtype, level, effort or
    part that does not exist, `DeviceError` for a plan of another machine, and for CUDA graphs without a GPU.
    """
    if plan.device.predicted:
        raise DeviceError(
            f"the plan is for {plan.device.arch.name}, which this machine does not have; "
            "run verify there, or plan with device='auto'"
        )
    if cuda_graph and plan.device.arch.vendor == "cpu":
        raise DeviceError("CUDA graphs asked for, but the plan is for the processor; leave cuda_graph out")
    wanted = Invariance.parse(level) if isinstance(level, str) else level
    check_level(wanted)
    number, parts = part
    if not 1 <= number <= parts:
        raise UsageError(f"there is no part {number} of {parts}: parts are counted from 1")
    began = time.monotonic()
    chosen = list(problems) if problems is not None else list(problems_for(plan.device, ops, dtypes))
    # Nothing serving a problem is an error where it was asked for: by itself, or as all there is of an op.
    added = [problem for problem in dict.fromkeys(extra) if problem not in chosen]
    selections, skipped = _select(plan, chosen, strict=problems is not None)
    selections += _select(plan, added, strict=True)[0]
    served = {selection.problem.op for selection in selections}
    for skip in skipped:
        if ops is not None and skip.problem.op not in served:
            raise skip.error
    selections, skipped = selections[number - 1 :: parts], skipped[number - 1 :: parts]
    tell = progress or (lambda done, total, what: None)
    total = len(selections) + 1
    results = []
    for index, selection in enumerate(selections):
        tell(index, total, str(selection.problem))
        results.append(
            verify_selection(
                selection,
                level=wanted,
                cuda_graph=cuda_graph,
                effort=effort,
                select=plan.select_problem if classes else None,
            )
        )
    tell(total - 1, total, "controls")
    verified = dict.fromkeys(selection.problem.op for selection in selections)
    over_sequences = [op for op in verified if catalogue.get(op).sequences]
    rows = len(over_sequences) < len(verified)
    controls = run_controls(
        plan.device,
        rows=rows,
        experts="moe.experts" in verified,
        over_sequences=over_sequences,
        cuda_graph=cuda_graph,
    )
    tell(total, total, "")
    return Report(plan.device, tuple(results), tuple(controls), tuple(skipped), now(), seconds=time.monotonic() - began)


def _select(plan: Plan, problems: Iterable[Problem], *, strict: bool) -> tuple[list[Selection], list[Skipped]]:
    """A selection for each problem, and the problems that nothing serves; the first such raises where `strict`."""
    selections: list[Selection] = []
    skipped: list[Skipped] = []
    for problem in problems:
        try:
            selections.append(plan.select_problem(problem))
        except SelectionError as error:  # noqa: PERF203 - one problem must not hide the others
            if strict:
                raise
            skipped.append(Skipped(problem, error))
    return selections, skipped

"""Verifying one ladder: every check, its accuracy, its classes, and plain torch beside it. Imports torch."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import torch

from bidispatch import ops
from bidispatch.errors import BidispatchError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.planning.selection import Selection
from bidispatch.registry import Rung
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits
from bidispatch.verify import rows, sequences
from bidispatch.verify.accuracy import measure_accuracy
from bidispatch.verify.cases import Sizes, sizes_for
from bidispatch.verify.classes import can_be_merged, check_merged
from bidispatch.verify.graphs import check_graphs
from bidispatch.verify.report import Accuracy, Check, ProblemResult
from bidispatch.verify.rungs import check_ladder
from bidispatch.verify.stock import stock_subject
from bidispatch.verify.subject import Subject

__all__ = ["check_level", "verify_selection"]

_log = logging.getLogger(__name__)


def verify_selection(
    selection: Selection,
    *,
    level: Invariance | None = None,
    cuda_graph: bool = False,
    effort: str = "quick",
    select: Callable[[Problem], Selection] | None = None,
    stock: bool = True,
    sizes: Sizes | None = None,
) -> ProblemResult:
    """Check one ladder. What a kernel raises is a fault of the result, but for what bidispatch itself raises.

    select: where the ladders of merged weights' parts come from; None leaves the class checks out.
    stock: also run plain torch. sizes: how much to compare, instead of what `effort` gives.
    """
    check_level(level)
    wanted = min(selection.level, Invariance.SEQUENCE) if level is None else level
    how_much = sizes or sizes_for(selection, effort)
    began = time.monotonic()
    found = _Findings()
    try:
        with torch.no_grad(), _current(selection):
            found.collect(selection, wanted, how_much, cuda_graph, select, stock)
    except BidispatchError:
        raise
    except Exception as error:  # noqa: BLE001 - a backend's code; the other problems still count
        _log.debug("%s", selection.problem, exc_info=True)
        found.error = f"{type(error).__name__}: {error}"
    if selection.device.arch.vendor != "cpu":
        torch.cuda.empty_cache()
    return ProblemResult(
        selection=selection,
        level=wanted,
        checks=tuple(found.checks),
        classes=tuple(found.classes),
        accuracy=tuple(found.accuracy),
        refuted=tuple(found.refuted),
        held=tuple(found.held),
        stock=found.stock,
        cuda_graph=found.cuda_graph,
        error=found.error,
        seconds=time.monotonic() - began,
    )


def _current(selection: Selection) -> contextlib.AbstractContextManager[object]:
    """Makes the selection's GPU the one that streams and graphs are made on."""
    on_cpu = selection.device.arch.vendor == "cpu"
    return contextlib.nullcontext() if on_cpu else torch.cuda.device(selection.device.index)


class _Findings:
    """What is known of one ladder so far; a kernel that raises leaves what came before."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.classes: list[Check] = []
        self.accuracy: list[Accuracy] = []
        self.refuted: list[tuple[Rung, Check]] = []
        self.held: list[Rung] = []
        self.stock: Check | None = None
        self.cuda_graph = False
        self.error = ""

    def collect(
        self,
        selection: Selection,
        level: Invariance,
        sizes: Sizes,
        cuda_graph: bool,
        select: Callable[[Problem], Selection] | None,
        stock: bool,
    ) -> None:
        device = torch.device(selection.device.torch_device)
        over_sequences = bool(ops.get(selection.problem.op).sequences)

        def rebind(limits: Limits) -> Subject:
            bound = bind(selection.problem, selection.device, selection.rungs, limits)
            return Subject(selection.problem, device, bound.launch)

        if over_sequences:
            subject = rebind(sequences.sequence_limits(selection.problem, sizes))
            self.checks.extend(sequences.check_sequences(subject, level, sizes, rebind))
        else:
            subject = rebind(Limits(max(*sizes.rows, *sizes.graph_rows)))
            self.checks.extend(rows.check_rows(subject, level, sizes, rebind))
        if cuda_graph and level >= Invariance.BATCH:
            self._graphs(selection, subject, sizes, level, rebind)
        plain = stock_subject(selection.problem, device) if stock else None
        rounding = max(rung.implementation.own_rounding(selection.problem) for rung in selection.rungs)
        self.accuracy.extend(measure_accuracy(subject, rebind, sizes.accuracy_rows, plain, rounding))
        if select is not None:
            self._rungs(selection, sizes)
            if can_be_merged(selection.problem):
                self.classes.append(check_merged(selection, sizes, select))
        if plain is not None:
            self.stock = (sequences if over_sequences else rows).stock_check(plain, sizes)

    def _rungs(self, selection: Selection, sizes: Sizes) -> None:
        for rungs, check in check_ladder(selection, sizes):
            self.classes.append(check)
            if not check.passed:
                self.refuted += [(rung, check) for rung in rungs]
            elif check.rows:
                self.held += rungs

    def _graphs(
        self,
        selection: Selection,
        subject: Subject,
        sizes: Sizes,
        level: Invariance,
        rebind: Callable[[Limits], Subject],
    ) -> None:
        refusing = [rung.implementation.name for rung in selection.rungs if not rung.implementation.cuda_graph]
        if refusing:
            self.checks.append(Check("CUDA graph replay", note=f"{', '.join(refusing)} cannot be captured"))
            return
        if ops.get(selection.problem.op).sequences:
            for binding, bound, calls in sequences.graph_groups(subject, sizes, level, rebind):
                self.checks.append(check_graphs(bound, calls, binding))
        else:
            self.checks.append(check_graphs(subject, rows.graph_trials(subject, sizes)))
        self.cuda_graph = True


def check_level(level: Invariance | None) -> None:
    if level is not None and level > Invariance.SEQUENCE:
        raise UsageError(
            f"level {level.label} cannot be verified on one device; "
            f"the levels are {', '.join(known.label for known in Invariance if known <= Invariance.SEQUENCE)}"
        )

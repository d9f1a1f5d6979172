"""The proof of winners: their results compared with the class's reference, bit by bit. Imports torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.ops.reference.draw import DISTRIBUTIONS
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Params, Rung
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits
from bidispatch.tune.ladder import Choice
from bidispatch.verify.cases import widest_dim
from bidispatch.verify.compare import Tally
from bidispatch.verify.report import Check
from bidispatch.verify.subject import Arguments, Subject, Trial

__all__ = ["Prover"]

_log = logging.getLogger(__name__)

_PIECE_ELEMENTS = 1 << 28
"""Of a result are compared at once, so that beside a large one there need be room for a part of what it should be."""


class Prover:
    """Compares winners with one reference: the first listed that makes no choice inside, at its own ladder.

    Rows of one class do not follow the call they are in. So what a call must give is found in pieces of rows: the
    first is kept, since every M has those rows, the others are found anew where a call has them.
    """

    def __init__(
        self, device: Device, problem: Problem, known: Sequence[tuple[Implementation, Params]], most: int
    ) -> None:
        """known: all of the class. most: the largest M that a winner will be asked about."""
        op = ops.get(problem.op)
        self._device, self._place = device, torch.device(device.torch_device)
        self._problem, self._most = problem, most
        plain = [pair for pair in known if not pair[0].chooses_inside]
        self._known = [*plain, *(pair for pair in known if pair not in plain)]
        # fp32 results show what rounding to 16 bits hides.
        wide = {"out_dtype": "float32"} if "out_dtype" in problem.dims else {}
        self._plain = tuple(dict.fromkeys((problem, op.problem(problem.dtype, {**problem.dims, **wide}))))
        self._biased = tuple(op.problem(p.dtype, {**p.dims, "bias": True}) for p in self._plain if "bias" in p.dims)
        self._piece = min(most + 1, max(1, _PIECE_ELEMENTS // widest_dim(problem)))
        self._drawn: dict[str, Arguments] = {}
        self._references: dict[str, Subject] = {}
        self._kept: dict[tuple[str, str], tuple[torch.Tensor, ...]] = {}
        self.comparisons = 0

    def check(self, choice: Choice, low: int, high: int) -> Check:
        """The winner of M from `low` to `high` without a bias, in every output dtype it gives."""
        check = self._check(choice, self._plain, low, high)
        return (
            check if check.rows or not check.passed else replace(check, differing=1, note="nothing could be compared")
        )

    def check_bias(self, choice: Choice, low: int, high: int) -> Check:
        """The same with a bias, which a ladder serves too. What takes none, or is of another class with
        one, passes with no rows: no plan uses it there.
        """
        return self._check(choice, self._biased, low, high)

    def _check(self, choice: Choice, problems: Sequence[Problem], low: int, high: int) -> Check:
        """At both ends of the rows, one beyond each, and at 1."""
        rows = sorted({m for m in (1, low - 1, low, high - 1, high, high + 1) if m >= 1})
        tally = Tally(str(choice), tuple(output.name for output in ops.get(self._problem.op).outputs))
        for problem in problems:
            if not self._takes((choice.implementation, choice.params), problem) or not self._referred(problem):
                continue
            self._expected(problem, "normal", 0, 1)  # what fails here is no fault of the winner's
            try:
                self._compare(choice, problem, rows, tally)
            except Exception as error:  # noqa: BLE001 - a backend's code; what cannot be compared does not win
                own = problem.dims.get("out_dtype") == self._problem.dims.get("out_dtype")
                if own or isinstance(error, torch.OutOfMemoryError):
                    return Check(str(choice), differing=1, note=f"{type(error).__name__}: {error}")
                # A tile with room for 16-bit results only. Those were compared.
                _log.debug("%s gives no fp32: %s", choice, error)
        check = tally.check()
        self.comparisons += check.rows if check.passed else 0
        return check

    def _compare(self, choice: Choice, problem: Problem, rows: Sequence[int], tally: Tally) -> None:
        """Normal data at every M, the other distributions at the largest."""
        rung = Rung(choice.implementation, choice.params, choice.tile)
        mine = Subject(problem, self._place, bind(problem, self._device, (rung,), Limits(max(rows))).launch)
        for distribution in DISTRIBUTIONS:
            for m in rows if distribution == "normal" else rows[-1:]:
                arguments = self._rows_of(problem, distribution, 0, m)
                canvas = mine.canvas(Trial(m, arguments, ()))
                mine.call(arguments, canvas.outputs)
                results = canvas.rows()
                for first, last in self._pieces(m):
                    wanted = self._expected(problem, distribution, first, last)
                    tally.add(m, tuple(out[first:last] for out in results), wanted, torch.arange(first, last))

    def _pieces(self, m: int) -> Iterable[tuple[int, int]]:
        return ((first, min(first + self._piece, m)) for first in range(0, m, self._piece))

    def _arguments(self, problem: Problem, distribution: str) -> Arguments:
        """One draw serves every output dtype, with a bias and without."""
        if distribution not in self._drawn:
            fullest = (*self._plain, *self._biased)[-1]
            drawn = Subject(fullest, self._place, _no_kernel).inputs(self._most + 1, distribution=distribution, seed=6)
            self._drawn[distribution] = drawn
        subject = self._reference(problem)
        pairs = zip(self._drawn[distribution], subject.argument_specs, strict=True)
        # A bias has the dtype of the result, and was drawn for the widest.
        return [None if tensor is None or not spec.present else tensor.to(spec.dtype) for tensor, spec in pairs]

    def _rows_of(self, problem: Problem, distribution: str, first: int, last: int) -> Arguments:
        """The arguments of a call with rows `first` to `last` (excluded)."""
        subject = self._reference(problem)
        axes = subject.axes_of(subject.row_size, subject.op.arguments)
        pairs = zip(self._arguments(problem, distribution), axes, strict=True)
        return [t if t is None or axis is None else t.narrow(axis, first, last - first) for t, axis in pairs]

    def _expected(self, problem: Problem, distribution: str, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """Rows `first` to `last` (excluded) of each output that a call of any M must give."""
        key = (problem.key, distribution)
        if first:
            return self._referred_rows(problem, distribution, first, last)
        if key not in self._kept:
            if problem in self._biased:  # the proof without a bias is over
                for other in self._plain:
                    self._kept.pop((other.key, distribution), None)
            self._kept[key] = self._referred_rows(problem, distribution, 0, self._piece)
        return tuple(rows[:last] for rows in self._kept[key])

    def _referred_rows(self, problem: Problem, distribution: str, first: int, last: int) -> tuple[torch.Tensor, ...]:
        return self._reference(problem).alone(self._rows_of(problem, distribution, first, last))

    def _referred(self, problem: Problem) -> tuple[Implementation, Params] | None:
        """What the others are compared with; None where nothing of the class takes the problem."""
        return next((pair for pair in self._known if self._takes(pair, problem)), None)

    def _takes(self, pair: tuple[Implementation, Params], problem: Problem) -> bool:
        """Whether it runs the problem; one with a bias, in the class it has without."""
        implementation, params = pair
        if implementation.unmet(self._device, problem):
            return False
        if problem not in self._biased:
            return True
        without = self._plain[self._biased.index(problem)]
        return implementation.numerics(params, problem) == implementation.numerics(params, without)

    def _reference(self, problem: Problem) -> Subject:
        if problem.key not in self._references:
            pair = self._referred(problem)
            if pair is None:
                raise ValueError(f"nothing of the class takes {problem}")
            implementation, params = pair
            shapes = implementation.tiles(self._device, problem, params)
            rungs = tuple(Rung(implementation, params, tile, max_m) for max_m, tile in shapes)
            launch = bind(problem, self._device, rungs, Limits(self._piece)).launch
            self._references[problem.key] = Subject(problem, self._place, launch)
        return self._references[problem.key]


def _no_kernel(*arguments: object) -> None:
    """For a subject that only draws."""

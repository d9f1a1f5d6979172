"""What a verification found, as frozen data: checks, accuracy, classes, stock, controls, totals. Imports no torch."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bidispatch.device import Device
from bidispatch.environment import describe
from bidispatch.errors import InvarianceError, SelectionError
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.planning.selection import Selection, verify_command
from bidispatch.records import Record, Refutation
from bidispatch.registry import Rung

__all__ = [
    "SOUND",
    "Accuracy",
    "Check",
    "ControlResult",
    "Mismatch",
    "ProblemResult",
    "Report",
    "Skipped",
]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One element whose bits differ, and the smallest call that shows it."""

    size: int
    """M: the rows (tokens) of the call."""
    row: int
    """The row in that call; for a batch of matrices, counted through all of them."""
    output: str
    element: int
    """The element within the row, axes flattened."""
    value: float
    expected: float
    value_bits: str
    expected_bits: str
    ulps: int | None
    """Representable numbers between the two; None where either is not finite."""

    def __str__(self) -> str:
        distance = "not finite" if self.ulps is None else f"{self.ulps} ULP{'s' if self.ulps != 1 else ''} apart"
        return (
            f"M={self.size} row {self.row} {self.output}[{self.element}]: {self.value!r} ({self.value_bits}), "
            f"instead of {self.expected!r} ({self.expected_bits}), {distance}"
        )

    @property
    def order(self) -> tuple[int, int, str, int]:
        """What "smallest" goes by."""
        return (self.size, self.row, self.output, self.element)


@dataclass(frozen=True, slots=True)
class Check:
    """One kind of comparison for one problem: how many rows it compared, and how many differed in any bit."""

    name: str
    rows: int = 0
    elements: int = 0
    differing: int = 0
    smallest: Mismatch | None = None
    note: str = ""
    """Why nothing was compared, where that is so."""

    @property
    def passed(self) -> bool:
        """No difference. A check that compared nothing passes; the problem it belongs to then has nothing to show."""
        return not self.differing

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.name}: nothing compared" + (f" ({self.note})" if self.note else "")
        found = f"{self.differing} of {self.rows} rows differ"
        return f"{self.name}: {found}" + (f"; smallest: {self.smallest}" if self.smallest else "")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """‖out − ref‖ / ‖ref‖ of one output against the fp64 reference; infinite when the output is not finite.

    Of integers it is the share that differ.
    """

    output: str
    distribution: str
    error: float
    limit: float
    stock: float | None = None
    """The error of plain torch on the same inputs; None where it was not run."""
    most_of_stock: float | None = None
    """The largest ratio to stock's error that passes; None where the ratio is reported and fails nothing."""

    @property
    def ratio(self) -> float | None:
        """error / stock, where stock's is a number above 0."""
        if self.stock is None or not 0 < self.stock < math.inf:
            return None
        return self.error / self.stock

    @property
    def passed(self) -> bool:
        near_stock = self.most_of_stock is None or self.ratio is None or self.ratio <= self.most_of_stock
        return self.error <= self.limit and near_stock

    def __str__(self) -> str:
        text = f"accuracy of {self.output} ({self.distribution}): {self.error:.2e}, at most {self.limit:.0e} is right"
        if self.stock is None:
            return text
        allowed = "" if self.most_of_stock is None else f", at most {self.most_of_stock:g} times that"
        return f"{text}; stock torch {self.stock:.2e}{allowed}"


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """What was found about one problem's ladder."""

    selection: Selection
    level: Invariance
    checks: tuple[Check, ...]
    """What must hold."""
    classes: tuple[Check, ...] = ()
    """Rungs of the ladder against each other, and merged weights against separate ones."""
    accuracy: tuple[Accuracy, ...] = ()
    stock: Check | None = None
    """The same comparison of plain torch: its differences are reported and fail nothing."""
    refuted: tuple[tuple[Rung, Check], ...] = ()
    """Rungs whose bits differed from the others', with the check that says so."""
    held: tuple[Rung, ...] = ()
    """Rungs that were compared with others and agreed."""
    cuda_graph: bool = False
    """Whether graph replay was compared."""
    error: str = ""
    """What a kernel raised, where one did."""
    seconds: float = 0.0

    @property
    def problem(self) -> Problem:
        return self.selection.problem

    @property
    def comparisons(self) -> int:
        """Rows compared bit by bit; stock's do not count."""
        return sum(check.rows for check in (*self.checks, *self.classes))

    @property
    def differing(self) -> int:
        """Rows that differed in any bit."""
        return sum(check.differing for check in (*self.checks, *self.classes))

    @property
    def smallest(self) -> Mismatch | None:
        """The smallest failing pair."""
        return _smallest((*self.checks, *self.classes))

    @property
    def passed(self) -> bool:
        """Something was compared, no bit differed, the numbers are right and nothing raised."""
        invariant = any(check.rows for check in self.checks) and not self.differing
        accurate = bool(self.accuracy) and all(accuracy.passed for accuracy in self.accuracy)
        return invariant and accurate and not self.error

    @property
    def faults(self) -> tuple[str, ...]:
        """Everything that speaks against it, one line each; empty when it passed."""
        lines = [str(check) for check in (*self.checks, *self.classes) if not check.passed]
        lines += [str(accuracy) for accuracy in self.accuracy if not accuracy.passed]
        if self.error:
            lines.append(self.error)
        elif not any(check.rows for check in self.checks):
            lines.append("nothing compared")
        elif not self.accuracy:
            lines.append("accuracy was not measured")
        return tuple(lines)


SOUND = "passing every check"
"""What a control without fault must do."""


@dataclass(frozen=True, slots=True)
class ControlResult:
    """A kernel broken on purpose: whether the checks named in `by` caught it. For a sound one, `by` is `SOUND` and
    `caught` says whether it passed.
    """

    name: str
    by: str
    caught: bool
    detail: str = ""

    @property
    def sound(self) -> bool:
        """Whether its kernel is without fault, and must pass."""
        return self.by == SOUND


@dataclass(frozen=True, slots=True)
class Skipped:
    """A problem that was not verified, and why."""

    problem: Problem
    error: SelectionError


@dataclass(frozen=True, slots=True)
class Report:
    """A run of `verify_plan`."""

    device: Device
    results: tuple[ProblemResult, ...]
    controls: tuple[ControlResult, ...]
    skipped: tuple[Skipped, ...]
    made: str
    """When, as an ISO date and time with offset."""
    seconds: float

    @property
    def comparisons(self) -> int:
        """Rows compared bit by bit, over all problems."""
        return sum(result.comparisons for result in self.results)

    @property
    def differing(self) -> int:
        """Rows that differed in any bit, over all problems."""
        return sum(result.differing for result in self.results)

    @property
    def controls_caught(self) -> bool:
        """Whether every broken kernel was caught; if not, this run proves nothing."""
        return bool(self.controls) and all(control.caught for control in self.controls)

    @property
    def passed(self) -> bool:
        """Something was compared, every problem passed and every control was caught."""
        return self.comparisons > 0 and self.controls_caught and all(result.passed for result in self.results)

    @property
    def faults(self) -> tuple[str, ...]:
        """Everything that speaks against the run, one line each; empty when it passed."""
        lines = [f"{result.problem}: {fault}" for result in self.results for fault in result.faults]
        lines += [
            f"control not caught: {control.name}, which {control.by} should catch; this run proves nothing"
            for control in self.controls
            if not control.caught
        ]
        if not self.controls:
            lines.append("no control was run")
        if not self.comparisons:
            lines.append("nothing was compared")
        return tuple(lines)

    def raise_if_failed(self) -> None:
        """Raise `InvarianceError` with every fault unless the run passed."""
        if not self.passed:
            raise InvarianceError("\n".join(self.faults))

    def records(self) -> list[Record]:
        """A record for each problem that passed with something compared; none when a control was not caught."""
        if not self.controls_caught:
            return []
        return [self._record(result) for result in self.results if result.passed]

    def refutations(self) -> tuple[list[Refutation], list[Refutation]]:
        """The rungs found to differ from their ladder, and those found to hold, of which nothing stays against them.

        A problem that passed holds with every rung. Both are empty when a control was not caught.
        """
        if not self.controls_caught:
            return [], []
        refuted, held = [], []
        for result in self.results:
            refuted += [self._refutation(result, rung, str(check)) for rung, check in result.refuted]
            good = result.selection.rungs if result.passed else result.held
            held += [self._refutation(result, rung, "") for rung in good]
        return refuted, held

    def _refutation(self, result: ProblemResult, rung: Rung, found: str) -> Refutation:
        environment = describe(self.device, {rung.implementation})
        retry = f"{verify_command(result.problem, result.selection.asked)} --retry"
        return Refutation(result.problem.key, rung.key, found, retry, self.made, environment)

    def _record(self, result: ProblemResult) -> Record:
        selection = result.selection
        return Record(
            problem=selection.problem.key,
            ladder=selection.ladder_key,
            numerics=selection.numerics,
            level=result.level.label,
            comparisons=result.comparisons,
            cuda_graph=result.cuda_graph,
            made=self.made,
            environment=self._environment([selection]),
        )

    def _environment(self, selections: Iterable[Selection]) -> dict[str, Any]:
        return describe(self.device, {rung.implementation for selection in selections for rung in selection.rungs})

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "environment": self._environment(result.selection for result in self.results),
            "passed": self.passed,
            "comparisons": self.comparisons,
            "differing": self.differing,
            "made": self.made,
            "seconds": round(self.seconds, 3),
            "faults": list(self.faults),
            "controls": [asdict(control) for control in self.controls],
            "problems": [_result_json(result) for result in self.results],
            "skipped": [{"problem": _problem_json(s.problem), "reason": str(s.error)} for s in self.skipped],
        }


def now() -> str:
    """The time a report is made, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _smallest(checks: Sequence[Check]) -> Mismatch | None:
    found = [check.smallest for check in checks if check.smallest]
    return min(found, key=lambda mismatch: mismatch.order, default=None)


def _result_json(result: ProblemResult) -> dict[str, Any]:
    return {
        **_problem_json(result.problem),
        "implementations": list(result.selection.implementations),
        "numerics": result.selection.numerics,
        "level": result.level.label,
        "passed": result.passed,
        "comparisons": result.comparisons,
        "differing": result.differing,
        "cuda_graph": result.cuda_graph,
        "checks": [_check_json(check) for check in result.checks],
        "classes": [_check_json(check) for check in result.classes],
        "accuracy": [_accuracy_json(accuracy) for accuracy in result.accuracy],
        "refuted": [{**rung.as_json(), "max_m": rung.max_m, "found": str(check)} for rung, check in result.refuted],
        "stock": _check_json(result.stock) if result.stock else None,
        "faults": list(result.faults),
        "seconds": round(result.seconds, 3),
    }


def _problem_json(problem: Problem) -> dict[str, Any]:
    return {"op": problem.op, "dtype": problem.dtype, "dims": dict(problem.dims)}


def _accuracy_json(accuracy: Accuracy) -> dict[str, Any]:
    """JSON has no infinity: a number that is not finite is null."""
    error, stock, ratio = (
        value if value is not None and math.isfinite(value) else None
        for value in (accuracy.error, accuracy.stock, accuracy.ratio)
    )
    return {**asdict(accuracy), "error": error, "stock": stock, "ratio": ratio, "passed": accuracy.passed}


def _check_json(check: Check) -> dict[str, Any]:
    """JSON has no NaN: a mismatch's values go as text, beside their bits."""
    content = asdict(check)
    if content["smallest"]:
        content["smallest"]["value"] = repr(content["smallest"]["value"])
        content["smallest"]["expected"] = repr(content["smallest"]["expected"])
    return content

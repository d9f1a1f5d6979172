"""The rungs of a ladder against one of them, bit by bit, at the same M. Imports torch.

Where an op can give fp32 outputs these are compared too: rounding to 16 bits hides differences. The rows of a rung
are compared with those that the reference rung gives in one large call: that a row does not follow M is what the
reference is checked for first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bidispatch import ops
from bidispatch.ops.schema import Problem
from bidispatch.planning.selection import Selection, rung_ranges
from bidispatch.registry import Rung
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import MOST_ELEMENTS, Sizes, widest_dim
from bidispatch.verify.compare import Tally
from bidispatch.verify.report import Check
from bidispatch.verify.subject import Arguments, Canvas, Subject, limits_for

__all__ = ["check_ladder"]

_LADDER = "rungs of the ladder"
_SEED = 4
_TRIAL = 1  # salt of the poison; the reference's is 0


@dataclass(eq=False)
class _Member:
    """Rungs that run one kernel, bound for every M once per output dtype."""

    rungs: tuple[Rung, ...]
    name: str
    own_rows: frozenset[int]
    """Both sides of where these rungs begin and end."""
    subjects: dict[Problem, Subject]
    edges: frozenset[int]
    """The largest M of each choice it makes inside."""

    @property
    def chooses_inside(self) -> bool:
        return self.rungs[0].implementation.chooses_inside


def check_ladder(selection: Selection, sizes: Sizes) -> Iterator[tuple[tuple[Rung, ...], Check]]:
    """A check for each kernel of the ladder, with the rungs that run it.

    Every rung is bound for any M and compared at both sides of every edge of the ladder, but for calls of others'
    edges that would be too large. One that chooses among algorithms inside is compared at every M up to
    `sizes.every_m`, and at both sides of each choice it names above. A rung alone is compared with itself if it
    chooses inside, else nothing is.
    """
    if len({rung.key for rung in selection.rungs}) == 1 and not selection.rungs[0].implementation.chooses_inside:
        yield (), Check(_LADDER, note="one rung")
        return
    members = _bind(selection, sizes)
    rows = {member.name: _rows_of(member, members, selection.problem, sizes) for member in members}
    calls = _Calls(members[0].subjects[selection.problem], max(max(every) for every in rows.values()))
    # The reference: the first that gives fp32 and makes no choices, if its own rows hold; else the next.
    waiting = sorted(members, key=lambda each: (-len(each.subjects), each.chooses_inside))
    holds = False
    while waiting and not holds:
        first = waiting.pop(0)
        expected = {problem: calls.expected(subject) for problem, subject in first.subjects.items()}
        check = _compare(first, expected, "itself at the largest M", rows[first.name], calls)
        holds = check.passed
        yield first.rungs, check
    for member in members:
        if member in waiting:
            yield member.rungs, _compare(member, expected, first.name, rows[member.name], calls)


def _bind(selection: Selection, sizes: Sizes) -> list[_Member]:
    """The ladder's kernels by rising M, each bound for the problem and for the one with fp32 outputs."""
    device = torch.device(selection.device.torch_device)
    limits = _limits(selection, sizes)
    groups: dict[str, list[int]] = {}
    for index, rung in enumerate(selection.rungs):
        groups.setdefault(rung.key, []).append(index)
    ranges = rung_ranges([rung.max_m for rung in selection.rungs])
    members = []
    for indices in groups.values():
        rungs = tuple(selection.rungs[index] for index in indices)
        subjects, edges = {}, set()
        for problem in _problems(selection, rungs[0]):
            bound = bind(problem, selection.device, (replace(rungs[0], max_m=None),), limits)
            subjects[problem] = Subject(problem, device, bound.launch)
            edges |= set(bound.edges[0])
        ends = {end for index in indices for end in (ranges[index][0] - 1, ranges[index][1]) if end}
        numbers = ", ".join(str(index + 1) for index in indices)
        spans = ", ".join(_span(*ranges[index]) for index in indices)
        name = f"rung {numbers}: {rungs[0].implementation.name} {spans}"
        members.append(_Member(rungs, name, frozenset(_around(ends)), subjects, frozenset(edges)))
    return members


def _problems(selection: Selection, rung: Rung) -> list[Problem]:
    """The problem, and the same with fp32 outputs where it has that choice and the rung can give them."""
    problem = selection.problem
    if "out_dtype" not in problem.dims:
        return [problem]
    wide = ops.get(problem.op).problem(problem.dtype, {**problem.dims, "out_dtype": "float32"})
    if wide == problem or rung.implementation.unmet(selection.device, wide):
        return [problem]
    return [problem, wide]


def _limits(selection: Selection, sizes: Sizes) -> Limits:
    """Room for every row that may be compared."""
    tokens = max([1, *sizes.graph_rows, *(rung.max_m + 1 for rung in selection.rungs if rung.max_m)])
    if any(rung.implementation.chooses_inside for rung in selection.rungs):
        tokens = max(tokens, sizes.every_m, _most_rows(selection.problem, sizes))
    if not _has_sequences(selection.problem):
        return Limits(tokens)
    generator = Subject(selection.problem, torch.device(selection.device.torch_device), lambda *everything: None)
    return limits_for(selection.problem, [generator.inputs(tokens, seed=_SEED)])


def _most_rows(problem: Problem, sizes: Sizes) -> int:
    return min(sizes.max_tokens, MOST_ELEMENTS // widest_dim(problem))


def _has_sequences(problem: Problem) -> bool:
    return any("seqs" in argument.shape for argument in ops.get(problem.op).arguments)


def _rows_of(member: _Member, members: Sequence[_Member], problem: Problem, sizes: Sizes) -> list[int]:
    """The M at which a member is compared."""
    width = widest_dim(problem)
    edges = {1, *sizes.graph_rows}.union(*(other.own_rows for other in members))
    rows = {m for m in edges if m * width <= MOST_ELEMENTS} | member.own_rows
    if member.chooses_inside:
        most = _most_rows(problem, sizes)
        inside = {m for m in _around(member.edges) if sizes.every_m < m <= most}
        rows |= inside | set(range(1, sizes.every_m + 1))
    return sorted(rows)


def _around(edges: set[int] | frozenset[int]) -> set[int]:
    return {m for edge in edges for m in (edge - 1, edge, edge + 1) if m > 0}


def _span(first: int, last: int | None) -> str:
    if last is None:
        return f"M >= {first}" if first > 1 else "every M"
    return f"{first} <= M <= {last}"


class _Calls:
    """Calls of any number of rows: the first rows of one batch. Sequences have no first rows, and are drawn anew."""

    def __init__(self, subject: Subject, most: int) -> None:
        self._generator, self._most = subject, most
        self._whole = None if _has_sequences(subject.problem) else subject.inputs(most, seed=_SEED)
        self._axes = subject.axes_of(subject.row_size, subject.op.arguments)

    def of(self, m: int, subject: Subject) -> Arguments:
        """The arguments of a call of m rows; what has the output's dtype is widened as that of the subject is."""
        if self._whole is None:
            return self._generator.inputs(m, seed=_SEED)
        return [
            None
            if tensor is None
            else (tensor if axis is None else tensor.narrow(axis, 0, m).contiguous()).to(spec.dtype)
            for tensor, axis, spec in zip(self._whole, self._axes, subject.argument_specs, strict=True)
        ]

    def expected(self, reference: Subject) -> _Expected:
        """What a kernel gives for these calls."""
        if self._whole is None:
            return _Expected(reference, self, ())
        arguments = self.of(self._most, reference)
        canvas = Canvas(reference, arguments, salt=0)
        reference.call(arguments, canvas.outputs)
        return _Expected(reference, self, canvas.outputs)


@dataclass
class _Expected:
    """The reference's rows: cut out of one large call, or of a call of the same size where rows cannot be cut out."""

    subject: Subject
    calls: _Calls
    whole: tuple[torch.Tensor, ...]

    def of(self, m: int, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """What the first m rows must be, run-time axes flattened."""
        if not self.whole:
            return self.subject.alone(arguments)
        specs, axes = self.subject.output_specs, self.subject.output_row_axes
        return tuple(
            out.narrow(axis, 0, m).flatten(0, spec.head - 1)
            for out, axis, spec in zip(self.whole, axes, specs, strict=True)
        )


def _compare(
    member: _Member, expected: Mapping[Problem, _Expected], against: str, rows: Sequence[int], calls: _Calls
) -> Check:
    """Compare every row of these calls, in every output dtype that both can give."""
    tally = Tally(member.name, next(iter(member.subjects.values())).output_names)
    shared = [problem for problem in member.subjects if problem in expected]
    for problem in shared:
        subject, wanted = member.subjects[problem], expected[problem]

        def call(
            m: int, subject: Subject = subject, wanted: _Expected = wanted
        ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            arguments = calls.of(m, subject)
            canvas = Canvas(subject, arguments, _TRIAL)
            subject.call(arguments, canvas.outputs)
            return canvas.rows(), wanted.of(m, arguments)

        for m in reversed(rows):  # the largest first, so that every later output fits in memory that was freed
            tally.count(m, *call(m))
        tally.settle(call)
    dtypes = " and ".join(str(problem.dims.get("out_dtype", problem.dtype)) for problem in shared)
    return tally.check(note=f"against {against}, {dtypes} outputs")

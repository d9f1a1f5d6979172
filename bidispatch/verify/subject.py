"""What is under test: a kernel, and how it is run on poisoned outputs and compared. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bidispatch import ops
from bidispatch.ops.schema import Argument, Problem
from bidispatch.runtime.arguments import check_tensors, output_shape, tensor_specs
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import Kernel, Limits
from bidispatch.verify.compare import Tally, poison
from bidispatch.verify.report import Check

__all__ = ["Arguments", "Canvas", "Subject", "Trial", "limits_for", "measure"]

Arguments = list[torch.Tensor | None]
"""An op's arguments in the catalogue's order."""

_ALONE, _TRIAL = 0, 1  # salts of the poison


@dataclass(frozen=True, slots=True)
class Trial:
    """One call, and what its rows must be."""

    size: int
    """M, for messages."""
    arguments: Arguments
    expected: tuple[torch.Tensor, ...]
    """Per output, the rows alone: [rows compared, ...]."""
    rows: torch.Tensor | None = None
    """Which rows of the outputs are compared; all when None."""
    untouched: torch.Tensor | None = None
    """Rows of the outputs that must keep the bits they had."""
    margin: int = 0
    """Rows before and after the outputs in the same allocation, which must keep their bits."""
    gap: int = 0
    """Elements before and after each row of the outputs, likewise."""


class Canvas:
    """Poisoned outputs for one call, with room around them when asked for."""

    def __init__(self, subject: Subject, arguments: Arguments, salt: int, margin: int = 0, gap: int = 0) -> None:
        self._salt = salt
        self._row_axes = subject.output_row_axes
        self._heads = [spec.head for spec in subject.output_specs]
        self._whole = []
        self._windows: list[tuple[slice, ...]] = []
        for shape, dtype, row_axis in subject.output_shapes(arguments):
            room = [0] * len(shape)
            room[row_axis] = margin
            if row_axis != len(shape) - 1:
                room[-1] += gap
            whole = torch.empty(
                [size + 2 * extra for size, extra in zip(shape, room, strict=True)], dtype=dtype, device=subject.device
            )
            self._whole.append(whole)
            self._windows.append(tuple(slice(extra, extra + size) for size, extra in zip(shape, room, strict=True)))
        self.outputs = tuple(whole[window] for whole, window in zip(self._whole, self._windows, strict=True))
        self.repaint()

    def repaint(self) -> None:
        """Poison everything again."""
        for whole in self._whole:
            poison(whole, self._salt)

    def rows(self, index: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Each output with its run-time axes flattened into one, and of those the rows asked for."""
        flat = (out.flatten(0, head - 1) for out, head in zip(self.outputs, self._heads, strict=True))
        return tuple(rows if index is None else rows[index] for rows in flat)

    def poison_rows(self, count: int) -> tuple[torch.Tensor, ...]:
        """As many rows of each output as they were before the call."""
        blank = tuple(torch.empty_like(rows[:1], memory_format=torch.contiguous_format) for rows in self.rows())
        for rows in blank:
            poison(rows, self._salt)
        return tuple(rows.expand(count, *rows.shape[1:]) for rows in blank)

    def margins(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Everything around the outputs, as it is and as it was: each allocation as one row.

        The outputs themselves are painted over.
        """
        actual, before = [], []
        for whole, window in zip(self._whole, self._windows, strict=True):
            clean = torch.empty_like(whole)
            poison(clean, self._salt)
            whole[window] = clean[window]
            actual.append(whole.view(1, -1))
            before.append(clean.view(1, -1))
        return tuple(actual), tuple(before)


class Subject:
    """A kernel of an op, called as a `Kernel` is, on one device."""

    def __init__(self, problem: Problem, device: torch.device, launch: Kernel) -> None:
        self.problem, self.device, self.launch = problem, device, launch
        self.op = ops.get(problem.op)
        self.scalars = tuple(scalar.default_for(problem) for scalar in self.op.scalars)
        self.argument_specs = tensor_specs(self.op.arguments, problem)
        self.output_specs = tensor_specs(self.op.outputs, problem)
        self.output_names = tuple(spec.name for spec in self.output_specs)
        self.row_size = str(self.op.arguments[0].shape[self.op.row_axis])
        """The run-time size that counts rows: `m` or `tokens`."""
        self.output_row_axes = tuple(output.shape.index(self.row_size) for output in self.op.outputs)

    def inputs(self, rows: int, *, distribution: str = "normal", seed: int = 0) -> Arguments:
        """Random arguments of the op's own generator."""
        generate: Callable[..., Arguments] = load_attribute(self.op.inputs)
        return generate(self.problem, rows, device=self.device, distribution=distribution, seed=seed)

    def output_shapes(self, arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype, int]]:
        """Shape, dtype and row axis of each output. Raises `ArgumentError` for arguments that do not fit."""
        sizes = check_tensors(self.problem, self.argument_specs, arguments, self.device)
        return [
            (output_shape(spec, sizes), spec.dtype, axis)
            for spec, axis in zip(self.output_specs, self.output_row_axes, strict=True)
        ]

    def call(self, arguments: Arguments, outputs: Sequence[torch.Tensor]) -> None:
        """Launch on outputs that are there."""
        self.launch(*arguments, *self.scalars, *outputs)

    def alone(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """Run a call that others are compared with; return the rows of each output."""
        canvas = Canvas(self, arguments, _ALONE)
        self.call(arguments, canvas.outputs)
        return canvas.rows()

    def canvas(self, trial: Trial) -> Canvas:
        """Poisoned outputs for a trial."""
        return Canvas(self, trial.arguments, _TRIAL, trial.margin, trial.gap)

    def axes_of(self, size: str, arguments: Sequence[Argument]) -> tuple[int | None, ...]:
        """Which axis of each argument has a run-time size; None where none has."""
        return tuple(a.shape.index(size) if size in a.shape else None for a in arguments)


def tally_trial(tally: Tally, canvas: Canvas, trial: Trial) -> None:
    """Compare what a trial left on its canvas. Paints over it where the trial has margins."""
    tally.add(trial.size, canvas.rows(trial.rows), trial.expected, trial.rows)
    if trial.untouched is not None and len(trial.untouched):
        tally.add(trial.size, canvas.rows(trial.untouched), canvas.poison_rows(len(trial.untouched)), trial.untouched)
    if trial.margin or trial.gap:
        tally.add(trial.size, *canvas.margins())


def measure(name: str, subject: Subject, trials: Iterable[Trial]) -> Check:
    """Run every trial on poisoned outputs and compare."""
    tally = Tally(name, subject.output_names)
    for trial in trials:
        canvas = subject.canvas(trial)
        subject.call(trial.arguments, canvas.outputs)
        tally_trial(tally, canvas, trial)
    return tally.check()


def limits_for(problem: Problem, calls: Iterable[Arguments]) -> Limits:
    """The smallest limits that these calls fit in."""
    op = ops.get(problem.op)
    names = [argument.name for argument in op.arguments]
    tokens = seqs = seq_len = 1
    for arguments in calls:
        by_name: dict[str, Any] = dict(zip(names, arguments, strict=True))
        tokens = max(tokens, by_name[names[0]].shape[op.row_axis])
        if "seq_lens" in by_name:
            seqs = max(seqs, len(by_name["seq_lens"]))
            seq_len = max(seq_len, int(by_name["seq_lens"].max()))
    return Limits(tokens, seqs, seq_len if "seq_lens" in names else 0, tokens)

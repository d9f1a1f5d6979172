"""One class, one order of additions, whatever N: merged weights against separate ones. Imports torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bidispatch import ops
from bidispatch.errors import SelectionError
from bidispatch.ops.schema import Argument, Problem
from bidispatch.planning.selection import Selection
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.compare import Tally
from bidispatch.verify.report import Check
from bidispatch.verify.subject import Subject

__all__ = ["can_be_merged", "check_merged"]

_MERGED = "merged and separate weights"
_COLUMNS = 8
"""What the parts of a weight are cut to multiples of, where its scales ask for no more."""


def can_be_merged(problem: Problem) -> bool:
    """Whether an op is a product with a weight of n rows, which hosts merge and shard."""
    return any(
        argument.name == "weight" and argument.shape[0] == "n" and len(argument.shape) == 2
        for argument in ops.get(problem.op).arguments
    )


def check_merged(selection: Selection, sizes: Sizes, select: Callable[[Problem], Selection]) -> Check:
    """A product with two weights merged into one against the product with each: hosts merge qkv and shard by N.

    `select` is the plan's. A part in another class was never promised to be equal, and is not compared.
    """
    problem = selection.problem
    n = problem.size("n")
    declared = ops.get(problem.op).arguments
    grain = max(_COLUMNS, *(_divisor(axis) for argument in declared for axis in argument.shape))
    cut = max(grain if grain > _COLUMNS else 1, n // 3 // grain * grain)
    if cut >= n:
        return Check(_MERGED, note=f"n={n} has no parts")
    device = torch.device(selection.device.torch_device)
    limits = Limits(max(sizes.graph_rows))
    whole = Subject(problem, device, bind(problem, selection.device, selection.rungs, limits).launch)
    arguments = whole.inputs(max(sizes.graph_rows), seed=5)
    tally = Tally(_MERGED, whole.output_names)
    notes = []
    for first, last in ((0, cut), (cut, n)):
        part = ops.get(problem.op).problem(problem.dtype, {**problem.dims, "n": last - first})
        try:
            chosen = select(part)
        except SelectionError:
            notes.append(f"nothing serves n={last - first}")
            continue
        if chosen.numerics != selection.numerics:
            notes.append(f"n={last - first} is in class {chosen.numerics}")
            continue
        separate = Subject(part, device, bind(part, selection.device, chosen.rungs, limits).launch)
        for m in sizes.graph_rows:
            some = [_cut(tensor, entry, "m", 0, m) for tensor, entry in zip(arguments, declared, strict=True)]
            parts = [_cut(tensor, entry, "n", first, last) for tensor, entry in zip(some, declared, strict=True)]
            merged = whole.alone(some)[0][:, first:last]
            tally.add(m, separate.alone(parts), (merged,))
    return tally.check(note="; ".join(notes))


def _divisor(axis: str | int) -> int:
    """128 of an axis `"n/128"`, else 1."""
    size, _, divisor = str(axis).partition("/")
    return int(divisor) if size == "n" and divisor else 1


def _cut(tensor: torch.Tensor | None, entry: Argument, size: str, first: int, last: int) -> torch.Tensor | None:
    """The part of an argument from `first` to `last` of a size, where an axis has that size or groups of it, contiguous
    as what a host loads is; the argument itself where none has.
    """
    for axis, extent in enumerate(entry.shape):
        name, _, divisor = str(extent).partition("/")
        if tensor is not None and name == size:
            group = int(divisor or 1)
            return tensor.narrow(axis, first // group, -(-last // group) - first // group).contiguous()
    return tensor

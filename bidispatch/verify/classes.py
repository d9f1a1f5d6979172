"""One class, one order of additions, whatever N: merged weights against separate ones. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bidispatch import ops
from bidispatch.errors import SelectionError
from bidispatch.ops.schema import Problem
from bidispatch.planning.selection import Selection
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.compare import Tally
from bidispatch.verify.report import Check
from bidispatch.verify.subject import Arguments, Subject

__all__ = ["MERGED_OPS", "check_merged"]

MERGED_OPS = ("gemm", "gemm.int4")
"""Products with a weight that hosts merge and shard by its n rows."""

_MERGED = "merged and separate weights"


def check_merged(selection: Selection, sizes: Sizes, select: Callable[[Problem], Selection]) -> Check:
    """A product with two weights merged into one against that with each: hosts merge qkv and shard by N.

    `select` is the plan's. A part in another class was never promised to be equal, and is not compared.
    """
    problem = selection.problem
    if problem.size("n") < 2:
        return Check(_MERGED, note="n=1 has no parts")
    n = problem.size("n")
    cut = max(1, n // 3 // 8 * 8)
    device = torch.device(selection.device.torch_device)
    limits = Limits(max(sizes.graph_rows))
    whole = Subject(problem, device, bind(problem, selection.device, selection.rungs, limits).launch)
    arguments = whole.inputs(max(sizes.graph_rows), seed=5)
    rows, columns = (whole.axes_of(size, whole.op.arguments) for size in (whole.row_size, "n"))
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
            some = _cut(arguments, rows, 0, m)
            merged = whole.alone(some)[0][:, first:last]
            tally.add(m, separate.alone(_cut(some, columns, first, last)), (merged,))
    return tally.check(note="; ".join(notes))


def _cut(arguments: Arguments, axes: Sequence[int | None], first: int, last: int) -> Arguments:
    """Each tensor from `first` to `last` on its axis; contiguous, as what a host loads is."""
    return [
        tensor if tensor is None or axis is None else tensor[(slice(None),) * axis + (slice(first, last),)].contiguous()
        for tensor, axis in zip(arguments, axes, strict=True)
    ]

"""One class, one order of additions, whatever N: merged weights against separate ones. Imports torch."""

from __future__ import annotations

from collections.abc import Callable

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
from bidispatch.verify.subject import Subject

__all__ = ["check_merged"]

_MERGED = "merged and separate weights"


def check_merged(selection: Selection, sizes: Sizes, select: Callable[[Problem], Selection]) -> Check:
    """A `gemm` with two weights merged into one against the product with each: hosts merge qkv and shard by N.

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
    x, weight, bias = whole.inputs(max(sizes.graph_rows), seed=5)
    tally = Tally(_MERGED, whole.output_names)
    notes = []
    for first, last in ((0, cut), (cut, n)):
        part = ops.get("gemm").problem(problem.dtype, {**problem.dims, "n": last - first})
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
            some = _rows(x, 0, m)
            merged = whole.alone([some, weight, bias])[0][:, first:last]
            tally.add(m, separate.alone([some, _rows(weight, first, last), _rows(bias, first, last)]), (merged,))
    return tally.check(note="; ".join(notes))


def _rows(tensor: torch.Tensor | None, first: int, last: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[first:last]

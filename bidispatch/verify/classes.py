"""One class, one order of additions: rungs of a ladder against each other, merged weights against separate ones.

Where an op can give fp32 outputs, these are compared: rounding to 16 bits hides differences. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
from bidispatch.verify.subject import Subject, limits_for

__all__ = ["check_ladder", "check_merged"]

_LADDER, _MERGED = "rungs of the ladder", "merged and separate weights"


def check_ladder(selection: Selection, sizes: Sizes) -> Check:
    """Bind every rung for every M and compare them at each edge of the ladder, one below and one above."""
    if len(selection.rungs) == 1:
        return Check(_LADDER, note="one rung")
    problem = _widest(selection)
    device = torch.device(selection.device.torch_device)
    edges = [top + step for rung in selection.rungs if (top := rung.max_m) for step in (-1, 0, 1)]
    rows = [m for m in sorted({1, *edges, *sizes.graph_rows}) if m]
    generator = Subject(problem, device, lambda *everything: None)
    calls = [generator.inputs(m, seed=4) for m in rows]
    limits = limits_for(problem, calls)
    first, *others = (_bind(problem, selection, index, limits) for index in range(len(selection.rungs)))
    tally = Tally(_LADDER, first.output_names)
    for m, call in zip(rows, calls, strict=True):
        expected = first.alone(call)
        for other in others:
            tally.add(m, other.alone(call), expected)
    return tally.check(note=f"{len(selection.rungs)} rungs, {problem.dims.get('out_dtype', problem.dtype)} outputs")


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


def _widest(selection: Selection) -> Problem:
    """The problem with fp32 outputs, where it has a choice and every rung can give them."""
    problem = selection.problem
    if "out_dtype" not in problem.dims:
        return problem
    wide = ops.get(problem.op).problem(problem.dtype, {**problem.dims, "out_dtype": "float32"})
    refused = any(rung.implementation.unmet(selection.device, wide) for rung in selection.rungs)
    return problem if refused else wide


def _bind(problem: Problem, selection: Selection, index: int, limits: Limits) -> Subject:
    """One rung of a ladder, for every M."""
    rung = replace(selection.rungs[index], max_m=None)
    bound = bind(problem, selection.device, (rung,), limits)
    return Subject(problem, torch.device(selection.device.torch_device), bound.launch)

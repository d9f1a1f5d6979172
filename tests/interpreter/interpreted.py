"""What the interpreter's tests share: run a kernel on the CPU into poisoned outputs, and compare bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Registry
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import BindContext, Kernel, Limits
from bidispatch.runtime.scratch import Scratch
from bidispatch_backends.triton import register

REGISTRY = Registry()
register(REGISTRY)
SM90 = Device(ARCHS["sm90"], "sm90", predicted=True)
CPU = Device(ARCHS["cpu"], "cpu")
TOLERANCE = {"float32": 2e-6, "float16": 1e-3}
DTYPES = (
    "float32",
    "float16",
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skip(reason="Triton's interpreter multiplies bfloat16 as raw bits and truncates its stores"),
    ),
)
_BITS = {torch.float32: torch.int32, torch.int32: torch.int32, torch.float16: torch.int16}
_BITS |= {torch.float8_e4m3fn: torch.uint8}


def implementation(problem: Problem, name: str = "") -> Implementation:
    """The Triton kernel of that name, by default the one named after the op, or the first that takes the problem."""
    found = {known.name: known for known in REGISTRY.for_op(problem.op)}
    if name or f"triton.{problem.op}" in found:
        return found[name or f"triton.{problem.op}"]
    taking = (known for known in found.values() if not known.unmet(SM90, problem))
    return next(taking) if len(found) > 1 else next(iter(found.values()))


def tiles(problem: Problem, params: Any = None, name: str = "") -> list[Any]:
    """The tiles of the default ladder on sm90, by rising M."""
    found = implementation(problem, name)
    return [tile for _, tile in found.tiles(SM90, problem, params or found.params())]


def bind(
    problem: Problem,
    *,
    params: Any = None,
    tile: Any = None,
    limits: Limits | None = None,
    name: str = "",
    scratch: Scratch | None = None,
) -> Kernel:
    """Bind on the CPU; by default with default params, the smallest tile and room for a test's batch."""
    found = implementation(problem, name)
    params = params or found.params()
    tile = tile or tiles(problem, params, name)[0]
    context = BindContext(CPU, problem, params, tile, limits or Limits(1024, 16, 2048), scratch)
    return load_attribute(found.load)(context)  # type: ignore[no-any-return]


def scalars(problem: Problem) -> tuple[float, ...]:
    return tuple(scalar.default_for(problem) for scalar in ops.get(problem.op).scalars)


def draw_inputs(problem: Problem, rows: int, **options: Any) -> list[Any]:
    return load_attribute(ops.get(problem.op).inputs)(problem, rows, **options)  # type: ignore[no-any-return]


def reference(problem: Problem, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    return load_attribute(ops.get(problem.op).reference)(problem, *arguments, *scalars(problem))  # type: ignore[no-any-return]


def poisoned_outputs(problem: Problem, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """Outputs of NaN, or of an id that nobody has, so that an element nobody writes is seen."""
    op = ops.get(problem.op)
    outputs = []
    for spec, like in zip(op.outputs, reference(problem, arguments), strict=True):
        dtype = problem.dtype if spec.dtype == "dtype" else str(problem.dims.get(spec.dtype, spec.dtype))
        torch_dtype = getattr(torch, dtype)
        blank = float("nan") if torch_dtype.is_floating_point else -7
        outputs.append(torch.full(like.shape, blank, dtype=torch_dtype))
    return outputs


def run(problem: Problem, arguments: Sequence[Any], kernel: Kernel | None = None) -> list[torch.Tensor]:
    """Launch into poisoned outputs."""
    outputs = poisoned_outputs(problem, arguments)
    (kernel or bind(problem))(*arguments, *scalars(problem), *outputs)
    return outputs


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(_BITS[left.dtype]), right.contiguous().view(_BITS[right.dtype]))


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def check_rows_without_positions(
    attend: Callable[[Sequence[Any]], torch.Tensor], problem: Problem, arguments: Sequence[Any], empty: Sequence[int]
) -> None:
    """Rows of these sequences are 0 once they have no positions, as a server may pad a batch, and no other row moves.

    Both calls are of one kernel, so that its workspace holds what the first one left.
    """
    names = [argument.name for argument in ops.get(problem.op).arguments]
    lengths, starts = (arguments[names.index(name)] for name in ("seq_lens", "query_start_loc"))
    wanted = attend(arguments)
    lengths[empty] = 0
    result = attend(arguments)
    gone = torch.zeros(len(result), dtype=torch.bool)
    for seq in empty:
        gone[starts[seq] : starts[seq + 1]] = True
    assert gone.any()
    assert not result[gone].any()
    assert same_bits(result[~gone], wanted[~gone])


def has_rows(problem: Problem) -> list[bool]:
    """Which arguments have rows; weights do not."""
    return ["m" in argument.shape for argument in ops.get(problem.op).arguments]


def rows_of(problem: Problem, arguments: list[Any], rows: Any) -> list[Any]:
    """The same arguments with some of the rows."""
    return [
        a[rows] if per_row and a is not None else a for a, per_row in zip(arguments, has_rows(problem), strict=True)
    ]


def rows_that_differ(problem: Problem, run_rows: Callable[[list[Any]], list[torch.Tensor]], rows: int = 5) -> int:
    """How many rows have other bits alone than among NaN, infinity and the other rows."""
    arguments = draw_inputs(problem, rows)
    together = run_rows(arguments)
    dirty = [argument if argument is None else argument.clone() for argument in arguments]
    for argument, per_row in zip(dirty, has_rows(problem), strict=True):
        if per_row and argument is not None and argument.is_floating_point():
            argument[0], argument[2] = float("nan"), float("inf")
    beside = run_rows(dirty)
    differ = 0
    for row in range(rows):
        alone = run_rows(rows_of(problem, arguments, slice(row, row + 1)))
        same = all(same_bits(a[0], t[row]) for a, t in zip(alone, together, strict=True))
        if row not in (0, 2):
            same = same and all(same_bits(a[0], b[row]) for a, b in zip(alone, beside, strict=True))
        differ += not same
    return differ

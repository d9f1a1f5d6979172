"""Sums over the last axis: `mean` and `sum`."""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.launch import ArgumentType, Launch, ceil_div, pointer
from bidispatch_backends.triton.params import RowParams, RowTile, row_width
from bidispatch_backends.triton.rows import row_block, row_launch, tree_sum

__all__ = ["bind_mean", "bind_sum", "launches", "mean_kernel", "sum_kernel"]


@triton.jit
def _row_sums(x_rows, live, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The sum of each row at pointers `x_rows` [ROWS, 1], where `live`: [ROWS]."""
    lanes = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_rows + columns, mask=live & (columns < N), other=0.0, eviction_policy="evict_first")
        lanes += x.to(tl.float32)
    return tree_sum(lanes)


@triton.jit(do_not_specialize=["rows"])
def mean_kernel(x_ptr, out_ptr, stride_x, rows, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out[row] = mean(x[row]), `ROWS` rows a program."""
    row, live = row_block(ROWS, rows)
    mean = _row_sums(x_ptr + row * stride_x, live, N, BLOCK, ROWS) / N
    tl.store(out_ptr + row, mean[:, None].to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(x_ptr, out_ptr, stride_x, rows, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out[row] = sum(x[row]), `ROWS` rows a program, in the order of the mean's."""
    row, live = row_block(ROWS, rows)
    total = _row_sums(x_ptr + row * stride_x, live, N, BLOCK, ROWS)
    tl.store(out_ptr + row, total[:, None].to(out_ptr.dtype.element_ty), mask=live)


def launches(problem: Problem, params: RowParams, tile: RowTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of a reduction."""
    n = problem.size("n")
    arguments: dict[str, ArgumentType] = {
        "x_ptr": pointer(problem.dtype),
        "out_ptr": pointer(str(problem["out_dtype"])),
        "stride_x": n,
        "rows": "i32",
    }
    shape = {"N": n, "BLOCK": row_width(n, params.block), "ROWS": tile.rows}
    kernel = mean_kernel if problem.op == "mean" else sum_kernel
    return (row_launch(kernel, arguments, arch, tile.num_warps, **shape),)


def bind_mean(context: BindContext) -> Kernel:
    """`mean` or, by the op of the problem, `sum`: x [m, n], out [m]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    per_program = context.tile.rows

    def reduce(x: torch.Tensor, out: torch.Tensor) -> None:
        rows = x.shape[0]
        launch((ceil_div(rows, per_program),), x, out, x.stride(0), rows)

    return reduce


bind_sum = bind_mean

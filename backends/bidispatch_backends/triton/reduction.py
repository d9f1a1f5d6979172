"""Reductions over the last axis: `softmax`, `log_softmax`, `mean`, `sum`, one program a row."""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.launch import ArgumentType, Launch, pointer
from bidispatch_backends.triton.params import RowParams, RowTile
from bidispatch_backends.triton.rows import pairwise_sum, row_launch

__all__ = ["bind_log_softmax", "bind_mean", "bind_softmax", "bind_sum", "launches", "softmax_kernel", "sum_kernel"]


@triton.jit
def softmax_kernel(
    x_ptr,
    out_ptr,
    stride_x,
    stride_out,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG: tl.constexpr,
):
    """out[row] = softmax(x[row]), or its logarithm. `out` may be `x`. A maximum is exact in any order."""
    index = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + index * stride_x
    out_row = out_ptr + index * stride_out
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, x)
    peak = tl.max(highest, axis=0)
    weights = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
        weights += tl.exp(x - peak)
    total = pairwise_sum(weights)
    if LOG:
        total = tl.log(total)
    tl.debug_barrier()  # every thread has read the row before one of them overwrites it
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
        value = x - peak - total if LOG else tl.exp(x - peak) / total
        tl.store(out_row + columns, value.to(out_ptr.dtype.element_ty), mask=columns < N)


@triton.jit
def sum_kernel(x_ptr, out_ptr, stride_x, N: tl.constexpr, BLOCK: tl.constexpr, MEAN: tl.constexpr):
    """out[row] = sum(x[row]), or its mean."""
    index = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        lanes += tl.load(x_ptr + index * stride_x + columns, mask=columns < N, other=0.0).to(tl.float32)
    total = pairwise_sum(lanes)
    if MEAN:
        total = total / N
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty))


def launches(problem: Problem, params: RowParams, tile: RowTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of a reduction."""
    n = problem.size("n")
    arguments: dict[str, ArgumentType] = {
        "x_ptr": pointer(problem.dtype),
        "out_ptr": pointer(str(problem["out_dtype"])),
        "stride_x": n,
    }
    if problem.op in ("mean", "sum"):
        return (row_launch(sum_kernel, arguments, problem, params, tile, arch, MEAN=problem.op == "mean"),)
    arguments["stride_out"] = n
    log = problem.op == "log_softmax"
    return (row_launch(softmax_kernel, arguments, problem, params, tile, arch, LOG=log),)


def bind_softmax(context: BindContext) -> Kernel:
    """`softmax` or, by the problem's op, `log_softmax`: x and out [m, n]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)

    def softmax(x: torch.Tensor, out: torch.Tensor) -> None:
        launch((x.shape[0],), x, out, x.stride(0), out.stride(0))

    return softmax


bind_log_softmax = bind_softmax


def bind_mean(context: BindContext) -> Kernel:
    """`mean` or, by the problem's op, `sum`: x [m, n], out [m]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)

    def row_sum(x: torch.Tensor, out: torch.Tensor) -> None:
        launch((x.shape[0],), x, out, x.stride(0))

    return row_sum


bind_sum = bind_mean

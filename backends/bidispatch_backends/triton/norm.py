"""Root-mean-square norms: `rms_norm` and `fused_add_rms_norm`, one program a row."""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.launch import ArgumentType, Launch, pointer
from bidispatch_backends.triton.params import RowParams, RowTile
from bidispatch_backends.triton.rows import pairwise_sum, row_launch

__all__ = ["bind_fused_add_rms_norm", "bind_rms_norm", "fused_add_rms_norm_kernel", "launches", "rms_norm_kernel"]


@triton.jit
def _inverse_rms(squares, eps, N: tl.constexpr):
    """1 / sqrt(mean + eps) from each lane's sum of squares."""
    return tl.rsqrt(pairwise_sum(squares) / N + eps)


@triton.jit
def _scale_row(row_ptr, weight_ptr, out_ptr, scale, N: tl.constexpr, BLOCK: tl.constexpr, GEMMA: tl.constexpr):
    """out = row · scale · weight, rounded once."""
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        row = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if GEMMA:
            weight += 1.0
        tl.store(out_ptr + columns, (row * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    stride_x,
    stride_out,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    GEMMA: tl.constexpr,
):
    """out[row] = x[row] / rms(x[row]) · weight. `out` may be `x`."""
    index = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + index * stride_x
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + columns, mask=columns < N, other=0.0).to(tl.float32)
        squares = tl.fma(x, x, squares)
    scale = _inverse_rms(squares, eps, N)
    tl.debug_barrier()  # every thread has read the row before one of them overwrites it
    _scale_row(x_row, weight_ptr, out_ptr + index * stride_out, scale, N, BLOCK, GEMMA)


@triton.jit
def fused_add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    stride_x,
    stride_residual,
    stride_out,
    stride_residual_out,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    GEMMA: tl.constexpr,
):
    """residual_out = x + residual, rounded; out = rms_norm(residual_out). Outputs may be inputs."""
    index = tl.program_id(0).to(tl.int64)
    residual_out_row = residual_out_ptr + index * stride_residual_out
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        x = tl.load(x_ptr + index * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + index * stride_residual + columns, mask=inside, other=0.0).to(tl.float32)
        added = (x + residual).to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_row + columns, added, mask=inside)
        rounded = added.to(tl.float32)
        squares = tl.fma(rounded, rounded, squares)
    scale = _inverse_rms(squares, eps, N)
    tl.debug_barrier()  # every thread's part of residual_out is written before another reads it
    _scale_row(residual_out_row, weight_ptr, out_ptr + index * stride_out, scale, N, BLOCK, GEMMA)


def launches(problem: Problem, params: RowParams, tile: RowTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of either norm."""
    kernel: Any = rms_norm_kernel
    tensors: tuple[str, ...] = ("x", "weight", "out")
    if problem.op == "fused_add_rms_norm":
        kernel, tensors = fused_add_rms_norm_kernel, ("x", "residual", "weight", "out", "residual_out")
    arguments: dict[str, ArgumentType] = {f"{tensor}_ptr": pointer(problem.dtype) for tensor in tensors}
    arguments |= {f"stride_{tensor}": problem.size("n") for tensor in tensors if tensor != "weight"}
    arguments["eps"] = "fp32"
    return (row_launch(kernel, arguments, problem, params, tile, arch, GEMMA=problem.flag("gemma")),)


def bind_rms_norm(context: BindContext) -> Kernel:
    """x [m, n], weight [n], eps, out [m, n]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        launch((x.shape[0],), x, weight, out, x.stride(0), out.stride(0), eps)

    return rms_norm


def bind_fused_add_rms_norm(context: BindContext) -> Kernel:
    """x and residual [m, n], weight [n], eps, out and residual_out [m, n]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)

    def fused_add_rms_norm(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        residual_out: torch.Tensor,
    ) -> None:
        strides = (x.stride(0), residual.stride(0), out.stride(0), residual_out.stride(0))
        launch((x.shape[0],), x, residual, weight, out, residual_out, *strides, eps)

    return fused_add_rms_norm

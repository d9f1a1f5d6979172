"""Quantisation to fp8 with a scale for a whole row, or with one that is given.

A maximum is exact in any order, so no layout enters a scale; the rest is elementwise.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.quantize import FP8
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.launch import ArgumentType, Launch, ceil_div, options, pointer
from bidispatch_backends.triton.params import ElementTile

__all__ = [
    "bind_quantize_fp8_tensor",
    "bind_quantize_fp8_token",
    "launches",
    "quantize_tensor_kernel",
    "quantize_token_kernel",
]

_LARGEST = tl.constexpr(448.0)
_LEAST = tl.constexpr(1 / (448 * 512))


@triton.jit
def quantize_token_kernel(
    x_ptr, q_ptr, scales_ptr, stride_x, stride_q, stride_scales, N: tl.constexpr, BLOCK: tl.constexpr
):
    """A row of x in fp8 and its scale, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_x
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        x = tl.load(x_row + start + columns, mask=start + columns < N, other=0.0).to(tl.float32)
        # Of two numbers one of which is NaN, hardware gives the other; here NaN counts as 0, which is the same.
        largest = tl.maximum(largest, tl.where(x == x, tl.abs(x), 0.0))
    scale = tl.maximum(tl.div_rn(tl.max(largest, axis=0), _LARGEST), _LEAST)
    tl.store(scales_ptr + row * stride_scales, scale)
    for start in range(0, N, BLOCK):
        inside = start + columns < N
        x = tl.load(x_row + start + columns, mask=inside, other=0.0).to(tl.float32)
        q = tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + scale)
        tl.store(q_ptr + row * stride_q + start + columns, q.to(q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quantize_tensor_kernel(x_ptr, scale_ptr, q_ptr, stride_x, stride_q, N: tl.constexpr, BLOCK: tl.constexpr):
    """x over a scale in fp8, `BLOCK` columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    q = tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + tl.load(scale_ptr))
    # NaN stays, which a minimum would drop.
    q = tl.where(q == q, tl.minimum(tl.maximum(q, -_LARGEST), _LARGEST), q)
    tl.store(q_ptr + row * stride_q + columns, q.to(q_ptr.dtype.element_ty), mask=inside)


def launches(problem: Problem, params: Params, tile: ElementTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `quantize.fp8_token` or `quantize.fp8_tensor`."""
    k = problem.size("k")
    x, q, scale = pointer(problem.dtype), pointer(FP8), pointer("float32")
    arguments: dict[str, ArgumentType] = (
        {"x_ptr": x, "q_ptr": q, "scales_ptr": scale, "stride_x": k, "stride_q": k, "stride_scales": 1}
        if problem.op == "quantize.fp8_token"
        else {"x_ptr": x, "scale_ptr": scale, "q_ptr": q, "stride_x": k, "stride_q": k}
    )
    kernel = quantize_token_kernel if problem.op == "quantize.fp8_token" else quantize_tensor_kernel
    compiler = options(arch, tile.num_warps, num_stages=1, fp_fusion=False)
    return (Launch(kernel, arguments, {"N": k, "BLOCK": tile.block}, compiler),)


def bind_quantize_fp8_token(context: BindContext) -> Kernel:
    """x [m, k], q [m, k], scales [m]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)

    def quantize(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor) -> None:
        launch((x.shape[0],), x, q, scales, x.stride(0), q.stride(0), scales.stride(0))

    return quantize


def bind_quantize_fp8_tensor(context: BindContext) -> Kernel:
    """x [m, k], scale [1], q [m, k]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    blocks = ceil_div(context.problem.size("k"), context.tile.block)

    def quantize(x: torch.Tensor, scale: torch.Tensor, q: torch.Tensor) -> None:
        launch((x.shape[0], blocks), x, scale, q, x.stride(0), q.stride(0))

    return quantize

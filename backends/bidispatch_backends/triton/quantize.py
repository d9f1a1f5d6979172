"""Quantisation to fp8 in groups of 128: by itself, and behind a gated activation or a norm in the same kernel.

What comes before has the arithmetic of its own kernel and is rounded to its dtype here too, so that a fused op gives
the bits of the two. A maximum is exact in any order, so no layout enters a scale.
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
from bidispatch_backends.triton.activation import gated
from bidispatch_backends.triton.launch import ArgumentType, Launch, ceil_div, options, pointer
from bidispatch_backends.triton.norm import normed
from bidispatch_backends.triton.params import ElementTile, RowParams, RowTile, row_width
from bidispatch_backends.triton.rows import row_block, row_launch

__all__ = [
    "bind_fused_add_rms_norm_fp8_group",
    "bind_quantize_fp8_group",
    "bind_rms_norm_fp8_group",
    "bind_silu_and_mul_fp8_group",
    "elementwise_launches",
    "fused_add_rms_norm_fp8_kernel",
    "quantize_kernel",
    "rms_norm_fp8_kernel",
    "row_launches",
    "silu_and_mul_fp8_kernel",
    "store_groups",
]

_GROUP = tl.constexpr(128)
_LARGEST = tl.constexpr(448.0)
_LEAST = tl.constexpr(1e-10)


@triton.jit
def store_groups(
    values,
    q_ptr,
    scales_ptr,
    first_row,
    first_column,
    rows,
    stride_q,
    stride_scales_row,
    stride_scales_group,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """Quantise fp32 values [ROWS, BLOCK] of rows from `first_row` on, below `rows`, and columns from `first_column` on.

    Columns past N may hold anything. The conversion rounds to nearest even, and a quotient is never above 448 by more
    than fp32's rounding: there is nothing to clamp.
    """
    WIDTH: tl.constexpr = min(_GROUP, BLOCK)
    GROUPS: tl.constexpr = BLOCK // WIDTH
    index = tl.arange(0, ROWS * GROUPS)
    row = first_row + (index // GROUPS).to(tl.int64)
    group_column = first_column + (index % GROUPS) * WIDTH
    column = group_column[:, None] + tl.arange(0, WIDTH)[None, :]
    live = row < rows
    inside = live[:, None] & (column < N)

    grouped = tl.reshape(values, (ROWS * GROUPS, WIDTH))
    # Of two numbers one of which is NaN, hardware gives the other; here NaN counts as 0, which is the same.
    magnitude = tl.where(inside & (grouped == grouped), tl.abs(grouped), 0.0)
    scale = tl.div_rn(tl.maximum(tl.max(magnitude, axis=1), _LEAST), _LARGEST)
    if UE8M0:
        bits = tl.maximum(scale, _LEAST).to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    q = tl.div_rn(grouped, tl.broadcast_to(scale[:, None], grouped.shape))
    tl.store(q_ptr + (row * stride_q)[:, None] + column, q.to(q_ptr.dtype.element_ty), mask=inside)
    scale_ptrs = scales_ptr + row * stride_scales_row + (group_column // _GROUP).to(tl.int64) * stride_scales_group
    tl.store(scale_ptrs, scale, mask=live & (group_column < N))


@triton.jit(do_not_specialize=["stride_scales_row", "stride_scales_group"])
def quantize_kernel(
    x_ptr,
    q_ptr,
    scales_ptr,
    stride_x,
    stride_q,
    stride_scales_row,
    stride_scales_group,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """x in fp8 and its scales, `BLOCK` columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row * stride_x + columns, mask=columns < N, other=0.0).to(tl.float32)
    store_groups(
        *(x, q_ptr, scales_ptr, row, start, row + 1, stride_q, stride_scales_row, stride_scales_group),
        *(N, 1, BLOCK, UE8M0),
    )


@triton.jit(do_not_specialize=["stride_scales_row", "stride_scales_group"])
def silu_and_mul_fp8_kernel(
    x_ptr,
    q_ptr,
    scales_ptr,
    stride_x,
    stride_q,
    stride_scales_row,
    stride_scales_group,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """silu(x[row, :N]) · x[row, N:], rounded, in fp8 and its scales, `BLOCK` columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)[None, :]
    inside = columns < N
    gate = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + N + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = gated(gate, up, False).to(x_ptr.dtype.element_ty).to(tl.float32)
    store_groups(
        *(rounded, q_ptr, scales_ptr, row, start, row + 1, stride_q, stride_scales_row, stride_scales_group),
        *(N, 1, BLOCK, UE8M0),
    )


@triton.jit(do_not_specialize=["rows", "stride_scales_row", "stride_scales_group"])
def rms_norm_fp8_kernel(
    x_ptr,
    weight_ptr,
    q_ptr,
    scales_ptr,
    stride_x,
    stride_q,
    stride_scales_row,
    stride_scales_group,
    eps,
    rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GEMMA: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """The norm of x[row], rounded, in fp8 and its scales, `ROWS` rows a program."""
    row, live = row_block(ROWS, rows)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = live & (columns < N)
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    rounded = normed(x, weight_ptr, columns, eps, N, GEMMA).to(x_ptr.dtype.element_ty).to(tl.float32)
    store_groups(
        *(rounded, q_ptr, scales_ptr, tl.program_id(0).to(tl.int64) * ROWS, 0, rows),
        *(stride_q, stride_scales_row, stride_scales_group, N, ROWS, BLOCK, UE8M0),
    )


@triton.jit(do_not_specialize=["rows", "stride_scales_row", "stride_scales_group"])
def fused_add_rms_norm_fp8_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    q_ptr,
    scales_ptr,
    residual_out_ptr,
    stride_x,
    stride_residual,
    stride_q,
    stride_scales_row,
    stride_scales_group,
    stride_residual_out,
    eps,
    rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GEMMA: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """residual_out = x + residual, rounded, which may be either of them; its norm, rounded, in fp8 and its scales."""
    row, live = row_block(ROWS, rows)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = live & (columns < N)
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    residual = tl.load(
        residual_ptr + row * stride_residual + columns, mask=inside, other=0.0, eviction_policy="evict_first"
    )
    added = (x + residual.to(tl.float32)).to(residual_out_ptr.dtype.element_ty)
    values = normed(added.to(tl.float32), weight_ptr, columns, eps, N, GEMMA)
    rounded = values.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.debug_barrier()  # every thread has read the rows before one of them overwrites them
    tl.store(residual_out_ptr + row * stride_residual_out + columns, added, mask=inside)
    store_groups(
        *(rounded, q_ptr, scales_ptr, tl.program_id(0).to(tl.int64) * ROWS, 0, rows),
        *(stride_q, stride_scales_row, stride_scales_group, N, ROWS, BLOCK, UE8M0),
    )


_SCALE_STRIDES: dict[str, ArgumentType] = {"stride_scales_row": "i32", "stride_scales_group": "i32"}
"""Of which one follows the batch where the scales of a group lie side by side."""


def elementwise_launches(problem: Problem, params: Params, tile: ElementTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `quantize.fp8_group` or `silu_and_mul.fp8_group`.

    Raises ValueError for a block that is not whole groups.
    """
    _need_groups(tile.block)
    alone = problem.op == "quantize.fp8_group"
    n = _width(problem)
    arguments: dict[str, ArgumentType] = {
        "x_ptr": pointer(problem.dtype),
        "q_ptr": pointer(FP8),
        "scales_ptr": pointer("float32"),
        "stride_x": n if alone else 2 * n,
        "stride_q": n,
        **_SCALE_STRIDES,
    }
    constants = {"N": n, "BLOCK": tile.block, "UE8M0": problem["scale_format"] == "ue8m0"}
    kernel = quantize_kernel if alone else silu_and_mul_fp8_kernel
    return (Launch(kernel, arguments, constants, options(arch, tile.num_warps, num_stages=1, fp_fusion=False)),)


def row_launches(problem: Problem, params: RowParams, tile: RowTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `rms_norm.fp8_group` or `fused_add_rms_norm.fp8_group`.

    Raises ValueError for a row that is longer than `params.block`.
    """
    n = problem.size("n")
    if n > params.block:
        raise ValueError(f"{problem}: a row must fit into block={params.block}")
    added = problem.op.startswith("fused_add")
    inputs = ("x", "residual") if added else ("x",)
    data = pointer(problem.dtype)
    arguments: dict[str, ArgumentType] = {f"{name}_ptr": data for name in (*inputs, "weight")}
    arguments |= {"q_ptr": pointer(FP8), "scales_ptr": pointer("float32")}
    arguments |= {"residual_out_ptr": data} if added else {}
    arguments |= {f"stride_{name}": n for name in (*inputs, "q")} | _SCALE_STRIDES
    arguments |= {"stride_residual_out": n} if added else {}
    arguments |= {"eps": "fp32", "rows": "i32"}
    shape = {"N": n, "BLOCK": row_width(n, params.block), "ROWS": tile.rows, "GEMMA": problem.flag("gemma")}
    kernel = fused_add_rms_norm_fp8_kernel if added else rms_norm_fp8_kernel
    return (row_launch(kernel, arguments, arch, tile.num_warps, **shape, UE8M0=problem["scale_format"] == "ue8m0"),)


def _width(problem: Problem) -> int:
    """Elements of a quantised row."""
    return problem.size("k" if problem.op == "quantize.fp8_group" else "n")


def _need_groups(block: int) -> None:
    if block % _GROUP.value:
        raise ValueError(f"block={block} is not a multiple of {_GROUP.value}, the elements of a group")


def bind_quantize_fp8_group(context: BindContext) -> Kernel:
    """x [m, k], q [m, k], scales [m, k/128] of any strides; x [m, 2k] for the gated activation."""
    (launch,) = elementwise_launches(context.problem, context.params, context.tile, context.device.arch)
    blocks = ceil_div(_width(context.problem), context.tile.block)

    def quantize(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor) -> None:
        launch((x.shape[0], blocks), x, q, scales, x.stride(0), q.stride(0), *scales.stride())

    return quantize


bind_silu_and_mul_fp8_group = bind_quantize_fp8_group


def bind_rms_norm_fp8_group(context: BindContext) -> Kernel:
    """x [m, n], weight [n], eps, q [m, n], scales [m, n/128] of any strides."""
    (launch,) = row_launches(context.problem, context.params, context.tile, context.device.arch)
    per_program = context.tile.rows

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, q: torch.Tensor, scales: torch.Tensor) -> None:
        rows = x.shape[0]
        grid = (ceil_div(rows, per_program),)
        launch(grid, x, weight, q, scales, x.stride(0), q.stride(0), *scales.stride(), eps, rows)

    return rms_norm


def bind_fused_add_rms_norm_fp8_group(context: BindContext) -> Kernel:
    """x and residual [m, n], weight [n], eps, q [m, n], scales [m, n/128] of any strides, residual_out [m, n]."""
    (launch,) = row_launches(context.problem, context.params, context.tile, context.device.arch)
    per_program = context.tile.rows

    def fused_add_rms_norm(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        q: torch.Tensor,
        scales: torch.Tensor,
        residual_out: torch.Tensor,
    ) -> None:
        rows = x.shape[0]
        strides = (x.stride(0), residual.stride(0), q.stride(0), *scales.stride(), residual_out.stride(0))
        grid = (ceil_div(rows, per_program),)
        launch(grid, x, residual, weight, q, scales, residual_out, *strides, eps, rows)

    return fused_add_rms_norm

"""fp8 products by one program a tile: `gemm.fp8_block`, scaled every 128 of K, and `gemm.fp8`, scaled at the end.

Each step of K starts from a fresh accumulator of the matrix unit and is added to one in fp32. With block scales that is
DeepGEMM's arithmetic on Hopper (sm90_fp8_gemm_1d2d.cuh): the two scales are multiplied and rounded, and the product of
that with the partial sum is added in one fused multiply-add.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201, SIM108
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.fp8_params import Fp8BlockParams, Fp8Params, step_of, tile_fault
from bidispatch_backends.triton.gemm import tile_of, tile_ptrs
from bidispatch_backends.triton.gemm_params import ProductTile
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, ceil_div, options, pointer

__all__ = [
    "accumulate_blocks",
    "bind_fp8",
    "bind_fp8_block",
    "block_product",
    "fp8_block_kernel",
    "fp8_kernel",
    "launches",
    "store_tile",
]

_GROUP = tl.constexpr(128)


@triton.jit
def block_product(
    x_ptrs, weight_ptrs, left, STEP: tl.constexpr, SWAP: tl.constexpr, K_IS_EVEN: tl.constexpr, WIDEN: tl.constexpr
):
    """The product of one step of K, of which `left` elements are there, from a fresh accumulator."""
    inside = tl.arange(0, STEP) < left
    if K_IS_EVEN:
        weight = tl.load(weight_ptrs)
        x = tl.load(x_ptrs)
    elif SWAP:
        weight = tl.load(weight_ptrs, mask=inside[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
    else:
        weight = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
        x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
    if WIDEN:
        weight = weight.to(tl.float16)
        x = x.to(tl.float16)
    # Triton's own limit of imprecise additions is above a step: the matrix unit takes all of it in one chain.
    if SWAP:
        product = tl.dot(weight, x)
    else:
        product = tl.dot(x, weight)
    return product


@triton.jit
def accumulate_blocks(
    x_ptrs,
    weight_ptrs,
    x_scale_ptrs,
    weight_scale_ptrs,
    stride_x_scales_group,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    SWAP: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    ONE_SCALE: tl.constexpr,
):
    """The scaled sum over k: [BLOCK_M, BLOCK_N], transposed where swapped. x has a scale a row and step; the weight one
    a step for the whole tile where ONE_SCALE, else one for each of its rows.
    """
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Each step's scales are loaded a step ahead: nothing else hides their latency.
    x_scale = tl.load(x_scale_ptrs)
    weight_scale = tl.load(weight_scale_ptrs)
    for start in range(0, k, STEP):
        group = min(start // STEP + 1, (k - 1) // STEP)
        next_x_scale = tl.load(x_scale_ptrs + tl.full((), group, tl.int64) * stride_x_scales_group)
        next_weight_scale = tl.load(weight_scale_ptrs + group)
        partial = block_product(x_ptrs, weight_ptrs, k - start, STEP, SWAP, K_IS_EVEN, WIDEN)
        if ONE_SCALE:
            # One product a row, the same one that each of its elements would have.
            scale = x_scale * weight_scale
            if SWAP:
                scale = scale[None, :]
            else:
                scale = scale[:, None]
        elif SWAP:
            scale = weight_scale[:, None] * x_scale[None, :]
        else:
            scale = x_scale[:, None] * weight_scale[None, :]
        acc = tl.fma(partial, tl.broadcast_to(scale, acc.shape), acc)
        x_ptrs += STEP
        weight_ptrs += STEP
        x_scale = next_x_scale
        weight_scale = next_weight_scale
    return acc


@triton.jit
def store_tile(acc, out_ptr, rows, columns, m, n, stride_out_row, SWAP: tl.constexpr):
    """Round and store what exists of a tile [BLOCK_M, BLOCK_N], transposed where swapped."""
    long_rows = rows.to(tl.int64)
    if SWAP:
        out_ptrs = out_ptr + long_rows[None, :] * stride_out_row + columns[:, None]
        inside = (rows < m)[None, :] & (columns < n)[:, None]
    else:
        out_ptrs = out_ptr + long_rows[:, None] * stride_out_row + columns[None, :]
        inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m", "stride_x_scales_row", "stride_x_scales_group"])
def fp8_block_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    out_ptr,
    m,
    n,
    k,
    stride_x_row,
    stride_x_scales_row,
    stride_x_scales_group,
    stride_weight_n,
    stride_weight_scales_n,
    stride_out_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    SWAP: tl.constexpr,
    FILL: tl.constexpr,
    GROUP_M: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """out = (x · x_scales) @ (weight · weight_scales).T: one [BLOCK_M, BLOCK_N] tile a program, 128 of K at a time."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs, weight_ptrs = tile_ptrs(
        *(x_ptr, weight_ptr, rows, columns, m, n, stride_x_row, stride_weight_n, 1, BLOCK_N, STEP, SWAP, FILL)
    )
    x_scale_ptrs = x_scales_ptr + tl.where(rows < m, rows, 0).to(tl.int64) * stride_x_scales_row
    if BLOCK_N <= _GROUP:
        # A tile lies in one block of the weight: it has one scale.
        weight_scale_ptrs = weight_scales_ptr + (tile_n * BLOCK_N // _GROUP).to(tl.int64) * stride_weight_scales_n
    else:
        block = tl.where(columns < n, columns, 0) // _GROUP
        weight_scale_ptrs = weight_scales_ptr + block.to(tl.int64) * stride_weight_scales_n

    acc = accumulate_blocks(
        *(x_ptrs, weight_ptrs, x_scale_ptrs, weight_scale_ptrs, stride_x_scales_group, k),
        *(BLOCK_M, BLOCK_N, STEP, SWAP, K_IS_EVEN, WIDEN, BLOCK_N <= _GROUP),
    )
    store_tile(acc, out_ptr, rows, columns, m, n, stride_out_row, SWAP)


@triton.jit(do_not_specialize=["m", "stride_x_scales"])
def fp8_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    stride_x_row,
    stride_x_scales,
    stride_weight_n,
    stride_weight_scales,
    stride_out_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    SWAP: tl.constexpr,
    FILL: tl.constexpr,
    GROUP_M: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """out = x_scales · (weight_scales · (x @ weight.T)) + bias: one [BLOCK_M, BLOCK_N] tile a program.

    A scale for a whole tensor has stride 0. The last product and the bias are one fused multiply-add.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs, weight_ptrs = tile_ptrs(
        *(x_ptr, weight_ptr, rows, columns, m, n, stride_x_row, stride_weight_n, 1, BLOCK_N, STEP, SWAP, FILL)
    )
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, STEP):
        acc += block_product(x_ptrs, weight_ptrs, k - start, STEP, SWAP, K_IS_EVEN, WIDEN)
        x_ptrs += STEP
        weight_ptrs += STEP

    safe_columns = tl.where(columns < n, columns, 0)
    x_scale = tl.load(x_scales_ptr + tl.where(rows < m, rows, 0).to(tl.int64) * stride_x_scales)
    weight_scale = tl.load(weight_scales_ptr + safe_columns * stride_weight_scales)
    if SWAP:
        x_scale = x_scale[None, :]
        weight_scale = weight_scale[:, None]
    else:
        x_scale = x_scale[:, None]
        weight_scale = weight_scale[None, :]
    acc *= weight_scale
    if bias_ptr is None:
        acc *= x_scale
    else:
        bias = tl.load(bias_ptr + safe_columns).to(tl.float32)
        if SWAP:
            bias = bias[:, None]
        else:
            bias = bias[None, :]
        acc = tl.fma(acc, tl.broadcast_to(x_scale, acc.shape), tl.broadcast_to(bias, acc.shape))
    store_tile(acc, out_ptr, rows, columns, m, n, stride_out_row, SWAP)


def launches(problem: Problem, params: Fp8BlockParams | Fp8Params, tile: ProductTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `gemm.fp8_block` or `gemm.fp8`.

    Raises ValueError for a tile that the compiler would multiply by another instruction than the params name.
    """
    if fault := tile_fault(arch, params, tile):
        raise ValueError(fault)
    n, k = problem.size("n"), problem.size("k")
    step = step_of(problem, params)
    fp8, fp32 = pointer(problem.dtype), pointer("float32")
    blocks = problem.op == "gemm.fp8_block"
    arguments: dict[str, ArgumentType] = {
        "x_ptr": fp8,
        "x_scales_ptr": fp32,
        "weight_ptr": fp8,
        "weight_scales_ptr": fp32,
    }
    out = pointer(str(problem["out_dtype"]))
    if not blocks:
        arguments["bias_ptr"] = out if problem.flag("bias") else None
    arguments |= {"out_ptr": out, "m": "i32", "n": n, "k": k, "stride_x_row": k}
    if blocks:
        arguments |= {"stride_x_scales_row": "i32", "stride_x_scales_group": "i32"}
    else:
        arguments["stride_x_scales"] = "i32"
    arguments["stride_weight_n"] = k
    if blocks:
        arguments["stride_weight_scales_n"] = ceil_div(k, step)
    else:
        arguments["stride_weight_scales"] = int(problem["weight_scaling"] == "channel")
    arguments["stride_out_row"] = n
    constants: dict[str, Constant] = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "STEP": step,
        "SWAP": tile.swap,
        "FILL": k >= _FILLED_ROW,
        "GROUP_M": tile.group_m,
        "K_IS_EVEN": k % step == 0,
        "WIDEN": params.products == "fp16",
    }
    # Every product and sum outside of the matrix unit says itself whether it is fused.
    compiler = options(arch, tile.num_warps, tile.num_stages, fp_fusion=False)
    return (Launch(fp8_block_kernel if blocks else fp8_kernel, arguments, constants, compiler),)


_FILLED_ROW = 16
"""Elements of K from which rows past the end of x read the weight instead: up to 15 bytes before a row of it."""


def bind_fp8_block(context: BindContext) -> Kernel:
    """x [m, k], x_scales [m, k/128] of any strides, weight [n, k], weight_scales [n/128, k/128], out [m, n]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    n, k = context.problem.size("n"), context.problem.size("k")
    block_m = context.tile.block_m
    tiles_n = ceil_div(n, context.tile.block_n)

    def fp8_block(
        x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, out: torch.Tensor
    ) -> None:
        m = x.shape[0]
        launch(
            (ceil_div(m, block_m) * tiles_n,),
            *(x, x_scales, weight, weight_scales, out, m, n, k),
            *(x.stride(0), *x_scales.stride(), weight.stride(0), weight_scales.stride(0), out.stride(0)),
        )

    return fp8_block


def bind_fp8(context: BindContext) -> Kernel:
    """x [m, k], weight [n, k], the scales that the problem has, bias [n] or None, out [m, n]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    n, k = context.problem.size("n"), context.problem.size("k")
    block_m = context.tile.block_m
    tiles_n = ceil_div(n, context.tile.block_n)

    def fp8(
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        x_scales: torch.Tensor | None,
        weight: torch.Tensor,
        weight_scale: torch.Tensor | None,
        weight_scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        m = x.shape[0]
        of_rows, row_step = (x_scale, 0) if x_scales is None else (x_scales, x_scales.stride(0))
        of_columns, column_step = (weight_scale, 0) if weight_scales is None else (weight_scales, 1)
        launch(
            (ceil_div(m, block_m) * tiles_n,),
            *(x, of_rows, weight, of_columns, bias, out, m, n, k),
            *(x.stride(0), row_step, weight.stride(0), column_step, out.stride(0)),
        )

    return fp8

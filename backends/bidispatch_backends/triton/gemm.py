"""Matrix products by one program a tile: `gemm` and `bmm`. Their sums run through the matrix unit in the order of K.

Measured on an H100: tiles of 16 to 128 rows, with x or the weight on the matrix unit's long side, give the same fp32
bits (bf16, fp16); at M up to 64 they stream a weight as fast as the best of cuBLASLt.
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
from bidispatch_backends.triton.gemm_params import GemmParams, GemmTile, runs_on_fma
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, ceil_div, options, pointer

__all__ = [
    "accumulate",
    "bind_bmm",
    "bind_gemm",
    "filled_offsets",
    "launches",
    "matmul_kernel",
    "tile_constants",
    "tile_of",
    "tile_ptrs",
]


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Which row tile and which column tile a program has: GROUP_M row tiles share columns while these are in L2."""
    group = program // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (program % (GROUP_M * tiles_n)) % group_rows
    tile_n = (program % (GROUP_M * tiles_n)) // group_rows
    return tile_m, tile_n


@triton.jit
def filled_offsets(x_ptr, offsets, inside, weight_ptr, filler_offsets):
    """Offsets from x_ptr of rows that are inside; the others are at filler_offsets from weight_ptr.

    A blend and not a selection, which would hide from the compiler that the pointers are aligned. The distance between
    the two is rounded down to what keeps them so: a filler row is never the weight's first, and what it reads does not
    matter.
    """
    ELEMENTS: tl.constexpr = 16 // (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
    distance = (weight_ptr.to(tl.int64) - x_ptr.to(tl.int64)) // 16 * ELEMENTS
    mine = inside.to(tl.int64)
    return mine * offsets + (1 - mine) * (filler_offsets + distance)


@triton.jit
def tile_ptrs(
    x_ptr,
    weight_ptr,
    rows,
    columns,
    m,
    n,
    stride_x_row,
    stride_weight_n,
    stride_weight_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    FILL: tl.constexpr,
):
    """Pointers to the first K step of a tile's operands; with SWAP the weight is the left one.

    Columns past the end read column 0, rows past the end row 0: only the tail of K needs a mask. With FILL, for a
    weight whose K is contiguous, such rows read rows of the weight that this program reads anyway. Measured on an H100
    with one row of 16 there: 13.3 µs so, 16.4 with a mask on every load, 17.1 where all programs ask for row 0.
    """
    steps = tl.arange(0, BLOCK_K)
    safe_columns = tl.where(columns < n, columns, 0).to(tl.int64)
    row_offsets = tl.where(rows < m, rows, 0).to(tl.int64) * stride_x_row
    if FILL:
        filler = tl.min(columns, axis=0) + 1 + rows % BLOCK_N
        filler_offsets = tl.where(filler < n, filler, n - 1).to(tl.int64) * stride_weight_n
        row_offsets = filled_offsets(x_ptr, row_offsets, (rows < m) | (n == 1), weight_ptr, filler_offsets)
    row_ptrs = x_ptr + row_offsets
    column_ptrs = weight_ptr + safe_columns * stride_weight_n
    weight_steps = steps.to(tl.int64) * stride_weight_k
    if SWAP:
        x_ptrs = row_ptrs[None, :] + steps[:, None]
        weight_ptrs = column_ptrs[:, None] + weight_steps[None, :]
    else:
        x_ptrs = row_ptrs[:, None] + steps[None, :]
        weight_ptrs = column_ptrs[None, :] + weight_steps[:, None]
    return x_ptrs, weight_ptrs


@triton.jit
def accumulate(
    x_ptrs,
    weight_ptrs,
    weight_step,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The sum over `length` elements of K from a fresh accumulator: [BLOCK_M, BLOCK_N], transposed where swapped."""
    steps = tl.arange(0, BLOCK_K)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, length, BLOCK_K):
        inside = steps < length - start
        if SWAP:
            if K_IS_EVEN:
                weight = tl.load(weight_ptrs)
            else:
                weight = tl.load(weight_ptrs, mask=inside[None, :], other=0.0)
            if K_IS_EVEN:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
            acc = tl.dot(weight, x, acc, input_precision=INPUT_PRECISION)
        else:
            if K_IS_EVEN:
                weight = tl.load(weight_ptrs)
            else:
                weight = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
            if K_IS_EVEN:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += weight_step
    return acc


@triton.jit(do_not_specialize=["m"])
def matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    stride_x_matrix,
    stride_x_row,
    stride_weight_matrix,
    stride_weight_n,
    stride_weight_k,
    stride_out_matrix,
    stride_out_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    FILL: tl.constexpr,
    GROUP_M: tl.constexpr,
    K_CHUNK: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out[z] = x[z] @ weight[z].T + bias: one [BLOCK_M, BLOCK_N] tile a program, z along with the tiles.

    With K_CHUNK every so many elements of K start from a fresh accumulator; what came before is added in order.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    matrix = (program // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = tile_of(program % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs, weight_ptrs = tile_ptrs(
        *(x_ptr + matrix * stride_x_matrix, weight_ptr + matrix * stride_weight_matrix, rows, columns, m, n),
        *(stride_x_row, stride_weight_n, stride_weight_k, BLOCK_N, BLOCK_K, SWAP, FILL),
    )
    weight_step = tl.full((), BLOCK_K, tl.int64) * stride_weight_k

    if K_CHUNK == 0:
        acc = accumulate(
            *(x_ptrs, weight_ptrs, weight_step, k),
            *(BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_IS_EVEN, INPUT_PRECISION),
        )
    else:
        acc = accumulate(
            *(x_ptrs, weight_ptrs, weight_step, min(k, K_CHUNK)),
            *(BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_IS_EVEN, INPUT_PRECISION),
        )
        for start in range(K_CHUNK, k, K_CHUNK):
            x_ptrs += K_CHUNK
            weight_ptrs += tl.full((), K_CHUNK, tl.int64) * stride_weight_k
            acc += accumulate(
                *(x_ptrs, weight_ptrs, weight_step, min(k - start, K_CHUNK)),
                *(BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_IS_EVEN, INPUT_PRECISION),
            )

    inside = rows < m
    long_rows = rows.to(tl.int64)
    safe_columns = tl.where(columns < n, columns, 0)
    out_ptr += matrix * stride_out_matrix
    if SWAP:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + safe_columns).to(tl.float32)[:, None]
        out_ptrs = out_ptr + long_rows[None, :] * stride_out_row + columns[:, None]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[None, :] & (columns < n)[:, None])
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + safe_columns).to(tl.float32)[None, :]
        out_ptrs = out_ptr + long_rows[:, None] * stride_out_row + columns[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (columns < n)[None, :])


def tile_constants(problem: Problem, params: GemmParams, tile: GemmTile, arch: Arch) -> dict[str, Constant]:
    """The constants of `accumulate` and `tile_of`. Raises ValueError where chunks are not whole steps of the tile, and
    for a tile that the matrix unit cannot fill: the compiler would take FMAs, which are of another class.
    """
    k = problem.size("k")
    if min(tile.block_m, tile.block_n) < 8 and not runs_on_fma(arch, problem, params):
        raise ValueError(f"a tile of {tile.block_m}x{tile.block_n} is too small for the matrix unit, which takes 8")
    if params.k_chunk % tile.block_k:
        raise ValueError(f"k_chunk={params.k_chunk} is not a multiple of block_k={tile.block_k}")
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SWAP": tile.swap,
        "FILL": problem.op == "gemm",
        "GROUP_M": tile.group_m,
        "K_CHUNK": params.k_chunk if k > params.k_chunk else 0,
        "K_IS_EVEN": k % tile.block_k == 0,
        "INPUT_PRECISION": params.input_precision,
    }


def launches(problem: Problem, params: GemmParams, tile: GemmTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `gemm` or `bmm`."""
    n, k = problem.size("n"), problem.size("k")
    pointer_in = pointer(problem.dtype)
    transposed = problem.op == "bmm"
    arguments: dict[str, ArgumentType] = {
        "x_ptr": pointer_in,
        "weight_ptr": pointer_in,
        "bias_ptr": pointer_in if problem.op == "gemm" and problem.flag("bias") else None,
        "out_ptr": pointer(str(problem["out_dtype"])),
        "m": "i32",
        "n": n,
        "k": k,
        "stride_x_matrix": k if transposed else 0,
        "stride_x_row": k,
        "stride_weight_matrix": n * k if transposed else 0,
        "stride_weight_n": 1 if transposed else k,
        "stride_weight_k": n if transposed else 1,
        "stride_out_matrix": n if transposed else 0,
        "stride_out_row": n,
    }
    # The one product and sum outside of the matrix unit's are those of its fp32 form, which wants the fusion.
    compiler = options(arch, tile.num_warps, tile.num_stages, fp_fusion=True)
    return (Launch(matmul_kernel, arguments, tile_constants(problem, params, tile, arch), compiler),)


def bind_gemm(context: BindContext) -> Kernel:
    """x [m, k], weight [n, k], bias [n] or None, out [m, n]; the last axes contiguous, rows of any stride."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    n, k = context.problem.size("n"), context.problem.size("k")
    block_m = context.tile.block_m
    tiles_n = ceil_div(n, context.tile.block_n)

    def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        m = x.shape[0]
        grid = (ceil_div(m, block_m) * tiles_n,)
        launch(grid, x, weight, bias, out, m, n, k, 0, x.stride(0), 0, weight.stride(0), 1, 0, out.stride(0))

    return gemm


def bind_bmm(context: BindContext) -> Kernel:
    """a [matrices, m, k], b [matrices, k, n] of any strides, out [matrices, m, n]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    n, k = context.problem.size("n"), context.problem.size("k")
    block_m = context.tile.block_m
    tiles_n = ceil_div(n, context.tile.block_n)

    def bmm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        matrices, m = a.shape[0], a.shape[1]
        grid = (matrices * ceil_div(m, block_m) * tiles_n,)
        stride_b_matrix, stride_b_k, stride_b_n = b.stride()
        launch(
            grid,
            *(a, b, None, out, m, n, k),
            *(a.stride(0), a.stride(1), stride_b_matrix, stride_b_n, stride_b_k, out.stride(0), out.stride(1)),
        )

    return bmm

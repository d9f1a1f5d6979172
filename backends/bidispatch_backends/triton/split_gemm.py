"""Products that take chunks of K in parallel: `gemm_split_k` by the matrix unit, `gemv` with a column a thread.

Each chunk's fp32 partial result goes to a workspace; the program that comes last to a tile adds its partials in
ascending order. So the bits are those of the kernels that walk the same chunks one after another (`gemm`, k_chunk).
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN202, SIM108
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.gemm import accumulate, tile_constants, tile_of, tile_ptrs
from bidispatch_backends.triton.gemm_params import GemmTile, SplitParams, VectorParams, VectorTile
from bidispatch_backends.triton.launch import ArgumentType, Launch, ceil_div, options, pointer

__all__ = ["bind_gemm_split_k", "bind_gemv", "launches", "vector_launches"]


@triton.jit
def _is_last(counter_ptr, programs):
    """Whether all other programs of a tile have stored their partials, which then are visible. Resets the count."""
    tl.debug_barrier()  # every thread's part is stored before one of them says so
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")
    return last


@triton.jit
def _fold(partial_ptrs, stride_chunk, chunks, inside):
    """A tile's partials added in ascending order. `.cg`: another multiprocessor wrote them, and L1 may not know."""
    total = tl.load(partial_ptrs, mask=inside, other=0.0, cache_modifier=".cg")
    for _ in range(1, chunks):
        partial_ptrs += stride_chunk
        total += tl.load(partial_ptrs, mask=inside, other=0.0, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["m", "stride_chunk"])
def split_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    m,
    n,
    k,
    stride_x_row,
    stride_weight_n,
    stride_out_row,
    stride_chunk,
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
    """out = x @ weight.T + bias; program (tile, chunk). partial [chunks, m, n] fp32, counter [tiles] zero."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * K_CHUNK
    x_ptrs, weight_ptrs = tile_ptrs(
        *(x_ptr + first, weight_ptr + first, rows, columns, m, n, stride_x_row, stride_weight_n, 1),
        *(BLOCK_N, BLOCK_K, SWAP, FILL),
    )
    acc = accumulate(
        *(x_ptrs, weight_ptrs, BLOCK_K, min(k - first, K_CHUNK)),
        *(BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_IS_EVEN, INPUT_PRECISION),
    )
    long_rows = rows.to(tl.int64)
    if SWAP:
        inside = (rows < m)[None, :] & (columns < n)[:, None]
        partial_ptrs = partial_ptr + long_rows[None, :] * n + columns[:, None]
        out_ptrs = out_ptr + long_rows[None, :] * stride_out_row + columns[:, None]
    else:
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        partial_ptrs = partial_ptr + long_rows[:, None] * n + columns[None, :]
        out_ptrs = out_ptr + long_rows[:, None] * stride_out_row + columns[None, :]
    tl.store(partial_ptrs + chunk * stride_chunk, acc, mask=inside)
    if _is_last(counter_ptr + tile, tl.num_programs(1)):
        total = _fold(partial_ptrs, stride_chunk, tl.num_programs(1), inside)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
            if SWAP:
                total += bias[:, None]
            else:
                total += bias[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _four(ptrs, at, length, K_IS_EVEN: tl.constexpr):
    """Elements at to at + 3 of each thread's row, one vector load, as four values a thread."""
    four = tl.arange(0, 4)[None, :]
    if K_IS_EVEN:
        group = tl.load(ptrs + at + four)
    else:
        group = tl.load(ptrs + at + four, mask=at + four < length, other=0.0)
    even, odd = tl.split(tl.reshape(group, (group.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _add_products(acc, w0, w1, w2, w3, x_ptrs, at, length, K_IS_EVEN: tl.constexpr):
    """Four elements of K, in order."""
    x0, x1, x2, x3 = _four(x_ptrs, at, length, K_IS_EVEN)
    acc = tl.fma(w0, x0, acc)
    acc = tl.fma(w1, x1, acc)
    acc = tl.fma(w2, x2, acc)
    return tl.fma(w3, x3, acc)


@triton.jit
def _finish_row(partial_ptrs, stride_chunk, bias_ptr, out_row, columns, inside):
    """Fold a row's partials, add the bias, store."""
    total = _fold(partial_ptrs, stride_chunk, tl.num_programs(1), inside)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_row + columns, total.to(out_row.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m", "stride_chunk"])
def vector_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    m,
    n,
    k,
    stride_x_row,
    stride_weight_n,
    stride_out_row,
    stride_chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    K_CHUNK: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
):
    """The same for fp32: each thread has a row of the weight, and adds products in the order of K by FMA.

    One accumulator a row of x, spelled out: as a tensor they would be spread over threads, through shared memory.
    """
    chunk = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n
    row = tl.program_id(2) * BLOCK_M
    first = tl.program_id(1) * K_CHUNK
    length = min(k - first, K_CHUNK)
    weight_ptrs = weight_ptr + tl.where(inside, columns, 0).to(tl.int64)[:, None] * stride_weight_n + first
    # Every thread reads the same elements of x: as vectors of four, like its own of the weight.
    same = tl.zeros((BLOCK_N, 1), dtype=tl.int32)
    # Rows past the end are the last one again: they store the same bits to the same place.
    row0 = row.to(tl.int64)
    row1 = min(row + 1, m - 1).to(tl.int64)
    row2 = min(row + 2, m - 1).to(tl.int64)
    row3 = min(row + 3, m - 1).to(tl.int64)
    x0 = x_ptr + row0 * stride_x_row + first + same
    x1 = x_ptr + row1 * stride_x_row + first + same
    x2 = x_ptr + row2 * stride_x_row + first + same
    x3 = x_ptr + row3 * stride_x_row + first + same
    acc0 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    acc3 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, length, 4 * UNROLL):
        for step in tl.static_range(UNROLL):
            at = start + 4 * step
            w0, w1, w2, w3 = _four(weight_ptrs, at, length, K_IS_EVEN)
            acc0 = _add_products(acc0, w0, w1, w2, w3, x0, at, length, K_IS_EVEN)
            if BLOCK_M > 1:
                acc1 = _add_products(acc1, w0, w1, w2, w3, x1, at, length, K_IS_EVEN)
            if BLOCK_M > 2:
                acc2 = _add_products(acc2, w0, w1, w2, w3, x2, at, length, K_IS_EVEN)
                acc3 = _add_products(acc3, w0, w1, w2, w3, x3, at, length, K_IS_EVEN)
    partial_ptrs = partial_ptr + chunk * stride_chunk + columns
    tl.store(partial_ptrs + row0 * n, acc0, mask=inside)
    if BLOCK_M > 1:
        tl.store(partial_ptrs + row1 * n, acc1, mask=inside)
    if BLOCK_M > 2:
        tl.store(partial_ptrs + row2 * n, acc2, mask=inside)
        tl.store(partial_ptrs + row3 * n, acc3, mask=inside)
    if _is_last(counter_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), tl.num_programs(1)):
        for i in range(min(BLOCK_M, m - row)):
            partial_row = partial_ptr + (row0 + i) * n + columns
            _finish_row(partial_row, stride_chunk, bias_ptr, out_ptr + (row0 + i) * stride_out_row, columns, inside)


def _arguments(problem: Problem) -> dict[str, ArgumentType]:
    """What both split kernels are given."""
    n, k = problem.size("n"), problem.size("k")
    pointer_in = pointer(problem.dtype)
    return {
        "x_ptr": pointer_in,
        "weight_ptr": pointer_in,
        "bias_ptr": pointer_in if problem.flag("bias") else None,
        "out_ptr": pointer(str(problem["out_dtype"])),
        "partial_ptr": pointer("float32"),
        "counter_ptr": pointer("int32"),
        "m": "i32",
        "n": n,
        "k": k,
        "stride_x_row": k,
        "stride_weight_n": k,
        "stride_out_row": n,
        "stride_chunk": "i64",
    }


def launches(problem: Problem, params: SplitParams, tile: GemmTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `gemm_split_k`."""
    constants = {**tile_constants(problem, params, tile), "K_CHUNK": params.k_chunk}
    compiler = options(arch, tile.num_warps, tile.num_stages, fp_fusion=True)
    return (Launch(split_kernel, _arguments(problem), constants, compiler),)


def vector_launches(problem: Problem, params: VectorParams, tile: VectorTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `gemv`."""
    step = 4 * tile.unroll
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "UNROLL": tile.unroll,
        "K_CHUNK": params.k_chunk,
        "K_IS_EVEN": problem.size("k") % step == 0 and params.k_chunk % step == 0,
    }
    num_warps = max(1, tile.block_n // (64 if arch.vendor == "amd" else 32))
    # No product and sum but the spelled FMAs: the folds are plain sums.
    return (
        Launch(vector_kernel, _arguments(problem), constants, options(arch, num_warps, num_stages=1, fp_fusion=False)),
    )


def bind_gemm_split_k(context: BindContext) -> Kernel:
    """x [m, k], weight [n, k], bias [n] or None, out [m, n]. Holds chunks · max_tokens · n fp32 of workspace."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    return _bind(context, launch, context.tile.block_m, context.tile.block_n, rows_last=False)


def bind_gemv(context: BindContext) -> Kernel:
    """The same."""
    (launch,) = vector_launches(context.problem, context.params, context.tile, context.device.arch)
    return _bind(context, launch, context.tile.block_m, context.tile.block_n, rows_last=True)


def _bind(context: BindContext, launch: Launch, block_m: int, block_n: int, *, rows_last: bool) -> Kernel:
    """`rows_last`: row tiles are the grid's third axis, instead of sharing the first with the column tiles."""
    n, k = context.problem.size("n"), context.problem.size("k")
    most = context.limits.max_tokens
    chunks = ceil_div(k, context.params.k_chunk)
    tiles_n = ceil_div(n, block_n)
    device = context.device.torch_device
    partial = torch.empty(chunks * most * n, dtype=torch.float32, device=device)
    counter = torch.zeros(ceil_div(most, block_m) * tiles_n, dtype=torch.int32, device=device)

    def split(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        m = x.shape[0]
        tiles_m = -(-m // block_m)
        grid = (tiles_n, chunks, tiles_m) if rows_last else (tiles_m * tiles_n, chunks)
        launch(
            grid, x, weight, bias, out, partial, counter, m, n, k, x.stride(0), weight.stride(0), out.stride(0), m * n
        )

    return split

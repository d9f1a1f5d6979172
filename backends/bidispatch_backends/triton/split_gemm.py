"""Products that take chunks of K in parallel: `gemm_split_k`.

Each chunk's fp32 partial result goes to a workspace; the program that comes last to a tile adds its partials in
ascending order. So the bits are those of the kernels that walk the same chunks one after another (`gemm`, k_chunk).
"""

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
from bidispatch_backends.triton.gemm import accumulate, tile_constants, tile_of, tile_ptrs
from bidispatch_backends.triton.gemm_params import GemmTile, SplitParams
from bidispatch_backends.triton.launch import ArgumentType, Launch, ceil_div, options, pointer

__all__ = ["bind_gemm_split_k", "fold_partials", "is_last", "launches"]


@triton.jit
def is_last(counter_ptr, programs):
    """Whether all other programs of a tile have stored their partials, which then are visible. Resets the count."""
    tl.debug_barrier()  # every thread's part is stored before one of them says so
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")
    return last


@triton.jit
def fold_partials(partial_ptrs, stride_chunk, chunks, inside):
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
    if is_last(counter_ptr + tile, tl.num_programs(1)):
        total = fold_partials(partial_ptrs, stride_chunk, tl.num_programs(1), inside)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
            if SWAP:
                total += bias[:, None]
            else:
                total += bias[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


def launches(problem: Problem, params: SplitParams, tile: GemmTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `gemm_split_k`."""
    n, k = problem.size("n"), problem.size("k")
    pointer_in = pointer(problem.dtype)
    arguments: dict[str, ArgumentType] = {
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
    constants = {**tile_constants(problem, params, tile, arch), "K_CHUNK": params.k_chunk}
    compiler = options(arch, tile.num_warps, tile.num_stages, fp_fusion=True)
    return (Launch(split_kernel, arguments, constants, compiler),)


def bind_gemm_split_k(context: BindContext) -> Kernel:
    """x [m, k], weight [n, k], bias [n] or None, out [m, n]. Holds chunks · max_tokens · n fp32 of workspace."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    n, k = context.problem.size("n"), context.problem.size("k")
    most, block_m = context.limits.max_tokens, context.tile.block_m
    chunks = ceil_div(k, context.params.k_chunk)
    tiles_n = ceil_div(n, context.tile.block_n)
    device = context.device.torch_device
    partial = torch.empty(chunks * most * n, dtype=torch.float32, device=device)
    counter = torch.zeros(ceil_div(most, block_m) * tiles_n, dtype=torch.int32, device=device)

    def split(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        m = x.shape[0]
        grid = (-(-m // block_m) * tiles_n, chunks)
        launch(
            grid, x, weight, bias, out, partial, counter, m, n, k, x.stride(0), weight.stride(0), out.stride(0), m * n
        )

    return split

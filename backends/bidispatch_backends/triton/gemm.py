"""Matrix products: `gemm` and `bmm` by one kernel, whose sums run through the matrix unit in the order of K."""

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
from bidispatch_backends.triton.launch import Launch, ceil_div, options, pointer
from bidispatch_backends.triton.params import GemmParams, GemmTile

__all__ = ["bind_bmm", "bind_gemm", "launches", "matmul_kernel"]


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
    GROUP_M: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out[z] = x[z] @ weight[z].T + bias: one [BLOCK_M, BLOCK_N] tile a program, z along with the tiles."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    matrix = (program // (tiles_m * tiles_n)).to(tl.int64)
    tile = program % (tiles_m * tiles_n)
    # GROUP_M row tiles share the weight's columns while they are in L2.
    group = tile // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (tile % (GROUP_M * tiles_n)) % group_rows
    tile_n = (tile % (GROUP_M * tiles_n)) // group_rows

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read row and column 0, so that only the tail of K needs a mask.
    safe_rows = tl.where(rows < m, rows, 0).to(tl.int64)
    safe_columns = tl.where(columns < n, columns, 0).to(tl.int64)
    x_ptrs = x_ptr + matrix * stride_x_matrix + safe_rows[:, None] * stride_x_row + steps[None, :]
    weight_ptrs = (
        weight_ptr
        + matrix * stride_weight_matrix
        + safe_columns[None, :] * stride_weight_n
        + steps.to(tl.int64)[:, None] * stride_weight_k
    )
    weight_step = tl.full((), BLOCK_K, tl.int64) * stride_weight_k

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        if K_IS_EVEN:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=steps[None, :] < k - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=steps[:, None] < k - start, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += weight_step

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + safe_columns).to(tl.float32)[None, :]
    out_ptrs = out_ptr + matrix * stride_out_matrix + rows.to(tl.int64)[:, None] * stride_out_row + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


def launches(problem: Problem, params: GemmParams, tile: GemmTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `gemm` or `bmm`."""
    n, k = problem.size("n"), problem.size("k")
    pointer_in = pointer(problem.dtype)
    transposed = problem.op == "bmm"
    arguments = {
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
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "K_IS_EVEN": k % tile.block_k == 0,
        "INPUT_PRECISION": params.input_precision,
    }
    # The one product and sum outside of the matrix unit's are those of its fp32 form, which wants the fusion.
    return (
        Launch(matmul_kernel, arguments, constants, options(arch, tile.num_warps, tile.num_stages, fp_fusion=True)),
    )


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

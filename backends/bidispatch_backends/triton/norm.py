"""Root-mean-square norms: `rms_norm`, `fused_add_rms_norm`, and `qk_norm` of the heads of queries and keys.

A row that fits a tile is read once and kept in registers; a longer one is read twice.
"""

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
from bidispatch_backends.triton.launch import ArgumentType, Launch, ceil_div, pointer
from bidispatch_backends.triton.params import RowParams, RowTile, row_width
from bidispatch_backends.triton.rows import row_block, row_launch, tree_sum

__all__ = [
    "bind_fused_add_rms_norm",
    "bind_qk_norm",
    "bind_rms_norm",
    "fused_add_rms_norm_kernel",
    "launches",
    "normed",
    "qk_norm_kernel",
    "rms_norm_kernel",
]


@triton.jit
def _inverse_rms(squares, eps, N: tl.constexpr):
    """1 / sqrt(mean + eps) of each row, [rows, 1], from each lane's sum of squares."""
    return tl.rsqrt(tree_sum(squares) / N + eps)[:, None]


@triton.jit
def _factor(weight_ptr, columns, N: tl.constexpr, GEMMA: tl.constexpr):
    """What a normed row is multiplied by, [1, lanes]. Every program reads it, so it is to stay in the cache."""
    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if GEMMA:
        weight += 1.0
    return weight


@triton.jit
def normed(x, weight_ptr, columns, eps, N: tl.constexpr, GEMMA: tl.constexpr):
    """The norm of rows x [rows, lanes] that are whole in registers, in fp32."""
    factor = _factor(weight_ptr, columns, N, GEMMA)
    return x * _inverse_rms(x * x, eps, N) * factor


@triton.jit
def _scale_long_rows(
    x_rows, out_rows, live, weight_ptr, scale, N: tl.constexpr, BLOCK: tl.constexpr, GEMMA: tl.constexpr
):
    """out = row · scale · weight, rounded once, of rows that are read again."""
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        inside = live & (columns < N)
        row = tl.load(x_rows + columns, mask=inside, other=0.0).to(tl.float32)
        factor = _factor(weight_ptr, columns, N, GEMMA)
        tl.store(out_rows + columns, (row * scale * factor).to(out_rows.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rows(
    x_rows,
    out_rows,
    live,
    weight_ptr,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GEMMA: tl.constexpr,
):
    """The norm of rows at pointers `x_rows` [ROWS, 1], where `live`, to `out_rows`, which may be the same."""
    if N <= BLOCK:
        columns = tl.arange(0, BLOCK)[None, :]
        inside = live & (columns < N)
        x = tl.load(x_rows + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        values = normed(x, weight_ptr, columns, eps, N, GEMMA)
        tl.debug_barrier()  # every thread has read the rows before one of them overwrites them
        tl.store(out_rows + columns, values.to(out_rows.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            columns = start + tl.arange(0, BLOCK)[None, :]
            x = tl.load(x_rows + columns, mask=live & (columns < N), other=0.0).to(tl.float32)
            squares = tl.fma(x, x, squares)
        scale = _inverse_rms(squares, eps, N)
        tl.debug_barrier()
        _scale_long_rows(x_rows, out_rows, live, weight_ptr, scale, N, BLOCK, GEMMA)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    stride_x,
    stride_out,
    eps,
    rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GEMMA: tl.constexpr,
):
    """out[row] = x[row] / rms(x[row]) · weight, `ROWS` rows a program. `out` may be `x`."""
    row, live = row_block(ROWS, rows)
    _norm_rows(x_ptr + row * stride_x, out_ptr + row * stride_out, live, weight_ptr, eps, N, BLOCK, ROWS, GEMMA)


@triton.jit(do_not_specialize=["rows"])
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
    rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GEMMA: tl.constexpr,
):
    """residual_out = x + residual, rounded; out = rms_norm(residual_out). Outputs may be inputs."""
    row, live = row_block(ROWS, rows)
    x_rows, residual_rows = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    out_rows, residual_out_rows = out_ptr + row * stride_out, residual_out_ptr + row * stride_residual_out
    if N <= BLOCK:
        columns = tl.arange(0, BLOCK)[None, :]
        inside = live & (columns < N)
        x = tl.load(x_rows + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        residual = tl.load(residual_rows + columns, mask=inside, other=0.0, eviction_policy="evict_first")
        added = (x + residual.to(tl.float32)).to(residual_out_ptr.dtype.element_ty)
        values = normed(added.to(tl.float32), weight_ptr, columns, eps, N, GEMMA)
        tl.debug_barrier()  # every thread has read the rows before one of them overwrites them
        tl.store(residual_out_rows + columns, added, mask=inside)
        tl.store(out_rows + columns, values.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            columns = start + tl.arange(0, BLOCK)[None, :]
            inside = live & (columns < N)
            x = tl.load(x_rows + columns, mask=inside, other=0.0).to(tl.float32)
            residual = tl.load(residual_rows + columns, mask=inside, other=0.0).to(tl.float32)
            added = (x + residual).to(residual_out_ptr.dtype.element_ty)
            tl.debug_barrier()  # x and residual may have come in other layouts than residual_out goes
            tl.store(residual_out_rows + columns, added, mask=inside)
            rounded = added.to(tl.float32)
            squares = tl.fma(rounded, rounded, squares)
        scale = _inverse_rms(squares, eps, N)
        tl.debug_barrier()  # every thread's part of residual_out is written before another reads it
        _scale_long_rows(residual_out_rows, out_rows, live, weight_ptr, scale, N, BLOCK, GEMMA)


@triton.jit
def _norm_heads(
    x_ptr,
    weight_ptr,
    out_ptr,
    stride_x_token,
    stride_x_head,
    stride_out_token,
    stride_out_head,
    eps,
    tokens,
    block,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GEMMA: tl.constexpr,
):
    """The norm of the `block`-th `ROWS` heads of x [tokens, HEADS, N]."""
    row = (block * ROWS + tl.arange(0, ROWS))[:, None]
    token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    x_rows = x_ptr + (token * stride_x_token + head * stride_x_head)
    out_rows = out_ptr + (token * stride_out_token + head * stride_out_head)
    _norm_rows(x_rows, out_rows, row < tokens * HEADS, weight_ptr, eps, N, BLOCK, ROWS, GEMMA)


@triton.jit(do_not_specialize=["tokens"])
def qk_norm_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_q_out_token,
    stride_q_out_head,
    stride_k_out_token,
    stride_k_out_head,
    eps,
    tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GEMMA: tl.constexpr,
):
    """rms_norm of every head of q and of k, in one launch: the first programs have q, the others k."""
    program = tl.program_id(0)
    q_programs = tl.cdiv(tokens * HEADS, ROWS)
    if program < q_programs:
        _norm_heads(
            q_ptr,
            q_weight_ptr,
            q_out_ptr,
            stride_q_token,
            stride_q_head,
            stride_q_out_token,
            stride_q_out_head,
            eps,
            tokens,
            program,
            HEADS,
            N,
            BLOCK,
            ROWS,
            GEMMA,
        )
    else:
        _norm_heads(
            k_ptr,
            k_weight_ptr,
            k_out_ptr,
            stride_k_token,
            stride_k_head,
            stride_k_out_token,
            stride_k_out_head,
            eps,
            tokens,
            program - q_programs,
            KV_HEADS,
            N,
            BLOCK,
            ROWS,
            GEMMA,
        )


def launches(problem: Problem, params: RowParams, tile: RowTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of a norm."""
    data = pointer(problem.dtype)
    if problem.op == "qk_norm":
        return (_qk_norm_launch(problem, params, tile, arch),)
    kernel: Any = rms_norm_kernel
    tensors: tuple[str, ...] = ("x", "weight", "out")
    if problem.op == "fused_add_rms_norm":
        kernel, tensors = fused_add_rms_norm_kernel, ("x", "residual", "weight", "out", "residual_out")
    n = problem.size("n")
    arguments: dict[str, ArgumentType] = {f"{tensor}_ptr": data for tensor in tensors}
    arguments |= {f"stride_{tensor}": n for tensor in tensors if tensor != "weight"}
    arguments |= {"eps": "fp32", "rows": "i32"}
    shape = {"N": n, "BLOCK": row_width(n, params.block), "ROWS": tile.rows}
    return (row_launch(kernel, arguments, arch, tile.num_warps, **shape, GEMMA=problem.flag("gemma")),)


def _qk_norm_launch(problem: Problem, params: RowParams, tile: RowTile, arch: Arch) -> Launch:
    head_dim, heads, kv_heads = (problem.size(dim) for dim in ("head_dim", "num_heads", "num_kv_heads"))
    tensors = ("q", "k", "q_weight", "k_weight", "q_out", "k_out")
    arguments: dict[str, ArgumentType] = {f"{tensor}_ptr": pointer(problem.dtype) for tensor in tensors}
    for tensor in ("q", "k"):
        # As slices of a packed row of queries, keys and values.
        arguments[f"stride_{tensor}_token"] = (heads + 2 * kv_heads) * head_dim
        arguments[f"stride_{tensor}_head"] = head_dim
    for tensor, count in (("q_out", heads), ("k_out", kv_heads)):
        arguments[f"stride_{tensor}_token"] = count * head_dim
        arguments[f"stride_{tensor}_head"] = head_dim
    arguments |= {"eps": "fp32", "tokens": "i32"}
    shape = {"N": head_dim, "BLOCK": row_width(head_dim, params.block), "ROWS": tile.rows}
    counts = {"HEADS": heads, "KV_HEADS": kv_heads}
    return row_launch(qk_norm_kernel, arguments, arch, tile.num_warps, **counts, **shape, GEMMA=problem.flag("gemma"))


def bind_rms_norm(context: BindContext) -> Kernel:
    """x [m, n], weight [n], eps, out [m, n]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    per_program = context.tile.rows

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        rows = x.shape[0]
        launch((ceil_div(rows, per_program),), x, weight, out, x.stride(0), out.stride(0), eps, rows)

    return rms_norm


def bind_fused_add_rms_norm(context: BindContext) -> Kernel:
    """x and residual [m, n], weight [n], eps, out and residual_out [m, n]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    per_program = context.tile.rows

    def fused_add_rms_norm(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        residual_out: torch.Tensor,
    ) -> None:
        rows = x.shape[0]
        strides = (x.stride(0), residual.stride(0), out.stride(0), residual_out.stride(0))
        grid = (ceil_div(rows, per_program),)
        launch(grid, x, residual, weight, out, residual_out, *strides, eps, rows)

    return fused_add_rms_norm


def bind_qk_norm(context: BindContext) -> Kernel:
    """q [m, heads, d], k [m, kv_heads, d], q_weight and k_weight [d], eps, q_out and k_out shaped as q and k."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    heads, kv_heads = context.problem.size("num_heads"), context.problem.size("num_kv_heads")
    per_program = context.tile.rows

    def qk_norm(
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
        q_out: torch.Tensor,
        k_out: torch.Tensor,
    ) -> None:
        tokens = q.shape[0]
        programs = ceil_div(tokens * heads, per_program) + ceil_div(tokens * kv_heads, per_program)
        strides = (*q.stride()[:2], *k.stride()[:2], *q_out.stride()[:2], *k_out.stride()[:2])
        launch((programs,), q, k, q_weight, k_weight, q_out, k_out, *strides, eps, tokens)

    return qk_norm

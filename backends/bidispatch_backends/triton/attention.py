"""Paged attention whose bits for a query depend on its own position, keys and values alone.

KV is cut at absolute positions into splits of `KV_SPLIT`, and a split into tiles of `BLOCK_N`. A split starts from a
fresh (maximum, sum, accumulator); the splits are folded in ascending order. Decode computes splits in parallel and
folds them in a second kernel, prefill walks them in one program: the same functions, so the same arithmetic.

What keeps a row's bits free of the tile it lies in:
- sums over KV run through the matrix unit, the sum of the weights too (`tl.dot` with ones): a `tl.sum` would follow the
  layout, which follows the number of rows. A maximum is exact in any order.
- a tile or split the row does not see changes nothing: its weights are 0 and the others are scaled by exp2(0) = 1.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.errors import ArgumentError, UsageError
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, ceil_div, options, pointer, power_of_two
from bidispatch_backends.triton.params import AttentionParams, AttentionTile

__all__ = ["bind_attention", "fold_kernel", "launches", "split_kernel", "walk_kernel"]

_SUM_COLUMNS = tl.constexpr(16)  # the narrowest product every matrix unit has; all columns hold the same sum
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _last_at_most(starts_ptr, seqs, place, TOKENS: tl.constexpr, STEP: tl.constexpr):
    """The last sequence b with starts[b] // TOKENS + b · STEP <= place. starts[0] is 0."""
    low = tl.full((), 0, tl.int32)
    high = low + seqs
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts_ptr + middle) // TOKENS + middle * STEP <= place
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _visible_range(first, last, kv_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The KV positions [low, high) that queries at positions first..last see between them."""
    low = first * 0
    high = kv_len
    if CAUSAL:
        high = tl.minimum(last + 1, kv_len)
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0)
    return low, high


@triton.jit
def _no_lower_than_zero(maximum):
    """0 where nothing has been seen yet: -inf less -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    pages_ptr,
    begin,
    end,
    low,
    high,
    positions,
    score_scale,
    exp2_scale,
    stride_k_page,
    stride_k_slot,
    stride_v_page,
    stride_v_slot,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from a fresh state over the tiles that start at begin, begin + BLOCK_N, ... below end.

    Positions outside [low, high) are never loaded: their pages may belong to nobody. Returns the maximum [BLOCK_M] in
    units of log2, the sum of the weights [BLOCK_M, _SUM_COLUMNS] and the accumulator [BLOCK_M, BLOCK_D].
    """
    maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, _SUM_COLUMNS), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    dims = tl.arange(0, BLOCK_D)
    ones = tl.full((BLOCK_N, _SUM_COLUMNS), 1.0, dtype=v_ptr.dtype.element_ty)
    for start in range(begin, end, BLOCK_N):
        kv = start + tl.arange(0, BLOCK_N)
        live = (kv >= low) & (kv < high)
        page = tl.load(pages_ptr + kv // PAGE_SIZE, mask=live, other=0).to(tl.int64)
        slot = (kv % PAGE_SIZE).to(tl.int64)
        k_rows = page * stride_k_page + slot * stride_k_slot
        k = tl.load(k_ptr + k_rows[None, :] + dims[:, None], mask=live[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        if SOFTCAP:
            # tanh(|u|) = (1 - e) / (1 + e) with e = exp(-2 |u|) cannot overflow. The cap itself is in exp2_scale.
            u = scores * score_scale
            e = tl.exp2(tl.abs(u) * (-2.0 * _LOG2_E))
            scores = tl.where(u < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)
        visible = live[None, :]
        if CAUSAL:
            visible = visible & (kv[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (kv[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * exp2_scale)
        reference = _no_lower_than_zero(new_maximum)
        weights = tl.exp2(
            tl.fma(scores, tl.zeros_like(scores) + exp2_scale, tl.zeros_like(scores) - reference[:, None])
        )
        decay = tl.exp2(maximum - reference)[:, None]
        weights = weights.to(v_ptr.dtype.element_ty)
        v_rows = page * stride_v_page + slot * stride_v_slot
        v = tl.load(v_ptr + v_rows[:, None] + dims[None, :], mask=live[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        total = tl.dot(weights, ones, total * decay, input_precision="ieee")
        acc = tl.dot(weights, v, acc * decay, input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc


@triton.jit
def _fold(maximum, total, acc, split_maximum, split_total, split_acc):
    """Fold one more split into a state of maximum [rows], total [rows] and acc [rows, dims]."""
    new_maximum = tl.maximum(maximum, split_maximum)
    reference = _no_lower_than_zero(new_maximum)
    decay = tl.exp2(maximum - reference)
    split_decay = tl.exp2(split_maximum - reference)
    total = tl.fma(split_total, split_decay, total * decay)
    acc = tl.fma(split_acc, tl.zeros_like(split_acc) + split_decay[:, None], acc * decay[:, None])
    return new_maximum, total, acc


@triton.jit
def _finish(maximum, total, acc, sinks_ptr, heads):
    """acc / total, with the sinks of `heads` [rows] in the total. A row that sees nothing gives 0."""
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads) * _LOG2_E
        new_maximum = tl.maximum(maximum, sink)
        reference = _no_lower_than_zero(new_maximum)
        decay = tl.exp2(maximum - reference)
        total = tl.fma(total, decay, tl.exp2(sink - reference))
        acc = acc * decay[:, None]
    # A tile the row does not see turns -0 into +0; so that it cannot be told whether there was one, all zeros are +0.
    return tl.where((total == 0.0)[:, None], 0.0, acc / total[:, None]) + 0.0


@triton.jit
def _query_tile(
    query_start_ptr,
    kv_lens_ptr,
    seqs,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Which rows this program has. A tile holds TOKENS query tokens of one sequence, HEADS heads of one KV head each.

    Program 0 of axis 0 counts tiles: sequence b owns those from query_start[b] // TOKENS + b on, which leaves room for
    its last, partly filled one, whatever the lengths are. Returns the sequence, its KV length, the KV head, whether the
    tile has no row, per row the token, the head, the position and whether it is one; and the visible range.
    """
    tile = tl.program_id(0)
    seq = _last_at_most(query_start_ptr, seqs, tile, TOKENS, 1)
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    kv_len = tl.load(kv_lens_ptr + seq)
    first = (tile - query_start // TOKENS - seq) * TOKENS

    head_blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // head_blocks
    rows = tl.arange(0, BLOCK_M)
    tokens = first + rows // HEADS
    group_heads = tl.program_id(1) % head_blocks * HEADS + rows % HEADS
    valid = (rows < TOKENS * HEADS) & (tokens < query_len) & (group_heads < GROUP)
    offset = kv_len - query_len
    last = tl.minimum(first + TOKENS, query_len) - 1
    low, high = _visible_range(offset + first, offset + last, kv_len, CAUSAL, WINDOW)
    return (
        seq,
        kv_len,
        kv_head,
        first >= query_len,
        query_start + tokens,
        kv_head * GROUP + group_heads,
        offset + tokens,
        valid,
        low,
        high,
    )


@triton.jit(do_not_specialize=["seqs", "max_kv", "stride_table"])
def walk_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    sinks_ptr,
    out_ptr,
    score_scale,
    exp2_scale,
    seqs,
    max_kv,
    stride_table,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KV_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Prefill: a program has a query tile and walks every split it sees."""
    seq, kv_len, kv_head, empty, tokens, heads, positions, valid, low, high = _query_tile(
        query_start_ptr, kv_lens_ptr, seqs, GROUP, HEADS, TOKENS, BLOCK_M, CAUSAL, WINDOW
    )
    if empty:
        return
    dims = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = tokens.to(tl.int64)
    out_ptrs = out_ptr + (tokens * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
    if kv_len > max_kv:
        nothing = tl.full((BLOCK_M, BLOCK_D), float("nan"), dtype=tl.float32)
        tl.store(out_ptrs, nothing.to(out_ptr.dtype.element_ty), mask=inside)
        return
    q = tl.load(
        q_ptr + (tokens * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :], mask=inside, other=0.0
    )

    maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for split in range(low // KV_SPLIT, tl.cdiv(high, KV_SPLIT)):
        split_maximum, split_total, split_acc = _attend(
            q,
            k_ptr + kv_head.to(tl.int64) * stride_k_head,
            v_ptr + kv_head.to(tl.int64) * stride_v_head,
            table_ptr + seq.to(tl.int64) * stride_table,
            tl.maximum(split * KV_SPLIT, low // BLOCK_N * BLOCK_N),
            tl.minimum(split * KV_SPLIT + KV_SPLIT, high),
            low,
            high,
            positions,
            score_scale,
            exp2_scale,
            stride_k_page,
            stride_k_slot,
            stride_v_page,
            stride_v_slot,
            HEAD_DIM,
            PAGE_SIZE,
            CAUSAL,
            WINDOW,
            SOFTCAP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        maximum, total, acc = _fold(maximum, total, acc, split_maximum, tl.max(split_total, axis=1), split_acc)
    result = _finish(maximum, total, acc, sinks_ptr, tl.where(valid, heads, 0))
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seqs", "max_kv", "stride_table", "splits"])
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    score_scale,
    exp2_scale,
    seqs,
    max_kv,
    stride_table,
    splits,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KV_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Decode, first kernel: a program has one split of a query tile and writes its state.

    maxima and totals are [tokens, heads, splits], accs [tokens, heads, splits, BLOCK_D], all fp32.
    """
    seq, kv_len, kv_head, empty, tokens, heads, positions, valid, low, high = _query_tile(
        query_start_ptr, kv_lens_ptr, seqs, GROUP, HEADS, TOKENS, BLOCK_M, CAUSAL, WINDOW
    )
    split = tl.program_id(2)
    begin = split * KV_SPLIT
    if (empty | (kv_len > max_kv)) | ((begin >= high) | (begin + KV_SPLIT <= low)):
        return
    dims = tl.arange(0, BLOCK_D)
    tokens = tokens.to(tl.int64)
    q = tl.load(
        q_ptr + (tokens * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :],
        mask=valid[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    maximum, total, acc = _attend(
        q,
        k_ptr + kv_head.to(tl.int64) * stride_k_head,
        v_ptr + kv_head.to(tl.int64) * stride_v_head,
        table_ptr + seq.to(tl.int64) * stride_table,
        tl.maximum(begin, low // BLOCK_N * BLOCK_N),
        tl.minimum(begin + KV_SPLIT, high),
        low,
        high,
        positions,
        score_scale,
        exp2_scale,
        stride_k_page,
        stride_k_slot,
        stride_v_page,
        stride_v_slot,
        HEAD_DIM,
        PAGE_SIZE,
        CAUSAL,
        WINDOW,
        SOFTCAP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    slots = (tokens * (KV_HEADS * GROUP) + heads) * splits + split
    tl.store(maxima_ptr + slots, maximum, mask=valid)
    tl.store(totals_ptr + slots, tl.max(total, axis=1), mask=valid)
    tl.store(accs_ptr + slots[:, None] * BLOCK_D + dims[None, :], acc, mask=valid[:, None])


@triton.jit(do_not_specialize=["seqs", "max_kv", "splits"])
def fold_kernel(
    kv_lens_ptr,
    query_start_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    sinks_ptr,
    out_ptr,
    seqs,
    max_kv,
    splits,
    stride_out_token,
    stride_out_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Decode, second kernel: a program folds the splits of one head of one token."""
    token = tl.program_id(0)
    if token >= tl.load(query_start_ptr + seqs):
        return
    seq = _last_at_most(query_start_ptr, seqs, token, 1, 0)
    kv_len = tl.load(kv_lens_ptr + seq)
    position = kv_len - tl.load(query_start_ptr + seq + 1) + token
    low, high = _visible_range(position, position, kv_len, CAUSAL, WINDOW)

    head = tl.program_id(1) + tl.arange(0, 1)
    dims = tl.arange(0, BLOCK_D)
    out_ptrs = out_ptr + token.to(tl.int64) * stride_out_token + (head * stride_out_head)[:, None] + dims[None, :]
    inside = (dims < HEAD_DIM)[None, :]
    if kv_len > max_kv:
        nothing = tl.full((1, BLOCK_D), float("nan"), dtype=tl.float32)
        tl.store(out_ptrs, nothing.to(out_ptr.dtype.element_ty), mask=inside)
        return
    first_slot = (token.to(tl.int64) * HEADS + head) * splits
    maximum = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    acc = tl.zeros((1, BLOCK_D), dtype=tl.float32)
    for split in range(low // KV_SPLIT, tl.cdiv(high, KV_SPLIT)):
        slot = first_slot + split
        maximum, total, acc = _fold(
            maximum,
            total,
            acc,
            tl.load(maxima_ptr + slot),
            tl.load(totals_ptr + slot),
            tl.load(accs_ptr + slot[:, None] * BLOCK_D + dims[None, :]),
        )
    result = _finish(maximum, total, acc, sinks_ptr, head)
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class _Packing:
    """How rows of a query tile are made of tokens and of the heads that share a KV head."""

    heads: int
    tokens: int
    head_blocks: int

    @classmethod
    def of(cls, problem: Problem, block_m: int) -> _Packing:
        group = problem.size("num_heads") // problem.size("num_kv_heads")
        heads = min(group, block_m)
        return cls(heads, block_m // heads, ceil_div(group, heads))


def launches(
    problem: Problem, params: AttentionParams, tile: AttentionTile, arch: Arch
) -> tuple[Launch, Launch, Launch]:
    """The launches of `walk_kernel`, `split_kernel` and `fold_kernel`."""
    data, state = pointer(problem.dtype), pointer("float32")
    heads, kv_heads = problem.size("num_heads"), problem.size("num_kv_heads")
    head_dim = problem.size("head_dim")
    index = pointer("int32")
    inputs: dict[str, ArgumentType] = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), data)
    inputs |= dict.fromkeys(("table_ptr", "kv_lens_ptr", "query_start_ptr"), index)
    scales = {"score_scale": "fp32", "exp2_scale": "fp32"}
    sinks = {"sinks_ptr": state if problem.flag("sinks") else None}
    workspace = dict.fromkeys(("maxima_ptr", "totals_ptr", "accs_ptr"), state)
    strides: dict[str, ArgumentType] = {"stride_q_token": heads * head_dim, "stride_q_head": head_dim}
    for cache in ("k", "v"):
        strides[f"stride_{cache}_page"] = problem.size("page_size") * kv_heads * head_dim
        strides[f"stride_{cache}_slot"] = kv_heads * head_dim
        strides[f"stride_{cache}_head"] = head_dim
    out_strides = {"stride_out_token": heads * head_dim, "stride_out_head": head_dim}
    sizes = {"seqs": "i32", "max_kv": "i32"}

    masks: dict[str, Constant] = {"CAUSAL": problem.flag("causal"), "WINDOW": problem.size("window")}
    widths: dict[str, Constant] = {
        "HEAD_DIM": head_dim,
        "KV_SPLIT": params.kv_split,
        "BLOCK_D": max(16, power_of_two(head_dim)),
    }
    attend: dict[str, Constant] = (
        masks | widths | {"PAGE_SIZE": problem.size("page_size"), "SOFTCAP": float(problem["softcap"]) > 0}
    )
    attend |= {"BLOCK_N": params.block_n, "GROUP": heads // kv_heads}

    def packed(block_m: int) -> dict[str, Constant]:
        packing = _Packing.of(problem, block_m)
        return attend | {"BLOCK_M": block_m, "HEADS": packing.heads, "TOKENS": packing.tokens}

    # Without the fusion: the compiler would contract a product and a sum in one kernel and not in the other.
    return (
        Launch(
            walk_kernel,
            inputs | sinks | {"out_ptr": data} | scales | sizes | {"stride_table": "i32"} | strides | out_strides,
            packed(tile.prefill_block_m),
            options(arch, tile.prefill_warps, tile.prefill_stages, fp_fusion=False),
        ),
        Launch(
            split_kernel,
            inputs | workspace | scales | sizes | {"stride_table": "i32", "splits": "i32"} | strides,
            packed(tile.decode_block_m) | {"KV_HEADS": kv_heads},
            options(arch, tile.decode_warps, tile.decode_stages, fp_fusion=False),
        ),
        Launch(
            fold_kernel,
            {"kv_lens_ptr": index, "query_start_ptr": index, **workspace, **sinks, "out_ptr": data, **sizes}
            | {"splits": "i32", **out_strides},
            masks | widths | {"HEADS": heads},
            options(arch, 1, 1, fp_fusion=False),
        ),
    )


def bind_attention(context: BindContext) -> Kernel:
    """Bind for calls up to `context.limits`; holds the workspace of the parallel splits.

    Which path a call takes follows from its numbers of tokens and sequences alone, and both give the same bits. A
    sequence longer than `max_seq_len`, or than its block table holds, gives NaN: its length is only known on the GPU.
    Raises `UsageError` when the limits name no `max_seq_len`.
    """
    problem, params, tile, limits = context.problem, context.params, context.tile, context.limits
    if limits.max_seq_len < 1:
        raise UsageError(f"{problem} is bound without max_seq_len; bind(..., max_seq_len=<longest KV of a sequence>)")
    walk, split, fold = launches(problem, params, tile, context.device.arch)
    heads, kv_heads, page_size = (problem.size(dim) for dim in ("num_heads", "num_kv_heads", "page_size"))
    softcap = float(problem["softcap"])
    log2_e = math.log2(math.e)
    prefill = _Packing.of(problem, tile.prefill_block_m)
    decode = _Packing.of(problem, tile.decode_block_m)

    max_splits = ceil_div(limits.max_seq_len, params.kv_split)
    width = cast("int", split.constants["BLOCK_D"])
    states = heads * max_splits  # of one token
    affordable = (tile.workspace_mb << 20) // (states * (width + 2) * 4)
    parallel_tokens = min(tile.decode_tokens, limits.max_tokens, affordable)
    maxima, totals, accs = (
        torch.empty(parallel_tokens * states * size, dtype=torch.float32, device=context.device.torch_device)
        for size in (1, 1, width)
    )

    def attention(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        sinks: torch.Tensor | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if not scale > 0:
            raise ArgumentError(f"{problem}: scale must be above 0, not {scale}")
        tokens, seqs = q.shape[0], seq_lens.shape[0]
        max_kv = min(limits.max_seq_len, block_table.shape[1] * page_size)
        scales = (scale / softcap, softcap * log2_e) if softcap else (1.0, scale * log2_e)
        inputs = (q, k_cache, v_cache, block_table, seq_lens, query_start_loc)
        sizes = (seqs, max_kv)
        strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
        out_strides = out.stride()[:2]
        if tokens > parallel_tokens:
            tiles = tokens // prefill.tokens + seqs
            walk(
                (tiles, kv_heads * prefill.head_blocks),
                *inputs,
                sinks,
                out,
                *scales,
                *sizes,
                block_table.stride(0),
                *strides,
                *out_strides,
            )
            return
        splits = ceil_div(max_kv, params.kv_split)
        workspace = (maxima, totals, accs)
        tiles = tokens // decode.tokens + seqs
        split(
            (tiles, kv_heads * decode.head_blocks, splits),
            *inputs,
            *workspace,
            *scales,
            *sizes,
            block_table.stride(0),
            splits,
            *strides,
        )
        fold((tokens, heads), seq_lens, query_start_loc, *workspace, sinks, out, *sizes, splits, *out_strides)

    return attention

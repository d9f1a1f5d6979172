"""Multi-head latent attention, absorbed: a query's bits follow from its own position and its sequence's cache alone.

As in `bidispatch_backends.triton.attention`: KV is cut at absolute positions into splits of `KV_SPLIT`, a split into
tiles of `BLOCK_N`; a split starts from a fresh (maximum, sum, accumulator), and splits are folded in ascending order.
Decode computes splits in parallel and folds them in a second kernel, prefill walks them in one program. Sums over KV
run through the matrix unit, the sum of the weights too; a maximum is exact in any order; a tile or split that a row
does not see changes nothing.

A score is the product over the compressed part of the cache, to which the one over the rotary part is added in the same
accumulator. The compressed part of a tile is loaded once: it is both key and value.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.errors import ArgumentError, UsageError
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, ceil_div, options, pointer, power_of_two
from bidispatch_backends.triton.mla_params import MlaParams, MlaTile

__all__ = ["bind_attention_mla", "fold_kernel", "launches", "split_kernel", "walk_kernel"]

_SUM_COLUMNS = tl.constexpr(16)  # the narrowest product every matrix unit has; all columns hold the same sum
_FOLD_WARPS = 2


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
def _no_lower_than_zero(maximum):
    """0 where nothing has been seen yet: -inf less -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _cache_rows(kv, high, pages_ptr, stride_page, stride_slot, PAGE_SIZE: tl.constexpr):
    """Where positions kv [BLOCK_N] below `high` are in the cache; the table is not read for others."""
    page = tl.load(pages_ptr + kv // PAGE_SIZE, mask=kv < high, other=0).to(tl.int64)
    return page * stride_page + (kv % PAGE_SIZE).to(tl.int64) * stride_slot


@triton.jit
def _attend(
    q,
    q_rope,
    kv_ptr,
    pages_ptr,
    begin,
    end,
    high,
    positions,
    exp2_scale,
    stride_page,
    stride_slot,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Attend from a fresh state over the tiles that start at begin, begin + BLOCK_N, ... below end.

    Positions from `high` on are never loaded: their pages may belong to nobody. Returns the maximum [BLOCK_M] in units
    of log2, the sum of the weights [BLOCK_M, _SUM_COLUMNS] and the accumulator [BLOCK_M, BLOCK_C].
    """
    maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, _SUM_COLUMNS), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    dims = tl.arange(0, BLOCK_C)
    rope_dims = tl.arange(0, BLOCK_R)
    ones = tl.full((BLOCK_N, _SUM_COLUMNS), 1.0, dtype=kv_ptr.dtype.element_ty)
    # Pages are found a tile ahead, so that the loads of a tile wait for no other load.
    rows = _cache_rows(begin + tl.arange(0, BLOCK_N), high, pages_ptr, stride_page, stride_slot, PAGE_SIZE)
    for start in range(begin, end, BLOCK_N):
        kv = start + tl.arange(0, BLOCK_N)
        live = kv < high
        compressed = tl.load(
            kv_ptr + rows[:, None] + dims[None, :], mask=live[:, None] & (dims < RANK)[None, :], other=0.0
        )
        rope = tl.load(
            kv_ptr + rows[None, :] + (rope_dims + RANK)[:, None],
            mask=live[None, :] & (rope_dims < ROPE)[:, None],
            other=0.0,
        )
        rows = _cache_rows(kv + BLOCK_N, high, pages_ptr, stride_page, stride_slot, PAGE_SIZE)
        scores = tl.dot(q, tl.trans(compressed), input_precision="ieee")
        scores = tl.dot(q_rope, rope, scores, input_precision="ieee")
        visible = live[None, :] & (kv[None, :] <= positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * exp2_scale)
        reference = _no_lower_than_zero(new_maximum)
        weights = tl.exp2(
            tl.fma(scores, tl.zeros_like(scores) + exp2_scale, tl.zeros_like(scores) - reference[:, None])
        )
        decay = tl.exp2(maximum - reference)[:, None]
        weights = weights.to(kv_ptr.dtype.element_ty)
        total = tl.dot(weights, ones, total * decay, input_precision="ieee")
        acc = tl.dot(weights, compressed, acc * decay, input_precision="ieee")
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
def _finish(total, acc):
    """acc / total. A row that sees nothing gives 0; all zeros are +0, as in `attention`."""
    return tl.where((total == 0.0)[:, None], 0.0, acc / total[:, None]) + 0.0


@triton.jit
def _query_tile(
    query_start_ptr,
    kv_lens_ptr,
    seqs,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Which rows this program has: TOKENS query tokens of one sequence times HEADS heads.

    Program 0 of axis 0 counts tiles: sequence b owns those from query_start[b] // TOKENS + b on, which leaves room for
    its last, partly filled one, whatever the lengths are. Returns the sequence, its KV length, whether the tile has no
    row, per row the token, the head, the position and whether it is one; and the KV position behind the last one seen.
    """
    tile = tl.program_id(0)
    seq = _last_at_most(query_start_ptr, seqs, tile, TOKENS, 1)
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    kv_len = tl.load(kv_lens_ptr + seq)
    first = (tile - query_start // TOKENS - seq) * TOKENS

    rows = tl.arange(0, BLOCK_M)
    tokens = first + rows // HEADS
    heads = tl.program_id(1) * HEADS + rows % HEADS
    valid = (rows < TOKENS * HEADS) & (tokens < query_len) & (heads < NUM_HEADS)
    offset = kv_len - query_len
    high = tl.minimum(offset + tl.minimum(first + TOKENS, query_len), kv_len)
    return seq, kv_len, first >= query_len, query_start + tokens, heads, offset + tokens, valid, high


@triton.jit
def _load_queries(
    q_ptr,
    tokens,
    heads,
    valid,
    stride_q_token,
    stride_q_head,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The compressed part [rows, BLOCK_C] and the rotary part [rows, BLOCK_R] of a tile's queries."""
    dims = tl.arange(0, BLOCK_C)
    rope_dims = tl.arange(0, BLOCK_R)
    rows = (tokens.to(tl.int64) * stride_q_token + heads * stride_q_head)[:, None]
    q = tl.load(q_ptr + rows + dims[None, :], mask=valid[:, None] & (dims < RANK)[None, :], other=0.0)
    q_rope = tl.load(
        q_ptr + rows + (rope_dims + RANK)[None, :], mask=valid[:, None] & (rope_dims < ROPE)[None, :], other=0.0
    )
    return q, q_rope


@triton.jit(do_not_specialize=["seqs", "max_kv", "stride_table"])
def walk_kernel(
    q_ptr,
    kv_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    out_ptr,
    exp2_scale,
    seqs,
    max_kv,
    stride_table,
    stride_q_token,
    stride_q_head,
    stride_page,
    stride_slot,
    stride_out_token,
    stride_out_head,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KV_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Prefill: a program has a query tile and walks every split it sees."""
    seq, kv_len, empty, tokens, heads, positions, valid, high = _query_tile(
        query_start_ptr, kv_lens_ptr, seqs, NUM_HEADS, HEADS, TOKENS, BLOCK_M
    )
    if empty:
        return
    dims = tl.arange(0, BLOCK_C)
    inside = valid[:, None] & (dims < RANK)[None, :]
    out_ptrs = out_ptr + (tokens.to(tl.int64) * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
    if kv_len > max_kv:
        nothing = tl.full((BLOCK_M, BLOCK_C), float("nan"), dtype=tl.float32)
        tl.store(out_ptrs, nothing.to(out_ptr.dtype.element_ty), mask=inside)
        return
    q, q_rope = _load_queries(q_ptr, tokens, heads, valid, stride_q_token, stride_q_head, RANK, ROPE, BLOCK_C, BLOCK_R)
    maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for split in range(tl.cdiv(high, KV_SPLIT)):
        split_maximum, split_total, split_acc = _attend(
            q,
            q_rope,
            kv_ptr,
            table_ptr + seq.to(tl.int64) * stride_table,
            split * KV_SPLIT,
            tl.minimum(split * KV_SPLIT + KV_SPLIT, high),
            high,
            positions,
            exp2_scale,
            stride_page,
            stride_slot,
            RANK,
            ROPE,
            PAGE_SIZE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_C,
            BLOCK_R,
        )
        maximum, total, acc = _fold(maximum, total, acc, split_maximum, tl.max(split_total, axis=1), split_acc)
    tl.store(out_ptrs, _finish(total, acc).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seqs", "max_kv", "stride_table", "splits"])
def split_kernel(
    q_ptr,
    kv_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    exp2_scale,
    seqs,
    max_kv,
    stride_table,
    splits,
    stride_q_token,
    stride_q_head,
    stride_page,
    stride_slot,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KV_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Decode, first kernel: a program has one split of a query tile and writes its state.

    maxima and totals are [tokens, heads, splits], accs [tokens, heads, splits, BLOCK_C], all fp32.
    """
    seq, kv_len, empty, tokens, heads, positions, valid, high = _query_tile(
        query_start_ptr, kv_lens_ptr, seqs, NUM_HEADS, HEADS, TOKENS, BLOCK_M
    )
    split = tl.program_id(2)
    begin = split * KV_SPLIT
    if (empty | (kv_len > max_kv)) | (begin >= high):
        return
    q, q_rope = _load_queries(q_ptr, tokens, heads, valid, stride_q_token, stride_q_head, RANK, ROPE, BLOCK_C, BLOCK_R)
    maximum, total, acc = _attend(
        q,
        q_rope,
        kv_ptr,
        table_ptr + seq.to(tl.int64) * stride_table,
        begin,
        tl.minimum(begin + KV_SPLIT, high),
        high,
        positions,
        exp2_scale,
        stride_page,
        stride_slot,
        RANK,
        ROPE,
        PAGE_SIZE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_C,
        BLOCK_R,
    )
    slots = (tokens.to(tl.int64) * NUM_HEADS + heads) * splits + split
    tl.store(maxima_ptr + slots, maximum, mask=valid)
    tl.store(totals_ptr + slots, tl.max(total, axis=1), mask=valid)
    tl.store(accs_ptr + slots[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :], acc, mask=valid[:, None])


@triton.jit(do_not_specialize=["seqs", "max_kv", "splits"])
def fold_kernel(
    kv_lens_ptr,
    query_start_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    out_ptr,
    seqs,
    max_kv,
    splits,
    stride_out_token,
    stride_out_head,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    KV_SPLIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Decode, second kernel: a program folds the splits of one head of one token."""
    token = tl.program_id(0)
    if token >= tl.load(query_start_ptr + seqs):
        return
    seq = _last_at_most(query_start_ptr, seqs, token, 1, 0)
    kv_len = tl.load(kv_lens_ptr + seq)
    high = kv_len - tl.load(query_start_ptr + seq + 1) + token + 1

    head = tl.program_id(1) + tl.arange(0, 1)
    dims = tl.arange(0, BLOCK_C)
    out_ptrs = out_ptr + token.to(tl.int64) * stride_out_token + (head * stride_out_head)[:, None] + dims[None, :]
    inside = (dims < RANK)[None, :]
    if kv_len > max_kv:
        nothing = tl.full((1, BLOCK_C), float("nan"), dtype=tl.float32)
        tl.store(out_ptrs, nothing.to(out_ptr.dtype.element_ty), mask=inside)
        return
    first_slot = (token.to(tl.int64) * NUM_HEADS + head) * splits
    maximum = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    acc = tl.zeros((1, BLOCK_C), dtype=tl.float32)
    for split in range(tl.cdiv(high, KV_SPLIT)):
        slot = first_slot + split
        maximum, total, acc = _fold(
            maximum,
            total,
            acc,
            tl.load(maxima_ptr + slot),
            tl.load(totals_ptr + slot),
            tl.load(accs_ptr + slot[:, None] * BLOCK_C + dims[None, :]),
        )
    tl.store(out_ptrs, _finish(total, acc).to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class _Packing:
    """How rows of a query tile are made of tokens and heads."""

    heads: int
    tokens: int
    head_blocks: int

    @classmethod
    def of(cls, problem: Problem, block_m: int) -> _Packing:
        heads = min(problem.size("num_heads"), block_m)
        return cls(heads, block_m // heads, ceil_div(problem.size("num_heads"), heads))


def _block_c(problem: Problem) -> int:
    """Columns of the compressed part: a power of two, 16 at least."""
    return max(16, power_of_two(problem.size("kv_lora_rank")))


def launches(problem: Problem, params: MlaParams, tile: MlaTile, arch: Arch) -> tuple[Launch, Launch, Launch]:
    """The launches of `walk_kernel`, `split_kernel` and `fold_kernel`."""
    data, state, index = pointer(problem.dtype), pointer("float32"), pointer("int32")
    heads, rank, rope = (problem.size(dim) for dim in ("num_heads", "kv_lora_rank", "rope_dim"))
    width = rank + rope
    inputs: dict[str, ArgumentType] = {"q_ptr": data, "kv_ptr": data}
    inputs |= dict.fromkeys(("table_ptr", "kv_lens_ptr", "query_start_ptr"), index)
    workspace = dict.fromkeys(("maxima_ptr", "totals_ptr", "accs_ptr"), state)
    sizes = {"exp2_scale": "fp32", "seqs": "i32", "max_kv": "i32", "stride_table": "i32"}
    strides: dict[str, ArgumentType] = {
        "stride_q_token": heads * width,
        "stride_q_head": width,
        "stride_page": problem.size("page_size") * width,
        "stride_slot": width,
    }
    out_strides = {"stride_out_token": heads * rank, "stride_out_head": rank}
    fold: dict[str, Constant] = {
        "NUM_HEADS": heads,
        "RANK": rank,
        "KV_SPLIT": params.kv_split,
        "BLOCK_C": _block_c(problem),
    }
    attend: dict[str, Constant] = fold | {
        "ROPE": rope,
        "BLOCK_R": max(16, power_of_two(rope)),
        "PAGE_SIZE": problem.size("page_size"),
        "BLOCK_N": params.block_n,
    }

    def packed(block_m: int) -> dict[str, Constant]:
        packing = _Packing.of(problem, block_m)
        return attend | {"BLOCK_M": block_m, "HEADS": packing.heads, "TOKENS": packing.tokens}

    # Without the fusion: the compiler would contract a product and a sum in one kernel and not in the other.
    return (
        Launch(
            walk_kernel,
            inputs | {"out_ptr": data} | sizes | strides | out_strides,
            packed(tile.prefill_block_m),
            options(arch, tile.prefill_warps, tile.prefill_stages, fp_fusion=False),
        ),
        Launch(
            split_kernel,
            inputs | workspace | sizes | {"splits": "i32"} | strides,
            packed(tile.decode_block_m),
            options(arch, tile.decode_warps, tile.decode_stages, fp_fusion=False),
        ),
        Launch(
            fold_kernel,
            {"kv_lens_ptr": index, "query_start_ptr": index, **workspace, "out_ptr": data}
            | {"seqs": "i32", "max_kv": "i32", "splits": "i32", **out_strides},
            fold,
            options(arch, _FOLD_WARPS, 1, fp_fusion=False),
        ),
    )


def bind_attention_mla(context: BindContext) -> Kernel:
    """Bind for calls up to `context.limits`; holds the workspace of the parallel splits.

    Which path a call takes follows from its numbers of tokens and sequences alone, and both give the same bits. A
    sequence longer than `max_seq_len`, or than its block table holds, gives NaN: its length is only known on the GPU.
    Raises `UsageError` when the limits name no `max_seq_len`; the kernel raises `ArgumentError` for a scale that is not
    above 0.
    """
    problem, params, tile, limits = context.problem, context.params, context.tile, context.limits
    if limits.max_seq_len < 1:
        raise UsageError(f"{problem} is bound without max_seq_len; bind(..., max_seq_len=<longest KV of a sequence>)")
    walk, split, fold = launches(problem, params, tile, context.device.arch)
    heads, page_size = problem.size("num_heads"), problem.size("page_size")
    prefill = _Packing.of(problem, tile.prefill_block_m)
    decode = _Packing.of(problem, tile.decode_block_m)

    width = _block_c(problem)
    states = heads * ceil_div(limits.max_seq_len, params.kv_split)  # of one token
    affordable = (tile.workspace_mb << 20) // (states * (width + 2) * 4)
    parallel_tokens = min(tile.decode_tokens, limits.max_tokens, affordable)
    maxima, totals, accs = (
        torch.empty(parallel_tokens * states * size, dtype=torch.float32, device=context.device.torch_device)
        for size in (1, 1, width)
    )

    def attention_mla(
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if not scale > 0:
            raise ArgumentError(f"{problem}: scale must be above 0, not {scale}")
        tokens, seqs = q.shape[0], seq_lens.shape[0]
        max_kv = min(limits.max_seq_len, block_table.shape[1] * page_size)
        inputs = (q, kv_cache, block_table, seq_lens, query_start_loc)
        sizes = (scale * math.log2(math.e), seqs, max_kv, block_table.stride(0))
        strides = (*q.stride()[:2], *kv_cache.stride()[:2])
        out_strides = out.stride()[:2]
        if tokens > parallel_tokens:
            grid = (tokens // prefill.tokens + seqs, prefill.head_blocks)
            walk(grid, *inputs, out, *sizes, *strides, *out_strides)
            return
        splits = ceil_div(max_kv, params.kv_split)
        workspace = (maxima, totals, accs)
        split(
            (tokens // decode.tokens + seqs, decode.head_blocks, splits), *inputs, *workspace, *sizes, splits, *strides
        )
        fold((tokens, heads), seq_lens, query_start_loc, *workspace, out, seqs, max_kv, splits, *out_strides)

    return attention_mla

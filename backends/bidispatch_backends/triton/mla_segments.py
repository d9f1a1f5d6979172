"""Latent attention's calls of many sequences: programs that walk runs of splits. `mla_hopper_segments` has its twin."""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from bidispatch_backends.triton.attention_kernels import _rows_of_tile, _splits_of
from bidispatch_backends.triton.attention_state import finish, fold, split_start, visible_range
from bidispatch_backends.triton.mla_kernels import _attend, _load_queries
from bidispatch_backends.triton.mla_runs import pair_at, part_of, places_of, run_of

__all__ = ["latent_segment_kernel"]


@triton.jit(do_not_specialize=["seqs", "max_kv", "capacity", "stride_table"])
def latent_segment_kernel(
    q_ptr,
    kv_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    folded_ptr,
    running_ptr,
    bases_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    out_ptr,
    exp2_scale,
    seqs,
    max_kv,
    capacity,
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
    SPLITS: tl.constexpr,
    MOST_QUERIES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What `latent_split_kernel` does, where there are enough sequences to fill the GPU without their splits.

    The programs' parts are those of `mla_runs`. Of a pair that a program begins, it folds all splits it has as
    `latent_walk_kernel` does. Has it the whole pair, it stores the result; else the folded state, in the place of the
    first split's. Of a pair that a program before it began, which is its first one at most, it stores the state of each
    split as `latent_split_kernel` does.

    folded: [tokens, heads], for `fold_kernel`: up to which split, excluded, that token's and head's are folded; -1
    where the result is stored. Every pair's first split has a program, so none is left from an earlier call.
    running: used by the twin alone.
    """
    head_blocks: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    batch = tl.arange(0, BLOCK_B)
    there = batch < seqs
    query_lens = tl.load(query_start_ptr + batch + 1, mask=there, other=0)
    query_lens -= tl.load(query_start_ptr + batch, mask=there, other=0)
    kv_lens = tl.load(kv_lens_ptr + batch, mask=there, other=0)
    _, splits = _splits_of(query_lens, kv_lens, max_kv, True, 0, SPLITS)
    query_tiles, kv_tiles, bases, parallel = places_of(
        query_lens, kv_lens, splits, tl.num_programs(0), capacity, TOKENS, MOST_QUERIES, BLOCK_N, head_blocks
    )
    if tl.program_id(0) == 0:
        tl.store(bases_ptr + batch, tl.where(parallel, bases, -1), mask=there)
    place, stop = part_of(tl.program_id(0), tl.num_programs(0), query_tiles, kv_tiles, head_blocks)
    dims = tl.arange(0, BLOCK_L)
    while place < stop:
        head_block, query_tile, seq, base, first_place, tiles = pair_at(place, batch, query_tiles, kv_tiles, bases)
        query_start = tl.load(query_start_ptr + seq)
        query_len = tl.load(query_start_ptr + seq + 1) - query_start
        kv_len = tl.load(kv_lens_ptr + seq)
        _first_split, seq_splits = _splits_of(query_len, kv_len, max_kv, True, 0, SPLITS)
        first_token = query_tile * TOKENS
        first = kv_len - query_len + first_token
        last = tl.minimum(first + TOKENS, kv_len) - 1
        _low, high = visible_range(first, last, kv_len, True, 0)
        next_place = tl.minimum(first_place + tiles, stop)
        split, end_split, begin, end = run_of(place - first_place, next_place - first_place, high, SPLITS, BLOCK_N)
        begins_pair, ends_pair = split == 0, end == high
        place = next_place

        _kv_head, tile_tokens, heads, valid = _rows_of_tile(head_block, NUM_HEADS, HEADS, TOKENS, BLOCK_M)
        tokens = first_token + tile_tokens
        valid = valid & (tokens < query_len)
        rows = (query_start + tokens).to(tl.int64)
        q, q_rope = _load_queries(
            q_ptr, rows * stride_q_token + heads * stride_q_head, valid, RANK, ROPE, BLOCK_L, BLOCK_R
        )
        while begin < end:
            slot = split
            maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_M,), dtype=tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
            stage_end = tl.where(begins_pair, end, tl.minimum(split_start(split + 1, SPLITS), end))
            while begin < stage_end:
                split_end = tl.minimum(split_start(split + 1, SPLITS), stage_end)
                split_maximum, split_total, split_acc = _attend(
                    q,
                    q_rope,
                    kv_ptr,
                    table_ptr + seq.to(tl.int64) * stride_table,
                    begin,
                    split_end,
                    high,
                    first,
                    kv_len - query_len + tokens,
                    exp2_scale,
                    stride_page,
                    stride_slot,
                    RANK,
                    ROPE,
                    PAGE_SIZE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_L,
                    BLOCK_R,
                )
                maximum, total, acc = fold(maximum, total, acc, split_maximum, tl.max(split_total, axis=1), split_acc)
                begin = split_end
                split += 1
            if begins_pair:
                folded = tl.where(ends_pair, -1, end_split)
                tl.store(folded_ptr + rows * NUM_HEADS + heads, tl.zeros_like(heads) + folded, mask=valid)
            if begins_pair & ends_pair:
                result = finish(maximum, total, acc, None, heads, None, 0, 0).to(out_ptr.dtype.element_ty)
                out_rows = rows * stride_out_token + heads * stride_out_head
                inside = valid[:, None] & (dims < RANK)[None, :]
                tl.store(out_ptr + out_rows[:, None] + dims[None, :], result, mask=inside)
            else:
                states = (base.to(tl.int64) + tokens * seq_splits + slot) * NUM_HEADS + heads
                tl.store(maxima_ptr + states, maximum, mask=valid)
                tl.store(totals_ptr + states, total, mask=valid)
                tl.store(accs_ptr + states[:, None] * BLOCK_L + dims[None, :], acc, mask=valid[:, None])

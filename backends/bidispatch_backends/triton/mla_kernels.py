"""Kernels of multi-head latent attention: splits in parallel, or one program that walks the splits of a query tile.

The splits, their fold and who serves a sequence are those of `attention_kernels`, whose `fold_kernel` serves here as it
is. What differs is a KV tile: the compressed KV is loaded once and is both key and value, and a score is the product
over it carried on, in the same accumulator, over the rotary part. All query heads share a row of the cache, so that
rows of a query tile are tokens and heads. What keeps a row's bits free of its tile is written in `attention_state`.
"""

# Kernel arguments are Triton values, which no annotation describes.
# RET505, SIM102: a branch on a constexpr must be an `if` of its own, or both sides are compiled.
# ruff: noqa: ANN001, ANN201, ANN202, RET505, SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from bidispatch_backends.triton.attention_kernels import _last_at_most, _rows_of_tile, _splits_of
from bidispatch_backends.triton.attention_state import (
    _SUM_COLUMNS,
    _fresh,
    _no_lower_than_zero,
    finish,
    fold,
    split_at,
    split_start,
    visible_range,
)

__all__ = ["latent_split_kernel", "latent_walk_kernel"]


@triton.jit
def _find_rows(start, pages_ptr, high, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each position of a tile, and its slot there.

    Positions from `high` on are never loaded: what is found in their place has a weight of 0.
    """
    place = tl.minimum(start + tl.arange(0, BLOCK_N), high - 1)
    return tl.load(pages_ptr + place // PAGE_SIZE), place % PAGE_SIZE


@triton.jit
def _load_padded(pointers, dims, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of what is WIDTH wide. A mask only where the block is wider: loads without one are faster."""
    if WIDTH == BLOCK:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(dims < WIDTH)[None, :], other=0.0)


@triton.jit
def _attend_tiles(
    maximum,
    total,
    acc,
    begin,
    end,
    q,
    q_rope,
    kv_ptr,
    pages_ptr,
    high,
    positions,
    exp2_scale,
    stride_page,
    stride_slot,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Carry a state over the tiles at begin, begin + BLOCK_N, ... Without MASKED every row sees all positions."""
    dims, rope_dims = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    ones = tl.full((BLOCK_N, _SUM_COLUMNS), 1.0, dtype=q.dtype)
    page, slot = _find_rows(begin, pages_ptr, high, PAGE_SIZE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        rows = kv_ptr + (page.to(tl.int64) * stride_page + slot.to(tl.int64) * stride_slot)[:, None]
        # The next tile's pages a tile ahead: see attention_state.
        page, slot = _find_rows(start + BLOCK_N, pages_ptr, high, PAGE_SIZE, BLOCK_N)
        latent = _load_padded(rows + dims[None, :], dims, RANK, BLOCK_L)
        rope = _load_padded(rows + RANK + rope_dims[None, :], rope_dims, ROPE, BLOCK_R)
        scores = tl.dot(q, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee")
        if MASKED:
            kv = start + tl.arange(0, BLOCK_N)
            visible = (kv < high)[None, :] & (kv[None, :] <= positions[:, None])
            scores = tl.where(visible, scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * exp2_scale)
        reference = _no_lower_than_zero(new_maximum)
        weights = tl.exp2(
            tl.fma(scores, tl.zeros_like(scores) + exp2_scale, tl.zeros_like(scores) - reference[:, None])
        )
        decay = tl.exp2(maximum - reference)[:, None]
        weights = weights.to(q.dtype)
        total = tl.dot(weights, ones, total * decay, input_precision="ieee")
        acc = tl.dot(weights, latent, acc * decay, input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc


@triton.jit
def _attend(
    q,
    q_rope,
    kv_ptr,
    pages_ptr,
    begin,
    end,
    high,
    first,
    positions,
    exp2_scale,
    stride_page,
    stride_slot,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Attend from a fresh state over the tiles of one split: those that start at begin, begin + BLOCK_N, ... below end.

    The tile's first query is at position `first`; the positions below `high` are those its queries see between them.
    Returns the maximum [BLOCK_M] in units of log2, the sum of the weights [BLOCK_M, _SUM_COLUMNS] and the accumulator
    [BLOCK_M, BLOCK_L].
    """
    maximum, total, acc = _fresh(BLOCK_M, BLOCK_L)
    # The tiles that every row sees whole come first; in the others a mask hides what is behind a row's position.
    full_end = tl.minimum(first + 1, high) // BLOCK_N * BLOCK_N
    full_end = tl.maximum(tl.minimum(full_end, end), begin)
    maximum, total, acc = _attend_tiles(
        maximum,
        total,
        acc,
        begin,
        full_end,
        q,
        q_rope,
        kv_ptr,
        pages_ptr,
        high,
        positions,
        exp2_scale,
        stride_page,
        stride_slot,
        RANK,
        ROPE,
        PAGE_SIZE,
        BLOCK_N,
        BLOCK_L,
        BLOCK_R,
        False,
    )
    maximum, total, acc = _attend_tiles(
        maximum,
        total,
        acc,
        full_end,
        end,
        q,
        q_rope,
        kv_ptr,
        pages_ptr,
        high,
        positions,
        exp2_scale,
        stride_page,
        stride_slot,
        RANK,
        ROPE,
        PAGE_SIZE,
        BLOCK_N,
        BLOCK_L,
        BLOCK_R,
        True,
    )
    return maximum, total, acc


@triton.jit
def _load_queries(
    q_ptr, rows, valid, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The two parts of the queries at offsets `rows` [BLOCK_M]: [BLOCK_M, BLOCK_L] and [BLOCK_M, BLOCK_R]."""
    dims, rope_dims = tl.arange(0, BLOCK_L)[None, :], tl.arange(0, BLOCK_R)[None, :]
    starts, there = q_ptr + rows[:, None], valid[:, None]
    q = tl.load(starts + dims, mask=there & (dims < RANK), other=0.0)
    q_rope = tl.load(starts + RANK + rope_dims, mask=there & (rope_dims < ROPE), other=0.0)
    return q, q_rope


@triton.jit(do_not_specialize=["seqs", "max_kv", "capacity", "stride_table"])
def latent_split_kernel(
    q_ptr,
    kv_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    bases_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    exp2_scale,
    seqs,
    max_kv,
    capacity,
    stride_table,
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
    SPLITS: tl.constexpr,
    MOST_QUERIES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Splits in parallel, for every sequence of up to MOST_QUERIES query tokens that the workspace has room for.

    Work items, the workspace and bases are those of attention's `split_kernel`.
    """
    batch = tl.arange(0, BLOCK_B)
    there = batch < seqs
    starts = tl.load(query_start_ptr + batch, mask=there, other=0)
    query_lens = tl.load(query_start_ptr + batch + 1, mask=there, other=0) - starts
    kv_lens = tl.load(kv_lens_ptr + batch, mask=there, other=0)
    _, splits = _splits_of(query_lens, kv_lens, max_kv, True, 0, SPLITS)
    parallel = (query_lens > 0) & (query_lens <= MOST_QUERIES)
    slots = tl.where(parallel, query_lens * splits, 0)
    slot_ends = tl.cumsum(slots, 0)
    parallel = parallel & (slot_ends <= capacity)
    if tl.program_id(0) == 0:
        tl.store(bases_ptr + batch, tl.where(parallel, slot_ends - slots, -1), mask=there)
    items = tl.where(parallel, tl.cdiv(query_lens, TOKENS) * splits, 0)
    item_ends = tl.cumsum(items, 0)

    head_blocks: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    dims = tl.arange(0, BLOCK_L)
    for work in range(tl.program_id(0), tl.sum(items) * head_blocks, tl.num_programs(0)):
        item = work // head_blocks
        before = item_ends <= item
        seq = tl.sum(before.to(tl.int32))
        item = item - tl.max(tl.where(before, item_ends, 0))
        base = tl.max(tl.where(before, slot_ends, 0)).to(tl.int64)

        query_start = tl.load(query_start_ptr + seq)
        query_len = tl.load(query_start_ptr + seq + 1) - query_start
        kv_len = tl.load(kv_lens_ptr + seq)
        first_split, seq_splits = _splits_of(query_len, kv_len, max_kv, True, 0, SPLITS)
        # The last splits first: they are the longest. A split's tiles come one after another and share its keys.
        tiles = tl.cdiv(query_len, TOKENS)
        split = first_split + seq_splits - 1 - item // tiles
        first_token = item % tiles * TOKENS
        first = kv_len - query_len + first_token
        last = tl.minimum(first + TOKENS, kv_len) - 1
        low, high = visible_range(first, last, kv_len, True, 0)
        begin = tl.maximum(split_start(split, SPLITS), low)  # low is 0: there is no window
        end = tl.minimum(split_start(split + 1, SPLITS), high)

        _kv_head, tile_tokens, heads, valid = _rows_of_tile(work % head_blocks, NUM_HEADS, HEADS, TOKENS, BLOCK_M)
        tokens = first_token + tile_tokens
        valid = valid & (tokens < query_len)
        if begin < end:  # else none of this tile's rows sees the split, and no fold reads it
            rows = (query_start + tokens).to(tl.int64) * stride_q_token + heads * stride_q_head
            q, q_rope = _load_queries(q_ptr, rows, valid, RANK, ROPE, BLOCK_L, BLOCK_R)
            maximum, total, acc = _attend(
                q,
                q_rope,
                kv_ptr,
                table_ptr + seq.to(tl.int64) * stride_table,
                begin,
                end,
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
            states = (base + tokens * seq_splits + (split - first_split)) * NUM_HEADS + heads
            tl.store(maxima_ptr + states, maximum, mask=valid)
            tl.store(totals_ptr + states, tl.max(total, axis=1), mask=valid)
            tl.store(accs_ptr + states[:, None] * BLOCK_L + dims[None, :], acc, mask=valid[:, None])


@triton.jit(do_not_specialize=["seqs", "max_kv", "stride_table"])
def latent_walk_kernel(
    q_ptr,
    kv_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    bases_ptr,
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
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Prefill: a program has a query tile and walks every split it sees.

    Tiles are counted as in attention's `walk_kernel`: axis 0 are a tile's heads, so that programs next to each other
    read the same rows of the cache, axis 1 its tokens. With bases_ptr, sequences that the parallel splits took
    (bases[b] >= 0) are left alone.
    """
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = _last_at_most(query_start_ptr, seqs, tile, TOKENS)
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    first_token = (tile - query_start // TOKENS - seq) * TOKENS
    if first_token >= query_len:
        return
    if bases_ptr is not None:
        if tl.load(bases_ptr + seq) >= 0:
            return
    kv_len = tl.load(kv_lens_ptr + seq)

    _, tile_tokens, heads, valid = _rows_of_tile(tl.program_id(0), NUM_HEADS, HEADS, TOKENS, BLOCK_M)
    tokens = first_token + tile_tokens
    valid = valid & (tokens < query_len)
    dims = tl.arange(0, BLOCK_L)
    inside = valid[:, None] & (dims < RANK)[None, :]
    rows = (query_start + tokens).to(tl.int64)
    out_ptrs = out_ptr + (rows * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
    if kv_len > max_kv:
        nothing = tl.full((BLOCK_M, BLOCK_L), float("nan"), dtype=tl.float32)
        tl.store(out_ptrs, nothing.to(out_ptr.dtype.element_ty), mask=inside)
        return
    q, q_rope = _load_queries(q_ptr, rows * stride_q_token + heads * stride_q_head, valid, RANK, ROPE, BLOCK_L, BLOCK_R)
    first = kv_len - query_len + first_token
    last = tl.minimum(first + TOKENS, kv_len) - 1
    _, high = visible_range(first, last, kv_len, True, 0)

    maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
    for split in range(split_at(high - 1, SPLITS) + 1):
        split_maximum, split_total, split_acc = _attend(
            q,
            q_rope,
            kv_ptr,
            table_ptr + seq.to(tl.int64) * stride_table,
            split_start(split, SPLITS),
            tl.minimum(split_start(split + 1, SPLITS), high),
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
    result = finish(maximum, total, acc, None, heads, None, 0, 0)
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)

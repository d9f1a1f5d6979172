"""Kernels of paged attention: splits in parallel and their fold, or one program that walks the splits of a query tile.

Which of them serves a sequence is decided on the GPU, from its number of query tokens and the room in the workspace, so
a captured CUDA graph serves any lengths. The bits do not follow the choice: all call `attention_state`.
"""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.language.extra import cuda

from bidispatch_backends.triton.attention_state import (
    attend,
    finish,
    fold,
    split_at,
    split_start,
    store_state,
    visible_range,
)

__all__ = ["fold_kernel", "segment_kernel", "split_kernel", "walk_kernel"]

_LOG2_E = tl.constexpr(math.log2(math.e))
_AT_ONCE = tl.constexpr(8)
"""Splits of a turn of the fold, whose loads are in flight two turns ahead; one that is not there changes nothing.

Compiling a fold takes 2 s with Triton 3.6, and 5 to 13 s with 3.7 to 3.9, whose pass TritonGPUCoalesceAsyncCopy took 4
of 4.5 s where it was looked into: the 24 loads of a turn make 72 to 96 copies (sm90, cross-compiled on one core).
"""


@triton.jit
def _last_at_most(starts_ptr, seqs, place, TOKENS: tl.constexpr):
    """The last sequence b with starts[b] // TOKENS + b <= place. starts[0] is 0."""
    low = seqs * 0
    high = low + seqs
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts_ptr + middle) // TOKENS + middle <= place
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _splits_of(query_len, kv_len, max_kv, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr):
    """The first split that a sequence's queries see, and how many; none past max_kv, which gives NaN later, and of no
    positions, which give 0.
    """
    low, high = visible_range(kv_len - query_len, kv_len - 1, kv_len, CAUSAL, WINDOW)
    first_split = split_at(low, SPLITS)
    splits = split_at(tl.maximum(high - 1, 0), SPLITS) - first_split + 1
    return first_split, tl.where((high > low) & (kv_len <= max_kv), splits, 0)


@triton.jit
def _parallel_sequences(
    kv_lens_ptr,
    query_start_ptr,
    bases_ptr,
    seqs,
    max_kv,
    capacity,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    MOST_QUERIES: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """All sequences, [BLOCK_B], with those whose splits run in parallel told from the others, which `walk_kernel` has.

    Returns their numbers, query starts, query lengths, KV lengths, numbers of splits (0 of the others) and where the
    workspace has their states. One program stores the latter for the kernels that follow, -1 for the others.
    """
    batch = tl.arange(0, BLOCK_B)
    there = batch < seqs
    starts = tl.load(query_start_ptr + batch, mask=there, other=0)
    query_lens = tl.load(query_start_ptr + batch + 1, mask=there, other=0) - starts
    kv_lens = tl.load(kv_lens_ptr + batch, mask=there, other=0)
    _, splits = _splits_of(query_lens, kv_lens, max_kv, CAUSAL, WINDOW, SPLITS)
    parallel = (query_lens > 0) & (query_lens <= MOST_QUERIES)
    slots = tl.where(parallel, query_lens * splits, 0)
    slot_ends = tl.cumsum(slots, 0)
    parallel = parallel & (slot_ends <= capacity)
    bases = slot_ends - slots
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(bases_ptr + batch, tl.where(parallel, bases, -1), mask=there)
    return batch, starts, query_lens, kv_lens, tl.where(parallel, splits, 0), bases


@triton.jit
def _larger(a, b, c, d, e, f, other_a, other_b, other_c, other_d, other_e, other_f):
    return (
        tl.maximum(a, other_a),
        tl.maximum(b, other_b),
        tl.maximum(c, other_c),
        tl.maximum(d, other_d),
        tl.maximum(e, other_e),
        tl.maximum(f, other_f),
    )


@triton.jit
def _rows_of_tile(head_block, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile holds TOKENS query tokens of a sequence, HEADS heads of one KV head each.

    Returns the KV head, and per row the token within the tile, the query head and whether there is such a row.
    """
    head_blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = head_block // head_blocks
    rows = tl.arange(0, BLOCK_M)
    group_heads = head_block % head_blocks * HEADS + rows % HEADS
    valid = (rows < TOKENS * HEADS) & (group_heads < GROUP)
    return kv_head, rows // HEADS, tl.where(valid, kv_head * GROUP + group_heads, 0), valid


@triton.jit
def _score_scales(score_scale, exp2_scale, k_scales_ptr, kv_head, stride_k_scale, SOFTCAP: tl.constexpr):
    """What scores are multiplied by before the soft cap, and on their way to exp2; with the scale of the keys."""
    if k_scales_ptr is not None:
        k_scale = tl.load(k_scales_ptr + kv_head * stride_k_scale)
        if SOFTCAP:
            score_scale = score_scale * k_scale
        else:
            exp2_scale = exp2_scale * k_scale
    return score_scale, exp2_scale


@triton.jit
def _negative_slopes(slopes_ptr, heads):
    """ALiBi's slope of each row's head, negative and in units of log2; zeros, unused, where there are none."""
    slopes = tl.zeros_like(heads).to(tl.float32)
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads) * -_LOG2_E
    return slopes


@triton.jit(do_not_specialize=["seqs", "max_kv", "capacity", "stride_table", "stride_k_scale"])
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    slopes_ptr,
    k_scales_ptr,
    bases_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    score_scale,
    exp2_scale,
    seqs,
    max_kv,
    capacity,
    stride_table,
    stride_k_scale,
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
    ALIBI: tl.constexpr,
    FENCED: tl.constexpr,
    SPLITS: tl.constexpr,
    MOST_QUERIES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Splits in parallel, for every sequence of up to MOST_QUERIES query tokens that the workspace has room for.

    A work item is one split of one query tile and KV head. The programs, whose number is fixed, share out the items
    there are: the captured grid does not follow the longest sequence possible, only the loop follows the lengths. So
    that no second kernel has to make a schedule, each program counts the items of all sequences, BLOCK_B of them or
    fewer: three loads and two prefix sums.

    A state (maximum, sum, accumulator) of a token's split has a slot for each head: maxima and totals are
    [capacity, heads], accs [capacity, heads, BLOCK_D], all fp32. Sequence b's slots start at bases[b], its tokens in
    order, each with the sequence's number of splits; bases[b] is -1 where the sequence is left to `walk_kernel`.

    DEPENDENT: the fold is launched before this kernel has ended. EARLY: as soon as every program has started, which
    suits few short ones; else as their last ends, since programs that wait take places.
    """
    if DEPENDENT and EARLY:
        cuda.gdc_launch_dependents()
    batch, starts, query_lens, kv_lens, splits, bases = _parallel_sequences(
        kv_lens_ptr, query_start_ptr, bases_ptr, seqs, max_kv, capacity, CAUSAL, WINDOW, SPLITS, MOST_QUERIES, BLOCK_B
    )
    items = tl.cdiv(query_lens, TOKENS) * splits
    item_ends = tl.cumsum(items, 0)

    head_blocks: tl.constexpr = KV_HEADS * ((GROUP + HEADS - 1) // HEADS)
    dims = tl.arange(0, BLOCK_D)
    for work in range(tl.program_id(0), tl.sum(items) * head_blocks, tl.num_programs(0)):
        item = work // head_blocks
        # All that the item's sequence has, in one reduction: each would wait for all warps, and a load for memory.
        its = (item_ends - items <= item) & (item < item_ends)
        seq, before, base, query_start, query_len, kv_len = tl.reduce(
            (
                tl.where(its, batch, 0),
                tl.where(its, item_ends - items, 0),
                tl.where(its, bases, 0),
                tl.where(its, starts, 0),
                tl.where(its, query_lens, 0),
                tl.where(its, kv_lens, 0),
            ),
            0,
            _larger,
        )
        item = item - before
        base = base.to(tl.int64)
        first_split, seq_splits = _splits_of(query_len, kv_len, max_kv, CAUSAL, WINDOW, SPLITS)
        # The last splits first: they are the longest. A split's tiles come one after another and share its keys.
        tiles = tl.cdiv(query_len, TOKENS)
        split = first_split + seq_splits - 1 - item // tiles
        first_token = item % tiles * TOKENS
        first = kv_len - query_len + first_token
        last = tl.minimum(first + TOKENS, kv_len) - 1
        low, high = visible_range(first, last, kv_len, CAUSAL, WINDOW)
        begin = tl.maximum(split_start(split, SPLITS), low // BLOCK_N * BLOCK_N)
        end = tl.minimum(split_start(split + 1, SPLITS), high)

        kv_head, tile_tokens, heads, valid = _rows_of_tile(work % head_blocks, GROUP, HEADS, TOKENS, BLOCK_M)
        tokens = first_token + tile_tokens
        valid = valid & (tokens < query_len)
        rows = (query_start + tokens).to(tl.int64) * stride_q_token + heads * stride_q_head
        inside = valid[:, None] & (dims < HEAD_DIM)[None, :]
        if begin < end:  # else none of this tile's rows sees the split, and no fold reads it
            q = tl.load(q_ptr + rows[:, None] + dims[None, :], mask=inside, other=0.0)
            own_score_scale, own_exp2_scale = _score_scales(
                score_scale, exp2_scale, k_scales_ptr, kv_head, stride_k_scale, SOFTCAP
            )
            maximum, total, acc = attend(
                q,
                k_ptr + kv_head.to(tl.int64) * stride_k_head,
                v_ptr + kv_head.to(tl.int64) * stride_v_head,
                table_ptr + seq.to(tl.int64) * stride_table,
                begin,
                end,
                low,
                high,
                first,
                last,
                kv_len - query_len + tokens,
                _negative_slopes(slopes_ptr, heads),
                own_score_scale,
                own_exp2_scale,
                stride_k_page,
                stride_k_slot,
                stride_v_page,
                stride_v_slot,
                False,
                None,
                None,
                None,
                None,
                None,
                HEAD_DIM,
                PAGE_SIZE,
                CAUSAL,
                WINDOW,
                SOFTCAP,
                ALIBI,
                FENCED,
                SPLITS,
                False,
                0,
                True,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
            states = (base + tokens * seq_splits + (split - first_split)) * (KV_HEADS * GROUP) + heads
            store_state(maximum, total, acc, states, valid, maxima_ptr, totals_ptr, accs_ptr, BLOCK_D)
    if DEPENDENT and not EARLY:
        cuda.gdc_launch_dependents()


@triton.jit
def _largest_of_three(a, b, c, other_a, other_b, other_c):
    return tl.maximum(a, other_a), tl.maximum(b, other_b), tl.maximum(c, other_c)


@triton.jit
def _split_from(tile, first_tile, first_split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first split of a sequence that begins at its tile number `tile` or behind."""
    begins = (first_tile + tile) * BLOCK_N
    return tl.where(tile == 0, first_split, split_at(tl.maximum(begins - 1, 0), SPLITS) + 1)


@triton.jit(
    do_not_specialize=["seqs", "max_kv", "capacity", "stride_table", "stride_k_scale", "stride_v_scale"],
)
def segment_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    sinks_ptr,
    slopes_ptr,
    k_scales_ptr,
    v_scales_ptr,
    folded_ptr,
    bases_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    out_ptr,
    score_scale,
    exp2_scale,
    seqs,
    max_kv,
    capacity,
    stride_table,
    stride_k_scale,
    stride_v_scale,
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
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    FENCED: tl.constexpr,
    SPLITS: tl.constexpr,
    MOST_QUERIES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    HALVINGS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What `split_kernel` does, where there are enough sequences to fill the GPU without their splits.

    A pair is a query tile of a sequence and its heads of one KV head, which axis 0 counts. The KV tiles of the pairs of
    a KV head stand in one order, pair by pair and positions ascending, and each program on axis 1 has an equal part of
    it, moved to the next boundaries of splits: a split belongs to the program that has its first tile. So programs next
    to each other read the same pages at the same time. Of a pair that a program begins, it walks all splits it has in
    one loop, folded as `walk_kernel` folds them, so that loads are in flight across their boundaries. Has it the whole
    pair, it stores the result; else the folded state, in the place of the first split's. Of a pair that a program
    before it began, which is its first one at most, it walks the splits likewise and stores the state of each, as
    `split_kernel` does.

    Where programs would have fewer than LEAST_TILES tiles, half as many share them, HALVINGS times at most: short
    contexts then have fewer states to fold.

    folded: [tokens, heads], for `fold_kernel`: up to which split, excluded, that token's and head's are folded; -1
    where the result is stored. Every pair's first split has a program, so none is left from an earlier call.
    """
    batch, _, query_lens, kv_lens, splits, bases = _parallel_sequences(
        kv_lens_ptr, query_start_ptr, bases_ptr, seqs, max_kv, capacity, CAUSAL, WINDOW, SPLITS, MOST_QUERIES, BLOCK_B
    )
    lows, highs = visible_range(kv_lens - query_lens, kv_lens - 1, kv_lens, CAUSAL, WINDOW)
    seq_tiles = (tl.cdiv(highs, BLOCK_N) - lows // BLOCK_N) * tl.cdiv(query_lens, TOKENS)
    seq_tiles = tl.where(splits > 0, seq_tiles, 0)
    seq_ends = tl.cumsum(seq_tiles, 0)
    seq_starts = seq_ends - seq_tiles
    all_tiles = tl.sum(seq_tiles)
    programs = tl.num_programs(1)
    for _ in tl.static_range(HALVINGS):
        programs = tl.where(all_tiles < programs * LEAST_TILES, (programs + 1) // 2, programs)
    share, rest = all_tiles // programs, all_tiles % programs
    place = tl.program_id(1) * share + tl.minimum(tl.program_id(1), rest)
    stop = tl.where(tl.program_id(1) < programs, place + share + tl.where(tl.program_id(1) < rest, 1, 0), place)

    dims = tl.arange(0, BLOCK_D)
    kv_head, tile_tokens, heads, valid_heads = _rows_of_tile(tl.program_id(0), GROUP, HEADS, TOKENS, BLOCK_M)
    score_scale, exp2_scale = _score_scales(score_scale, exp2_scale, k_scales_ptr, kv_head, stride_k_scale, SOFTCAP)
    while place < stop:
        # A load of the sequence's lengths, which are near, spares registers.
        its = (seq_ends > place) & (seq_starts <= place)
        seq, before, base = tl.reduce(
            (tl.where(its, batch, 0), tl.where(its, seq_starts, 0), tl.where(its, bases, 0)), 0, _largest_of_three
        )
        query_start = tl.load(query_start_ptr + seq)
        query_len = tl.load(query_start_ptr + seq + 1) - query_start
        kv_len = tl.load(kv_lens_ptr + seq)
        low, high = visible_range(kv_len - query_len, kv_len - 1, kv_len, CAUSAL, WINDOW)
        first_split, seq_splits = _splits_of(query_len, kv_len, max_kv, CAUSAL, WINDOW, SPLITS)
        first_tile = low // BLOCK_N
        tiles = tl.cdiv(high, BLOCK_N) - first_tile
        query_tile = (place - before) // tiles
        pair_place = before + query_tile * tiles
        next_place = tl.minimum(pair_place + tiles, stop)
        begin_split = _split_from(place - pair_place, first_tile, first_split, SPLITS, BLOCK_N)
        end_split = _split_from(next_place - pair_place, first_tile, first_split, SPLITS, BLOCK_N)
        place = next_place

        first_token = query_tile * TOKENS
        first = kv_len - query_len + first_token
        last = tl.minimum(first + TOKENS, kv_len) - 1
        low, high = visible_range(first, last, kv_len, CAUSAL, WINDOW)
        begin = tl.maximum(split_start(begin_split, SPLITS), low // BLOCK_N * BLOCK_N)
        end = tl.minimum(split_start(end_split, SPLITS), high)
        begins_pair = begin_split <= split_at(low, SPLITS)
        ends_pair = end == high

        tokens = first_token + tile_tokens
        valid = valid_heads & (tokens < query_len)
        rows = (query_start + tokens).to(tl.int64)
        inside = valid[:, None] & (dims < HEAD_DIM)[None, :]
        q_rows = rows * stride_q_token + heads * stride_q_head
        q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=inside, other=0.0)
        states = (base.to(tl.int64) + tokens * seq_splits - first_split) * (KV_HEADS * GROUP) + heads
        if begin < end:
            maximum, total, acc = attend(
                q,
                k_ptr + kv_head.to(tl.int64) * stride_k_head,
                v_ptr + kv_head.to(tl.int64) * stride_v_head,
                table_ptr + seq.to(tl.int64) * stride_table,
                begin,
                end,
                low,
                high,
                first,
                last,
                kv_len - query_len + tokens,
                _negative_slopes(slopes_ptr, heads),
                score_scale,
                exp2_scale,
                stride_k_page,
                stride_k_slot,
                stride_v_page,
                stride_v_slot,
                begins_pair == 0,
                states,
                valid,
                maxima_ptr,
                totals_ptr,
                accs_ptr,
                HEAD_DIM,
                PAGE_SIZE,
                CAUSAL,
                WINDOW,
                SOFTCAP,
                ALIBI,
                FENCED,
                SPLITS,
                True,
                KV_HEADS * GROUP,
                True,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
            if begins_pair:
                folded = tl.where(ends_pair, -1, end_split)
                tl.store(folded_ptr + rows * (KV_HEADS * GROUP) + heads, tl.zeros_like(heads) + folded, mask=valid)
            if begins_pair & ends_pair:
                result = finish(maximum, total, acc, sinks_ptr, heads, v_scales_ptr, kv_head, stride_v_scale)
                out_rows = rows * stride_out_token + heads * stride_out_head
                result = result.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + out_rows[:, None] + dims[None, :], result, mask=inside)
            else:
                split = tl.where(begins_pair, first_split, split_at(end - 1, SPLITS))
                states += split * (KV_HEADS * GROUP)
                store_state(maximum, total, acc, states, valid, maxima_ptr, totals_ptr, accs_ptr, BLOCK_D)
    if DEPENDENT:  # at its end: the fold waits in places that other programs would need until then
        cuda.gdc_launch_dependents()


@triton.jit
def _fold_heads(
    sinks_ptr,
    v_scales_ptr,
    folded_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    out_ptr,
    first_head,
    row,
    token,
    query_len,
    kv_len,
    base,
    first_split,
    splits,
    stride_v_scale,
    stride_out_token,
    stride_out_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold what is left of a token and ROWS of its heads."""
    head = first_head + tl.arange(0, ROWS)
    kv_head = first_head // GROUP
    dims = tl.arange(0, BLOCK_D)
    inside = (dims < HEAD_DIM)[None, :]
    no_states = (splits == 0) | (base < 0)
    folded = tl.full((), 0, tl.int32)
    if folded_ptr is not None:
        folded = tl.load(folded_ptr + row * HEADS + first_head, mask=(splits > 0) & (base >= 0), other=0)
    if folded >= 0:  # else its result is stored
        position = kv_len - query_len + token
        low, high = visible_range(position, position, kv_len, CAUSAL, WINDOW)
        begin, end = split_at(low, SPLITS), split_at(tl.maximum(high - 1, 0), SPLITS) + 1
        slot = base.to(tl.int64) + token * splits - first_split
        maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        acc = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
        if no_states:  # past the limits NaN; of no positions 0, as where it is walked
            nothing = tl.where(kv_len > 0, float("nan"), 0.0)
            maximum, total, acc = maximum + nothing, total + nothing, acc + nothing
        else:
            if folded_ptr is not None:  # noqa: SIM102 - decided when it is compiled
                if folded > 0:
                    state = (slot + first_split) * HEADS + head
                    maximum = tl.load(maxima_ptr + state)
                    total = tl.load(totals_ptr + state)
                    acc = tl.load(accs_ptr + state[:, None] * BLOCK_D + dims[None, :])
                    begin = tl.maximum(begin, folded)
            for first in tl.range(begin, end, _AT_ONCE, num_stages=3):
                for step in tl.static_range(_AT_ONCE):
                    split = first + step
                    state = (slot + split) * HEADS + head
                    there = state * 0 + split < end
                    maximum, total, acc = fold(
                        maximum,
                        total,
                        acc,
                        tl.load(maxima_ptr + state, mask=there, other=float("-inf")),
                        tl.load(totals_ptr + state, mask=there, other=0.0),
                        tl.load(accs_ptr + state[:, None] * BLOCK_D + dims[None, :], mask=there[:, None], other=0.0),
                    )
        result = finish(maximum, total, acc, sinks_ptr, head, v_scales_ptr, kv_head, stride_v_scale)
        out_ptrs = out_ptr + row * stride_out_token + (head * stride_out_head)[:, None] + dims[None, :]
        tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["max_kv", "alone", "stride_v_scale"])
def fold_kernel(
    kv_lens_ptr,
    query_start_ptr,
    sinks_ptr,
    v_scales_ptr,
    folded_ptr,
    bases_ptr,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    out_ptr,
    max_kv,
    alone,
    stride_v_scale,
    stride_out_token,
    stride_out_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold what `split_kernel` wrote: a program has SPAN heads of a sequence, every num_programs(2)-th of its tokens.

    It folds ROWS heads at once, which divide SPAN, those of a query tile and those of a KV head. SPAN divides HEADS; it
    is more than ROWS where so few are left to fold that programs without any would take the time.

    alone: 1 where no `walk_kernel` follows. A sequence that would be left to it is beyond the limits, and gives NaN.
    folded_ptr: of `segment_kernel`, which has folded the first splits, or all; None after `split_kernel`.
    DEPENDENT: it is launched before that kernel has ended, and waits for it before it reads what it writes.
    """
    seq = tl.program_id(0)
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    kv_len = tl.load(kv_lens_ptr + seq)
    first_split, splits = _splits_of(query_len, kv_len, max_kv, CAUSAL, WINDOW, SPLITS)
    if DEPENDENT:
        cuda.gdc_wait()
    base = tl.load(bases_ptr + seq)
    if (base < 0) & (alone == 0):
        return

    first_head = tl.program_id(1) * SPAN
    for token in range(tl.program_id(2), query_len, tl.num_programs(2)):
        row = (query_start + token).to(tl.int64)
        if SPAN == ROWS:
            _fold_heads(
                sinks_ptr,
                v_scales_ptr,
                folded_ptr,
                maxima_ptr,
                totals_ptr,
                accs_ptr,
                out_ptr,
                first_head,
                row,
                token,
                query_len,
                kv_len,
                base,
                first_split,
                splits,
                stride_v_scale,
                stride_out_token,
                stride_out_head,
                HEADS,
                GROUP,
                HEAD_DIM,
                CAUSAL,
                WINDOW,
                SPLITS,
                ROWS,
                BLOCK_D,
            )
        else:
            left = tl.full((), 0, tl.int32)
            if (splits > 0) & (base >= 0):
                left = tl.max(tl.load(folded_ptr + row * HEADS + first_head + tl.arange(0, SPAN)), 0)
            if left >= 0:  # else all results are stored
                for head in range(first_head, first_head + SPAN, ROWS):
                    _fold_heads(
                        sinks_ptr,
                        v_scales_ptr,
                        folded_ptr,
                        maxima_ptr,
                        totals_ptr,
                        accs_ptr,
                        out_ptr,
                        head,
                        row,
                        token,
                        query_len,
                        kv_len,
                        base,
                        first_split,
                        splits,
                        stride_v_scale,
                        stride_out_token,
                        stride_out_head,
                        HEADS,
                        GROUP,
                        HEAD_DIM,
                        CAUSAL,
                        WINDOW,
                        SPLITS,
                        ROWS,
                        BLOCK_D,
                    )


@triton.jit(do_not_specialize=["seqs", "max_kv", "stride_table", "stride_k_scale", "stride_v_scale"])
def walk_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    sinks_ptr,
    slopes_ptr,
    k_scales_ptr,
    v_scales_ptr,
    bases_ptr,
    out_ptr,
    score_scale,
    exp2_scale,
    seqs,
    max_kv,
    stride_table,
    stride_k_scale,
    stride_v_scale,
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
    ALIBI: tl.constexpr,
    FENCED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Prefill: a program has a query tile and walks every split it sees.

    Axis 0 counts tiles: sequence b owns those from query_start[b] // TOKENS + b on, which leaves room for its last,
    partly filled one, whatever the lengths are. The last tiles, which see most, start first. With bases_ptr, sequences
    that `split_kernel` took (bases[b] >= 0) are left alone.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    seq = _last_at_most(query_start_ptr, seqs, tile, TOKENS)
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    first_token = (tile - query_start // TOKENS - seq) * TOKENS
    if first_token >= query_len:
        return
    if bases_ptr is not None:  # noqa: SIM102 - decided when it is compiled
        if tl.load(bases_ptr + seq) >= 0:
            return
    kv_len = tl.load(kv_lens_ptr + seq)

    kv_head, tile_tokens, heads, valid = _rows_of_tile(tl.program_id(1), GROUP, HEADS, TOKENS, BLOCK_M)
    tokens = first_token + tile_tokens
    valid = valid & (tokens < query_len)
    positions = kv_len - query_len + tokens
    dims = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (dims < HEAD_DIM)[None, :]
    rows = (query_start + tokens).to(tl.int64)
    out_ptrs = out_ptr + (rows * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
    if kv_len > max_kv:
        nothing = tl.full((BLOCK_M, BLOCK_D), float("nan"), dtype=tl.float32)
        tl.store(out_ptrs, nothing.to(out_ptr.dtype.element_ty), mask=inside)
        return
    first = kv_len - query_len + first_token
    last = tl.minimum(first + TOKENS, kv_len) - 1
    low, high = visible_range(first, last, kv_len, CAUSAL, WINDOW)
    if high <= low:
        nothing = tl.zeros((BLOCK_M, BLOCK_D), dtype=out_ptr.dtype.element_ty)
        tl.store(out_ptrs, nothing, mask=inside)
        return
    q = tl.load(
        q_ptr + (rows * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :], mask=inside, other=0.0
    )
    score_scale, exp2_scale = _score_scales(score_scale, exp2_scale, k_scales_ptr, kv_head, stride_k_scale, SOFTCAP)
    negative_slopes = _negative_slopes(slopes_ptr, heads)

    maximum, total, acc = attend(
        q,
        k_ptr + kv_head.to(tl.int64) * stride_k_head,
        v_ptr + kv_head.to(tl.int64) * stride_v_head,
        table_ptr + seq.to(tl.int64) * stride_table,
        low // BLOCK_N * BLOCK_N,
        high,
        low,
        high,
        first,
        last,
        positions,
        negative_slopes,
        score_scale,
        exp2_scale,
        stride_k_page,
        stride_k_slot,
        stride_v_page,
        stride_v_slot,
        False,
        None,
        None,
        None,
        None,
        None,
        HEAD_DIM,
        PAGE_SIZE,
        CAUSAL,
        WINDOW,
        SOFTCAP,
        ALIBI,
        FENCED,
        SPLITS,
        True,
        0,
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    result = finish(maximum, total, acc, sinks_ptr, heads, v_scales_ptr, kv_head, stride_v_scale)
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)

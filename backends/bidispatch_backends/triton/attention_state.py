"""Attention's arithmetic: which positions a split holds, one split over KV tiles, the fold of splits, the end.

KV is cut at absolute positions into splits, and a split into tiles of `BLOCK_N`. A split starts from a fresh (maximum,
sum, accumulator); the splits are folded in ascending order. Every kernel of attention calls these functions, so that
one order of additions serves all of them.

What keeps a row's bits free of the tile it lies in:
- sums over KV run through the matrix unit, the sum of the weights too (`tl.dot` with ones): a `tl.sum` would follow the
  layout, which follows the number of rows. A maximum is exact in any order.
- a tile or split the row does not see changes nothing: its weights are 0 and the others are scaled by exp2(0) = 1. So
  the tiles that every row of a program sees whole go without a mask, which would be all true.
- keys and values of an fp8 cache are widened to q's dtype, which is exact; their scales, one a KV head, join the scale
  of the scores and the last division, where they meet whole rows. FENCED hides from the compiler that they were narrow:
  for mma.sync, which decode's tiles have, it would give each instruction other elements of the sum (kWidth 4 instead of
  2, Triton 3.6 and 3.9) than wgmma has, which prefill's have. 538 of 4734 decoded rows differed so on an H100.
"""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = [
    "attend",
    "finish",
    "fold",
    "fold_decays",
    "fold_sums",
    "split_at",
    "split_start",
    "store_state",
    "visible_range",
]

_SUM_COLUMNS = tl.constexpr(16)  # the narrowest product every matrix unit has; all columns hold the same sum
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def split_start(index, SPLITS: tl.constexpr):
    """The first KV position of a split.

    SPLITS is (size, offset) of each range of sizes, flat: there a split starts at index · size + offset. Sizes grow, so
    the starts are a convex function of the index, and the line that holds is the highest.
    """
    start = index * SPLITS[0]
    for level in tl.static_range(1, len(SPLITS) // 2):
        start = tl.maximum(start, index * SPLITS[2 * level] + SPLITS[2 * level + 1])
    return start


@triton.jit
def split_at(position, SPLITS: tl.constexpr):
    """The split that holds a position: the inverse, where the lowest line holds."""
    index = position // SPLITS[0]
    for level in tl.static_range(1, len(SPLITS) // 2):
        index = tl.minimum(index, (position - SPLITS[2 * level + 1]) // SPLITS[2 * level])
    return index


@triton.jit
def visible_range(first, last, kv_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
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
def _load_rows(pointers, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of keys or values. A mask only where the head is narrower than the block: loads without one are faster."""
    if HEAD_DIM == BLOCK_D:  # noqa: SIM108 - decided when it is compiled
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=inside, other=0.0)
    return rows


@triton.jit
def _widen(values, dtype: tl.constexpr, FENCED: tl.constexpr):
    """Values of a cache in q's dtype."""
    wide = values.to(dtype)
    if FENCED:  # a move that may have effects is where the compiler's look at a product's operand ends
        wide = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [wide], dtype=wide.dtype, is_pure=False, pack=2)
    return wide


@triton.jit
def _find_pages(start, pages_ptr, low, high, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """The page of each position of a tile, and its slot there.

    Positions outside [low, high) are never loaded: their pages may belong to nobody. What is found in their place has a
    weight of 0; an address costs less than a mask on every element. ALIGNED: the tile starts a page, or lies in one,
    which then is a scalar; the slots are left to the caller.
    """
    if ALIGNED:
        index = start // PAGE_SIZE
        if PAGE_SIZE < BLOCK_N:
            index += tl.arange(0, BLOCK_N) // PAGE_SIZE
        index = tl.minimum(index, (high - 1) // PAGE_SIZE)
        slot = tl.full((), 0, tl.int64) + start % PAGE_SIZE
    else:
        place = tl.minimum(tl.maximum(start + tl.arange(0, BLOCK_N), low), high - 1)
        index = place // PAGE_SIZE
        slot = place % PAGE_SIZE
    return tl.load(pages_ptr + index), slot


@triton.jit
def _row_offsets(
    page, slot, stride_page, stride_slot, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):
    """Where in a cache the rows of a tile are; with ALIGNED, less what does not change from tile to tile."""
    offsets = page.to(tl.int64) * stride_page
    if (not ALIGNED) or PAGE_SIZE > BLOCK_N:
        offsets += slot.to(tl.int64) * stride_slot
    return offsets


@triton.jit
def _fresh(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """A state that has seen nothing: maximum, sum (in every column) and accumulator."""
    maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, _SUM_COLUMNS), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    return maximum, total, acc


@triton.jit
def _attend_tiles(
    maximum,
    total,
    acc,
    folded_maximum,
    folded_total,
    folded_acc,
    boundary,
    begin,
    end,
    q,
    k_ptr,
    v_ptr,
    pages_ptr,
    low,
    high,
    positions,
    negative_slopes,
    score_scale,
    exp2_scale,
    stride_k_page,
    stride_k_slot,
    stride_v_page,
    stride_v_slot,
    keeps,
    states,
    valid,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    FENCED: tl.constexpr,
    SPLITS: tl.constexpr,
    WALKS: tl.constexpr,
    HEADS: tl.constexpr,
    SKIPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Carry a state over the tiles at begin, begin + BLOCK_N, ... Without MASKED every row sees all positions.

    With WALKS the tiles may go on past `boundary`, where the state's split ends: it is folded there into the folded
    one, or stored if it `keeps` them, and starts afresh. A loop for each split would drain the pipeline of loads at
    every boundary.
    """
    dims = tl.arange(0, BLOCK_D)
    ones = tl.full((BLOCK_N, _SUM_COLUMNS), 1.0, dtype=q.dtype)
    # In tiles that all rows see whole, a position's slot is the same in every tile of a loop, and is added once. That
    # takes most of the arithmetic on addresses out of the loop, which else outweighs that of the softmax.
    ALIGNED: tl.constexpr = (not MASKED) and (BLOCK_N % PAGE_SIZE == 0 or PAGE_SIZE % BLOCK_N == 0)
    # Not those of float32, of which two do not both fit shared memory.
    EARLY: tl.constexpr = (WALKS or (SKIPS and MASKED)) and q.dtype != tl.float32
    # Of masked tiles decode has one or two, which a pipeline would only ask for later, behind its own arithmetic.
    STAGES: tl.constexpr = 1 if SKIPS and MASKED else None
    columns = tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + dims[:, None]
    v_ptrs = v_ptr + dims[None, :]
    if ALIGNED:
        slots = (columns % PAGE_SIZE).to(tl.int64)
        k_ptrs = k_ptrs + (slots * stride_k_slot)[None, :]
        v_ptrs = v_ptrs + (slots * stride_v_slot)[:, None]
    # A loop without turns would still work out and ask for the tiles that its first ones wait for: of a split of four
    # tiles, as many instructions as two of them.
    if (begin < end) or not SKIPS:
        page, slot = _find_pages(begin, pages_ptr, low, high, PAGE_SIZE, BLOCK_N, ALIGNED)
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            kv = start + columns
            k_rows = _row_offsets(page, slot, stride_k_page, stride_k_slot, PAGE_SIZE, BLOCK_N, ALIGNED)
            v_rows = _row_offsets(page, slot, stride_v_page, stride_v_slot, PAGE_SIZE, BLOCK_N, ALIGNED)
            # The next tile's pages a tile ahead: a load that waits for another in the same turn of the loop gets one
            # buffer from Triton's pipeliner, whatever the stages, and would be waited for as soon as it is asked for.
            page, slot = _find_pages(start + BLOCK_N, pages_ptr, low, high, PAGE_SIZE, BLOCK_N, ALIGNED)
            if ALIGNED and PAGE_SIZE >= BLOCK_N:  # the offsets are scalars
                k_tile, v_tile = k_ptrs + k_rows, v_ptrs + v_rows
            else:
                k_tile, v_tile = k_ptrs + k_rows[None, :], v_ptrs + v_rows[:, None]
            k = _load_rows(k_tile, (dims < HEAD_DIM)[:, None], HEAD_DIM, BLOCK_D)
            if EARLY:  # with the keys, so that one wait and one barrier serve both
                v = _load_rows(v_tile, (dims < HEAD_DIM)[None, :], HEAD_DIM, BLOCK_D)
            scores = tl.dot(q, _widen(k, q.dtype, FENCED), input_precision="ieee")
            if SOFTCAP:
                # tanh(|u|) = (1 - e) / (1 + e) with e = exp(-2 |u|) cannot overflow. The cap itself is in exp2_scale.
                u = scores * score_scale
                e = tl.exp2(tl.abs(u) * (-2.0 * _LOG2_E))
                scores = tl.where(u < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)
            scale = exp2_scale
            if ALIBI:
                distance = tl.abs(positions[:, None] - kv[None, :]).to(tl.float32)
                scores = tl.fma(scores, tl.zeros_like(scores) + exp2_scale, distance * negative_slopes[:, None])
                scale = 1.0
            if MASKED:
                visible = ((kv >= low) & (kv < high))[None, :]
                if CAUSAL:
                    visible = visible & (kv[None, :] <= positions[:, None])
                if WINDOW > 0:
                    visible = visible & (kv[None, :] > positions[:, None] - WINDOW)
                scores = tl.where(visible, scores, float("-inf"))

            before = maximum
            starts_split = False
            if WALKS:
                starts_split = start == boundary
                before = tl.where(starts_split, float("-inf"), maximum)
            new_maximum = tl.maximum(before, tl.max(scores, axis=1) * scale)
            reference = _no_lower_than_zero(new_maximum)
            weights = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + scale, tl.zeros_like(scores) - reference[:, None]))
            weights = weights.to(q.dtype)
            decay = tl.exp2(before - reference)
            if WALKS:
                decay = tl.where(starts_split, 1.0, decay)
            total = total * decay[:, None]
            acc = acc * decay[:, None]
            if WALKS:  # noqa: SIM102 - decided when it is compiled
                # After what scales the accumulator, by 1 here: were that not the first to read it, Triton would wait
                # for its product as soon as it is asked for, and not in the next turn, with that of the scores.
                if starts_split:
                    split_total = tl.max(total, axis=1)
                    if keeps:
                        ended = split_at(start, SPLITS) - 1
                        store_state(
                            maximum,
                            split_total,
                            acc,
                            states + ended * HEADS,
                            valid,
                            maxima_ptr,
                            totals_ptr,
                            accs_ptr,
                            BLOCK_D,
                        )
                    else:
                        folded_maximum, folded_total, folded_acc = fold(
                            folded_maximum, folded_total, folded_acc, maximum, split_total, acc
                        )
                    _, total, acc = _fresh(BLOCK_M, BLOCK_D)
                    boundary = split_start(split_at(start, SPLITS) + 1, SPLITS)
            if not EARLY:
                v = _load_rows(v_tile, (dims < HEAD_DIM)[None, :], HEAD_DIM, BLOCK_D)
            total = tl.dot(weights, ones, total, input_precision="ieee")
            acc = tl.dot(weights, _widen(v, q.dtype, FENCED), acc, input_precision="ieee")
            maximum = new_maximum
    return maximum, total, acc, folded_maximum, folded_total, folded_acc, boundary


@triton.jit
def attend(
    q,
    k_ptr,
    v_ptr,
    pages_ptr,
    begin,
    end,
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
    keeps,
    states,
    valid,
    maxima_ptr,
    totals_ptr,
    accs_ptr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    FENCED: tl.constexpr,
    SPLITS: tl.constexpr,
    WALKS: tl.constexpr,
    HEADS: tl.constexpr,
    SKIPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from a fresh state over the tiles that start at begin, begin + BLOCK_N, ... below end.

    begin is a multiple of BLOCK_N, `low < high`; the tile's queries are at positions first..last and see [low, high)
    between them. Without WALKS all is in one split. SKIPS is for few tiles: a loop without any then costs a branch.
    Returns the maximum [BLOCK_M] in units of log2, the sum of the weights [BLOCK_M] and the accumulator [BLOCK_M,
    BLOCK_D]; with WALKS those of all splits, folded.

    keeps: with WALKS, whether the state of each split is left as it is: those but the last, which is returned, are
    stored by `store_state`, split s at states [BLOCK_M] + s · HEADS. False needs no such arguments.
    """
    maximum, total, acc = _fresh(BLOCK_M, BLOCK_D)
    folded_maximum, folded_total, folded_acc = maximum, tl.max(total, axis=1), acc
    boundary = begin
    if WALKS:
        boundary = split_start(split_at(begin, SPLITS) + 1, SPLITS)

    # The tiles that all rows see whole, [full_begin, full_end): in the middle, none of them where first..last is wide.
    full_begin = begin
    full_end = high
    if CAUSAL:
        full_end = tl.minimum(first + 1, high)
    full_end = tl.maximum(tl.minimum(full_end // BLOCK_N * BLOCK_N, end), begin)
    if WINDOW > 0:
        full_begin = tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.cdiv(end, BLOCK_N) * BLOCK_N)
        full_end = tl.maximum(full_end, full_begin)
        maximum, total, acc, folded_maximum, folded_total, folded_acc, boundary = _attend_tiles(
            maximum,
            total,
            acc,
            folded_maximum,
            folded_total,
            folded_acc,
            boundary,
            begin,
            full_begin,
            q,
            k_ptr,
            v_ptr,
            pages_ptr,
            low,
            high,
            positions,
            negative_slopes,
            score_scale,
            exp2_scale,
            stride_k_page,
            stride_k_slot,
            stride_v_page,
            stride_v_slot,
            keeps,
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
            WALKS,
            HEADS,
            SKIPS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            True,
        )
    maximum, total, acc, folded_maximum, folded_total, folded_acc, boundary = _attend_tiles(
        maximum,
        total,
        acc,
        folded_maximum,
        folded_total,
        folded_acc,
        boundary,
        full_begin,
        full_end,
        q,
        k_ptr,
        v_ptr,
        pages_ptr,
        low,
        high,
        positions,
        negative_slopes,
        score_scale,
        exp2_scale,
        stride_k_page,
        stride_k_slot,
        stride_v_page,
        stride_v_slot,
        keeps,
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
        WALKS,
        HEADS,
        SKIPS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        False,
    )
    maximum, total, acc, folded_maximum, folded_total, folded_acc, boundary = _attend_tiles(
        maximum,
        total,
        acc,
        folded_maximum,
        folded_total,
        folded_acc,
        boundary,
        full_end,
        end,
        q,
        k_ptr,
        v_ptr,
        pages_ptr,
        low,
        high,
        positions,
        negative_slopes,
        score_scale,
        exp2_scale,
        stride_k_page,
        stride_k_slot,
        stride_v_page,
        stride_v_slot,
        keeps,
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
        WALKS,
        HEADS,
        SKIPS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        True,
    )
    row_total = tl.max(total, axis=1)
    if WALKS:  # noqa: SIM102 - decided when it is compiled
        if not keeps:
            maximum, row_total, acc = fold(folded_maximum, folded_total, folded_acc, maximum, row_total, acc)
    return maximum, row_total, acc


@triton.jit
def store_state(maximum, total, acc, states, valid, maxima_ptr, totals_ptr, accs_ptr, BLOCK_D: tl.constexpr):
    """Store a state in the workspace at `states` [rows], where it is `valid` [rows]; accs has BLOCK_D for each."""
    tl.store(maxima_ptr + states, maximum, mask=valid)
    tl.store(totals_ptr + states, total, mask=valid)
    tl.store(accs_ptr + states[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], acc, mask=valid[:, None])


@triton.jit
def fold_decays(maximum, split_maximum):
    """The maximum of a state and one more split, and what each of the two is scaled by."""
    new_maximum = tl.maximum(maximum, split_maximum)
    reference = _no_lower_than_zero(new_maximum)
    return new_maximum, tl.exp2(maximum - reference), tl.exp2(split_maximum - reference)


@triton.jit
def fold_sums(split_value, split_decay, value, decay):
    """Sums of a state with those of one more split, of one shape: a product, then a product and a sum in one."""
    return tl.fma(split_value, split_decay, value * decay)


@triton.jit
def fold(maximum, total, acc, split_maximum, split_total, split_acc):
    """Fold one more split into a state of maximum [rows], total [rows] and acc [rows, dims]."""
    new_maximum, decay, split_decay = fold_decays(maximum, split_maximum)
    total = fold_sums(split_total, split_decay, total, decay)
    acc = fold_sums(split_acc, tl.zeros_like(split_acc) + split_decay[:, None], acc, decay[:, None])
    return new_maximum, total, acc


@triton.jit
def finish(maximum, total, acc, sinks_ptr, heads, v_scales_ptr, kv_head, stride_v_scale):
    """acc / total, with the sinks of `heads` [rows] in the total, times the values' scale where there is one.

    A row that sees nothing gives 0.
    """
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads) * _LOG2_E
        new_maximum = tl.maximum(maximum, sink)
        reference = _no_lower_than_zero(new_maximum)
        decay = tl.exp2(maximum - reference)
        total = tl.fma(total, decay, tl.exp2(sink - reference))
        acc = acc * decay[:, None]
    if v_scales_ptr is not None:
        acc = acc * tl.load(v_scales_ptr + kv_head * stride_v_scale)
    # A tile the row does not see turns -0 into +0; so that it cannot be told whether there was one, all zeros are +0.
    return tl.where((total == 0.0)[:, None], 0.0, acc / total[:, None]) + 0.0

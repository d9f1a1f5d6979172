"""Prefill of paged attention on Hopper: `walk_kernel` with the softmax of a tile beside the products of the one before.

Triton waits for the product of the scores before it can issue that of the values, and for both warpgroups together.
Here, in Gluon, a turn issues the scores of tile i + 1, then the values of tile i, and does the softmax of tile i + 1
while the latter run, as FlashAttention-3 does (arXiv 2407.08608, section 3.2). The order of every sum is that of
`attention_state`, and so are the bits.
"""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

__all__ = ["overlapped_walk_kernel"]

# The name it had before Triton 3.8, or the one since.
_async_load = getattr(hopper.async_copy, "async_load", None) or hopper.async_copy.async_copy_global_to_shared

_LOG2_E = gl.constexpr(math.log2(math.e))
_SUM_COLUMNS = gl.constexpr(16)
_BUFFERS = gl.constexpr(3)
_WARPS = gl.constexpr(8)


@gluon.jit
def _split_start(index, SPLITS: gl.constexpr):
    start = index * SPLITS[0]
    for level in gl.static_range(1, len(SPLITS) // 2):
        start = gl.maximum(start, index * SPLITS[2 * level] + SPLITS[2 * level + 1])
    return start


@gluon.jit
def _split_at(position, SPLITS: gl.constexpr):
    index = position // SPLITS[0]
    for level in gl.static_range(1, len(SPLITS) // 2):
        index = gl.minimum(index, (position - SPLITS[2 * level + 1]) // SPLITS[2 * level])
    return index


@gluon.jit
def _last_at_most(starts_ptr, seqs, place, TOKENS: gl.constexpr):
    low = seqs * 0
    high = seqs
    while high - low > 1:
        middle = (low + high) // 2
        before = gl.load(starts_ptr + middle) // TOKENS + middle <= place
        low = gl.where(before, middle, low)
        high = gl.where(before, high, middle)
    return low


@gluon.jit
def _no_lower_than_zero(maximum):
    return gl.where(maximum == float("-inf"), 0.0, maximum)


@gluon.jit
def _fold(maximum, total, acc, split_maximum, split_total, split_acc, ROWS: gl.constexpr):
    new_maximum = gl.maximum(maximum, split_maximum)
    reference = _no_lower_than_zero(new_maximum)
    decay = gl.exp2(maximum - reference)
    split_decay = gl.exp2(split_maximum - reference)
    total = gl.fma(split_total, split_decay, total * decay)
    own = gl.convert_layout(decay, ROWS)[:, None]
    other = gl.convert_layout(split_decay, ROWS)[:, None]
    acc = gl.fma(split_acc, gl.zeros_like(split_acc) + other, acc * own)
    return new_maximum, total, acc


@gluon.jit
def _pages_at(start, pages_ptr, low, high, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, COPY: gl.constexpr):
    """The page of each position of a tile. Outside [low, high) pages may belong to nobody: the nearest inside."""
    columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COPY))
    place = gl.minimum(gl.maximum(start + columns, low), high - 1)
    return gl.load(pages_ptr + place // PAGE_SIZE)


@gluon.jit
def _copy(
    buffer,
    base_ptr,
    start,
    page,
    low,
    high,
    stride_page,
    stride_slot,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    COPY: gl.constexpr,
):
    """Ask for the rows of a tile; outside [low, high) for others, which nobody looks at."""
    columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COPY))
    dims = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, COPY))
    place = gl.minimum(gl.maximum(start + columns, low), high - 1)
    rows = page.to(gl.int64) * stride_page + (place % PAGE_SIZE) * stride_slot
    _async_load(buffer, base_ptr + rows[:, None] + dims[None, :])


@gluon.jit
def _softmax(
    scores,
    maximum,
    start,
    fresh,
    positions,
    low,
    high,
    scale,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SCORES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Weights of a tile, the new maximum, and what the sums so far are to be scaled by."""
    if MASKED:
        kv = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        visible = ((kv >= low) & (kv < high))[None, :]
        if CAUSAL:
            visible = visible & (kv[None, :] <= positions[:, None])
        scores = gl.where(visible, scores, float("-inf"))
    before = gl.where(fresh, float("-inf"), maximum)
    new_maximum = gl.maximum(before, gl.max(scores, axis=1) * scale)
    reference = _no_lower_than_zero(new_maximum)
    weights = gl.exp2(gl.fma(scores, gl.zeros_like(scores) + scale, gl.zeros_like(scores) - reference[:, None]))
    return weights, new_maximum, gl.exp2(before - reference)


@gluon.jit
def _turn(
    i,
    begin,
    end,
    weights,
    maximum,
    total,
    acc,
    folded_maximum,
    folded_total,
    folded_acc,
    boundary,
    value_page,
    key_page,
    next_page,
    q_shared,
    k_shared,
    v_shared,
    ones,
    k_ptr,
    v_ptr,
    pages_ptr,
    positions,
    low,
    high,
    scale,
    stride_k_page,
    stride_k_slot,
    stride_v_page,
    stride_v_slot,
    PAGE_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    COPY: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
    VALUES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Values of tile i, scores and softmax of tile i + 1; asks for the keys of i + 3 and the values of i + 2."""
    start = begin + (i + 1) * BLOCK_N
    hopper.async_copy.wait_group(1)  # the keys of i + 1, the values of i; what was read before may be overwritten
    scores = hopper.warpgroup_mma(
        q_shared,
        k_shared.index((i + 1) % _BUFFERS).permute((1, 0)),
        gl.zeros((BLOCK_M, BLOCK_N), gl.float32, SCORES),
        use_acc=False,
        is_async=True,
    )
    total = hopper.warpgroup_mma(
        gl.convert_layout(weights, gl.DotOperandLayout(0, SUMS, 2)), ones, total, is_async=True
    )
    acc = hopper.warpgroup_mma(weights, v_shared.index(i % _BUFFERS), acc, is_async=True)

    fresh = start == boundary
    scores = hopper.warpgroup_mma_wait(2, deps=[scores])
    new_weights, new_maximum, decay = _softmax(
        scores, maximum, start, fresh, positions, low, high, scale, CAUSAL, BLOCK_N, SCORES, MASKED
    )
    new_weights = new_weights.to(q_shared.dtype)

    # The branch, and the new weights' names in the wait below, keep the softmax in front of that wait: the compiler
    # would move it behind, where nothing is left to hide it.
    if start + BLOCK_N < end:
        _copy(
            k_shared.index(i % _BUFFERS),
            k_ptr,
            start + 2 * BLOCK_N,
            key_page,
            low,
            high,
            stride_k_page,
            stride_k_slot,
            PAGE_SIZE,
            BLOCK_N,
            BLOCK_D,
            COPY,
        )
        _copy(
            v_shared.index((i + 2) % _BUFFERS),
            v_ptr,
            start + BLOCK_N,
            value_page,
            low,
            high,
            stride_v_page,
            stride_v_slot,
            PAGE_SIZE,
            BLOCK_N,
            BLOCK_D,
            COPY,
        )
    hopper.async_copy.commit_group()
    value_page, key_page = key_page, next_page
    next_page = _pages_at(start + 4 * BLOCK_N, pages_ptr, low, high, PAGE_SIZE, BLOCK_N, COPY)

    total, acc, weights, new_weights, decay = hopper.warpgroup_mma_wait(
        0, deps=[total, acc, weights, new_weights, decay]
    )
    VALUE_ROWS: gl.constexpr = gl.SliceLayout(1, VALUES)
    if fresh:
        row_total = gl.convert_layout(gl.max(total, axis=1), gl.SliceLayout(1, SCORES))
        folded_maximum, folded_total, folded_acc = _fold(
            folded_maximum, folded_total, folded_acc, maximum, row_total, acc, VALUE_ROWS
        )
        total = gl.zeros((BLOCK_M, _SUM_COLUMNS), gl.float32, SUMS)
        acc = gl.zeros((BLOCK_M, BLOCK_D), gl.float32, VALUES)
        boundary = _split_start(_split_at(start, SPLITS) + 1, SPLITS)
    else:
        total = total * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
        acc = acc * gl.convert_layout(decay, VALUE_ROWS)[:, None]
    weights = gl.convert_layout(new_weights, gl.DotOperandLayout(0, VALUES, 2))
    return (
        weights,
        new_maximum,
        total,
        acc,
        folded_maximum,
        folded_total,
        folded_acc,
        boundary,
        value_page,
        key_page,
        next_page,
    )


@gluon.jit(do_not_specialize=["seqs", "max_kv", "stride_table", "stride_k_scale", "stride_v_scale"])
def overlapped_walk_kernel(
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
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
    ALIBI: gl.constexpr,
    FENCED: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
):
    """`walk_kernel` for head_dim = BLOCK_D, without window, soft cap, ALiBi or an fp8 cache; BLOCK_M = 128, 8 warps."""
    gl.static_assert(HEAD_DIM == BLOCK_D and WINDOW == 0 and not SOFTCAP and not ALIBI and not FENCED)
    gl.static_assert(BLOCK_M == 16 * _WARPS)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _SUM_COLUMNS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_D, 16])
    LANES: gl.constexpr = BLOCK_D // 8
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [_WARPS, 1], [1, 0])
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    COPY_ROWS: gl.constexpr = gl.SliceLayout(1, COPY)

    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    seq = _last_at_most(query_start_ptr, seqs, tile, TOKENS)
    query_start = gl.load(query_start_ptr + seq)
    query_len = gl.load(query_start_ptr + seq + 1) - query_start
    first_token = (tile - query_start // TOKENS - seq) * TOKENS
    if first_token >= query_len:
        return
    if bases_ptr is not None:  # noqa: SIM102 - decided when it is compiled
        if gl.load(bases_ptr + seq) >= 0:
            return
    kv_len = gl.load(kv_lens_ptr + seq)

    head_blocks: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = gl.program_id(1) // head_blocks
    first_head = gl.program_id(1) % head_blocks * HEADS

    # Rows as they are copied and stored.
    rows = gl.arange(0, BLOCK_M, layout=COPY_ROWS)
    group_heads = first_head + rows % HEADS
    tokens = first_token + rows // HEADS
    valid = (rows < TOKENS * HEADS) & (group_heads < GROUP) & (tokens < query_len)
    heads = gl.where(valid, kv_head * GROUP + group_heads, 0)
    places = (query_start + tokens).to(gl.int64)
    dims = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, COPY))
    inside = valid[:, None] & (dims < HEAD_DIM)[None, :]
    out_ptrs = out_ptr + (places * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
    dtype: gl.constexpr = out_ptr.dtype.element_ty

    first = kv_len - query_len + first_token
    last = gl.minimum(first + TOKENS, kv_len) - 1
    low = first * 0
    high = kv_len
    if CAUSAL:
        high = gl.minimum(last + 1, kv_len)
    if kv_len > max_kv:
        gl.store(out_ptrs, gl.full((BLOCK_M, BLOCK_D), float("nan"), gl.float32, COPY).to(dtype), mask=inside)
        return
    if high <= low:
        gl.store(out_ptrs, gl.zeros((BLOCK_M, BLOCK_D), dtype, COPY), mask=inside)
        return

    q = gl.load(
        q_ptr + (places * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :], mask=inside, other=0.0
    )
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    q_shared = gl.allocate_shared_memory(
        dtype, (BLOCK_M, BLOCK_D), gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype), q
    )
    k_shared = gl.allocate_shared_memory(dtype, (_BUFFERS, BLOCK_N, BLOCK_D), WIDE)
    v_shared = gl.allocate_shared_memory(dtype, (_BUFFERS, BLOCK_N, BLOCK_D), WIDE)
    ones = gl.allocate_shared_memory(
        dtype,
        (BLOCK_N, _SUM_COLUMNS),
        gl.NVMMASharedLayout.get_default_for([BLOCK_N, _SUM_COLUMNS], dtype),
        gl.full((BLOCK_N, _SUM_COLUMNS), 1.0, dtype, gl.BlockedLayout([1, 8], [16, 2], [_WARPS, 1], [1, 0])),
    )

    score_rows = gl.arange(0, BLOCK_M, layout=SCORE_ROWS)
    positions = kv_len - query_len + first_token + score_rows // HEADS
    k_ptr += kv_head.to(gl.int64) * stride_k_head
    v_ptr += kv_head.to(gl.int64) * stride_v_head
    pages_ptr = table_ptr + seq.to(gl.int64) * stride_table
    begin = low
    tiles = gl.cdiv(high, BLOCK_N)
    whole = high // BLOCK_N
    if CAUSAL:
        whole = gl.minimum(first + 1, high) // BLOCK_N

    # Keys of tiles 0, 1, 2, values of 0 and 1: in groups, each what a turn waits for.
    value_page = _pages_at(begin, pages_ptr, low, high, PAGE_SIZE, BLOCK_N, COPY)
    key_page = value_page
    next_page = _pages_at(begin + BLOCK_N, pages_ptr, low, high, PAGE_SIZE, BLOCK_N, COPY)
    for i in gl.static_range(_BUFFERS):
        _copy(
            k_shared.index(i),
            k_ptr,
            begin + i * BLOCK_N,
            key_page,
            low,
            high,
            stride_k_page,
            stride_k_slot,
            PAGE_SIZE,
            BLOCK_N,
            BLOCK_D,
            COPY,
        )
        if i > 0:
            _copy(
                v_shared.index(i - 1),
                v_ptr,
                begin + (i - 1) * BLOCK_N,
                value_page,
                low,
                high,
                stride_v_page,
                stride_v_slot,
                PAGE_SIZE,
                BLOCK_N,
                BLOCK_D,
                COPY,
            )
        hopper.async_copy.commit_group()
        value_page, key_page = key_page, next_page
        next_page = _pages_at(begin + (i + 2) * BLOCK_N, pages_ptr, low, high, PAGE_SIZE, BLOCK_N, COPY)

    maximum = gl.full((BLOCK_M,), float("-inf"), gl.float32, SCORE_ROWS)
    total = gl.zeros((BLOCK_M, _SUM_COLUMNS), gl.float32, SUMS)
    acc = gl.zeros((BLOCK_M, BLOCK_D), gl.float32, VALUES)
    folded_maximum = maximum
    folded_total = gl.zeros((BLOCK_M,), gl.float32, SCORE_ROWS)
    folded_acc = acc
    boundary = _split_start(_split_at(begin, SPLITS) + 1, SPLITS)

    hopper.async_copy.wait_group(2)
    hopper.fence_async_shared()
    scores = hopper.warpgroup_mma(
        q_shared,
        k_shared.index(0).permute((1, 0)),
        gl.zeros((BLOCK_M, BLOCK_N), gl.float32, SCORES),
        use_acc=False,
        is_async=True,
    )
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    first_weights, maximum, _ = _softmax(
        scores, maximum, begin, begin < 0, positions, low, high, exp2_scale, CAUSAL, BLOCK_N, SCORES, True
    )
    weights = gl.convert_layout(first_weights.to(dtype), gl.DotOperandLayout(0, VALUES, 2))

    whole_turns = gl.minimum(gl.maximum(whole - 1, 0), tiles - 1)
    for i in range(whole_turns):
        (
            weights,
            maximum,
            total,
            acc,
            folded_maximum,
            folded_total,
            folded_acc,
            boundary,
            value_page,
            key_page,
            next_page,
        ) = _turn(
            i,
            begin,
            high,
            weights,
            maximum,
            total,
            acc,
            folded_maximum,
            folded_total,
            folded_acc,
            boundary,
            value_page,
            key_page,
            next_page,
            q_shared,
            k_shared,
            v_shared,
            ones,
            k_ptr,
            v_ptr,
            pages_ptr,
            positions,
            low,
            high,
            exp2_scale,
            stride_k_page,
            stride_k_slot,
            stride_v_page,
            stride_v_slot,
            PAGE_SIZE,
            CAUSAL,
            SPLITS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            COPY,
            SCORES,
            SUMS,
            VALUES,
            False,
        )
    for i in range(whole_turns, tiles - 1):
        (
            weights,
            maximum,
            total,
            acc,
            folded_maximum,
            folded_total,
            folded_acc,
            boundary,
            value_page,
            key_page,
            next_page,
        ) = _turn(
            i,
            begin,
            high,
            weights,
            maximum,
            total,
            acc,
            folded_maximum,
            folded_total,
            folded_acc,
            boundary,
            value_page,
            key_page,
            next_page,
            q_shared,
            k_shared,
            v_shared,
            ones,
            k_ptr,
            v_ptr,
            pages_ptr,
            positions,
            low,
            high,
            exp2_scale,
            stride_k_page,
            stride_k_slot,
            stride_v_page,
            stride_v_slot,
            PAGE_SIZE,
            CAUSAL,
            SPLITS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            COPY,
            SCORES,
            SUMS,
            VALUES,
            True,
        )
    hopper.async_copy.wait_group(0)
    total = hopper.warpgroup_mma(
        gl.convert_layout(weights, gl.DotOperandLayout(0, SUMS, 2)), ones, total, is_async=True
    )
    acc = hopper.warpgroup_mma(weights, v_shared.index((tiles - 1) % _BUFFERS), acc, is_async=True)
    total, acc, weights = hopper.warpgroup_mma_wait(0, deps=[total, acc, weights])

    VALUE_ROWS: gl.constexpr = gl.SliceLayout(1, VALUES)
    row_total = gl.convert_layout(gl.max(total, axis=1), SCORE_ROWS)
    maximum, row_total, acc = _fold(folded_maximum, folded_total, folded_acc, maximum, row_total, acc, VALUE_ROWS)
    if sinks_ptr is not None:
        own_heads = kv_head * GROUP + gl.minimum(first_head + score_rows % HEADS, GROUP - 1)
        sink = gl.load(sinks_ptr + own_heads) * _LOG2_E
        new_maximum = gl.maximum(maximum, sink)
        reference = _no_lower_than_zero(new_maximum)
        decay = gl.exp2(maximum - reference)
        row_total = gl.fma(row_total, decay, gl.exp2(sink - reference))
        acc = acc * gl.convert_layout(decay, VALUE_ROWS)[:, None]
    divisor = gl.convert_layout(row_total, VALUE_ROWS)[:, None]
    result = gl.where(divisor == 0.0, 0.0, acc / divisor) + 0.0
    gl.store(out_ptrs, gl.convert_layout(result.to(dtype), COPY), mask=inside)

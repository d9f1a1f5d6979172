"""Prefill of paged attention on Hopper: `walk_kernel` with the softmax of a tile beside the products of the one before.

Triton waits for the product of the scores before it can issue that of the values, in all warps at once. Here, in Gluon,
the warps have roles, as in FlashAttention-3 (arXiv 2407.08608): one warpgroup copies keys and values, two hold half of
the query tile each and wait for nobody but the copies, so that one's softmax runs beside the other's products. A turn
of theirs issues the scores of tile i + 1 and the values of tile i, and does the softmax of tile i + 1 while the latter
run. The order of every sum is that of `attention_state`, and so are the bits.
"""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from bidispatch_backends.triton.attention_kernels import _last_at_most
from bidispatch_backends.triton.attention_state import _no_lower_than_zero, split_at, split_start, visible_range
from bidispatch_backends.triton.hopper import WARPS, async_load, barrier, publish

__all__ = ["overlapped_walk_kernel"]


_LOG2_E = gl.constexpr(math.log2(math.e))
_SUM_COLUMNS = gl.constexpr(16)
_WARPS = gl.constexpr(WARPS)
_HELD_DIMS = gl.constexpr(64)
_ROWS = gl.constexpr(64)
"""Query rows of a warpgroup."""
_BUFFERS = gl.constexpr(5)
"""Of keys and values. A turn holds two and waits for a third, handed over when _IN_FLIGHT more are asked for."""
_IN_FLIGHT = gl.constexpr(2)
# Of a multiprocessor's 65536 registers; what is left, 224 a thread, is the first warpgroup's.
_ATTEND_REGISTERS = gl.constexpr(224)
_COPY_REGISTERS = gl.constexpr(56)


@gluon.jit
def _fold(maximum, total, acc, split_maximum, split_total, split_acc, VALUES: gl.constexpr):
    """`attention_state.fold` for a maximum and a total whose rows are laid out as those of the scores."""
    new_maximum = gl.maximum(maximum, split_maximum)
    reference = _no_lower_than_zero(new_maximum)
    decay = gl.exp2(maximum - reference)
    split_decay = gl.exp2(split_maximum - reference)
    total = gl.fma(split_total, split_decay, total * decay)
    own = gl.convert_layout(decay, gl.SliceLayout(1, VALUES))[:, None]
    other = gl.convert_layout(split_decay, gl.SliceLayout(1, VALUES))[:, None]
    acc = gl.fma(split_acc, gl.zeros_like(split_acc) + other, acc * own)
    return new_maximum, total, acc


@gluon.jit
def _copy_tiles(copied, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, COPY: gl.constexpr):
    """The warpgroup that copies: a step has the keys and values of a tile.

    Outside [low, high), where pages may belong to nobody, it takes the nearest row inside. Where a row is, is worked
    out by one thread and handed to those that copy it: for all of their rows it would take them longer than a tile.
    """
    (
        k_shared,
        v_shared,
        ready,
        free,
        k_ptr,
        v_ptr,
        pages_ptr,
        begin,
        low,
        high,
        stride_k_page,
        stride_k_slot,
        stride_v_page,
        stride_v_slot,
    ) = copied
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [_WARPS], [0])
    dims = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, COPY))[None, :]
    tiles = gl.cdiv(high - begin, BLOCK_N)
    for step in range(tiles):
        place = gl.minimum(gl.maximum(begin + step * BLOCK_N + gl.arange(0, BLOCK_N, layout=ROWS), low), high - 1)
        page = gl.load(pages_ptr + place // PAGE_SIZE).to(gl.int64)
        slot = (place % PAGE_SIZE).to(gl.int64)
        # The first wait for each buffer is for the phase before the first, which counts as over.
        buffer = step % _BUFFERS
        hopper.mbarrier.wait(free.index(buffer), (step // _BUFFERS + 1) % 2)
        k_rows = gl.convert_layout(page * stride_k_page + slot * stride_k_slot, gl.SliceLayout(1, COPY))
        async_load(k_shared.index(buffer), k_ptr + k_rows[:, None] + dims)
        v_rows = gl.convert_layout(page * stride_v_page + slot * stride_v_slot, gl.SliceLayout(1, COPY))
        async_load(v_shared.index(buffer), v_ptr + v_rows[:, None] + dims)
        hopper.async_copy.commit_group()
        if step >= _IN_FLIGHT:
            hopper.async_copy.wait_group(_IN_FLIGHT)
            publish(step - _IN_FLIGHT, ready, _BUFFERS)
    if tiles > 1:
        hopper.async_copy.wait_group(1)
        publish(tiles - 2, ready, _BUFFERS)
    hopper.async_copy.wait_group(0)
    publish(tiles - 1, ready, _BUFFERS)


def _pinned(registers: int) -> str:
    """PTX that hands on packed weights, and stores to shared memory where one is negative.

    None is, which ptxas cannot know: so all of the softmax stays in front of the store, and the store in front of the
    wait for the values' product. Else ptxas moves most of the softmax behind that wait, where nothing hides it.
    """
    sources = [f"${registers + i}" for i in range(registers)]
    joined = " ".join(f"or.b32 all, all, {source};" for source in sources)
    moved = " ".join(f"mov.b32 ${i}, {source};" for i, source in enumerate(sources))
    return (
        "{ .reg .b32 all, place; .reg .pred negative; mov.b32 all, 0; mov.b32 place, 0; "
        f"{joined} and.b32 all, all, 0x80008000; setp.ne.b32 negative, all, 0; "
        f"@negative st.volatile.shared.b32 [place], all; {moved} }}"
    )


_PACKED = _ROWS.value * 64 // (WARPS * 32) // 2
"""Of a thread's weights of a tile of 64 columns, two in each."""
_AT_ONCE = gl.constexpr(2 * _PACKED)
_PINNED = gl.constexpr(_pinned(_PACKED))
_PINNED_REGISTERS = gl.constexpr(",".join(["=r"] * _PACKED + ["r"] * _PACKED))


@gluon.jit
def _wait_ready(step, ready):
    """Wait for a step's keys and values."""
    hopper.mbarrier.wait(ready.index(step % _BUFFERS), step // _BUFFERS % 2)


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
    WINDOW: gl.constexpr,
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
        if WINDOW > 0:
            visible = visible & (kv[None, :] > positions[:, None] - WINDOW)
        scores = gl.where(visible, scores, float("-inf"))
    before = gl.where(fresh, float("-inf"), maximum)
    new_maximum = gl.maximum(before, gl.max(scores, axis=1) * scale)
    reference = _no_lower_than_zero(new_maximum)
    weights = gl.exp2(gl.fma(scores, gl.zeros_like(scores) + scale, gl.zeros_like(scores) - reference[:, None]))
    return weights, new_maximum, gl.exp2(before - reference)


@gluon.jit
def _turns(
    first_step,
    last_step,
    tiles,
    begin,
    weights,
    maximum,
    total,
    acc,
    folded_maximum,
    folded_total,
    folded_acc,
    boundary,
    q_own,
    k_shared,
    v_shared,
    ones,
    ready,
    free,
    positions,
    low,
    high,
    scale,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
    VALUES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Turns [first_step, last_step): each has the scores and the softmax of its tile, and the values of the one before.

    Both are ready at its start, and the next one at its end. Without MASKED every row sees all positions of the tiles.
    """
    for step in range(first_step, last_step):
        start = begin + step * BLOCK_N
        before = (step - 1) % _BUFFERS
        scores = hopper.warpgroup_mma(
            q_own,
            k_shared.index(step % _BUFFERS).permute((1, 0)),
            gl.zeros((_ROWS, BLOCK_N), gl.float32, SCORES),
            use_acc=False,
            is_async=True,
        )
        total = hopper.warpgroup_mma(
            gl.convert_layout(weights, gl.DotOperandLayout(0, SUMS, 2)), ones, total, is_async=True
        )
        acc = hopper.warpgroup_mma(weights, v_shared.index(before), acc, is_async=True)

        fresh = start == boundary
        scores = hopper.warpgroup_mma_wait(2, deps=[scores])
        new_weights, new_maximum, decay = _softmax(
            scores, maximum, start, fresh, positions, low, high, scale, CAUSAL, WINDOW, BLOCK_N, SCORES, MASKED
        )
        new_weights = gl.inline_asm_elementwise(
            _PINNED, _PINNED_REGISTERS, [new_weights.to(q_own.dtype)], dtype=q_own.dtype, is_pure=False, pack=_AT_ONCE
        )
        # The new weights are named in the wait, so that LLVM does not move them behind it; `_pinned` is for ptxas.
        if step + 1 < tiles:
            _wait_ready(step + 1, ready)
        total, acc, weights, new_weights, decay = hopper.warpgroup_mma_wait(
            0, deps=[total, acc, weights, new_weights, decay]
        )
        if fresh:
            row_total = gl.convert_layout(gl.max(total, axis=1), gl.SliceLayout(1, SCORES))
            folded_maximum, folded_total, folded_acc = _fold(
                folded_maximum, folded_total, folded_acc, maximum, row_total, acc, VALUES
            )
            total = gl.zeros((_ROWS, _SUM_COLUMNS), gl.float32, SUMS)
            acc = gl.zeros((_ROWS, BLOCK_D), gl.float32, VALUES)
            boundary = split_start(split_at(start, SPLITS) + 1, SPLITS)
        else:
            total = total * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, VALUES))[:, None]
        weights = gl.convert_layout(new_weights, gl.DotOperandLayout(0, VALUES, 2))
        hopper.mbarrier.arrive(free.index(before))
        maximum = new_maximum
    return weights, maximum, total, acc, folded_maximum, folded_total, folded_acc, boundary


@gluon.jit
def _attend(
    HALF: gl.constexpr,
    attended,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    COPY: gl.constexpr,
):
    """A warpgroup that attends, for half of the query tile's rows: `attention_state.attend` and `finish`."""
    (
        q_shared,
        k_shared,
        v_shared,
        ones,
        ready,
        free,
        q_ptr,
        out_ptr,
        sinks_ptr,
        query_start,
        query_len,
        kv_len,
        first_token,
        kv_head,
        first_head,
        begin,
        low,
        high,
        scale,
        stride_q_token,
        stride_q_head,
        stride_out_token,
        stride_out_head,
    ) = attended
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _SUM_COLUMNS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_D, 16])
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    dtype: gl.constexpr = q_shared.dtype

    # Rows as they are copied and stored.
    rows = HALF * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, COPY))
    group_heads = first_head + rows % HEADS
    tokens = first_token + rows // HEADS
    valid = (rows < TOKENS * HEADS) & (group_heads < GROUP) & (tokens < query_len)
    heads = gl.where(valid, kv_head * GROUP + group_heads, 0)
    places = (query_start + tokens).to(gl.int64)
    dims = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, COPY))
    inside = valid[:, None] & (dims < BLOCK_D)[None, :]
    q_own = q_shared.index(HALF)
    q_own.store(
        gl.load(
            q_ptr + (places * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :], mask=inside, other=0.0
        )
    )
    hopper.fence_async_shared()
    barrier()
    # A narrow head's queries stay in registers, which takes their share off shared memory (D64: 853 µs for 908).
    queries = q_own
    if BLOCK_D <= _HELD_DIMS:
        queries = q_own.load(gl.DotOperandLayout(0, SCORES, 2))

    score_rows = HALF * _ROWS + gl.arange(0, _ROWS, layout=SCORE_ROWS)
    first = kv_len - query_len + first_token
    positions = first + score_rows // HEADS
    tiles = gl.cdiv(high - begin, BLOCK_N)
    # The tiles that all rows of the query tile see whole, [full_begin, full_end).
    full_begin = begin
    full_end = high
    if CAUSAL:
        full_end = gl.minimum(first + 1, high)
    full_end = full_end // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        last = gl.minimum(first + TOKENS, kv_len) - 1
        full_begin = gl.cdiv(gl.maximum(last - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
    # Their turns; that of tile 0 comes before the loops.
    first_full = gl.minimum(gl.maximum((full_begin - begin) // BLOCK_N, 1), tiles)
    last_full = gl.minimum(gl.maximum((full_end - begin) // BLOCK_N, first_full), tiles)

    maximum = gl.full((_ROWS,), float("-inf"), gl.float32, SCORE_ROWS)
    total = gl.zeros((_ROWS, _SUM_COLUMNS), gl.float32, SUMS)
    acc = gl.zeros((_ROWS, BLOCK_D), gl.float32, VALUES)
    folded_maximum = maximum
    folded_total = gl.zeros((_ROWS,), gl.float32, SCORE_ROWS)
    folded_acc = acc
    boundary = split_start(split_at(begin, SPLITS) + 1, SPLITS)

    _wait_ready(0, ready)
    scores = hopper.warpgroup_mma(
        queries,
        k_shared.index(0).permute((1, 0)),
        gl.zeros((_ROWS, BLOCK_N), gl.float32, SCORES),
        use_acc=False,
        is_async=True,
    )
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    first_weights, maximum, _ = _softmax(
        scores, maximum, begin, begin < 0, positions, low, high, scale, CAUSAL, WINDOW, BLOCK_N, SCORES, True
    )
    weights = gl.convert_layout(first_weights.to(dtype), gl.DotOperandLayout(0, VALUES, 2))

    if tiles > 1:
        _wait_ready(1, ready)
    state = (weights, maximum, total, acc, folded_maximum, folded_total, folded_acc, boundary)
    given = (queries, k_shared, v_shared, ones, ready, free, positions, low, high, scale)
    if WINDOW > 0:
        state = _turns(
            1,
            first_full,
            tiles,
            begin,
            *state,
            *given,
            *(CAUSAL, WINDOW, SPLITS, BLOCK_N, BLOCK_D, SCORES, SUMS, VALUES, True),
        )
    state = _turns(
        first_full,
        last_full,
        tiles,
        begin,
        *state,
        *given,
        *(CAUSAL, WINDOW, SPLITS, BLOCK_N, BLOCK_D, SCORES, SUMS, VALUES, False),
    )
    state = _turns(
        last_full,
        tiles,
        tiles,
        begin,
        *state,
        *given,
        *(CAUSAL, WINDOW, SPLITS, BLOCK_N, BLOCK_D, SCORES, SUMS, VALUES, True),
    )
    weights, maximum, total, acc, folded_maximum, folded_total, folded_acc, _ = state
    total = hopper.warpgroup_mma(
        gl.convert_layout(weights, gl.DotOperandLayout(0, SUMS, 2)), ones, total, is_async=True
    )
    acc = hopper.warpgroup_mma(weights, v_shared.index((tiles - 1) % _BUFFERS), acc, is_async=True)
    total, acc, weights = hopper.warpgroup_mma_wait(0, deps=[total, acc, weights])

    row_total = gl.convert_layout(gl.max(total, axis=1), SCORE_ROWS)
    maximum, row_total, acc = _fold(folded_maximum, folded_total, folded_acc, maximum, row_total, acc, VALUES)
    if sinks_ptr is not None:
        own_heads = kv_head * GROUP + gl.minimum(first_head + score_rows % HEADS, GROUP - 1)
        sink = gl.load(sinks_ptr + own_heads) * _LOG2_E
        new_maximum = gl.maximum(maximum, sink)
        reference = _no_lower_than_zero(new_maximum)
        decay = gl.exp2(maximum - reference)
        row_total = gl.fma(row_total, decay, gl.exp2(sink - reference))
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, VALUES))[:, None]
    divisor = gl.convert_layout(row_total, gl.SliceLayout(1, VALUES))[:, None]
    result = gl.where(divisor == 0.0, 0.0, acc / divisor) + 0.0
    # Through the queries' place, whose last reader has been waited for, so that whole rows are stored.
    q_own.store(result.to(dtype))
    barrier()
    out_ptrs = out_ptr + (places * stride_out_token + heads * stride_out_head)[:, None] + dims[None, :]
    gl.store(out_ptrs, q_own.load(COPY), mask=inside)


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
    """`walk_kernel`, launched with WARPS, for 128 rows and what `attention_params.overlaps` names."""
    gl.static_assert(
        HEAD_DIM == BLOCK_D and BLOCK_M == 2 * _ROWS and BLOCK_N == 64 and not SOFTCAP and not ALIBI and not FENCED
    )
    LANES: gl.constexpr = BLOCK_D // 8
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [_WARPS, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty

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
    first = kv_len - query_len + first_token
    last = gl.minimum(first + TOKENS, kv_len) - 1
    low, high = visible_range(first, last, kv_len, CAUSAL, WINDOW)
    if (kv_len > max_kv) | (high <= low):
        rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, COPY))
        group_heads = first_head + rows % HEADS
        tokens = first_token + rows // HEADS
        valid = (rows < TOKENS * HEADS) & (group_heads < GROUP) & (tokens < query_len)
        heads = gl.where(valid, kv_head * GROUP + group_heads, 0)
        dims = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, COPY))
        places = (query_start + tokens).to(gl.int64) * stride_out_token + heads * stride_out_head
        nothing = gl.full((BLOCK_M, BLOCK_D), 0.0, gl.float32, COPY)
        nothing = gl.where(kv_len > max_kv, float("nan"), nothing)
        gl.store(out_ptr + places[:, None] + dims[None, :], nothing.to(dtype), mask=valid[:, None])
        return

    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    q_shared = gl.allocate_shared_memory(
        dtype, (2, _ROWS, BLOCK_D), gl.NVMMASharedLayout.get_default_for([_ROWS, BLOCK_D], dtype)
    )
    k_shared = gl.allocate_shared_memory(dtype, (_BUFFERS, BLOCK_N, BLOCK_D), WIDE)
    v_shared = gl.allocate_shared_memory(dtype, (_BUFFERS, BLOCK_N, BLOCK_D), WIDE)
    ones = gl.allocate_shared_memory(
        dtype,
        (BLOCK_N, _SUM_COLUMNS),
        gl.NVMMASharedLayout.get_default_for([BLOCK_N, _SUM_COLUMNS], dtype),
        gl.full((BLOCK_N, _SUM_COLUMNS), 1.0, dtype, gl.BlockedLayout([1, 8], [16, 2], [_WARPS, 1], [1, 0])),
    )
    ready = gl.allocate_shared_memory(gl.int64, (_BUFFERS, 1), hopper.mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, (_BUFFERS, 1), hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(_BUFFERS):
        hopper.mbarrier.init(ready.index(i), count=1)
        hopper.mbarrier.init(free.index(i), count=2)
    hopper.fence_async_shared()

    begin = low // BLOCK_N * BLOCK_N
    attend = (
        q_shared,
        k_shared,
        v_shared,
        ones,
        ready,
        free,
        q_ptr,
        out_ptr,
        sinks_ptr,
        query_start,
        query_len,
        kv_len,
        first_token,
        kv_head,
        first_head,
        begin,
        low,
        high,
        exp2_scale,
        stride_q_token,
        stride_q_head,
        stride_out_token,
        stride_out_head,
    )
    copy = (
        k_shared,
        v_shared,
        ready,
        free,
        k_ptr + kv_head.to(gl.int64) * stride_k_head,
        v_ptr + kv_head.to(gl.int64) * stride_v_head,
        table_ptr + seq.to(gl.int64) * stride_table,
        begin,
        low,
        high,
        stride_k_page,
        stride_k_slot,
        stride_v_page,
        stride_v_slot,
    )
    gl.warp_specialize(
        [
            (_attend, (gl.constexpr(0), attend, GROUP, HEADS, TOKENS, CAUSAL, WINDOW, SPLITS, BLOCK_N, BLOCK_D, COPY)),
            (_attend, (gl.constexpr(1), attend, GROUP, HEADS, TOKENS, CAUSAL, WINDOW, SPLITS, BLOCK_N, BLOCK_D, COPY)),
            (_copy_tiles, (copy, PAGE_SIZE, BLOCK_N, BLOCK_D, COPY)),
        ],
        [_WARPS, _WARPS],
        [_ATTEND_REGISTERS, _COPY_REGISTERS],
    )

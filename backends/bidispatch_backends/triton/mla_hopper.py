"""Latent attention's parallel splits on Hopper: `latent_split_kernel` with its matrix units kept busy, in Gluon.

For 128 heads a KV row of 1152 bytes takes part in 139 kFLOP a tile of 64 rows, so that the products must never wait for
the softmax. As in FlashMLA (DeepSeek, 2025-04 "new kernel deep-dive"), two warpgroups hold half of the accumulator's
512 columns each; one has the scores of even KV tiles, the other those of odd ones, and each multiplies its columns by
the weights of both: so one's softmax runs beside the other's products. A third one copies, and runs ahead over the ends
of work items. Maxima are handed from tile to tile, so the order of every sum is that of `mla_kernels`, and so are the
bits.
"""

# Kernel arguments are Triton values, which no annotation describes.
# RET505: a branch on a constexpr must be an `if` of its own, or both sides are compiled.
# ruff: noqa: ANN001, ANN201, ANN202, RET505
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from bidispatch_backends.triton.attention_kernels import _larger, _splits_of
from bidispatch_backends.triton.attention_state import _no_lower_than_zero, split_start, visible_range
from bidispatch_backends.triton.hopper import WARPS, async_load, barrier, publish

__all__ = ["SEESAW_ROWS", "seesaw_split_kernel"]

SEESAW_ROWS = 64
"""Rows of its query tile: those of one matrix instruction."""


_SUM_COLUMNS = gl.constexpr(16)
_WARPS = gl.constexpr(WARPS)
_ROWS = gl.constexpr(SEESAW_ROWS)
_BUFFERS = gl.constexpr(4)
"""Of KV tiles: two have their scores taken, one is multiplied by weights, one is on its way."""
_FIELDS = gl.constexpr(32)
"""Integers of an item that are handed over, rounded up to a lane each."""
_ATTEND_REGISTERS = gl.constexpr(208)
_COPY_REGISTERS = gl.constexpr(96)


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _work_list(
    query_start_ptr,
    kv_lens_ptr,
    seqs,
    max_kv,
    capacity,
    TOKENS: gl.constexpr,
    SPLITS: gl.constexpr,
    MOST_QUERIES: gl.constexpr,
    BLOCK_B: gl.constexpr,
):
    """What `latent_split_kernel` counts for every sequence: its work items and its slots of the workspace.

    Every warp counts for itself, so that none waits for another.
    """
    BATCH: gl.constexpr = gl.BlockedLayout([max(1, BLOCK_B // 32)], [32], [_WARPS], [0])
    batch = gl.arange(0, BLOCK_B, layout=BATCH)
    there = batch < seqs
    starts = gl.load(query_start_ptr + batch, mask=there, other=0)
    query_lens = gl.load(query_start_ptr + batch + 1, mask=there, other=0) - starts
    kv_lens = gl.load(kv_lens_ptr + batch, mask=there, other=0)
    _, splits = _splits_of(query_lens, kv_lens, max_kv, True, 0, SPLITS)
    parallel = (query_lens > 0) & (query_lens <= MOST_QUERIES)
    slots = gl.where(parallel, query_lens * splits, 0)
    slot_ends = gl.associative_scan(slots, 0, _plus)
    parallel = parallel & (slot_ends <= capacity)
    items = gl.where(parallel, (query_lens + TOKENS - 1) // TOKENS * splits, 0)
    item_ends = gl.associative_scan(items, 0, _plus)
    return batch, starts, query_lens, kv_lens, slot_ends - slots, parallel, item_ends - items, item_ends


@gluon.jit
def _item(
    work,
    query_start_ptr,
    kv_lens_ptr,
    seqs,
    max_kv,
    capacity,
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    SPLITS: gl.constexpr,
    MOST_QUERIES: gl.constexpr,
    BLOCK_B: gl.constexpr,
):
    """A work item, as `latent_split_kernel` finds it: counted anew, which takes less than holding the counts would."""
    batch, starts, query_lens, kv_lens, slot_starts, _parallel, item_starts, item_ends = _work_list(
        query_start_ptr, kv_lens_ptr, seqs, max_kv, capacity, TOKENS, SPLITS, MOST_QUERIES, BLOCK_B
    )
    head_blocks: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    item = work // head_blocks
    its = (item_starts <= item) & (item < item_ends)
    seq, before, base, query_start, query_len, kv_len = gl.reduce(
        (
            gl.where(its, batch, 0),
            gl.where(its, item_starts, 0),
            gl.where(its, slot_starts, 0),
            gl.where(its, starts, 0),
            gl.where(its, query_lens, 0),
            gl.where(its, kv_lens, 0),
        ),
        0,
        _larger,
    )
    item = item - before
    first_split, seq_splits = _splits_of(query_len, kv_len, max_kv, True, 0, SPLITS)
    tiles = (query_len + TOKENS - 1) // TOKENS
    split = first_split + seq_splits - 1 - item // tiles
    first_token = item % tiles * TOKENS
    first = kv_len - query_len + first_token
    last = gl.minimum(first + TOKENS, kv_len) - 1
    low, high = visible_range(first, last, kv_len, True, 0)
    begin = gl.maximum(split_start(split, SPLITS), low)
    end = gl.minimum(split_start(split + 1, SPLITS), high)
    return seq, base + split - first_split, seq_splits, query_start, query_len, first_token, first, high, begin, end


@gluon.jit
def _field(values, place: gl.constexpr):
    """One of the integers that the copying warps wrote about an item."""
    at = gl.arange(0, _FIELDS, layout=gl.BlockedLayout([1], [32], [_WARPS], [0]))
    return gl.max(gl.where(at == place, values, -(2**31)), axis=0)


@gluon.jit
def _rows_of(
    work,
    first_token,
    query_len,
    layout: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """The token and the head of each row of a tile, and whether there is such a row; else those of the first."""
    head_blocks: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    rows = gl.arange(0, _ROWS, layout=layout)
    heads = work % head_blocks * HEADS + rows % HEADS
    tokens = first_token + rows // HEADS
    valid = (rows < TOKENS * HEADS) & (heads < NUM_HEADS) & (tokens < query_len)
    return gl.where(valid, tokens, first_token), gl.where(valid, heads, 0), valid


@gluon.jit
def _find(pages_ptr, start, high, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """The page of each row of a tile; a scalar where the tile lies in one.

    Behind the last position, where pages may belong to nobody, it is the last one's.
    """
    if PAGE_SIZE % BLOCK_N == 0:
        page = gl.load(pages_ptr + gl.minimum(start, high - 1) // PAGE_SIZE)
    else:
        page = gl.load(pages_ptr + gl.minimum(start + gl.arange(0, BLOCK_N, layout=layout), high - 1) // PAGE_SIZE)
    return page.to(gl.int64)


@gluon.jit
def _rows_in_cache(
    page,
    start,
    high,
    stride_page,
    stride_slot,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    layout: gl.constexpr,
):
    """Where the rows of a tile are; behind the last position it is the last one."""
    place = gl.minimum(start + gl.arange(0, BLOCK_N, layout=layout), high - 1)
    if PAGE_SIZE % BLOCK_N == 0:
        offsets = (place - start // PAGE_SIZE * PAGE_SIZE) * stride_slot
    else:
        offsets = place % PAGE_SIZE * stride_slot
    return page * stride_page + offsets


@gluon.jit
def _copy_tile(
    kv_left,
    kv_right,
    kv_rope,
    free,
    step,
    kv_ptr,
    page,
    rope_page,
    start,
    high,
    stride_page,
    stride_slot,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
    ROPE: gl.constexpr,
    WIDE: gl.constexpr,
    NARROW: gl.constexpr,
):
    """Ask for the rows of a KV tile, once its buffer is free."""
    dims = gl.arange(0, HALF, layout=gl.SliceLayout(0, WIDE))[None, :]
    rope_dims = 2 * HALF + gl.arange(0, ROPE, layout=gl.SliceLayout(0, NARROW))[None, :]
    rows = _rows_in_cache(page, start, high, stride_page, stride_slot, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, WIDE))
    rope_rows = _rows_in_cache(
        rope_page, start, high, stride_page, stride_slot, PAGE_SIZE, BLOCK_N, gl.SliceLayout(1, NARROW)
    )
    buffer = step % _BUFFERS
    # The first wait for each buffer is for the phase before the first, which counts as over.
    hopper.mbarrier.wait(free.index(buffer), (step // _BUFFERS + 1) % 2)
    async_load(kv_left.index(buffer), kv_ptr + rows[:, None] + dims)
    async_load(kv_right.index(buffer), kv_ptr + rows[:, None] + (dims + HALF))
    async_load(kv_rope.index(buffer), kv_ptr + rope_rows[:, None] + rope_dims)
    hopper.async_copy.commit_group()


@gluon.jit
def _copy_item(
    copied_to,
    pointers,
    strides,
    step,
    done,
    head_block,
    query_start,
    query_len,
    first_token,
    begin,
    end,
    high,
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
    ROPE: gl.constexpr,
):
    """Copy the KV tiles of an item, at least one, and its queries. pointers: q, the cache and the sequence's pages.

    step, done: KV tiles and items copied so far, which are returned with these. A tile is handed over when the next is
    asked for; the first with the queries. The last of all is left to the caller.
    """
    q_left, q_right, q_rope, kv_left, kv_right, kv_rope, ready, free, q_free = copied_to
    q_ptr, kv_ptr, pages_ptr = pointers
    stride_q_token, stride_q_head, stride_page, stride_slot = strides
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [_WARPS, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [_WARPS, 1], [1, 0])
    WIDE_ROWS: gl.constexpr = gl.SliceLayout(1, WIDE)
    NARROW_ROWS: gl.constexpr = gl.SliceLayout(1, NARROW)
    dims = gl.arange(0, HALF, layout=gl.SliceLayout(0, WIDE))[None, :]
    rope_dims = 2 * HALF + gl.arange(0, ROPE, layout=gl.SliceLayout(0, NARROW))[None, :]
    page = _find(pages_ptr, begin, high, PAGE_SIZE, BLOCK_N, WIDE_ROWS)
    rope_page = _find(pages_ptr, begin, high, PAGE_SIZE, BLOCK_N, NARROW_ROWS)
    tokens, heads, _ = _rows_of(head_block, first_token, query_len, WIDE_ROWS, NUM_HEADS, HEADS, TOKENS)
    q_rows = ((query_start + tokens).to(gl.int64) * stride_q_token + heads * stride_q_head)[:, None]
    rope_tokens, rope_heads, _ = _rows_of(head_block, first_token, query_len, NARROW_ROWS, NUM_HEADS, HEADS, TOKENS)
    q_rope_rows = (query_start + rope_tokens).to(gl.int64) * stride_q_token + rope_heads * stride_q_head
    _copy_tile(
        kv_left,
        kv_right,
        kv_rope,
        free,
        step,
        kv_ptr,
        page,
        rope_page,
        begin,
        high,
        stride_page,
        stride_slot,
        PAGE_SIZE,
        BLOCK_N,
        HALF,
        ROPE,
        WIDE,
        NARROW,
    )
    # The last tile of the item before must be there before its queries are done with.
    if step > 0:
        hopper.async_copy.wait_group(1)
        publish(step - 1, ready, _BUFFERS)
    step += 1
    hopper.mbarrier.wait(q_free, (done + 1) % 2)
    async_load(q_left.index(0), q_ptr + q_rows + dims)
    async_load(q_right.index(0), q_ptr + q_rows + (dims + HALF))
    async_load(q_rope.index(0), q_ptr + q_rope_rows[:, None] + rope_dims)
    hopper.async_copy.commit_group()
    done += 1
    page = _find(pages_ptr, begin + BLOCK_N, high, PAGE_SIZE, BLOCK_N, WIDE_ROWS)
    rope_page = _find(pages_ptr, begin + BLOCK_N, high, PAGE_SIZE, BLOCK_N, NARROW_ROWS)
    for start in range(begin + BLOCK_N, end, BLOCK_N):
        _copy_tile(
            kv_left,
            kv_right,
            kv_rope,
            free,
            step,
            kv_ptr,
            page,
            rope_page,
            start,
            high,
            stride_page,
            stride_slot,
            PAGE_SIZE,
            BLOCK_N,
            HALF,
            ROPE,
            WIDE,
            NARROW,
        )
        # The next tile's pages before the wait for this one, which hides their latency.
        page = _find(pages_ptr, start + BLOCK_N, high, PAGE_SIZE, BLOCK_N, WIDE_ROWS)
        rope_page = _find(pages_ptr, start + BLOCK_N, high, PAGE_SIZE, BLOCK_N, NARROW_ROWS)
        hopper.async_copy.wait_group(1)
        publish(step - 1, ready, _BUFFERS)
        step += 1
    return step, done


@gluon.jit
def _copy(
    copied,
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    SPLITS: gl.constexpr,
    MOST_QUERIES: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
    ROPE: gl.constexpr,
):
    """The warpgroup that copies: what an item is, then its queries and KV tiles."""
    (
        q_left,
        q_right,
        q_rope,
        kv_left,
        kv_right,
        kv_rope,
        items,
        ready,
        free,
        q_free,
        item_ready,
        item_free,
        q_ptr,
        kv_ptr,
        table_ptr,
        kv_lens_ptr,
        query_start_ptr,
        bases_ptr,
        seqs,
        max_kv,
        capacity,
        stride_table,
        stride_q_token,
        stride_q_head,
        stride_page,
        stride_slot,
    ) = copied
    head_blocks: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    copied_to = q_left, q_right, q_rope, kv_left, kv_right, kv_rope, ready, free, q_free
    batch, _starts, _query_lens, _kv_lens, slot_starts, parallel, _item_starts, item_ends = _work_list(
        query_start_ptr, kv_lens_ptr, seqs, max_kv, capacity, TOKENS, SPLITS, MOST_QUERIES, BLOCK_B
    )
    if gl.program_id(0) == 0:
        gl.store(bases_ptr + batch, gl.where(parallel, slot_starts, -1), mask=batch < seqs)
    total_work = gl.max(item_ends, 0) * head_blocks
    step = gl.program_id(0) * 0
    done = gl.program_id(0) * 0
    number = gl.program_id(0) * 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        seq, slot, seq_splits, query_start, query_len, first_token, first, high, begin, end = _item(
            work,
            query_start_ptr,
            kv_lens_ptr,
            seqs,
            max_kv,
            capacity,
            NUM_HEADS,
            HEADS,
            TOKENS,
            SPLITS,
            MOST_QUERIES,
            BLOCK_B,
        )
        at = gl.arange(0, _FIELDS, layout=gl.BlockedLayout([1], [32], [_WARPS], [0]))
        fields = gl.where(at == 0, slot, gl.where(at == 1, seq_splits, gl.where(at == 2, query_len, first_token)))
        fields = gl.where(at == 4, first, gl.where(at == 5, high, gl.where(at == 6, begin, fields)))
        fields = gl.where(at == 7, end, fields)
        hopper.mbarrier.wait(item_free.index(number % 2), (number // 2 + 1) % 2)
        items.index(number % 2).store(fields)
        barrier()
        hopper.mbarrier.arrive(item_ready.index(number % 2))
        number += 1
        if begin < end:
            step, done = _copy_item(
                copied_to,
                (q_ptr, kv_ptr, table_ptr + seq.to(gl.int64) * stride_table),
                (stride_q_token, stride_q_head, stride_page, stride_slot),
                step,
                done,
                work % head_blocks,
                query_start,
                query_len,
                first_token,
                begin,
                end,
                high,
                NUM_HEADS,
                HEADS,
                TOKENS,
                PAGE_SIZE,
                BLOCK_N,
                HALF,
                ROPE,
            )
    if step > 0:
        hopper.async_copy.wait_group(0)
        publish(step - 1, ready, _BUFFERS)


@gluon.jit
def _softmax(
    scores,
    before,
    start,
    full_end,
    positions,
    high,
    scale,
    BLOCK_N: gl.constexpr,
    SCORES: gl.constexpr,
):
    """Weights of a tile, the new maximum, and what the sums so far are to be scaled by."""
    if start + BLOCK_N > full_end:
        kv = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        visible = (kv < high)[None, :] & (kv[None, :] <= positions[:, None])
        scores = gl.where(visible, scores, float("-inf"))
    maximum = gl.maximum(before, gl.max(scores, axis=1) * scale)
    reference = _no_lower_than_zero(maximum)
    weights = gl.exp2(gl.fma(scores, gl.zeros_like(scores) + scale, gl.zeros_like(scores) - reference[:, None]))
    return weights, maximum, gl.exp2(before - reference)


@gluon.jit
def _scores(q_left, q_right, q_rope, kv_left, kv_right, kv_rope, buffer, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """Ask for the scores of a tile: over the compressed KV, then over the rotary part."""
    # Where the queries are is hidden from the compiler: it would work out where each piece is in front of the loop, and
    # keep that in local memory, which takes longer to read.
    none = gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [buffer], dtype=gl.int32, is_pure=False, pack=1)
    scores = hopper.warpgroup_mma(
        q_left.index(none),
        kv_left.index(buffer).permute((1, 0)),
        gl.zeros((_ROWS, BLOCK_N), gl.float32, SCORES),
        use_acc=False,
        is_async=True,
    )
    scores = hopper.warpgroup_mma(q_right.index(none), kv_right.index(buffer).permute((1, 0)), scores, is_async=True)
    return hopper.warpgroup_mma(q_rope.index(none), kv_rope.index(buffer).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _hand_over(weights, maximum, decay, weights_own, maxima_own, decays_own, ready):
    """Store a tile's weights, maximum and decay for both warpgroups, and say that they are there."""
    weights_own.store(weights.to(weights_own.dtype))
    maxima_own.store(maximum)
    decays_own.store(decay)
    hopper.fence_async_shared()
    barrier()
    hopper.mbarrier.arrive(ready)


@gluon.jit
def _values(total, acc, decays, weights, ones, values, SUMMED: gl.constexpr, SUMS: gl.constexpr, VALUES: gl.constexpr):
    """Scale the sums by a tile's decay, and ask for the products of its weights to be added: one group, SUMMED two."""
    acc = acc * decays.load(gl.SliceLayout(1, VALUES))[:, None]
    if SUMMED:
        total = total * decays.load(gl.SliceLayout(1, SUMS))[:, None]
        total = hopper.warpgroup_mma(weights, ones, total, is_async=True)
    acc = hopper.warpgroup_mma(weights, values, acc, is_async=True)
    return total, acc


@gluon.jit
def _first_tile(
    SIDE: gl.constexpr,
    total,
    acc,
    start,
    full_end,
    positions,
    high,
    step,
    use,
    shared,
    scale,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
):
    """An item's first tile, where it is this side's. use: how many tiles of this side were before it."""
    (
        q_left,
        q_right,
        q_rope,
        kv_left,
        kv_right,
        kv_rope,
        weights_shared,
        maxima_shared,
        decays_shared,
        _ones,
        ready,
        _free,
        weights_ready,
        weights_free,
    ) = shared
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_N, 16])
    hopper.mbarrier.wait(ready.index(step % _BUFFERS), step // _BUFFERS % 2)
    scores = _scores(q_left, q_right, q_rope, kv_left, kv_right, kv_rope, step % _BUFFERS, BLOCK_N, SCORES)
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    none = gl.full((_ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    weights, maximum, decay = _softmax(scores, none, start, full_end, positions, high, scale, BLOCK_N, SCORES)
    hopper.mbarrier.wait(weights_free.index(SIDE), (use + 1) % 2)
    _hand_over(
        weights,
        maximum,
        decay,
        weights_shared.index(SIDE),
        maxima_shared.index(SIDE),
        decays_shared.index(SIDE),
        weights_ready.index(SIDE),
    )
    return _own_values(SIDE, total, acc, step, shared, HALF)


@gluon.jit
def _ask(step, shared, BLOCK_N: gl.constexpr):
    """Ask for the scores of a tile, once it is there."""
    q_left, q_right, q_rope, kv_left, kv_right, kv_rope, _w, _m, _d, _o, ready, _f, _wr, _wf = shared
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_N, 16])
    buffer = step % _BUFFERS
    hopper.mbarrier.wait(ready.index(buffer), step // _BUFFERS % 2)
    return _scores(q_left, q_right, q_rope, kv_left, kv_right, kv_rope, buffer, BLOCK_N, SCORES)


@gluon.jit
def _weigh(
    SIDE: gl.constexpr,
    FRESH: gl.constexpr,
    scores,
    total,
    acc,
    start,
    full_end,
    positions,
    high,
    step,
    use,
    others_use,
    shared,
    scale,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
):
    """From the scores of a tile of this side, being asked for: add the values of the other's before it, hand over the
    weights.

    FRESH: it begins a split, so that no maximum is carried on. use, others_use: how many tiles of this side were before
    this one, and of the other before its own. Returns the sums, which hold the tile before; with FRESH also that tile's
    maximum, as rows of the accumulator have it.
    """
    (
        _q_left,
        _q_right,
        _q_rope,
        kv_left,
        kv_right,
        _kv_rope,
        weights_shared,
        maxima_shared,
        decays_shared,
        ones,
        _ready,
        free,
        weights_ready,
        weights_free,
    ) = shared
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _SUM_COLUMNS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, HALF, 16])
    OTHER: gl.constexpr = 1 - SIDE
    if SIDE == 0:  # noqa: SIM108 - decided when it is compiled
        values = kv_left
    else:
        values = kv_right
    before_buffer = (step - 1) % _BUFFERS
    hopper.mbarrier.wait(weights_ready.index(OTHER), others_use % 2)
    if FRESH:
        others_maximum = maxima_shared.index(OTHER).load(gl.SliceLayout(1, VALUES))
        before = gl.full((_ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    else:
        before = maxima_shared.index(OTHER).load(gl.SliceLayout(1, SCORES))
    total, acc = _values(
        total,
        acc,
        decays_shared.index(OTHER),
        weights_shared.index(OTHER),
        ones,
        values.index(before_buffer),
        SIDE == 0,
        SUMS,
        VALUES,
    )
    scores = hopper.warpgroup_mma_wait(2 - SIDE, deps=[scores])
    weights, maximum, decay = _softmax(scores, before, start, full_end, positions, high, scale, BLOCK_N, SCORES)
    # Over by now. The buffer goes back before the weights are handed over: it is what the copies wait for.
    total, acc = hopper.warpgroup_mma_wait(0, deps=[total, acc])
    hopper.mbarrier.arrive(free.index(before_buffer))
    hopper.mbarrier.arrive(weights_free.index(OTHER))
    hopper.mbarrier.wait(weights_free.index(SIDE), (use + 1) % 2)
    _hand_over(
        weights,
        maximum,
        decay,
        weights_shared.index(SIDE),
        maxima_shared.index(SIDE),
        decays_shared.index(SIDE),
        weights_ready.index(SIDE),
    )
    if FRESH:
        return total, acc, others_maximum
    else:
        return total, acc


@gluon.jit
def _own_values(SIDE: gl.constexpr, total, acc, step, shared, HALF: gl.constexpr):
    """Add the values of a tile of this side, whose weights are handed over."""
    _q0, _q1, _q2, kv_left, kv_right, _k2, weights_shared, _m, decays_shared, ones, _r, free, _wr, _wf = shared
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _SUM_COLUMNS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, HALF, 16])
    if SIDE == 0:  # noqa: SIM108 - decided when it is compiled
        values = kv_left
    else:
        values = kv_right
    total, acc = _values(
        total,
        acc,
        decays_shared.index(SIDE),
        weights_shared.index(SIDE),
        ones,
        values.index(step % _BUFFERS),
        SIDE == 0,
        SUMS,
        VALUES,
    )
    total, acc = hopper.warpgroup_mma_wait(0, deps=[total, acc])
    hopper.mbarrier.arrive(free.index(step % _BUFFERS))
    return total, acc


@gluon.jit
def _others_values(SIDE: gl.constexpr, total, acc, step, others_use, shared, HALF: gl.constexpr):
    """Add the values of an item's last tile, where it is the other side's. Its weights and maxima are kept."""
    _q0, _q1, _q2, kv_left, kv_right, _k2, weights_shared, _m, decays_shared, ones, _r, free, weights_ready, _wf = (
        shared
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _SUM_COLUMNS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, HALF, 16])
    OTHER: gl.constexpr = 1 - SIDE
    if SIDE == 0:  # noqa: SIM108 - decided when it is compiled
        values = kv_left
    else:
        values = kv_right
    hopper.mbarrier.wait(weights_ready.index(OTHER), others_use % 2)
    total, acc = _values(
        total,
        acc,
        decays_shared.index(OTHER),
        weights_shared.index(OTHER),
        ones,
        values.index(step % _BUFFERS),
        SIDE == 0,
        SUMS,
        VALUES,
    )
    total, acc = hopper.warpgroup_mma_wait(0, deps=[total, acc])
    hopper.mbarrier.arrive(free.index(step % _BUFFERS))
    return total, acc


@gluon.jit
def _attend(
    SIDE: gl.constexpr,
    attended,
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    SPLITS: gl.constexpr,
    MOST_QUERIES: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
):
    """A warpgroup that attends: the scores of every other tile, and SIDE's half of the accumulator's columns."""
    (
        q_left,
        q_right,
        q_rope,
        kv_left,
        kv_right,
        kv_rope,
        weights_shared,
        maxima_shared,
        decays_shared,
        ones,
        items,
        ready,
        free,
        q_free,
        item_ready,
        item_free,
        weights_ready,
        weights_free,
        kv_lens_ptr,
        query_start_ptr,
        maxima_ptr,
        totals_ptr,
        accs_ptr,
        scale,
        seqs,
        max_kv,
        capacity,
    ) = attended
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _SUM_COLUMNS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, HALF, 16])
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OTHER: gl.constexpr = 1 - SIDE
    shared = (
        q_left,
        q_right,
        q_rope,
        kv_left,
        kv_right,
        kv_rope,
        weights_shared,
        maxima_shared,
        decays_shared,
        ones,
        ready,
        free,
        weights_ready,
        weights_free,
    )
    _batch, _starts, _query_lens, _kv_lens, _slot_starts, _parallel, _item_starts, item_ends = _work_list(
        query_start_ptr, kv_lens_ptr, seqs, max_kv, capacity, TOKENS, SPLITS, MOST_QUERIES, BLOCK_B
    )
    head_blocks: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    total_work = gl.max(item_ends, 0) * head_blocks
    base_step = gl.program_id(0) * 0
    number = gl.program_id(0) * 0
    for work in range(gl.program_id(0), total_work, gl.num_programs(0)):
        hopper.mbarrier.wait(item_ready.index(number % 2), number // 2 % 2)
        fields = items.index(number % 2).load(gl.BlockedLayout([1], [32], [_WARPS], [0]))
        slot = _field(fields, 0)
        seq_splits = _field(fields, 1)
        query_len = _field(fields, 2)
        first_token = _field(fields, 3)
        first = _field(fields, 4)
        high = _field(fields, 5)
        begin = _field(fields, 6)
        end = _field(fields, 7)
        barrier()
        hopper.mbarrier.arrive(item_free.index(number % 2))
        number += 1
        if begin < end:
            tiles = gl.cdiv(end - begin, BLOCK_N)
            score_tokens, _, _ = _rows_of(work, first_token, query_len, SCORE_ROWS, NUM_HEADS, HEADS, TOKENS)
            positions = first - first_token + score_tokens
            full_end = gl.minimum(first + 1, high)
            total = gl.zeros((_ROWS, _SUM_COLUMNS), gl.float32, SUMS)
            acc = gl.zeros((_ROWS, HALF), gl.float32, VALUES)

            # A tile belongs to the side that its number in the program has as its parity.
            first_own = (base_step + SIDE) % 2
            if first_own == 0:
                total, acc = _first_tile(
                    SIDE,
                    total,
                    acc,
                    begin,
                    full_end,
                    positions,
                    high,
                    base_step,
                    base_step // 2,
                    shared,
                    scale,
                    BLOCK_N,
                    HALF,
                )
            for tile in range(2 - first_own, tiles, 2):
                step = base_step + tile
                total, acc = _weigh(
                    SIDE,
                    False,
                    _ask(step, shared, BLOCK_N),
                    total,
                    acc,
                    begin + tile * BLOCK_N,
                    full_end,
                    positions,
                    high,
                    step,
                    step // 2,
                    (step - 1) // 2,
                    shared,
                    scale,
                    BLOCK_N,
                    HALF,
                )
                total, acc = _own_values(SIDE, total, acc, step, shared, HALF)
            last_step = base_step + tiles - 1
            # The last scores have been taken; the queries of the next item may come.
            barrier()
            hopper.mbarrier.arrive(q_free)
            if last_step % 2 == OTHER:
                total, acc = _others_values(SIDE, total, acc, last_step, last_step // 2, shared, HALF)
            tokens, heads, valid = _rows_of(
                work, first_token, query_len, gl.SliceLayout(1, VALUES), NUM_HEADS, HEADS, TOKENS
            )
            dims = SIDE * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, VALUES))
            states = (slot.to(gl.int64) + tokens * seq_splits) * NUM_HEADS + heads
            gl.store(accs_ptr + states[:, None] * (2 * HALF) + dims[None, :], acc, mask=valid[:, None])
            if SIDE == 0:
                sum_tokens, sum_heads, sum_valid = _rows_of(
                    work, first_token, query_len, gl.SliceLayout(1, SUMS), NUM_HEADS, HEADS, TOKENS
                )
                sum_states = (slot.to(gl.int64) + sum_tokens * seq_splits) * NUM_HEADS + sum_heads
                maximum = maxima_shared.index(last_step % 2).load(gl.SliceLayout(1, SUMS))
                gl.store(maxima_ptr + sum_states, maximum, mask=sum_valid)
                gl.store(totals_ptr + sum_states, gl.max(total, axis=1), mask=sum_valid)
            barrier()
            hopper.mbarrier.arrive(weights_free.index(OTHER), pred=last_step % 2 == OTHER)
            base_step += tiles


@gluon.jit
def _allocate(dtype: gl.constexpr, BLOCK_N: gl.constexpr, HALF: gl.constexpr, ROPE: gl.constexpr):
    """A program's shared memory: queries, KV tiles, what the sides hand over, items, and their barriers."""
    Q_WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, HALF], dtype)
    Q_NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, ROPE], dtype)
    KV_WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HALF], dtype)
    KV_NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, ROPE], dtype)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, BLOCK_N], dtype)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, _SUM_COLUMNS], dtype)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_left = gl.allocate_shared_memory(dtype, (1, _ROWS, HALF), Q_WIDE)
    q_right = gl.allocate_shared_memory(dtype, (1, _ROWS, HALF), Q_WIDE)
    q_rope = gl.allocate_shared_memory(dtype, (1, _ROWS, ROPE), Q_NARROW)
    kv_left = gl.allocate_shared_memory(dtype, (_BUFFERS, BLOCK_N, HALF), KV_WIDE)
    kv_right = gl.allocate_shared_memory(dtype, (_BUFFERS, BLOCK_N, HALF), KV_WIDE)
    kv_rope = gl.allocate_shared_memory(dtype, (_BUFFERS, BLOCK_N, ROPE), KV_NARROW)
    weights = gl.allocate_shared_memory(dtype, (2, _ROWS, BLOCK_N), WEIGHTS)
    maxima = gl.allocate_shared_memory(gl.float32, (2, _ROWS), PLAIN)
    decays = gl.allocate_shared_memory(gl.float32, (2, _ROWS), PLAIN)
    ones = gl.allocate_shared_memory(
        dtype,
        (BLOCK_N, _SUM_COLUMNS),
        ONES,
        gl.full((BLOCK_N, _SUM_COLUMNS), 1.0, dtype, gl.BlockedLayout([1, 8], [16, 2], [_WARPS, 1], [1, 0])),
    )
    ready = gl.allocate_shared_memory(gl.int64, (_BUFFERS, 1), hopper.mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, (_BUFFERS, 1), hopper.mbarrier.MBarrierLayout())
    weights_ready = gl.allocate_shared_memory(gl.int64, (2, 1), hopper.mbarrier.MBarrierLayout())
    weights_free = gl.allocate_shared_memory(gl.int64, (2, 1), hopper.mbarrier.MBarrierLayout())
    items = gl.allocate_shared_memory(gl.int32, (2, _FIELDS), PLAIN)
    item_ready = gl.allocate_shared_memory(gl.int64, (2, 1), hopper.mbarrier.MBarrierLayout())
    item_free = gl.allocate_shared_memory(gl.int64, (2, 1), hopper.mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, (1,), hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(_BUFFERS):
        hopper.mbarrier.init(ready.index(i), count=1)
        hopper.mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        hopper.mbarrier.init(weights_ready.index(i), count=1)
        hopper.mbarrier.init(weights_free.index(i), count=1)
        hopper.mbarrier.init(item_ready.index(i), count=1)
        hopper.mbarrier.init(item_free.index(i), count=2)
    hopper.mbarrier.init(q_free, count=2)
    hopper.fence_async_shared()
    barrier()
    queries = (q_left, q_right, q_rope)
    tiles = (kv_left, kv_right, kv_rope)
    handed = (weights, maxima, decays, ones)
    return queries, tiles, handed, items, ready, free, q_free, item_ready, item_free, weights_ready, weights_free


@gluon.jit(do_not_specialize=["seqs", "max_kv", "capacity", "stride_table"])
def seesaw_split_kernel(
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
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    RANK: gl.constexpr,
    ROPE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    SPLITS: gl.constexpr,
    MOST_QUERIES: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_L: gl.constexpr,
    BLOCK_R: gl.constexpr,
):
    """`latent_split_kernel`, launched with WARPS, for SEESAW_ROWS rows and what `mla_params.seesaws` names."""
    gl.static_assert(RANK == BLOCK_L and ROPE == BLOCK_R and BLOCK_M == _ROWS)
    HALF: gl.constexpr = BLOCK_L // 2
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    queries, tiles, handed, items, ready, free, q_free, item_ready, item_free, weights_ready, weights_free = _allocate(
        dtype, BLOCK_N, HALF, ROPE
    )
    q_left, q_right, q_rope = queries
    kv_left, kv_right, kv_rope = tiles
    weights, maxima, decays, ones = handed
    attend = (
        q_left,
        q_right,
        q_rope,
        kv_left,
        kv_right,
        kv_rope,
        weights,
        maxima,
        decays,
        ones,
        items,
        ready,
        free,
        q_free,
        item_ready,
        item_free,
        weights_ready,
        weights_free,
        kv_lens_ptr,
        query_start_ptr,
        maxima_ptr,
        totals_ptr,
        accs_ptr,
        exp2_scale,
        seqs,
        max_kv,
        capacity,
    )
    copy = (
        q_left,
        q_right,
        q_rope,
        kv_left,
        kv_right,
        kv_rope,
        items,
        ready,
        free,
        q_free,
        item_ready,
        item_free,
        q_ptr,
        kv_ptr,
        table_ptr,
        kv_lens_ptr,
        query_start_ptr,
        bases_ptr,
        seqs,
        max_kv,
        capacity,
        stride_table,
        stride_q_token,
        stride_q_head,
        stride_page,
        stride_slot,
    )
    gl.warp_specialize(
        [
            (
                _attend,
                (gl.constexpr(0), attend, NUM_HEADS, HEADS, TOKENS, SPLITS, MOST_QUERIES, BLOCK_B, BLOCK_N, HALF),
            ),
            (
                _attend,
                (gl.constexpr(1), attend, NUM_HEADS, HEADS, TOKENS, SPLITS, MOST_QUERIES, BLOCK_B, BLOCK_N, HALF),
            ),
            (_copy, (copy, NUM_HEADS, HEADS, TOKENS, PAGE_SIZE, SPLITS, MOST_QUERIES, BLOCK_B, BLOCK_N, HALF, ROPE)),
        ],
        [_WARPS, _WARPS],
        [_ATTEND_REGISTERS, _COPY_REGISTERS],
    )

"""Latent attention's runs of splits on Hopper: `latent_segment_kernel` with the roles of `mla_hopper`, in Gluon.

A split of 64 rows is 128 KB in fp32, as much as the KV of 114 positions. Here it is not stored for another kernel:
where a split ends, each of the two warpgroups that attend folds its half of the accumulator's columns into a running
state. That has no place in registers or shared memory, which the accumulator and the KV tiles fill, so it lies in
global memory of the program's own, 17 MB for 132 programs, for the L2 cache to keep. A thread reads what it wrote
itself, so that nothing has to be waited for but the loads. The stream of KV tiles does not stop there: side 0 takes the
scores of the next split's first tile and hands its weights over before it folds; side 1 folds meanwhile.

For that, an item's tiles belong to the sides in turn from its first on, and splits hold tiles in pairs: a split begins
with a tile of side 0 and ends with one of side 1.
"""

# Kernel arguments are Triton values, which no annotation describes.
# RET505: a branch on a constexpr must be an `if` of its own, or both sides are compiled.
# RUF005: Triton has no unpacking.
# ruff: noqa: ANN001, ANN201, ANN202, RET505, RUF005
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from bidispatch_backends.triton.attention_kernels import _splits_of
from bidispatch_backends.triton.attention_state import (
    finish,
    fold_decays,
    fold_sums,
    split_at,
    split_start,
    visible_range,
)
from bidispatch_backends.triton.hopper import barrier, publish
from bidispatch_backends.triton.mla_hopper import (
    _ATTEND_REGISTERS,
    _BUFFERS,
    _COPY_REGISTERS,
    _FIELDS,
    _ROWS,
    _SUM_COLUMNS,
    _WARPS,
    _allocate,
    _ask,
    _copy_item,
    _field,
    _first_tile,
    _others_values,
    _own_values,
    _rows_of,
    _weigh,
)
from bidispatch_backends.triton.mla_runs import pair_at, part_of, places_of, run_of

__all__ = ["seesaw_segment_kernel"]

_PIECE = gl.constexpr(32)
"""Columns of an accumulator that are folded at once: 16 registers a thread."""
_AHEAD = gl.constexpr(2)
"""Pieces of the running state that are on their way."""


@gluon.jit
def _of_roles(allocated):
    """Of a program's shared memory and barriers, what the warps that attend take, and what those that copy do."""
    queries, tiles, handed, items, ready, free, q_free, item_ready, item_free, weights_ready, weights_free = allocated
    both = items, ready, free, q_free, item_ready, item_free
    return queries + tiles + handed + both + (weights_ready, weights_free), queries + tiles + both


@gluon.jit
def _send(items, item_ready, item_free, number, fields):
    """Hand an item's integers to the warps that attend."""
    hopper.mbarrier.wait(item_free.index(number % 2), (number // 2 + 1) % 2)
    items.index(number % 2).store(fields)
    barrier()
    hopper.mbarrier.arrive(item_ready.index(number % 2))


@gluon.jit
def _fields_of(slot, seq_splits, query_len, first_token, first, high, begin, end, head_block, query_start, whole):
    """What is handed over of an item: positions [begin, end) of a query tile, and whether they are all that it sees.

    slot: of the first split's state, where they are not. first: the position of the tile's first token.
    """
    at = gl.arange(0, _FIELDS, layout=gl.BlockedLayout([1], [32], [_WARPS], [0]))
    fields = gl.where(at == 0, slot, gl.where(at == 1, seq_splits, gl.where(at == 2, query_len, 0)))
    fields = gl.where(at == 3, first_token, gl.where(at == 4, first, gl.where(at == 5, high, fields)))
    fields = gl.where(at == 6, begin, gl.where(at == 7, end, gl.where(at == 8, head_block, fields)))
    return gl.where(at == 9, query_start, gl.where(at == 10, gl.where(whole, 1, 0), fields))


@gluon.jit
def _send_end(items, item_ready, item_free, number):
    """Say that no item follows."""
    at = gl.arange(0, _FIELDS, layout=gl.BlockedLayout([1], [32], [_WARPS], [0]))
    _send(items, item_ready, item_free, number, gl.where(at == 10, -1, 0))


@gluon.jit
def _read(items, number):
    """The integers of an item that has been received."""
    return items.index(number % 2).load(gl.BlockedLayout([1], [32], [_WARPS], [0]))


@gluon.jit
def _sequences(
    query_start_ptr,
    kv_lens_ptr,
    seqs,
    max_kv,
    capacity,
    TOKENS: gl.constexpr,
    SPLITS: gl.constexpr,
    MOST_QUERIES: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
):
    """Every sequence's number and what `places_of` says of it. Every warp counts for itself, so that none waits."""
    batch = gl.arange(0, BLOCK_B, layout=gl.BlockedLayout([max(1, BLOCK_B // 32)], [32], [_WARPS], [0]))
    there = batch < seqs
    query_lens = gl.load(query_start_ptr + batch + 1, mask=there, other=0)
    query_lens -= gl.load(query_start_ptr + batch, mask=there, other=0)
    kv_lens = gl.load(kv_lens_ptr + batch, mask=there, other=0)
    _, splits = _splits_of(query_lens, kv_lens, max_kv, True, 0, SPLITS)
    query_tiles, kv_tiles, slot_starts, parallel = places_of(
        query_lens, kv_lens, splits, gl.num_programs(0), capacity, TOKENS, MOST_QUERIES, BLOCK_N, HEAD_BLOCKS
    )
    return batch, query_tiles, kv_tiles, slot_starts, parallel


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
    """The warpgroup that copies: what an item is, then its queries and KV tiles.

    An item is a run of splits that a program folds, or one split whose state it stores.
    """
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
        folded_ptr,
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
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [_WARPS], [0])
    head_blocks: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    copied_to = q_left, q_right, q_rope, kv_left, kv_right, kv_rope, ready, free, q_free
    batch, query_tiles, kv_tiles, slot_starts, parallel = _sequences(
        query_start_ptr,
        kv_lens_ptr,
        seqs,
        max_kv,
        capacity,
        TOKENS,
        SPLITS,
        MOST_QUERIES,
        BLOCK_B,
        BLOCK_N,
        head_blocks,
    )
    if gl.program_id(0) == 0:
        gl.store(bases_ptr + batch, gl.where(parallel, slot_starts, -1), mask=batch < seqs)
    place, stop = part_of(gl.program_id(0), gl.num_programs(0), query_tiles, kv_tiles, head_blocks)
    step = gl.program_id(0) * 0
    done = gl.program_id(0) * 0
    number = gl.program_id(0) * 0
    while place < stop:
        # Counted anew for each pair, which takes less than holding the counts would.
        batch, query_tiles, kv_tiles, slot_starts, _parallel = _sequences(
            query_start_ptr,
            kv_lens_ptr,
            seqs,
            max_kv,
            capacity,
            TOKENS,
            SPLITS,
            MOST_QUERIES,
            BLOCK_B,
            BLOCK_N,
            head_blocks,
        )
        head_block, query_tile, seq, base, first_place, pair_tiles = pair_at(
            place, batch, query_tiles, kv_tiles, slot_starts
        )
        query_start = gl.load(query_start_ptr + seq)
        query_len = gl.load(query_start_ptr + seq + 1) - query_start
        kv_len = gl.load(kv_lens_ptr + seq)
        _first_split, seq_splits = _splits_of(query_len, kv_len, max_kv, True, 0, SPLITS)
        first_token = query_tile * TOKENS
        first = kv_len - query_len + first_token
        last = gl.minimum(first + TOKENS, kv_len) - 1
        _low, high = visible_range(first, last, kv_len, True, 0)
        next_place = gl.minimum(first_place + pair_tiles, stop)
        split, end_split, begin, end = run_of(place - first_place, next_place - first_place, high, SPLITS, BLOCK_N)
        begins_pair = split == 0
        whole = begins_pair & (end == high)
        place = next_place

        if begins_pair & (begin < end):
            folded_tokens, folded_heads, valid = _rows_of(
                head_block, first_token, query_len, ROWS, NUM_HEADS, HEADS, TOKENS
            )
            folded_rows = (query_start + folded_tokens).to(gl.int64) * NUM_HEADS + folded_heads
            gl.store(folded_ptr + folded_rows, gl.where(whole, -1, end_split) + folded_heads * 0, mask=valid)
        while begin < end:
            item_end = gl.where(begins_pair, end, gl.minimum(split_start(split + 1, SPLITS), end))
            fields = _fields_of(
                base + split,
                seq_splits,
                query_len,
                first_token,
                first,
                high,
                begin,
                item_end,
                head_block,
                query_start,
                whole,
            )
            _send(items, item_ready, item_free, number, fields)
            number += 1
            step, done = _copy_item(
                copied_to,
                (q_ptr, kv_ptr, table_ptr + seq.to(gl.int64) * stride_table),
                (stride_q_token, stride_q_head, stride_page, stride_slot),
                step,
                done,
                head_block,
                query_start,
                query_len,
                first_token,
                begin,
                item_end,
                high,
                NUM_HEADS,
                HEADS,
                TOKENS,
                PAGE_SIZE,
                BLOCK_N,
                HALF,
                ROPE,
            )
            begin = item_end
            split += 1
    if step > 0:
        hopper.async_copy.wait_group(0)
        publish(step - 1, ready, _BUFFERS)
    _send_end(items, item_ready, item_free, number)


@gluon.jit
def _pieces(acc, COLUMNS: gl.constexpr):
    """An accumulator's columns, _PIECE at a time: a thread has some of each, so that nothing moves."""
    if COLUMNS == _PIECE:
        return (acc,)
    else:
        left, right = acc.reshape([_ROWS, 2, COLUMNS // 2]).permute([0, 2, 1]).split()
        return _pieces(left, COLUMNS // 2) + _pieces(right, COLUMNS // 2)


@gluon.jit
def _in_memory(piece):
    """A piece as the running state lies in memory: [16, 128], of which a warp has a row, a thread 4 elements of it.

    Of the matrix unit's layout a thread has 2 elements of a row and of the one 8 below, in each 8 columns.
    """
    ROW: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [_WARPS, 1], [1, 0])
    rows = piece.reshape([_WARPS, 2, 8, _PIECE // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5])
    return gl.convert_layout(rows.reshape([_WARPS * _PIECE // 8, 128]), ROW, assert_trivial=True)


@gluon.jit
def _from_memory(rows):
    """What `_in_memory` was given."""
    MATRIX: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _PIECE, 16])
    piece = rows.reshape([_PIECE // 8, _WARPS, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5])
    return gl.convert_layout(piece.reshape([_ROWS, _PIECE]), MATRIX, assert_trivial=True)


@gluon.jit
def _running(running_ptr, place: gl.constexpr):
    """Where a piece of the running state is."""
    ROW: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [_WARPS, 1], [1, 0])
    rows = gl.arange(0, _WARPS * _PIECE // 8, layout=gl.SliceLayout(1, ROW))
    columns = gl.arange(0, 128, layout=gl.SliceLayout(0, ROW))
    return running_ptr + place * (_ROWS * _PIECE) + rows[:, None] * 128 + columns[None, :]


@gluon.jit
def _hidden(running_ptr, number):
    """The same pointer, of which the compiler works out no addresses in front of the loops, to hold them there."""
    none = gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)
    return running_ptr + none * 32


@gluon.jit
def _of_warps(warps):
    """Which elements of a piece, as it lies in memory, are the first warps': those of 16 rows each."""
    ROW: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [_WARPS, 1], [1, 0])
    rows = gl.arange(0, _WARPS * _PIECE // 8, layout=gl.SliceLayout(1, ROW))
    columns = gl.arange(0, 128, layout=gl.SliceLayout(0, ROW))
    return (rows % _WARPS < warps)[:, None] & (columns >= 0)[None, :]


@gluon.jit
def _load_running(running_ptr, place: gl.constexpr, warps):
    """A piece of the running state, of so many warps; zeros for others. Past the L1 cache: it would not stay there."""
    return gl.load(_running(running_ptr, place), mask=_of_warps(warps), other=0.0, cache_modifier=".cg")


@gluon.jit
def _fold_piece(piece, rows, decay, split_decay):
    """A piece of a split's accumulator, folded into that of the running state."""
    MATRIX: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _PIECE, 16])
    piece = gl.convert_layout(piece, MATRIX, assert_trivial=True)
    return fold_sums(piece, gl.zeros_like(piece) + split_decay[:, None], _from_memory(rows), decay[:, None])


@gluon.jit
def _by_piece(values):
    """What each row of the accumulator has, as each row of a piece has it."""
    MATRIX: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _PIECE, 16])
    return gl.convert_layout(values, gl.SliceLayout(1, MATRIX), assert_trivial=True)


@gluon.jit
def _fold_rows(maximum, total, split_maximum, split_total, SIDE: gl.constexpr):
    """Fold a split's maxima and, on side 0, which has them, its totals; returns also the decays of both states."""
    maximum, decay, split_decay = fold_decays(maximum, _by_piece(split_maximum))
    if SIDE == 0:
        split_row = _by_piece(gl.max(split_total, axis=1))
        total = fold_sums(split_row, split_decay, total, decay)
    return maximum, total, decay, split_decay


@gluon.jit
def _load_first(running_ptr, warps):
    """The first pieces of the running state."""
    loaded = ()
    for place in gl.static_range(_AHEAD):
        loaded = loaded + (_load_running(running_ptr, place, warps),)
    return loaded


@gluon.jit
def _store_last(
    WHOLE: gl.constexpr,
    acc,
    loaded,
    running_ptr,
    before,
    decay,
    split_decay,
    maximum,
    total,
    pointers,
    valid,
    HALF: gl.constexpr,
):
    """Fold a run's last split and store what comes of it at `pointers`, which a piece has: the state, or the result."""
    pieces = _pieces(acc, HALF)
    for place in gl.static_range(HALF // _PIECE):
        piece = _fold_piece(pieces[place], loaded[place], decay, split_decay)
        if place + _AHEAD < HALF // _PIECE:
            loaded = loaded + (_load_running(running_ptr, place + _AHEAD, before),)
        if WHOLE:
            piece = finish(maximum, total, piece, None, None, None, 0, 0)
        gl.store(pointers + place * _PIECE, piece.to(pointers.dtype.element_ty), mask=valid[:, None])


@gluon.jit
def _fold_split(acc, running_ptr, before, warps, decay, split_decay, HALF: gl.constexpr):
    """Fold a split's accumulator into the running state in memory.

    warps: those whose rows there are, so that few rows take less traffic. before: as many, or none for a first split.
    """
    pieces = _pieces(acc, HALF)
    loaded = _load_first(running_ptr, before)
    for place in gl.static_range(HALF // _PIECE):
        rows = _in_memory(_fold_piece(pieces[place], loaded[place], decay, split_decay))
        if place + _AHEAD < HALF // _PIECE:
            loaded = loaded + (_load_running(running_ptr, place + _AHEAD, before),)
        gl.store(_running(running_ptr, place), rows, mask=_of_warps(warps))
    # So that the compiler keeps what follows apart: it would hold a part of two accumulators at once, and spill them
    # (Triton 3.9).
    barrier()


@gluon.jit
def _attend(
    SIDE: gl.constexpr,
    attended,
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    SPLITS: gl.constexpr,
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
        running_ptr,
        maxima_ptr,
        totals_ptr,
        accs_ptr,
        out_ptr,
        scale,
        stride_out_token,
        stride_out_head,
    ) = attended
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _SUM_COLUMNS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, HALF, 16])
    MATRIX: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _PIECE, 16])
    PIECE_ROWS: gl.constexpr = gl.SliceLayout(1, MATRIX)
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
    own_running = running_ptr + (gl.program_id(0) * 2 + SIDE) * (_ROWS * HALF)
    base_step = gl.program_id(0) * 0
    own_uses = gl.program_id(0) * 0
    others_uses = gl.program_id(0) * 0
    number = gl.program_id(0) * 0
    hopper.mbarrier.wait(item_ready.index(0), 0)
    fields = _read(items, number)
    while _field(fields, 10) >= 0:
        query_len = _field(fields, 2)
        first_token = _field(fields, 3)
        first = _field(fields, 4)
        high = _field(fields, 5)
        begin = _field(fields, 6)
        end = _field(fields, 7)
        head_block = _field(fields, 8)
        tiles = gl.cdiv(end - begin, BLOCK_N)
        score_tokens, _, _ = _rows_of(
            head_block, first_token, query_len, gl.SliceLayout(1, SCORES), NUM_HEADS, HEADS, TOKENS
        )
        positions = first - first_token + score_tokens
        full_end = gl.minimum(first + 1, high)
        warps = (gl.minimum(query_len - first_token, TOKENS) * HEADS + 15) // 16
        maximum = gl.full((_ROWS,), float("-inf"), gl.float32, PIECE_ROWS)
        row_total = gl.full((_ROWS,), 0.0, gl.float32, PIECE_ROWS)
        total = gl.zeros((_ROWS, _SUM_COLUMNS), gl.float32, SUMS)
        acc = gl.zeros((_ROWS, HALF), gl.float32, VALUES)
        if SIDE == 0:
            total, acc = _first_tile(
                SIDE, total, acc, begin, full_end, positions, high, base_step, own_uses, shared, scale, BLOCK_N, HALF
            )
        first_split = split_at(begin, SPLITS)
        last_split = split_at(end - 1, SPLITS)
        for split in range(first_split, last_split + 1):
            # This side's first tile that no fold before asked for. Worked out anew, not carried from split to split: of
            # a loop's values that only bound a loop within, Triton 3.6 keeps the first turn's (its pull request 9036).
            own = (split_start(split, SPLITS) - begin) // BLOCK_N + 2
            own += gl.where(split > first_split, SIDE, -SIDE)
            stop = gl.cdiv(gl.minimum(split_start(split + 1, SPLITS), end) - begin, BLOCK_N)
            for tile in range(own, stop, 2):
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
                    own_uses + tile // 2,
                    others_uses + (tile - 1) // 2,
                    shared,
                    scale,
                    BLOCK_N,
                    HALF,
                )
                total, acc = _own_values(SIDE, total, acc, step, shared, HALF)
            if split < last_split:
                # Scores of the split that follows are asked for before the fold.
                before, running_now = gl.where(split > first_split, warps, 0), _hidden(own_running, split)
                step = base_step + stop + SIDE
                if SIDE == 0:
                    total, acc, split_maximum = _weigh(
                        SIDE,
                        True,
                        _ask(step, shared, BLOCK_N),
                        total,
                        acc,
                        begin + stop * BLOCK_N,
                        full_end,
                        positions,
                        high,
                        step,
                        own_uses + stop // 2,
                        others_uses + (stop - 1) // 2,
                        shared,
                        scale,
                        BLOCK_N,
                        HALF,
                    )
                    maximum, row_total, decay, split_decay = _fold_rows(maximum, row_total, split_maximum, total, SIDE)
                    _fold_split(acc, running_now, before, warps, decay, split_decay, HALF)
                    total = gl.zeros((_ROWS, _SUM_COLUMNS), gl.float32, SUMS)
                    acc = gl.zeros((_ROWS, HALF), gl.float32, VALUES)
                    total, acc = _own_values(SIDE, total, acc, step, shared, HALF)
                else:
                    split_maximum = maxima_shared.index(SIDE).load(gl.SliceLayout(1, VALUES))
                    barrier()
                    maximum, row_total, decay, split_decay = _fold_rows(maximum, row_total, split_maximum, total, SIDE)
                    if stop + 1 < tiles:
                        scores = _ask(step, shared, BLOCK_N)
                        _fold_split(acc, running_now, before, warps, decay, split_decay, HALF)
                        total = gl.zeros((_ROWS, _SUM_COLUMNS), gl.float32, SUMS)
                        acc = gl.zeros((_ROWS, HALF), gl.float32, VALUES)
                        total, acc = _weigh(
                            SIDE,
                            False,
                            scores,
                            total,
                            acc,
                            begin + (stop + 1) * BLOCK_N,
                            full_end,
                            positions,
                            high,
                            step,
                            own_uses + (stop + 1) // 2,
                            others_uses + stop // 2,
                            shared,
                            scale,
                            BLOCK_N,
                            HALF,
                        )
                        total, acc = _own_values(SIDE, total, acc, step, shared, HALF)
                    else:
                        _fold_split(acc, running_now, before, warps, decay, split_decay, HALF)
                        total = gl.zeros((_ROWS, _SUM_COLUMNS), gl.float32, SUMS)
                        acc = gl.zeros((_ROWS, HALF), gl.float32, VALUES)
        # The last scores have been taken; the queries of the next item may come.
        barrier()
        hopper.mbarrier.arrive(q_free)
        last = tiles - 1
        if last % 2 == OTHER:
            total, acc = _others_values(SIDE, total, acc, base_step + last, others_uses + last // 2, shared, HALF)
        split_maximum = maxima_shared.index(last % 2).load(gl.SliceLayout(1, VALUES))
        barrier()
        hopper.mbarrier.arrive(weights_free.index(OTHER), pred=last % 2 == OTHER)
        maximum, row_total, decay, split_decay = _fold_rows(maximum, row_total, split_maximum, total, SIDE)
        base_step += tiles
        own_uses += (tiles + OTHER) // 2
        others_uses += (tiles + SIDE) // 2
        before = gl.where(last_split > first_split, warps, 0)
        # Read again, so that no register holds them meanwhile.
        fields = _read(items, number)
        slot = _field(fields, 0)
        seq_splits = _field(fields, 1)
        query_len = _field(fields, 2)
        first_token = _field(fields, 3)
        head_block = _field(fields, 8)
        query_start = _field(fields, 9)
        whole = _field(fields, 10)
        barrier()
        hopper.mbarrier.arrive(item_free.index(number % 2))
        tokens, heads, valid = _rows_of(head_block, first_token, query_len, PIECE_ROWS, NUM_HEADS, HEADS, TOKENS)
        dims = SIDE * HALF + gl.arange(0, _PIECE, layout=gl.SliceLayout(0, MATRIX))
        running_now = _hidden(own_running, number)
        loaded = _load_first(running_now, before)
        if whole > 0:
            # Side 1 is told the totals in the place of decays, as if they were another tile's of side 0.
            if SIDE == 0:
                hopper.mbarrier.wait(weights_free.index(0), (own_uses + 1) % 2)
                decays_shared.index(0).store(row_total)
                barrier()
                hopper.mbarrier.arrive(weights_ready.index(0))
                own_uses += 1
            else:
                hopper.mbarrier.wait(weights_ready.index(0), others_uses % 2)
                row_total = decays_shared.index(0).load(PIECE_ROWS)
                barrier()
                hopper.mbarrier.arrive(weights_free.index(0))
                others_uses += 1
            rows = (query_start + tokens).to(gl.int64) * stride_out_token + heads * stride_out_head
            out_ptrs = out_ptr + rows[:, None] + dims[None, :]
            _store_last(
                True, acc, loaded, running_now, before, decay, split_decay, maximum, row_total, out_ptrs, valid, HALF
            )
        else:
            states = (slot.to(gl.int64) + tokens * seq_splits) * NUM_HEADS + heads
            state_ptrs = accs_ptr + states[:, None] * (2 * HALF) + dims[None, :]
            _store_last(
                False, acc, loaded, running_now, before, decay, split_decay, maximum, row_total, state_ptrs, valid, HALF
            )
            if SIDE == 0:
                gl.store(maxima_ptr + states, maximum, mask=valid)
                gl.store(totals_ptr + states, row_total, mask=valid)
        number += 1
        hopper.mbarrier.wait(item_ready.index(number % 2), number // 2 % 2)
        fields = _read(items, number)


@gluon.jit(do_not_specialize=["seqs", "max_kv", "capacity", "stride_table"])
def seesaw_segment_kernel(
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
    """`latent_segment_kernel`, launched with WARPS, for SEESAW_ROWS rows and what `mla_params.walks_runs` names.

    running: [programs, SEESAW_ROWS, RANK] in float32, whose contents are nobody's before and after.
    """
    gl.static_assert(RANK == BLOCK_L and ROPE == BLOCK_R and BLOCK_M == _ROWS)
    HALF: gl.constexpr = BLOCK_L // 2
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    attend, copy = _of_roles(_allocate(dtype, BLOCK_N, HALF, ROPE))
    attend += running_ptr, maxima_ptr, totals_ptr, accs_ptr, out_ptr, exp2_scale, stride_out_token, stride_out_head
    copy += q_ptr, kv_ptr, table_ptr, kv_lens_ptr, query_start_ptr, folded_ptr, bases_ptr, seqs, max_kv, capacity
    copy += stride_table, stride_q_token, stride_q_head, stride_page, stride_slot
    gl.warp_specialize(
        [
            (_attend, (gl.constexpr(0), attend, NUM_HEADS, HEADS, TOKENS, SPLITS, BLOCK_N, HALF)),
            (_attend, (gl.constexpr(1), attend, NUM_HEADS, HEADS, TOKENS, SPLITS, BLOCK_N, HALF)),
            (_copy, (copy, NUM_HEADS, HEADS, TOKENS, PAGE_SIZE, SPLITS, MOST_QUERIES, BLOCK_B, BLOCK_N, HALF, ROPE)),
        ],
        [_WARPS, _WARPS],
        [_ATTEND_REGISTERS, _COPY_REGISTERS],
    )

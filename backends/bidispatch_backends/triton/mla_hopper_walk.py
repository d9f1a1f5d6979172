"""Latent attention's walk on Hopper: `latent_walk_kernel` with the roles of `mla_hopper_segments`, in Gluon.

A pair is a query tile and a block of its heads. Programs, one a multiprocessor, deal the pairs of all sequences that
are walked out among themselves, and each folds the splits of its pairs as a run that it has whole. What attends is that
of `mla_hopper_segments`, with the running state in the program's own memory; what copies differs in where its items
come from.

Pairs are dealt from the last tokens to the first, which have more to see, in rounds that turn about: so every program
gets about as much. Those of a round are tokens next to each other, whose keys the L2 cache has once.
"""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from bidispatch_backends.triton.attention_state import visible_range
from bidispatch_backends.triton.hopper import publish
from bidispatch_backends.triton.mla_hopper import (
    _ATTEND_REGISTERS,
    _BUFFERS,
    _COPY_REGISTERS,
    _ROWS,
    _WARPS,
    _allocate,
    _copy_item,
    _plus,
)
from bidispatch_backends.triton.mla_hopper_segments import _attend, _fields_of, _of_roles, _send, _send_end

__all__ = ["seesaw_walk_kernel"]


@gluon.jit
def _tiles(query_start_ptr, kv_lens_ptr, bases_ptr, seqs, TOKENS: gl.constexpr, BLOCK_B: gl.constexpr):
    """Of every sequence: its number, its first token, its lengths, its query tiles, and those up to its end.

    Sequences that the parallel splits took (bases[b] >= 0) have none. Every warp counts for itself.
    """
    batch = gl.arange(0, BLOCK_B, layout=gl.BlockedLayout([max(1, BLOCK_B // 32)], [32], [_WARPS], [0]))
    there = batch < seqs
    starts = gl.load(query_start_ptr + batch, mask=there, other=0)
    query_lens = gl.load(query_start_ptr + batch + 1, mask=there, other=0) - starts
    kv_lens = gl.load(kv_lens_ptr + batch, mask=there, other=0)
    walked = (query_lens > 0) & (gl.load(bases_ptr + batch, mask=there, other=0) < 0)
    tiles = gl.where(walked, (query_lens + TOKENS - 1) // TOKENS, 0)
    return batch, starts, query_lens, kv_lens, tiles, gl.associative_scan(tiles, 0, _plus)


@gluon.jit
def _fill(
    value,
    out_ptr,
    head_block,
    query_start,
    query_len,
    first_token,
    stride_out_token,
    stride_out_head,
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """Store a number for every row of a tile: of one that sees nothing, or must not."""
    dims = gl.arange(0, WIDTH, layout=gl.BlockedLayout([WIDTH // 128], [32], [_WARPS], [0]))
    for row in range(TOKENS * HEADS):
        token, head = first_token + row // HEADS, head_block * HEADS + row % HEADS
        if (token < query_len) & (head < NUM_HEADS):
            start = (query_start + token).to(gl.int64) * stride_out_token + head * stride_out_head
            gl.store(out_ptr + start + dims, (value + dims * 0.0).to(out_ptr.dtype.element_ty))


@gluon.jit
def _copy(
    copied,
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALF: gl.constexpr,
    ROPE: gl.constexpr,
):
    """The warpgroup that copies: what a pair is, then its queries and KV tiles. A pair is one item."""
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
        out_ptr,
        seqs,
        max_kv,
        stride_table,
        stride_q_token,
        stride_q_head,
        stride_page,
        stride_slot,
        stride_out_token,
        stride_out_head,
    ) = copied
    head_blocks: gl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    copied_to = q_left, q_right, q_rope, kv_left, kv_right, kv_rope, ready, free, q_free
    _batch, _starts, _query_lens, _kv_lens, _tile_counts, ends = _tiles(
        query_start_ptr, kv_lens_ptr, bases_ptr, seqs, TOKENS, BLOCK_B
    )
    pairs = gl.max(ends, 0) * head_blocks
    step = gl.program_id(0) * 0
    done = gl.program_id(0) * 0
    number = gl.program_id(0) * 0
    for dealt in range(0, pairs, gl.num_programs(0)):
        turn = dealt // gl.num_programs(0) % 2
        pair = dealt + gl.where(turn == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))
        if pair < pairs:
            # Counted anew, which takes less than holding the counts would.
            batch, starts, query_lens, kv_lens, tile_counts, ends = _tiles(
                query_start_ptr, kv_lens_ptr, bases_ptr, seqs, TOKENS, BLOCK_B
            )
            tile = gl.max(ends, 0) - 1 - pair // head_blocks
            its = (ends > tile) & (ends - tile_counts <= tile)
            seq, before = gl.max(gl.where(its, batch, 0), 0), gl.max(gl.where(its, ends - tile_counts, 0), 0)
            query_start = gl.max(gl.where(its, starts, 0), 0)
            query_len, kv_len = gl.max(gl.where(its, query_lens, 0), 0), gl.max(gl.where(its, kv_lens, 0), 0)
            head_block = pair % head_blocks
            first_token = (tile - before) * TOKENS
            first = kv_len - query_len + first_token
            last = gl.minimum(first + TOKENS, kv_len) - 1
            _low, high = visible_range(first, last, kv_len, True, 0)
            if (kv_len > max_kv) | (high <= 0):
                _fill(
                    gl.where(kv_len > max_kv, float("nan"), 0.0),
                    out_ptr,
                    head_block,
                    query_start,
                    query_len,
                    first_token,
                    stride_out_token,
                    stride_out_head,
                    NUM_HEADS,
                    HEADS,
                    TOKENS,
                    2 * HALF,
                )
            else:
                # Whole, so that it has no state to store and needs neither slot nor splits.
                fields = _fields_of(
                    0, 0, query_len, first_token, first, high, 0, high, head_block, query_start, high > 0
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
                    0,
                    high,
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
    _send_end(items, item_ready, item_free, number)


@gluon.jit(do_not_specialize=["seqs", "max_kv", "stride_table"])
def seesaw_walk_kernel(
    q_ptr,
    kv_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    bases_ptr,
    running_ptr,
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
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    RANK: gl.constexpr,
    ROPE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_L: gl.constexpr,
    BLOCK_R: gl.constexpr,
):
    """`latent_walk_kernel`, launched with WARPS and any number of programs, for SEESAW_ROWS rows and what
    `mla_params.walks_pairs` names.

    running: [programs, SEESAW_ROWS, RANK] in float32, whose contents are nobody's before and after.
    """
    gl.static_assert(RANK == BLOCK_L and ROPE == BLOCK_R and BLOCK_M == _ROWS)
    HALF: gl.constexpr = BLOCK_L // 2
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    attend, copy = _of_roles(_allocate(dtype, BLOCK_N, HALF, ROPE))
    # Three times in the place of where states go of pairs that are cut: none is.
    attend += running_ptr, running_ptr, running_ptr, running_ptr, out_ptr, exp2_scale, stride_out_token, stride_out_head
    copy += q_ptr, kv_ptr, table_ptr, kv_lens_ptr, query_start_ptr, bases_ptr, out_ptr, seqs, max_kv
    copy += stride_table, stride_q_token, stride_q_head, stride_page, stride_slot, stride_out_token, stride_out_head
    gl.warp_specialize(
        [
            (_attend, (gl.constexpr(0), attend, NUM_HEADS, HEADS, TOKENS, SPLITS, BLOCK_N, HALF)),
            (_attend, (gl.constexpr(1), attend, NUM_HEADS, HEADS, TOKENS, SPLITS, BLOCK_N, HALF)),
            (_copy, (copy, NUM_HEADS, HEADS, TOKENS, PAGE_SIZE, BLOCK_B, BLOCK_N, HALF, ROPE)),
        ],
        [_WARPS, _WARPS],
        [_ATTEND_REGISTERS, _COPY_REGISTERS],
    )

"""How calls of many sequences are cut into runs of splits, for `mla_segments` and `mla_hopper_segments`.

A pair is a query tile of a sequence and a block of its heads. The KV tiles of all pairs stand in one order: by block of
heads, then by the number of the query tile, then by sequence, positions ascending. Each program has an equal part of
it, moved to the next boundaries of splits: a split belongs to the program that has its first tile. So the programs that
have the same keys for other heads or later tokens of a sequence read them at about the same time.
"""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from bidispatch_backends.triton.attention_kernels import _split_from
from bidispatch_backends.triton.attention_state import split_start

__all__ = ["pair_at", "part_of", "places_of", "run_of"]

_MOST_IDLE = tl.constexpr(16)
"""A part of the programs, at most one in so many, may be left without work so that the others have whole pairs."""


@triton.jit
def _larger_of_four(a, b, c, d, other_a, other_b, other_c, other_d):
    return tl.maximum(a, other_a), tl.maximum(b, other_b), tl.maximum(c, other_c), tl.maximum(d, other_d)


@triton.jit
def _shares(programs, query_tiles, kv_tiles, HEAD_BLOCKS: tl.constexpr):
    """How many places there are, how many each program has that has work, and how many have one more.

    Where the pairs would nearly go round, so many programs have work that they do: alike sequences are then not cut,
    and no state of a split is stored.
    """
    pairs = tl.sum(query_tiles) * HEAD_BLOCKS
    places = tl.sum(query_tiles * kv_tiles) * HEAD_BLOCKS
    most = tl.maximum((pairs + programs - 1) // programs, 1)
    going_round = (pairs + most - 1) // most
    parts = tl.where((programs - going_round) * _MOST_IDLE <= programs, going_round, programs)
    parts = tl.maximum(parts, 1)
    return places, places // parts, places % parts


@triton.jit
def part_of(program, programs, query_tiles, kv_tiles, HEAD_BLOCKS: tl.constexpr):
    """The places [place, stop) in the order of KV tiles that a program has. query_tiles, kv_tiles: of each sequence."""
    places, share, rest = _shares(programs, query_tiles, kv_tiles, HEAD_BLOCKS)
    place = program * share + tl.minimum(program, rest)
    stop = place + share + tl.where(program < rest, 1, 0)
    return tl.minimum(place, places), tl.minimum(stop, places)


@triton.jit
def _program_of(place, share, rest):
    """Which program's part a place is in."""
    longer = rest * (share + 1)
    return tl.where(place < longer, place // (share + 1), rest + (place - longer) // tl.maximum(share, 1))


@triton.jit
def places_of(
    query_lens,
    kv_lens,
    splits,
    programs,
    capacity,
    TOKENS: tl.constexpr,
    MOST_QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
):
    """Of each sequence: its query tiles and KV tiles, 0 where it has no part in the order; where the workspace has its
    states; and whether it is none of the walk's.

    Only a pair that is cut has states to store. Where those of all such sequences have room, none is left to the walk;
    else, and where sequences have several query tiles, each takes the room of all its splits, and those that find none
    are left.
    """
    parallel = (query_lens > 0) & (query_lens <= MOST_QUERIES)
    listed = parallel & (splits > 0)
    query_tiles = tl.where(listed, (query_lens + TOKENS - 1) // TOKENS, 0)
    kv_tiles = tl.where(listed, (kv_lens + BLOCK_N - 1) // BLOCK_N, 0)
    slots = tl.where(listed, query_lens * splits, 0)

    places, share, rest = _shares(programs, query_tiles, kv_tiles, HEAD_BLOCKS)
    begins = tl.cumsum(kv_tiles, 0) - kv_tiles
    cut = kv_tiles < 0
    for block in tl.static_range(HEAD_BLOCKS):
        first = begins + block * (places // HEAD_BLOCKS)
        last = tl.maximum(first + kv_tiles - 1, first)
        cut = cut | (_program_of(first, share, rest) != _program_of(last, share, rest))
    of_cut = tl.where(cut, slots, 0)
    slots = tl.where((tl.max(query_tiles, 0) <= 1) & (tl.sum(of_cut) <= capacity), of_cut, slots)

    ends = tl.cumsum(slots, 0)
    parallel = parallel & (ends <= capacity)
    return tl.where(parallel, query_tiles, 0), tl.where(parallel, kv_tiles, 0), ends - slots, parallel


@triton.jit
def pair_at(place, batch, query_tiles, kv_tiles, slots):
    """The pair that a place is in: its block of heads, its query tile, its sequence and what `slots` has of that.

    Returns also the pair's first place and its number of KV tiles. kv_tiles is 0 where query_tiles is.
    """
    block_places = tl.sum(query_tiles * kv_tiles)
    block = place // block_places
    before = block * block_places
    query_tile = block * 0
    lengths = kv_tiles
    row = tl.sum(lengths)
    while place >= before + row:
        before += row
        query_tile += 1
        lengths = tl.where(query_tiles > query_tile, kv_tiles, 0)
        row = tl.sum(lengths)
    ends = before + tl.cumsum(lengths, 0)
    its = (ends > place) & (ends - lengths <= place)
    seq, slot, first_place, tiles = tl.reduce(
        (tl.where(its, batch, 0), tl.where(its, slots, 0), tl.where(its, ends - lengths, 0), tl.where(its, lengths, 0)),
        0,
        _larger_of_four,
    )
    return block, query_tile, seq, slot, first_place, tiles


@triton.jit
def run_of(begin_tile, end_tile, high, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The splits that begin in KV tiles [begin_tile, end_tile) of a sequence, and the positions of them below high.

    Returns the first split, the one behind the last, and begin and end of the positions: none where begin >= end.
    """
    begin_split = _split_from(begin_tile, 0, 0, SPLITS, BLOCK_N)
    end_split = _split_from(end_tile, 0, 0, SPLITS, BLOCK_N)
    return begin_split, end_split, split_start(begin_split, SPLITS), tl.minimum(split_start(end_split, SPLITS), high)

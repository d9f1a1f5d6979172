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

__all__ = ["MOST_IDLE", "pair_at", "part_of", "run_of"]

MOST_IDLE = 16
"""A part of the programs, at most one in so many, may be left without work so that the others have whole pairs."""

_MOST_IDLE = tl.constexpr(MOST_IDLE)


@triton.jit
def _larger_of_four(a, b, c, d, other_a, other_b, other_c, other_d):
    return tl.maximum(a, other_a), tl.maximum(b, other_b), tl.maximum(c, other_c), tl.maximum(d, other_d)


@triton.jit
def part_of(program, programs, query_tiles, kv_tiles, HEAD_BLOCKS: tl.constexpr):
    """The places [place, stop) in the order of KV tiles that a program has. query_tiles, kv_tiles: of each sequence.

    Where the pairs would nearly go round, so many programs have work that they do: alike sequences are then not cut,
    and no state of a split is stored.
    """
    pairs = tl.sum(query_tiles) * HEAD_BLOCKS
    places = tl.sum(query_tiles * kv_tiles) * HEAD_BLOCKS
    most = tl.maximum((pairs + programs - 1) // programs, 1)
    going_round = (pairs + most - 1) // most
    parts = tl.where((programs - going_round) * _MOST_IDLE <= programs, going_round, programs)
    parts = tl.maximum(parts, 1)
    share, rest = places // parts, places % parts
    place = program * share + tl.minimum(program, rest)
    stop = place + share + tl.where(program < rest, 1, 0)
    return tl.minimum(place, places), tl.minimum(stop, places)


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

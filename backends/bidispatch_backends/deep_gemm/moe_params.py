"""Tiles, workspaces and class labels of the grouped products. Imports no torch, no library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from bidispatch.device import Device
from bidispatch.ops.moe import known_experts
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.numerics import fp8_block_numerics
from bidispatch_backends.pieces import most_rows
from bidispatch_backends.triton.moe_params import most_blocks

__all__ = [
    "BLOCK_ROWS",
    "GroupedTile",
    "Room",
    "expected_rows",
    "grouped_numerics",
    "grouped_tiles",
    "grouped_tiles_for",
    "most_tokens",
]

BLOCK_ROWS = 128
"""Rows of the library's largest tile of a grouped product on Hopper (csrc/jit_kernels/heuristics/sm90.hpp:19-31). In
the contiguous layout an expert's rows begin at multiples of it; in the masked one a group has whole ones, because a
tile is stored whole, also over what lies behind its group."""
_MASKED_TOKENS = 64
"""Calls of up to so many tokens take the masked layout. Its smallest tile has 64 rows, so that up to there a token's
row in a group can be the token's number, and nothing is sorted."""
_MOST_TRIED = 256


class GroupedTile(Tile):
    """How rows lie for the products. A row's bits are claimed to be the same in both layouts."""

    layout: Literal["masked", "contiguous"]
    workspace_mb: int = Field(default=1024, ge=1)
    """The most MiB a bound kernel may hold. Calls whose masked groups take more are contiguous; contiguous ones that
    would are made in pieces. Rows that pad are most of it where there are many experts."""


@dataclass(frozen=True)
class Room:
    """The rows of a layout: `groups` groups of `rows` each."""

    groups: int
    rows: int

    @classmethod
    def of(cls, problem: Problem, tile: GroupedTile, tokens: int) -> Room:
        """For calls of up to so many tokens, however they spread over experts."""
        experts, pairs = problem.size("experts"), tokens * problem.size("top_k")
        if tile.layout == "masked":
            return cls(experts, -(-tokens // BLOCK_ROWS) * BLOCK_ROWS)
        return cls(1, most_blocks(pairs, experts, BLOCK_ROWS) * BLOCK_ROWS)

    def bytes_of(self, problem: Problem) -> int:
        """What a bound kernel holds: x and later the parts in one place, gate and up, the activation, scales of fp8."""
        hidden, inner = problem.size("hidden"), problem.size("intermediate")
        fp8 = problem["weight_dtype"] == FP8
        row = 2 * hidden + 4 * inner + (1 if fp8 else 2) * inner + (4 * (hidden + inner) // GROUP if fp8 else 0)
        return self.groups * self.rows * row


def most_tokens(problem: Problem, tile: GroupedTile, tokens: int) -> int:
    """Of a call of up to so many tokens, those that the workspace has room for at a time; all of a masked one."""
    if tile.layout == "masked":
        return tokens

    def bytes_of(count: int) -> int:
        return Room.of(problem, tile, count).bytes_of(problem)

    return most_rows(bytes_of, tile.workspace_mb << 20, tokens)


def grouped_numerics(params: Params, problem: Problem) -> str:
    """`deep_gemm.grouped.<products>`: gate and up, each in the order of the product's class and rounded; the activation
    of both in fp32, rounded, and quantised for fp8 weights; down, in that order, rounded; then the parts times their
    weights, each product rounded to fp32, added in fp32 in the order of slots.
    """
    return f"deep_gemm.grouped.{fp8_block_numerics('fp8') if problem['weight_dtype'] == FP8 else 'k_sequential'}"


def _fits(problem: Problem, tokens: int) -> bool:
    tile = GroupedTile(layout="masked")
    return Room.of(problem, tile, tokens).bytes_of(problem) <= tile.workspace_mb << 20


def grouped_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, GroupedTile], ...]:
    """Masked for few tokens, contiguous for more."""
    masked, contiguous = GroupedTile(layout="masked"), GroupedTile(layout="contiguous")
    if not _fits(problem, _MASKED_TOKENS):
        return ((None, contiguous),)
    return ((_MASKED_TOKENS, masked), (None, contiguous))


def grouped_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[GroupedTile]:
    """Layouts to try for calls of m tokens."""
    yield GroupedTile(layout="contiguous")
    if m <= _MOST_TRIED and _fits(problem, m):
        yield GroupedTile(layout="masked")


def expected_rows(problem: Problem, tokens: int) -> int:
    """Rows of a group that the library's heuristic is told to expect: an even spread of the largest call. Follows from
    limits, not from the batch.
    """
    return max(1, -(-tokens * problem.size("top_k") // known_experts(problem.dims)))

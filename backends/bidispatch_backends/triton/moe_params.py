"""Tiles, default ladders and class labels of the mixture of experts. Imports no triton, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator

from bidispatch.device import Arch, Device
from bidispatch.ops.moe import known_experts
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.triton.fields import power_of_two_field
from bidispatch_backends.triton.fp8_params import block_numerics, tile_fault
from bidispatch_backends.triton.gemm_params import FILLED, GemmTile, ProductTile, Shape, stages_for, units
from bidispatch_backends.triton.params import RowTile

__all__ = [
    "ExpertsTile",
    "experts_fp8_numerics",
    "experts_numerics",
    "experts_tiles",
    "experts_tiles_for",
    "most_blocks",
    "router_numerics",
    "router_tiles",
]


class ExpertsTile(Tile):
    """Launch shape of the experts; none of it enters the order of a sum."""

    block_m: int = Field(ge=16)
    """Pairs of a token and a slot in a block, all of one expert."""
    counted: int = Field(default=0, ge=0, le=1024)
    """Calls bound for up to so many pairs have no kernel that sorts: each program counts for itself. 0: none."""
    group_m: int = Field(default=8, ge=1)
    up_block_n: int = Field(ge=16)
    """Rows of w13 in a tile: gate and up of half as many outputs."""
    up_block_k: int = Field(ge=16)
    up_swap: bool = False
    """Whether the weight's rows lie on the matrix unit's long side, as suits few rows."""
    up_warps: int = Field(ge=1, le=16)
    up_stages: int = Field(ge=1)
    down_block_n: int = Field(ge=16)
    down_block_k: int = Field(ge=16)
    down_swap: bool = False
    down_warps: int = Field(ge=1, le=16)
    down_stages: int = Field(ge=1)

    _sizes = field_validator(
        "block_m", "up_block_n", "up_block_k", "up_warps", "down_block_n", "down_block_k", "down_warps"
    )(power_of_two_field)

    def product(self, which: str) -> GemmTile:
        """The tile of one of the two products, "up" or "down"."""
        fields = self.model_dump()
        return GemmTile(
            block_m=self.block_m,
            block_n=fields[f"{which}_block_n"],
            block_k=fields[f"{which}_block_k"],
            swap=fields[f"{which}_swap"],
            group_m=self.group_m,
            num_warps=fields[f"{which}_warps"],
            num_stages=fields[f"{which}_stages"],
        )


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Blocks of any spread of pairs over experts: one each for as many experts as there can be, the rest full."""
    begun = min(pairs, experts)
    return begun + (pairs - begun) // block_m


def experts_numerics(params: Params, problem: Problem) -> str:
    """`moe.k_sequential`: both products in one accumulator in the order of K; the activation in fp32 of both sums,
    rounded once; each part weighted in fp32 and rounded to the result's dtype; parts added in fp32 in order of slots.
    """
    return "moe.k_sequential"


def experts_fp8_numerics(params: Any, problem: Problem) -> str:
    """`moe.fp8_blocks.<products>`: the same with products as those of `gemm.fp8_block`, x and the rounded activation
    quantised as by `quantize.fp8_group`.
    """
    return f"moe.{block_numerics(params, problem)}"


_UP, _DOWN = "up", "down"
_LEAST_STEP = 32
# For blocks of so many rows, the shapes of both products, as `gemm_params` found them for as many rows of x.
_SHAPES: tuple[tuple[int, Shape, Shape], ...] = (
    (16, (16, 64, 128, True, 4, 5), (16, 64, 128, True, 4, 5)),
    (32, (32, 64, 128, True, 4, 5), (32, 64, 128, True, 4, 5)),
    (64, (64, 128, 128, True, 8, 4), (64, 128, 128, True, 8, 4)),
    (128, (128, 256, 64, False, 8, 3), (128, 128, 64, False, 8, 4)),
)
# fp8: 128 of K a step, and 64 rows or more on the matrix unit's long side, or it would be another instruction. Each
# step ends in a wait for that unit, so several small programs a multiprocessor, which wait at different times, beat one
# large one: 128 experts of 2048 x 768, 256 rows each, took 1623 us in blocks of 128 (H100), 788 in blocks of 64 (H200).
_SHAPES_FP8: tuple[tuple[int, Shape, Shape], ...] = (
    (16, (16, 64, 128, True, 4, 8), (16, 128, 128, True, 4, 4)),
    (32, (32, 64, 128, True, 4, 5), (32, 128, 128, True, 4, 4)),
    (64, (64, 128, 128, False, 4, 3), (64, 128, 128, False, 4, 3)),
)
# A matrix instruction of 16x16 on AMD: both sides of a tile must hold two or more, and LDS one tile ahead.
_SHAPES_AMD: tuple[tuple[int, Shape, Shape], ...] = (
    (16, (16, 64, 128, False, 4, 2), (16, 64, 128, False, 4, 2)),
    (32, (32, 64, 128, False, 4, 2), (32, 64, 128, False, 4, 2)),
    (64, (64, 128, 64, False, 4, 2), (64, 128, 64, False, 4, 2)),
    (128, (128, 128, 64, False, 8, 2), (128, 128, 64, False, 8, 2)),
)
_COUNTED = 128
"""Pairs up to which each program counts for itself. A sort is a kernel more; the counting compares every row of a block
with every pair. In fp8 the sort was as fast for 8 pairs and faster for more (H200)."""
_MOST_COUNTED = 512
"""Up to how many it is tried."""
_BLOCK_ROWS = {16: 12, 32: 24, 64: 96}
"""Rows of a block, and up to how many rows of an expert, on average, it serves. The largest block serves the rest."""


# For few outputs: 8 of them a tile, so that few pairs fill the device.
_NARROW: Shape = (16, 16, 256, False, 2, 6)


def experts_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, ExpertsTile], ...]:
    """Blocks by how many rows an expert has on average; few pairs in all are not sorted."""
    top_k, everywhere = problem.size("top_k"), known_experts(problem.dims)
    shapes = _shapes(device.arch, problem)
    ladder: list[tuple[int | None, ExpertsTile]] = []
    few = 0 if _is_fp8(problem) else min(_COUNTED, _BLOCK_ROWS[16] * everywhere) // top_k
    if few:
        up, down = shapes[16]
        narrow = min(few, _pairs_that_leave_room(device, problem, up) // top_k)
        if narrow:
            ladder.append((narrow, _tile(device.arch, problem, 16, _NARROW, down, counted=_COUNTED)))
        if narrow < few:
            ladder.append((few, _tile(device.arch, problem, 16, up, down, counted=_COUNTED)))
    for rows, (up, down) in shapes.items():
        max_m = None if rows == max(shapes) else _BLOCK_ROWS[rows] * everywhere // top_k
        if max_m is None or max_m > (ladder[-1][0] or 0 if ladder else 0):
            ladder.append((max_m, _tile(device.arch, problem, rows, up, down)))
    return tuple(ladder)


def _pairs_that_leave_room(device: Device, problem: Problem, up: Shape) -> int:
    """Pairs whose tiles of this shape do not fill the device. None on Blackwell's data-center GPUs and on AMD's, where
    a narrow tile is another matrix instruction, and nobody has compared their bits; none in fp8, where they differ.
    """
    if device.arch.vendor == "amd" or device.arch.family == "sm100" or _is_fp8(problem):
        return 0
    tiles = -(-2 * problem.size("intermediate") // up[1])
    return int(FILLED * units(device)) // tiles


def _is_fp8(problem: Problem) -> bool:
    return problem["weight_dtype"] == FP8


def _shapes(arch: Arch, problem: Problem) -> dict[int, tuple[Shape, Shape]]:
    """The shapes of both products by the rows of a block."""
    known = _SHAPES_FP8 if _is_fp8(problem) else _SHAPES_AMD if arch.vendor == "amd" else _SHAPES
    return {rows: (up, down) for rows, up, down in known}


def _stages(arch: Arch, problem: Problem, blocks: tuple[int, int, int], most: int) -> int:
    """Stages of a tile that fit; 0 where too few do."""
    block_m, block_n, block_k = blocks
    return stages_for(arch, (block_m + block_n) * block_k * (1 if _is_fp8(problem) else 2), most)


def _tile(arch: Arch, problem: Problem, rows: int, up: Shape, down: Shape, counted: int = 0) -> ExpertsTile:
    """The tile with as many stages as pay and fit, and steps of K that divide it where they stay of a fair size."""
    fields: dict[str, Any] = {"block_m": rows, "counted": counted}
    for which, shape, k in ((_UP, up, problem.size("hidden")), (_DOWN, down, problem.size("intermediate"))):
        _, block_n, block_k, swap, warps, most = shape
        if k % _LEAST_STEP == 0:
            while k % block_k:
                block_k //= 2
        least = GROUP if _is_fp8(problem) else _LEAST_STEP
        while not (stages := _stages(arch, problem, (rows, block_n, block_k), most)) and block_k > least:
            block_k //= 2
        fields |= {
            f"{which}_block_n": block_n,
            f"{which}_block_k": block_k,
            f"{which}_swap": swap,
            f"{which}_warps": warps,
            f"{which}_stages": max(1, stages),
        }
    return ExpertsTile(**fields)


_TRIED: tuple[Shape, ...] = (
    (16, 64, 64, True, 4, 8),
    (16, 64, 128, True, 4, 5),
    (16, 64, 256, True, 4, 4),
    (16, 128, 64, True, 4, 6),
    (16, 128, 128, True, 8, 4),
    (16, 128, 128, True, 4, 4),
    (16, 256, 128, True, 8, 3),
    (16, 16, 256, False, 2, 6),
    (16, 32, 256, False, 2, 4),
    (16, 64, 128, False, 4, 5),
    (32, 64, 128, True, 4, 5),
    (32, 128, 64, True, 4, 6),
    (32, 128, 128, True, 8, 4),
    (32, 128, 128, True, 4, 4),
    (64, 64, 128, True, 4, 5),
    (64, 128, 64, True, 4, 5),
    (64, 128, 128, True, 8, 4),
    (64, 128, 128, False, 4, 3),
    (64, 128, 64, False, 4, 4),
    (64, 256, 64, False, 8, 3),
    (128, 64, 128, False, 4, 3),
    (128, 128, 64, False, 8, 4),
    (128, 128, 128, False, 8, 3),
    (128, 256, 64, False, 8, 3),
    (128, 128, 64, False, 4, 4),
)


def experts_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[ExpertsTile]:
    """Launch shapes to try for calls of m rows: blocks that are not mostly empty nor many to an expert, with the same
    shape for both products and with the default's for one of them; sorted, and not where there are few pairs.
    """
    top_k = problem.size("top_k")
    rows = max(1, m * top_k // known_experts(problem.dims))
    most = min(128, max(32, 4 << (rows - 1).bit_length()))
    least = min(64, max(16, (1 << (rows - 1).bit_length()) // 4))
    default = next(tile for max_m, tile in experts_tiles(device, problem, params) if max_m is None or m <= max_m)
    found: list[ExpertsTile] = [default]
    for block_m in (16, 32, 64, 128):
        if not least <= block_m <= most:
            continue
        shapes = [s for s in _TRIED if s[0] == block_m and _runs(device.arch, problem, params, s)]
        pairs = [(s, s) for s in shapes]
        if plain := _shapes(device.arch, problem).get(block_m):
            pairs += [(s, plain[1]) for s in shapes] + [(plain[0], s) for s in shapes]
        counted = (0, max(_COUNTED, 1 << (m * top_k - 1).bit_length())) if m * top_k <= _MOST_COUNTED else (0,)
        found += [
            _tile(device.arch, problem, block_m, up, down, c) for up, down in dict.fromkeys(pairs) for c in counted
        ]
    yield from dict.fromkeys(found)


def _runs(arch: Arch, problem: Problem, params: Any, shape: Shape) -> bool:
    """Whether a shape fits, and is of the class's instruction."""
    block_m, block_n, block_k, swap, warps, most = shape
    if not _stages(arch, problem, (block_m, block_n, block_k), most):
        return False
    if not _is_fp8(problem):
        return True
    tile = ProductTile(block_m=block_m, block_n=block_n, swap=swap, num_warps=warps, num_stages=1)
    return block_k == GROUP and tile_fault(arch, params, tile) is None


def router_numerics(params: Params, problem: Problem) -> str:
    """`row_tree.exp2`: the sum of a row's exponentials in the order of `RowParams` with the row in one block; what
    chooses is compared as it is, and the chosen are added in their order.
    """
    return "row_tree.exp2"


def router_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, RowTile], ...]:
    """A row a program: a round takes a warp few steps, and several wait for each other."""
    warps = 1 if problem.size("experts") <= 512 else 4
    return ((None, RowTile(rows=1, num_warps=warps)),)

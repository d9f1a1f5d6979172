"""Reduction params, tiles, default tile ladders and class labels of the matrix products. Imports no triton, no torch.

A ladder is `((max_m, tile), ...)`, as `Implementation.tiles` wants it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from bidispatch.device import Arch, Device
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.numerics import product_numerics
from bidispatch_backends.triton.fields import power_of_two_field

__all__ = [
    "FILLED",
    "GemmParams",
    "GemmTile",
    "Shape",
    "SplitParams",
    "gemm_numerics",
    "gemm_tiles",
    "runs_on_fma",
    "split_tiles",
    "tile_count",
    "tile_for",
    "units_of",
]

_KB = 1024
_UNITS = {"sm80": 108, "sm86": 84, "sm89": 142, "sm90": 132, "sm100": 148, "sm103": 148, "sm120": 188, "gfx942": 304}
"""Multiprocessors of the largest product of an arch, for a device that is not here. They enter tiles, never bits."""

FILLED = 0.45
"""A GPU streams a weight at full speed with this many tiles a multiprocessor (H100: 64 tiles on 132)."""


class GemmParams(Params):
    """How a product sums over K. Whatever the tile, K is walked in ascending order into fp32 accumulators."""

    input_precision: Literal["ieee", "tf32"] = "ieee"
    """How fp32 operands are multiplied: as they are, or rounded to TF32. Other dtypes ignore it."""
    k_chunk: int = Field(default=0, ge=0, multiple_of=256)
    """0: one accumulator for all of K. Else each so many elements of K start from a fresh accumulator, and these are
    added in ascending order, one after another."""


class SplitParams(GemmParams):
    """The same, for kernels that take the chunks in parallel: they need some."""

    k_chunk: int = Field(default=1024, ge=256, multiple_of=256)


class GemmTile(Tile):
    """Launch shape of a product; none of it enters the order of a sum."""

    block_m: int = Field(ge=1)
    """Rows of x; below 8 only where products run on the FMA units."""
    block_n: int = Field(ge=8)
    """Rows of the weight."""
    block_k: int = Field(ge=16)
    swap: bool = False
    """Whether the weight's rows lie on the matrix unit's long side, as suits few rows of x."""
    group_m: int = Field(default=8, ge=1)
    num_warps: int = Field(ge=1, le=16)
    num_stages: int = Field(ge=1)

    _sizes = field_validator("block_m", "block_n", "block_k", "num_warps")(power_of_two_field)


def gemm_numerics(params: Any, problem: Problem) -> str:
    """`k_sequential` or `k_chunks.<c>`, for fp32 with the precision of the products."""
    return product_numerics(problem, params.input_precision, params.k_chunk)


Shape = tuple[int, int, int, bool, int, int]
"""block_m, block_n, block_k, swap, num_warps, the most stages that pay."""

# Measured on an H100 over 15 shapes (bf16, cold weights): for each M the fastest, widest block_n first. With the weight
# on the long side 64 rows are one warpgroup's instruction, and few rows of x cost little.
_SHAPES: tuple[tuple[int | None, tuple[Shape, ...]], ...] = (
    (16, ((16, 64, 128, True, 4, 5), (16, 16, 256, False, 2, 6))),
    (32, ((32, 64, 128, True, 4, 5), (32, 16, 256, False, 4, 6))),
    (64, ((64, 64, 128, True, 4, 5), (32, 32, 256, False, 4, 4))),
    (128, ((64, 128, 128, True, 8, 4), (64, 64, 128, True, 4, 5))),
    (512, ((128, 128, 64, False, 8, 4), (64, 128, 128, True, 8, 4), (64, 64, 128, True, 4, 5))),
    (None, ((128, 128, 64, False, 8, 4),)),
)
# Without TF32, NVIDIA's products run on the FMA units and the operands in registers: smaller tiles.
_SHAPES_FP32: tuple[tuple[int | None, tuple[Shape, ...]], ...] = (
    (16, ((16, 64, 32, False, 4, 4),)),
    (32, ((32, 64, 32, False, 4, 4),)),
    (64, ((64, 64, 32, False, 4, 4),)),
    (None, ((128, 64, 32, False, 8, 4),)),
)
# A few rows have tiles of their own there: a thread adds up whole columns, from rows of the weight that it finds in
# shared memory. Measured on an H100, chunks of 1024 in parallel, tuned ladders of 8 shapes, as part of stock's time:
# 1.30 at M = 1 (2.24 where n is 256), 0.97 at 2 and 4, 0.90 at 8 (geometric means).
_SHAPES_FP32_FEW: tuple[tuple[int | None, tuple[Shape, ...]], ...] = (
    (1, ((1, 64, 64, True, 2, 4),)),
    (2, ((2, 64, 64, True, 2, 4),)),
    (4, ((4, 64, 64, True, 2, 4),)),
    (8, ((8, 64, 32, True, 2, 6),)),
)
# A matrix instruction of 16x16 on AMD: both sides of a tile must hold two or more, and LDS one tile ahead.
_SHAPES_AMD: tuple[tuple[int | None, tuple[Shape, ...]], ...] = (
    (16, ((16, 64, 128, False, 4, 2),)),
    (32, ((32, 64, 128, False, 4, 2),)),
    (64, ((64, 128, 64, False, 4, 2),)),
    (None, ((128, 128, 64, False, 8, 2),)),
)


def gemm_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, GemmTile], ...]:
    """A rung for each range of M: the widest tile that still fills the device, by n and its multiprocessors."""
    single = problem.dtype == "float32"
    shapes = _SHAPES_FP32 if single else _SHAPES_AMD if device.arch.vendor == "amd" else _SHAPES
    ladder = []
    for max_m, choices in shapes:
        fitting = [tile for shape in choices if (tile := tile_for(device.arch, problem, params, shape))]
        # A batch of matrices has more tiles than can be known here.
        wanted = 0.0 if problem.op == "bmm" else FILLED * units_of(device)
        filling = (tile for tile in fitting if tile_count(problem, tile.block_m, tile.block_n, max_m) >= wanted)
        ladder.append((max_m, next(filling, fitting[-1])))
    return tuple(ladder)


def runs_on_fma(arch: Arch, problem: Problem, params: Any) -> bool:
    """Whether products are IEEE's fused multiply-adds, and not the matrix unit's."""
    return problem.dtype == "float32" and params.input_precision == "ieee" and arch.vendor != "amd"


def split_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, GemmTile], ...]:
    """The same for chunks of K in parallel, which fill the device by themselves."""
    amd = device.arch.vendor == "amd"
    narrow: tuple[tuple[int | None, Shape], ...] = (
        (16, (16, 32, 128, False, 4, 5)),
        (32, (32, 32, 128, False, 4, 5)),
        (64, (64, 64, 64, False, 4, 5)),
        (None, (64, 64, 64, False, 4, 4) if amd else (128, 64, 64, False, 4, 4)),
    )
    single = [*(_SHAPES_FP32_FEW if runs_on_fma(device.arch, problem, params) else ()), *_SHAPES_FP32]
    shapes = [(m, ladder[0]) for m, ladder in single] if problem.dtype == "float32" else narrow
    return tuple((max_m, _require(tile_for(device.arch, problem, params, shape))) for max_m, shape in shapes)


def units_of(device: Device) -> int:
    """Multiprocessors of a device, or of the largest product of its arch."""
    arch = device.arch
    return device.compute_units or _UNITS.get(arch.name) or _UNITS.get(arch.family, 100)


def tile_count(problem: Problem, block_m: int, block_n: int, max_m: int | None) -> float:
    """Tiles of a call at the top of a rung; a rung without one has as many as it likes."""
    rows = float("inf") if max_m is None else -(-max_m // block_m)
    return rows * -(-problem.size("n") // block_n)


def tile_for(arch: Arch, problem: Problem, params: Any, shape: Shape) -> GemmTile | None:
    """The tile with as many stages as pay and as fit with 2 KB to spare; None where too few do, and where chunks of K
    are not whole steps of it.
    """
    block_m, block_n, block_k, swap, num_warps, most = shape
    if params.k_chunk % block_k:
        return None
    stage_bytes = (block_m + block_n) * block_k * (4 if problem.dtype == "float32" else 2)
    num_stages = min(most, (arch.shared_memory - 2 * _KB) // stage_bytes)
    if num_stages < (1 if arch.vendor == "amd" else 2):
        return None
    return GemmTile(
        block_m=block_m, block_n=block_n, block_k=block_k, swap=swap, num_warps=num_warps, num_stages=num_stages
    )


def _require(tile: GemmTile | None) -> GemmTile:
    if tile is None:
        raise ValueError("no tile of this kernel fits the shared memory")
    return tile

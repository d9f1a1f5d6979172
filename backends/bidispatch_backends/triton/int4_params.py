"""Reduction params, tiles, default tile ladders and class labels of `gemm.int4`. Imports no triton, no torch.

A ladder is `((max_m, tile), ...)`, as `Implementation.tiles` wants it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator

from bidispatch.device import Arch, Device
from bidispatch.ops.int4 import K_BLOCK
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.numerics import product_numerics
from bidispatch_backends.triton.fields import power_of_two_field
from bidispatch_backends.triton.gemm_params import FILLED, tile_count, units

__all__ = [
    "Int4Params",
    "Int4Tile",
    "SplitInt4Params",
    "fits_tensor_memory",
    "int4_numerics",
    "int4_split_tiles",
    "int4_tiles",
    "int4_tiles_for",
    "on_tensor_memory",
]

_KB = 1024


class Int4Params(Params):
    """How a product sums over K. Whatever the tile, K is walked in ascending order into fp32 accumulators."""

    k_chunk: int = Field(default=0, ge=0, multiple_of=256)
    """0: one accumulator for all of K. Else each so many elements of K start from a fresh accumulator, and these are
    added in ascending order, one after another."""


class SplitInt4Params(Int4Params):
    """The same, for kernels that take the chunks in parallel: they need some."""

    k_chunk: int = Field(default=1024, ge=256, multiple_of=256)


class Int4Tile(Tile):
    """Launch shape; none of it enters the order of a sum. The weight's rows lie on the matrix unit's long side."""

    block_m: int = Field(ge=8)
    """Rows of x."""
    block_n: int = Field(ge=16)
    """Rows of the weight."""
    block_k: int = Field(ge=K_BLOCK)
    group_m: int = Field(default=8, ge=1)
    num_warps: int = Field(ge=1, le=16)
    num_stages: int = Field(ge=1)

    _sizes = field_validator("block_m", "block_n", "block_k", "num_warps")(power_of_two_field)


def int4_numerics(params: Any, problem: Problem) -> str:
    """`k_sequential` or `k_chunks.<c>`: the bits of `gemm` in that class with the dequantised weight."""
    return product_numerics(problem, "", params.k_chunk)


def on_tensor_memory(arch: Arch) -> bool:
    """Whether products are tcgen05's, whose left operand comes from tensor memory."""
    return arch.family == "sm100"


def fits_tensor_memory(block_m: int, block_n: int, num_warps: int) -> bool:
    """Whether a tile's products are tcgen05's there, and not mma.sync's, and its sums fit the registers beside them."""
    return block_m >= 16 and block_n >= 64 and num_warps in (4, 8) and block_m * block_n <= 64 * 32 * num_warps


Shape = tuple[int, int, int, int, int]
"""block_m, block_n, block_k, num_warps, the most stages that pay."""

_Ladder = tuple[tuple[int | None, tuple[Shape, ...]], ...]

# For each M the shapes that may serve, the widest first, of which the first that fills the device is taken; those whose
# steps do not divide K or a chunk of it are not. A step of 256 halves what a loop costs beside its products. Chosen by
# counts of instructions (sm90). M <= 64 on an H200: 1.01 of Marlin's time as geometric mean.
_WALKED: _Ladder = (
    (8, ((8, 64, 256, 4, 5), (8, 64, 128, 4, 6), (16, 64, 256, 4, 4), (16, 64, 128, 4, 6))),
    (16, ((16, 64, 256, 4, 4), (16, 64, 128, 4, 6))),
    (32, ((32, 128, 128, 8, 4), (32, 64, 256, 4, 4), (32, 64, 128, 4, 5))),
    (64, ((64, 128, 128, 8, 4), (64, 64, 128, 4, 4))),
    (128, ((128, 128, 128, 8, 4), (64, 64, 128, 4, 4))),
    (512, ((128, 128, 128, 8, 4), (64, 128, 128, 8, 4), (64, 64, 128, 4, 4))),
    (None, ((128, 128, 128, 8, 4), (128, 128, 128, 8, 2), (64, 64, 128, 4, 3))),
)
_SPLIT: _Ladder = (
    (8, ((8, 64, 256, 4, 4), (8, 64, 128, 4, 6), (16, 64, 256, 4, 4), (16, 64, 128, 4, 6))),
    (16, ((16, 64, 256, 4, 4), (16, 64, 128, 4, 6))),
    (32, ((32, 128, 128, 8, 4), (32, 64, 128, 4, 4))),
    (64, ((64, 128, 128, 8, 4), (64, 64, 128, 4, 4))),
    (None, ((128, 128, 128, 8, 4), (128, 128, 128, 8, 2), (64, 64, 128, 4, 3))),
)
_AMD: _Ladder = (
    (16, ((16, 64, 128, 4, 2),)),
    (64, ((64, 64, 128, 4, 2),)),
    (None, ((64, 128, 128, 8, 2),)),
)

# What `tune` tries.
_TRIED: tuple[Shape, ...] = (
    (8, 32, 256, 2, 5),
    (8, 64, 128, 4, 4),
    (8, 64, 128, 4, 8),
    (8, 64, 256, 4, 4),
    (8, 64, 256, 4, 6),
    (8, 64, 512, 4, 3),
    (8, 128, 128, 4, 4),
    (8, 128, 256, 4, 3),
    (8, 128, 256, 8, 4),
    (16, 32, 256, 2, 4),
    (16, 64, 128, 4, 5),
    (16, 64, 256, 2, 4),
    (16, 64, 256, 4, 3),
    (16, 64, 256, 4, 5),
    (16, 128, 128, 4, 4),
    (16, 128, 128, 8, 5),
    (16, 128, 256, 8, 3),
    (32, 64, 128, 4, 5),
    (32, 64, 256, 4, 4),
    (32, 128, 128, 8, 5),
    (32, 128, 256, 8, 4),
    (32, 256, 128, 8, 4),
    (64, 64, 128, 4, 5),
    (64, 128, 128, 4, 4),
    (64, 128, 128, 8, 5),
    (64, 256, 128, 8, 4),
    (128, 64, 128, 4, 4),
    (128, 128, 128, 8, 4),
    (128, 128, 128, 4, 4),
    (256, 128, 128, 8, 3),
)


def int4_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, Int4Tile], ...]:
    """A rung for each range of M."""
    return _ladder(device, problem, params, _WALKED)


def int4_split_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, Int4Tile], ...]:
    """The same for chunks of K in parallel."""
    return _ladder(device, problem, params, _SPLIT)


def int4_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[Int4Tile]:
    """Launch shapes to try at m rows: from half the rows of the smallest tile that holds m to all of them."""
    tallest = max(shape[0] for shape in _TRIED)
    enough = min(tallest, max(8, 1 << (m - 1).bit_length()))
    for shape in _TRIED:
        if enough // 2 <= shape[0] <= enough and (tile := _tile_for(device.arch, problem, params, shape)):
            yield tile


def _ladder(device: Device, problem: Problem, params: Any, shapes: _Ladder) -> tuple[tuple[int | None, Int4Tile], ...]:
    ladder = []
    chunks = 1 if shapes is _WALKED else -(-problem.size("k") // params.k_chunk)
    for max_m, choices in _AMD if device.arch.vendor == "amd" else shapes:
        fitting = [tile for shape in choices if (tile := _tile_for(device.arch, problem, params, shape))]
        programs = [chunks * tile_count(problem, tile.block_m, tile.block_n, max_m) for tile in fitting]
        wanted = FILLED * units(device)
        filling = (tile for tile, count in zip(fitting, programs, strict=True) if count >= wanted)
        ladder.append((max_m, next(filling, fitting[programs.index(max(programs))])))
    return tuple(ladder)


def _tile_for(arch: Arch, problem: Problem, params: Any, shape: Shape) -> Int4Tile | None:
    """The tile with as many stages as pay and as fit with 4 KB to spare; None where too few do, and where K or a chunk
    of it is not whole steps.
    """
    block_m, block_n, block_k, num_warps, most = shape
    if problem.size("k") % block_k or params.k_chunk % block_k:
        return None
    if arch.vendor == "amd" and block_m < 16:  # a side of its matrix instruction
        return None
    if on_tensor_memory(arch) and not fits_tensor_memory(block_m, block_n, num_warps):
        return None
    metadata = 2 * 4 * block_n * (block_k // min(K_BLOCK, problem.size("group_size")))  # a word a scale and a zero
    stage_bytes = block_m * block_k * 2 + block_n * block_k // 2 + metadata
    # Warps of mma.sync share out the columns of a wide tile too: what one has unpacked, others get by shared memory.
    exchanged = block_n * block_k * 2 if block_m >= 32 and arch.family not in ("sm90", "sm100") else 0
    num_stages = min(most, (arch.shared_memory - 4 * _KB - exchanged) // stage_bytes)
    if num_stages < (1 if arch.vendor == "amd" else 2):
        return None
    return Int4Tile(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages)

"""Launch shapes that `tune` tries for the products: what may be fastest for calls of m rows. Imports no triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bidispatch.device import Device
from bidispatch.ops.schema import Problem
from bidispatch_backends.triton.gemm_params import GemmTile, Shape, VectorTile, tile_for, vector_tiles

__all__ = ["gemm_tiles_for", "split_tiles_for", "vector_tiles_for"]

# Each was the fastest, or within 3 % of it, for some shape and M on an H100 (bf16, cold weights).
_SHAPES: tuple[Shape, ...] = (
    (16, 16, 256, False, 2, 6),
    (16, 16, 512, False, 2, 4),
    (16, 16, 256, True, 2, 6),
    (16, 32, 256, False, 2, 4),
    (16, 64, 64, True, 4, 8),
    (16, 64, 128, True, 4, 5),
    (16, 128, 128, True, 8, 4),
    (16, 8, 512, False, 2, 5),
    (8, 16, 512, True, 2, 5),
    (8, 64, 128, True, 4, 6),
    (32, 16, 256, False, 4, 6),
    (32, 16, 256, True, 2, 4),
    (32, 32, 256, False, 4, 4),
    (32, 64, 64, True, 4, 8),
    (32, 64, 128, True, 4, 5),
    (32, 128, 128, True, 8, 4),
    (64, 32, 128, False, 4, 4),
    (64, 64, 64, True, 4, 6),
    (64, 64, 128, True, 4, 5),
    (64, 128, 128, True, 8, 4),
    (128, 64, 64, False, 4, 5),
    (128, 64, 128, False, 4, 4),
    (128, 128, 64, False, 8, 4),
    (128, 256, 64, False, 8, 3),
)
_SHAPES_FP32: tuple[Shape, ...] = (
    (16, 32, 64, False, 4, 4),
    (16, 64, 32, False, 4, 4),
    (32, 32, 32, False, 4, 4),
    (32, 64, 32, False, 4, 4),
    (64, 64, 32, False, 8, 3),
    (128, 64, 32, False, 8, 3),
    (128, 128, 32, False, 8, 2),
)
_SHAPES_SPLIT: tuple[Shape, ...] = (
    (16, 16, 256, False, 2, 4),
    (16, 32, 128, False, 4, 5),
    (16, 64, 128, True, 4, 5),
    (16, 64, 128, False, 4, 5),
    (32, 32, 128, False, 4, 5),
    (32, 64, 128, True, 4, 5),
    (64, 64, 128, True, 4, 4),
    (64, 64, 64, False, 4, 5),
    (128, 64, 64, False, 4, 4),
    (128, 128, 64, False, 8, 4),
)


def gemm_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[GemmTile]:
    """Tiles of `gemm` that are not mostly empty at m rows."""
    return _fitting(device, problem, params, m, _SHAPES)


def split_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[GemmTile]:
    """The same for `gemm_split_k`."""
    return _fitting(device, problem, params, m, _SHAPES_SPLIT)


def vector_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[VectorTile]:
    """Tiles of `gemv` for few rows; none for more, where it reads the weight again for every four."""
    if m > 8:
        return
    rows = next(tile.block_m for max_m, tile in vector_tiles(device, problem, params) if max_m is None or m <= max_m)
    for block_n, unroll in ((32, 16), (32, 8), (64, 16), (64, 8), (128, 16)):
        yield VectorTile(block_m=rows, block_n=block_n, unroll=unroll)


def _fitting(device: Device, problem: Problem, params: Any, m: int, shapes: tuple[Shape, ...]) -> Iterator[GemmTile]:
    """From a quarter of the rows of the smallest tile that holds m to all of them; more than any holds, the largest.

    Those for fp32 where its products are IEEE: they fit no tensor core.
    """
    if problem.dtype == "float32" and params.input_precision == "ieee":
        shapes = _SHAPES_FP32
    tallest = max(shape[0] for shape in shapes)
    enough = min(tallest, max(16, 1 << (m - 1).bit_length()))
    for shape in shapes:
        if enough // 4 <= shape[0] <= enough and (tile := tile_for(device.arch, problem, params, shape)):
            yield tile

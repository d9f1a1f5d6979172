"""Launch shapes to try: what may be fastest for calls of m rows. Those of experts, fp8, int4 and latent attention are
with their params. Imports no triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bidispatch.device import Device
from bidispatch.ops.schema import Problem
from bidispatch_backends.triton.attention_params import AttentionTile, attention_tiles, fits_shared_memory
from bidispatch_backends.triton.gemm_params import GemmTile, Shape, runs_on_fma, tile_for
from bidispatch_backends.triton.params import ElementTile, RowTile, element_tiles, row_width

__all__ = ["attention_tiles_for", "element_tiles_for", "gemm_tiles_for", "row_tiles_for", "split_tiles_for"]

# Each was the fastest, or within 3 % of it, for some shape and M on an H100 (bf16, cold weights). 16 columns with 512
# of K are for few columns of the weight: 1280x8192 at M = 1 to 48, 13.5 to 14 µs, where stock's splits take 12.2.
_SHAPES: tuple[Shape, ...] = (
    (16, 16, 256, False, 2, 6),
    (16, 16, 512, False, 2, 4),
    (16, 16, 256, True, 2, 6),
    (16, 16, 512, True, 2, 5),
    (16, 32, 256, False, 2, 4),
    (16, 64, 64, True, 4, 8),
    (16, 64, 128, True, 4, 5),
    (16, 128, 128, True, 8, 4),
    (16, 8, 512, False, 2, 5),
    (8, 16, 512, True, 2, 5),
    (8, 64, 128, True, 4, 6),
    (32, 16, 256, False, 4, 6),
    (32, 16, 256, True, 2, 4),
    (32, 16, 512, True, 4, 4),
    (32, 32, 256, False, 4, 4),
    (32, 64, 64, True, 4, 8),
    (32, 64, 128, True, 4, 5),
    (32, 128, 128, True, 8, 4),
    (64, 16, 256, False, 4, 5),
    (64, 16, 256, True, 4, 5),
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
_SHAPES_FP32_FEW: tuple[Shape, ...] = tuple(
    (rows, *shape)
    for rows in (1, 2, 4, 8)
    for shape in (
        (32, 16, True, 2, 6),
        (32, 32, True, 1, 6),
        (64, 32, True, 2, 6),
        (64, 64, True, 2, 4),
        (128, 32, True, 4, 6),
    )
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
_LARGE = 1024
"""From so many rows on only the last two of these are tried."""


def gemm_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[GemmTile]:
    """Tiles of `gemm` that are not mostly empty at m rows."""
    return _fitting(device, problem, params, m, _SHAPES)


def split_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[GemmTile]:
    """The same for `gemm_split_k`."""
    return _fitting(device, problem, params, m, _SHAPES_SPLIT)


def _fitting(device: Device, problem: Problem, params: Any, m: int, shapes: tuple[Shape, ...]) -> Iterator[GemmTile]:
    """From a quarter of the rows of the smallest tile that holds m to all of them; more than any holds, the largest.

    Where products run on the FMA units, those for that.
    """
    if fma := runs_on_fma(device.arch, problem, params):
        shapes = (*_SHAPES_FP32_FEW, *_SHAPES_FP32)
    tallest = max(shape[0] for shape in shapes)
    enough = min(tallest, max(1 if fma else 16, 1 << (m - 1).bit_length()))
    mine = [shape for shape in shapes if enough // 4 <= shape[0] <= enough]
    found = [tile for shape in mine if (tile := tile_for(device.arch, problem, params, shape))]
    yield from found[-2:] if m >= _LARGE else found


# Rows, warps, stages and registers (0: as many as the compiler likes) of decode tiles; rows, warps and stages of
# prefill's. On an H100, 32/8 heads of 128 in bf16, decode: (16, 4, 3, 0) is the fastest or within 2 % of it at 1, 16
# and 64 sequences of 1k, 8k and 32k; 168 registers spill, 4 to 5 % slower at 64; 2 warps 3 %, 8 warps 12 to 30 %
# slower, taller tiles 1 to 20 %. A prefill of 8192: (128, 8, 3) 1410 µs, (64, 4, 2) 1731, (128, 8, 2) 1747, (64, 4, 3)
# 2049, (32, 4, 3) 3144; FA3 850. A loop for each split instead of one for all took 1842.
_DECODE_SHAPES = (
    (16, 4, 3, 168),
    (16, 4, 3, 0),
    (16, 4, 2, 128),
    (16, 4, 3, 128),
    (16, 4, 4, 168),
    (16, 4, 4, 0),
    (16, 2, 3, 0),
    (16, 8, 3, 0),
    (32, 4, 3, 0),
    (64, 4, 3, 0),
)
# On an H200, 16 to 256 sequences of 1k to 8k: 2 segments of 255 registers are the fastest with heads of 128, 5 to 35 %
# before 3 of 168; with heads of 64 it is 4 of two warps, 4 % before 4 of four and 128 registers and 7 % before 2 of 255
# as geometric means, up to 16k. A fourth stage costs 0 to 6 %.
_DECODE_PROGRAMS = (
    (3, 2, 4, 0, 0),
    (6, 2, 4, 0, 0),
    (6, 2, 16, 0, 0),
    (6, 4, 4, 0, 128),
    (12, 3, 4, 0, 168),
    (12, 4, 4, 2, 0),
)
"""Programs a multiprocessor, of the parallel splits and of the segments; into how many of the latter a pair is cut, at
most, their warps and their registers."""
_FEW_TOKENS = 256
"""Calls of up to so many tokens are taken for decode steps."""
_PREFILL_SHAPES = ((128, 8, 3), (128, 8, 2), (64, 4, 2), (64, 4, 3), (64, 8, 3), (128, 4, 2), (32, 4, 3), (16, 4, 3))


def attention_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[AttentionTile]:
    """Launch shapes to try for calls of m tokens: those of decode for few, else those of prefill.

    Each differs from the default in one of the two only, all are of one class, and all fit shared memory.
    """
    ((_, default),) = attention_tiles(device, problem, params)
    nvidia = device.arch.vendor == "nvidia"
    tiles = [default]
    if m <= _FEW_TOKENS:
        for rows, warps, stages, registers in _DECODE_SHAPES:
            if fits_shared_memory(device.arch, problem, params, rows, stages):
                shape = {"decode_block_m": rows, "decode_warps": warps, "decode_stages": stages}
                shape["decode_registers"] = registers if nvidia else 0
                for splits, segments, parts, segment_warps, bound in _DECODE_PROGRAMS:
                    shape |= {"decode_programs": splits, "segment_programs": segments, "segment_parts": parts}
                    shape |= {"segment_warps": segment_warps, "segment_registers": bound if nvidia else 0}
                    tiles.append(default.model_copy(update=shape))
    else:
        for rows, warps, stages in _PREFILL_SHAPES:
            if fits_shared_memory(device.arch, problem, params, rows, stages):
                shape = {"prefill_block_m": rows, "prefill_warps": warps, "prefill_stages": stages}
                tiles.append(default.model_copy(update={**shape, "prefill_overlap": False}))
    yield from dict.fromkeys(tiles)


_WARPS = (1, 2, 4, 8)
_ROWS_OF_A_PROGRAM = (1, 2, 4, 8)
_WARP_ELEMENTS = (64, 4096)
"""Of a tile of rows, the fewest and the most that a warp has: two to 128 a thread."""
_BLOCKS = (256, 512, 1024, 2048, 4096)
_THREAD_ELEMENTS = (4, 64)
"""Of an elementwise tile, the fewest and the most that a thread has."""


def row_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[RowTile]:
    """Tiles of whole rows: for several rows a program, as many as m has. `moe.router` has a row of all experts."""
    routed = problem.op == "moe.router"
    width = row_width(problem.size("experts" if routed else "n"), 4096 if routed else params.block)
    for rows in _ROWS_OF_A_PROGRAM:
        for warps in _WARPS:
            if rows <= m and _WARP_ELEMENTS[0] <= rows * width // warps <= _WARP_ELEMENTS[1]:
                yield RowTile(rows=rows, num_warps=warps)


def element_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[ElementTile]:
    """Tiles of an elementwise kernel, of no more columns than a row has."""
    width = row_width(problem.size("k" if "k" in problem.dims else "n"), max(_BLOCKS))
    widest = max(width, *(tile.block for _, tile in element_tiles(device, problem, params)))
    for block in _BLOCKS:
        for warps in _WARPS:
            if block <= widest and _THREAD_ELEMENTS[0] <= block // (32 * warps) <= _THREAD_ELEMENTS[1]:
                yield ElementTile(block=block, num_warps=warps)

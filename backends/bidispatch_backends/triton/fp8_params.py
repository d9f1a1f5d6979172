"""Reduction params, tiles, default ladders and class labels of the fp8 products. Imports no triton, no torch.

An fp8 product on Hopper's wgmma keeps about 14 bits of the sum while an instruction adds to it (DeepSeek-V3, arXiv
2412.19437, section 3.3.2), mma.sync on fp16 keeps fp32's 24: the same tile code gives other bits by the instruction it
compiles to. So the instruction's operands are a reduction param, and a tile that would leave its path is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from bidispatch.device import Arch, Device
from bidispatch.ops.quantize import GROUP
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params
from bidispatch_backends.numerics import fp8_block_numerics
from bidispatch_backends.triton.gemm_params import ProductTile, stages_for, widest_that_fills

__all__ = [
    "ARCHS",
    "Fp8BlockParams",
    "Fp8Params",
    "block_numerics",
    "fp8_numerics",
    "fp8_tiles",
    "fp8_tiles_for",
    "step_of",
    "tile_fault",
]

ARCHS = ("sm89", "sm90", "sm100", "sm103", "sm12*")
"""NVIDIA GPUs that have e4m3. CDNA3's fp8 is of another format (fnuz)."""

_LONG_SIDE = 64
"""Rows of the left operand from which Hopper and Blackwell multiply fp8 by wgmma and tcgen05. With fewer, Triton widens
the operands to fp16 for mma.sync."""
_SHORT_SIDE = 16
"""Columns of the right operand from which every tile gives the same bits. 8 gave others in every shape on an H100, in
fp8 and, rarely, in fp16: tests/gpu/test_fp8.py."""
_WARPGROUP = 4
"""Warps that share such an instruction."""


class Fp8BlockParams(Params):
    """How a block-scaled product sums over K: every 128 from a fresh accumulator of the matrix unit, which then, times
    the product of the two scales, is added to an fp32 accumulator in one fused multiply-add, in ascending order.
    """

    products: Literal["fp8", "fp16"] = "fp8"
    """Operands of the matrix instruction: as they are, in the arch's own fp8 instruction (wgmma on Hopper, tcgen05 on
    sm100 and sm103, mma.sync on Ada and sm120), or widened to fp16, which loses nothing and sums in fp32."""


class Fp8Params(Fp8BlockParams):
    """How a product with scales outside of the sum goes over K: every `max_num_imprecise_acc` from a fresh accumulator
    of the matrix unit, which is then added to an fp32 accumulator, in ascending order.
    """

    max_num_imprecise_acc: Literal[128, 256] = 128


def block_numerics(params: Any, problem: Problem) -> str:
    """`fp8_blocks.<products>`: 128 of K at a time."""
    return fp8_block_numerics(params.products)


def fp8_numerics(params: Any, problem: Problem) -> str:
    """`fp8_chunks.<max_num_imprecise_acc>.<products>`."""
    return f"fp8_chunks.{params.max_num_imprecise_acc}.{params.products}"


def step_of(problem: Problem, params: Any) -> int:
    """Elements of K that a program multiplies at a time: those that one accumulator of the matrix unit takes."""
    return GROUP if problem.op == "gemm.fp8_block" else int(params.max_num_imprecise_acc)


def tile_fault(arch: Arch, params: Any, tile: ProductTile) -> str | None:
    """Why the compiler would not multiply a tile by the instruction that the params name; None where it would."""
    long_side, short_side = (tile.block_n, tile.block_m) if tile.swap else (tile.block_m, tile.block_n)
    if short_side < 8 or long_side < 16:
        return f"a tile of {tile.block_m}x{tile.block_n} is too small for the matrix unit"
    if short_side < _SHORT_SIDE:
        return f"a tile of {tile.block_m}x{tile.block_n} is another class: 8 columns sum in another order"
    # On Hopper mma.sync and wgmma sum fp16 alike (`gemm`'s tiles); that mma.sync and tcgen05 do, nobody has seen.
    if arch.family == "sm100" or (arch.family == "sm90" and params.products == "fp8"):
        what = f"products={params.products} needs"
        if long_side < _LONG_SIDE:
            return f"{what} {_LONG_SIDE} rows of the left operand on {arch.name}, this tile has {long_side}; swap them"
        if tile.num_warps < _WARPGROUP:
            return f"{what} {_WARPGROUP} warps on {arch.name}, this tile has {tile.num_warps}"
    return None


Fp8Shape = tuple[int, int, bool, int, int]
"""block_m, block_n, swap, num_warps, the most stages that pay."""

# Not tuned yet: those of bf16 (gemm_params) with as many bytes in flight. For each M the widest first.
_SHAPES: tuple[tuple[int | None, tuple[Fp8Shape, ...]], ...] = (
    (16, ((16, 64, True, 4, 8),)),
    (32, ((32, 64, True, 4, 8),)),
    (64, ((64, 128, True, 8, 6), (64, 64, True, 4, 8))),
    (128, ((64, 128, True, 8, 6), (64, 64, True, 4, 8))),
    (512, ((128, 128, False, 8, 4), (64, 128, True, 8, 6), (64, 64, True, 4, 8))),
    (None, ((128, 128, False, 8, 4), (64, 64, True, 4, 8))),
)
_SHAPES_TRIED: tuple[Fp8Shape, ...] = (
    (16, 64, True, 4, 5),
    (16, 64, True, 4, 8),
    (16, 64, True, 4, 12),
    (16, 128, True, 4, 6),
    (16, 128, True, 8, 6),
    (32, 64, True, 4, 6),
    (32, 64, True, 4, 10),
    (32, 128, True, 8, 6),
    (64, 16, False, 4, 8),
    (64, 32, False, 4, 8),
    (64, 64, True, 4, 8),
    (64, 64, False, 4, 8),
    (64, 128, True, 8, 6),
    (64, 128, False, 4, 6),
    (128, 64, False, 4, 6),
    (128, 64, False, 8, 6),
    (128, 256, False, 8, 3),
    (128, 128, False, 8, 4),
    (128, 128, True, 8, 4),
    (128, 128, False, 8, 3),
)
_TALLEST = 128


def fp8_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, ProductTile], ...]:
    """A rung for each range of M: the widest tile that still fills the device, by n and its multiprocessors.

    Raises ValueError where no tile of a rung fits the shared memory.
    """
    ladder = []
    for max_m, shapes in _SHAPES:
        fitting = [tile for shape in shapes if (tile := _tile_for(device.arch, problem, params, shape))]
        if not fitting:
            raise ValueError("no tile of this kernel fits the shared memory")
        ladder.append((max_m, widest_that_fills(device, problem, fitting, max_m)))
    return tuple(ladder)


def fp8_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[ProductTile]:
    """Launch shapes to try for calls of m rows, those that are not mostly empty; few rows also in tiles of 64, whose
    narrow column tiles are more in number.
    """
    enough = min(_TALLEST, max(16, 1 << (m - 1).bit_length()))
    for shape in _SHAPES_TRIED:
        block_m, _, swap, *_ = shape
        fits = enough // 2 <= block_m <= enough or (block_m == _LONG_SIDE and not swap)
        if fits and (tile := _tile_for(device.arch, problem, params, shape)):
            yield tile


def _tile_for(arch: Arch, problem: Problem, params: Any, shape: Fp8Shape) -> ProductTile | None:
    """The tile with as many stages as pay and fit; None where too few do, or on another path of the matrix unit."""
    block_m, block_n, swap, num_warps, most = shape
    num_stages = stages_for(arch, (block_m + block_n) * step_of(problem, params), most)
    if not num_stages:
        return None
    tile = ProductTile(block_m=block_m, block_n=block_n, swap=swap, num_warps=num_warps, num_stages=num_stages)
    return None if tile_fault(arch, params, tile) else tile

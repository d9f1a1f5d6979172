"""Reduction params, tiles, default tile ladders and class labels of the row ops and the elementwise ones; those of the
products are in `gemm_params`, those of attention in `attention_params`. Imports no triton, no torch.

A ladder is `((max_m, tile), ...)`, as `Implementation.tiles` wants it. Each function here is given the params of its
own family; they are typed `Any` because the registry calls every family's through one signature.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from bidispatch.device import Device
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.triton.fields import power_of_two_field

__all__ = [
    "ElementTile",
    "RowParams",
    "RowTile",
    "SoftmaxParams",
    "SoftmaxTile",
    "chunks_of",
    "element_numerics",
    "element_tiles",
    "row_numerics",
    "row_tiles",
    "row_width",
    "softmax_numerics",
    "softmax_tiles",
]


# -- rows --------------------------------------------------------------------------------------------------------------

# The constants of the ladders of rows and elements. Measured on an H100 (bf16, cold): at M >= 2048 norms, activations
# and rows of softmax up to 4096 run at 94 % of a copy of their bytes and more; `python benchmarks/rows.py --try` times
# the shapes around them.
_WARP_ELEMENTS = 1024
"""Elements a warp has of a tile of rows where the batch fills the GPU: 32 a thread take 64 registers, so that an SM
holds 1024 threads and 64 KB of bf16 at once."""
_WARP_ELEMENTS_FEW = 512
"""The same for calls too small for that: more warps a row, so that it ends sooner."""
_WARP_ELEMENTS_CHUNK = 2048
"""The same for a chunk of a longer row of softmax: 151936 columns at M = 2048 take 835 µs so, with four warps for 8192
columns 2100, where a copy of the bytes takes 621."""
_MOST_WARPS = 8
"""With 16, rows of 4096 to 8192 took two to three times as long, at every M."""
_FEW_ROWS = 512
"""Calls of up to so many rows are small: under four for each multiprocessor of an H100."""
_SHORT_ROW = 256
"""Rows of up to this width share a program."""
_SHORT_ROWS = 8
"""How many of them do where the batch fills the GPU."""
_FEW_TOKENS = 64
"""Elementwise calls of up to so many rows spread over more and smaller programs."""
_NARROWEST = 64
"""Lanes of a tile, at least: one wide warp."""


def row_width(n: int, most: int) -> int:
    """Lanes of a row of n elements: the power of two that holds it, from 64 to `most`. Follows from n alone."""
    return min(most, max(_NARROWEST, 1 << (n - 1).bit_length()))


def _row_size(problem: Problem) -> int:
    return problem.size("head_dim" if problem.op == "qk_norm" else "n")


class RowParams(Params):
    """Row sums: lane i of `block` sums elements i, i + block, ... in order; then halves of the lanes, then pairs.

    The upper half is added to the lower one until 2048 lanes are left, then adjacent pairs are added. A row of up to
    `block` elements is read once.
    """

    block: int = Field(default=16384, ge=1024, le=32768)

    _sizes = field_validator("block")(power_of_two_field)


class RowTile(Tile):
    """Launch shape of rows. The order of the sum is spelled out in the kernel, so neither size enters it."""

    rows: int = Field(default=1, ge=1, le=64)
    """Rows of one program."""
    num_warps: int = Field(ge=1, le=16)

    _sizes = field_validator("rows", "num_warps")(power_of_two_field)


def row_numerics(params: Any, problem: Problem) -> str:
    """`row_tree.<block>`: how the sum over a row is ordered."""
    return f"row_tree.{params.block}"


def row_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, RowTile], ...]:
    """One row a program and more warps for few rows; then fewer warps, and several short rows a program."""
    few = _FEW_ROWS
    if problem.op == "qk_norm":
        few = max(1, few // (problem.size("num_heads") + problem.size("num_kv_heads")))  # a row of M has so many
    shapes = _row_shapes(row_width(_row_size(problem), params.block))
    return tuple((max_m, RowTile(rows=rows, num_warps=w)) for max_m, (rows, w) in zip((few, None), shapes, strict=True))


def _row_shapes(width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, warps) of a program in a small call, and in a large one."""
    rows = _SHORT_ROWS if width <= _SHORT_ROW else 1
    return (1, _warps(width, _WARP_ELEMENTS_FEW)), (rows, _warps(rows * width, _WARP_ELEMENTS))


def _warps(elements: int, of_a_warp: int) -> int:
    return min(_MOST_WARPS, max(1, elements // of_a_warp))


class SoftmaxParams(Params):
    """Sums of exponentials, of each `chunk` columns apart and from the chunk's own maximum.

    A chunk is summed in the order of `RowParams` with one block; the sums of a row's chunks, scaled to its maximum, are
    added in the same order.
    """

    chunk: int = Field(default=4096, ge=1024, le=16384)

    _sizes = field_validator("chunk")(power_of_two_field)


class SoftmaxTile(Tile):
    """Launch shape of `softmax`, `log_softmax` and `token_logprob`."""

    rows: int = Field(default=1, ge=1, le=64)
    """Rows of one program, where a row is one chunk."""
    num_warps: int = Field(ge=1, le=16)
    joint: bool = False
    """Whether the chunks of a longer row wait for each other instead of being read twice. Needs a GPU that starts the
    programs of a launch in order, as NVIDIA's do."""

    _sizes = field_validator("rows", "num_warps")(power_of_two_field)


def chunks_of(n: int, chunk: int) -> int:
    """How many chunks a row has."""
    return -(-n // chunk)


def softmax_numerics(params: Any, problem: Problem) -> str:
    """`row_chunks.<chunk>.exp2`: how the sum over a row is cut and ordered, and how exponentials are computed."""
    return f"row_chunks.{params.chunk}.exp2"


def softmax_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, SoftmaxTile], ...]:
    """As `row_tiles` for rows of one chunk; longer ones take a program a chunk, whatever M."""
    n = problem.size("n")
    width = row_width(n, params.chunk)
    if chunks_of(n, params.chunk) > 1:
        joint = problem.op != "token_logprob" and device.arch.vendor == "nvidia"
        return ((None, SoftmaxTile(num_warps=_warps(width, _WARP_ELEMENTS_CHUNK), joint=joint)),)
    shapes = zip((_FEW_ROWS, None), _row_shapes(width), strict=True)
    return tuple((max_m, SoftmaxTile(rows=rows, num_warps=warps)) for max_m, (rows, warps) in shapes)


class ElementTile(Tile):
    """Launch shape of an elementwise kernel: columns and warps a program."""

    block: int = Field(default=2048, ge=64)
    num_warps: int = Field(default=4, ge=1, le=16)

    _sizes = field_validator("block", "num_warps")(power_of_two_field)


def element_numerics(params: Any, problem: Problem) -> str:
    """`elementwise`: no sums; every element has the same arithmetic."""
    return "elementwise"


def element_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, ElementTile], ...]:
    """8 columns a thread for few rows, one 16-byte load of each half; then 16."""
    return ((_FEW_TOKENS, ElementTile(block=512, num_warps=2)), (None, ElementTile(block=2048, num_warps=4)))

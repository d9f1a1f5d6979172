"""Reduction params, tiles, default tile ladders and class labels of the row ops, the elementwise ones and attention;
those of the products are in `gemm_params`. Imports no triton, no torch.

A ladder is `((max_m, tile), ...)`, as `Implementation.tiles` wants it. Each function here is given the params of its
own family; they are typed `Any` because the registry calls every family's through one signature.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from bidispatch.device import Device
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.triton.fields import power_of_two_field

__all__ = [
    "AttentionParams",
    "AttentionTile",
    "ElementTile",
    "RowParams",
    "RowTile",
    "attention_numerics",
    "attention_tiles",
    "element_numerics",
    "element_tiles",
    "row_numerics",
    "row_tiles",
]

_KB = 1024


class RowParams(Params):
    """Row sums: lane i of `block` sums elements i, i + block, ... in order; lanes are then summed in adjacent pairs."""

    block: int = Field(default=4096, ge=1024)

    _sizes = field_validator("block")(power_of_two_field)


class RowTile(Tile):
    """Launch shape of one row. The order of the sum is spelled out in the kernel, so warps do not enter it."""

    num_warps: int = Field(ge=1, le=16)

    _sizes = field_validator("num_warps")(power_of_two_field)


def row_numerics(params: Any, problem: Problem) -> str:
    """`row_pairwise.<block>`: how the sum over a row is ordered."""
    return f"row_pairwise.{params.block}"


def row_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, RowTile], ...]:
    """About 512 elements a warp, at most 8 warps."""
    warps = min(problem.size("n"), params.block) // 512
    return ((None, RowTile(num_warps=min(8, 1 << max(0, warps.bit_length() - 1)))),)


class ElementTile(Tile):
    """Launch shape of an elementwise kernel: columns and warps a program."""

    block: int = Field(default=1024, ge=64)
    num_warps: int = Field(default=4, ge=1, le=16)

    _sizes = field_validator("block", "num_warps")(power_of_two_field)


def element_numerics(params: Any, problem: Problem) -> str:
    """`elementwise`: no sums; every element has the same arithmetic."""
    return "elementwise"


def element_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, ElementTile], ...]:
    """One shape for all."""
    return ((None, ElementTile()),)


class AttentionParams(Params):
    """The order of attention's sums: KV tiles and splits at absolute positions, the same for decode and prefill."""

    kv_split: int = Field(default=512, ge=16)
    """KV positions that start from a fresh accumulator; the splits are then folded in ascending order."""
    block_n: int = Field(default=64, ge=16)
    """KV positions of one tile, which share one running maximum."""

    _sizes = field_validator("block_n")(power_of_two_field)

    @model_validator(mode="after")
    def _splits_hold_whole_tiles(self) -> AttentionParams:
        if self.kv_split % self.block_n:
            raise ValueError(f"kv_split={self.kv_split} is not a multiple of block_n={self.block_n}")
        return self


class AttentionTile(Tile):
    """Launch shapes of attention: `decode` where splits run in parallel, `prefill` where one program walks them."""

    decode_block_m: int = Field(ge=16)
    """Rows (query tokens times grouped heads) of a tile."""
    decode_warps: int = Field(ge=1, le=16)
    decode_stages: int = Field(ge=1)
    prefill_block_m: int = Field(ge=16)
    prefill_warps: int = Field(ge=1, le=16)
    prefill_stages: int = Field(ge=1)
    decode_tokens: int = Field(default=256, ge=0)
    """Calls of up to this many tokens run their splits in parallel, workspace allowing."""
    workspace_mb: int = Field(default=256, ge=0)
    """The most MiB a bound kernel may hold for the partial results of parallel splits."""

    _sizes = field_validator("decode_block_m", "decode_warps", "prefill_block_m", "prefill_warps")(power_of_two_field)


def attention_numerics(params: Any, problem: Problem) -> str:
    """`kv_split.<positions>.<tile>.exp2`: absolute splits, left fold, row sums by the matrix unit, weights by exp2."""
    return f"kv_split.{params.kv_split}.{params.block_n}.exp2"


def attention_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, AttentionTile], ...]:
    """One tile for any number of tokens: the kernel itself chooses between decode and prefill."""
    wide = problem.size("head_dim") > 128
    single = problem.dtype == "float32"
    # Two stages hold two KV tiles; the wide fp32 ones, and any wide ones on a small shared memory, fit once.
    stages = 1 if single or (wide and device.arch.shared_memory < 128 * _KB) else 2
    tile = AttentionTile(
        decode_block_m=16,
        decode_warps=4,
        decode_stages=stages,
        prefill_block_m=16 if single and wide else 32 if single else 64,
        prefill_warps=8 if wide else 4,
        prefill_stages=stages,
    )
    return ((None, tile),)

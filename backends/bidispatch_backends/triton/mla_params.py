"""Reduction params, tiles and class label of multi-head latent attention. Imports no triton, no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from bidispatch.device import Device
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.triton.fields import power_of_two_field

__all__ = ["MlaParams", "MlaTile", "mla_numerics", "mla_tiles"]

_KB = 1024


class MlaParams(Params):
    """The order of the sums over KV: tiles and splits at absolute positions, the same for decode and prefill."""

    kv_split: int = Field(default=1024, ge=16)
    """KV positions that start from a fresh accumulator. With 128 heads, the state of a split is written and read in
    512 KB; 1024 positions of the cache are 1.1 MB."""
    block_n: int = Field(default=32, ge=16, le=128)
    """KV positions of one tile, which share one running maximum. 32 of 576 elements take 36 KB, which fits a block of
    every arch."""

    _sizes = field_validator("block_n")(power_of_two_field)

    @model_validator(mode="after")
    def _splits_hold_whole_tiles(self) -> MlaParams:
        if self.kv_split % self.block_n:
            raise ValueError(f"kv_split={self.kv_split} is not a multiple of block_n={self.block_n}")
        return self


class MlaTile(Tile):
    """Launch shapes: `decode` where splits run in parallel, `prefill` where one program walks them."""

    decode_block_m: int = Field(ge=16, le=128)
    """Rows (query tokens times heads) of a tile."""
    decode_warps: int = Field(ge=1, le=16)
    decode_stages: int = Field(ge=1)
    prefill_block_m: int = Field(ge=16, le=128)
    prefill_warps: int = Field(ge=1, le=16)
    prefill_stages: int = Field(ge=1)
    decode_tokens: int = Field(default=256, ge=0)
    """Calls of up to this many tokens run their splits in parallel, workspace allowing."""
    workspace_mb: int = Field(default=1024, ge=0)
    """The most MiB a bound kernel may hold for the partial results of parallel splits. One token of 128 heads takes
    257 KB for each split: 1 GiB is 31 tokens at 131072 positions, 127 at 32768."""

    _sizes = field_validator("decode_block_m", "decode_warps", "prefill_block_m", "prefill_warps")(power_of_two_field)


def mla_numerics(params: Any, problem: Problem) -> str:
    """`mla.<split>.<tile>.exp2`: absolute splits, left fold, scores as compressed part, then rotary part."""
    return f"mla.{params.kv_split}.{params.block_n}.exp2"


def mla_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, MlaTile], ...]:
    """One tile for any number of tokens: the kernel itself chooses between decode and prefill.

    The accumulator of a row is kv_lora_rank fp32 numbers, so that tiles are flatter than those of attention. sm90 has
    64 rows in both paths, one warpgroup instruction; everything else has fewer, all through the same instruction. The
    walk holds a second accumulator, that of the splits before: with 64 rows it lies in local memory while a split is
    computed, and is read and written once a split.
    """
    arch = device.arch
    if arch.family == "sm90":
        decode, prefill = (64, 8, 2), (64, 8, 2)
    elif arch.vendor == "amd":
        decode, prefill = (16, 4, 1), (16, 4, 1)
    elif arch.shared_memory < 128 * _KB:
        decode, prefill = (16, 4, 2), (16, 4, 2)
    else:
        decode, prefill = (16, 4, 2), (32, 8, 2)
    tile = MlaTile(
        decode_block_m=decode[0],
        decode_warps=decode[1],
        decode_stages=decode[2],
        prefill_block_m=prefill[0],
        prefill_warps=prefill[1],
        prefill_stages=prefill[2],
    )
    return ((None, tile),)

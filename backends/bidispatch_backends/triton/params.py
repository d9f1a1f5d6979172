"""Reduction params, tiles, default tile ladders and class labels of the Triton kernels. Imports no triton, no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from bidispatch.device import Device
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile

__all__ = [
    "AttentionParams",
    "AttentionTile",
    "ElementTile",
    "GemmParams",
    "GemmTile",
    "RowParams",
    "RowTile",
    "attention_numerics",
    "attention_tiles",
    "element_numerics",
    "element_tiles",
    "gemm_numerics",
    "gemm_tiles",
    "row_numerics",
    "row_tiles",
]

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two")
    return value


# ---- gemm, bmm


class GemmParams(Params):
    """`gemm` and `bmm`. K is walked in order in an fp32 accumulator, whatever the tile."""

    input_precision: Literal["ieee", "tf32"] = "ieee"
    """How fp32 operands are multiplied: as they are, or rounded to TF32. Other dtypes ignore it."""


class GemmTile(Tile):
    """Launch shape of `gemm` and `bmm`; none of it enters the order of a sum."""

    block_m: int = Field(ge=16)
    block_n: int = Field(ge=16)
    block_k: int = Field(ge=16)
    group_m: int = Field(default=8, ge=1)
    num_warps: int = Field(ge=1, le=16)
    num_stages: int = Field(ge=1)

    _sizes = field_validator("block_m", "block_n", "block_k", "num_warps")(_power_of_two)


def gemm_numerics(params: Params, problem: Problem) -> str:
    """`k_sequential` for 16-bit dtypes; for fp32 with the precision of the products."""
    assert_params = _cast(params, GemmParams)
    return f"k_sequential.{assert_params.input_precision}" if problem.dtype == "float32" else "k_sequential"

"""Reduction params, launch shape and class label of `flashinfer.paged`. Imports no torch, no flashinfer."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.ops.schema import SAME_DTYPE, Problem
from bidispatch.registry import Params, Tile

__all__ = ["PAGE_SIZES", "PagedParams", "PagedTile", "nothing_else", "numerics", "tiles"]

PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SMALLEST_SPLIT = PAGE_SIZES[-1]

_SERVED = frozenset({"head_dim", "num_heads", "num_kv_heads", "page_size", "causal", "window", "softcap"})


class PagedParams(Params):
    """How many KV positions a split has. Splits start at multiples of it, counted from a sequence's first position.

    A power of two from 256 on, so that pages of every size fill a split evenly, or 0 for one split of any length.
    """

    decode_split: int = Field(default=2048, ge=0)
    """For queries of one token, and of up to 16 rows (query tokens times grouped heads). With 2048, decode on
    an H200 (32/8 heads, head_dim 128, bf16, FlashInfer 0.6) took 1 % longer than with FlashInfer's own choice from 32k
    positions on; with 512, 7 % longer there and half as long for one sequence of 8k."""
    prefill_split: int = Field(default=0, ge=0)
    """For longer queries. Partial results take heads x tiles x splits x tile rows x (head_dim + 1) x 4 bytes."""

    @field_validator("decode_split", "prefill_split")
    @classmethod
    def _holds_whole_pages(cls, value: int) -> int:
        if value and (value < _SMALLEST_SPLIT or value & (value - 1)):
            raise ValueError(f"{value} is neither 0 nor a power of two from {_SMALLEST_SPLIT} on")
        return value


class PagedTile(Tile):
    """What may change without a bit: how many sequences are planned together follows from it."""

    workspace_mb: int = Field(default=512, ge=1, le=16384)
    """The most MiB a bound kernel may hold for partial results. FlashInfer's kernels count the elements of theirs in
    32 bits, which the plans of a workspace of 16 GiB never exceed."""


def numerics(params: Any, problem: Problem) -> str:
    """`flashinfer_fa2.<decode split>.<prefill split>`: the order is FlashInfer's own, so no other kernel's."""
    return f"flashinfer_fa2.{params.decode_split}.{params.prefill_split}"


def tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, PagedTile], ...]:
    """One launch shape for any number of tokens."""
    return ((None, PagedTile()),)


def nothing_else(device: Device, problem: Problem) -> str | None:
    """Every dim it does not serve has to be what it is by default: also one that the op gets later."""
    for dim in ops.get(problem.op).dims:
        default = problem.dtype if dim.default == SAME_DTYPE else dim.default
        if dim.name not in _SERVED and problem[dim.name] != default:
            return f"takes no {dim.name} but {default}, asked for {problem[dim.name]}"
    return None

"""Reduction params, tiles, the default tile, tiles to try and the class label of latent attention. No triton here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from bidispatch.device import Arch, Device
from bidispatch.ops.schema import Problem
from bidispatch_backends.triton.attention_params import AttentionParams, AttentionTile, padded

__all__ = ["MlaParams", "MlaTile", "mla_numerics", "mla_tiles", "mla_tiles_for", "seesaws", "walks_pairs", "walks_runs"]

_MATRIX_ROWS = 16
"""Rows of the narrowest tile a matrix unit takes."""
_ASYNC_ROWS = 64
"""Rows from which a product on Hopper is wgmma."""
_ELEMENT_BYTES = 2
_SEESAW_SEQS = 512
"""Sequences whose lengths a warp can hold in registers."""

# A split of 128 heads is written and read again as 514 KB, as much as the KV of 446 positions: one of 256 is for what
# is short. H100, 128 heads, 1 x 1k to 32k: as attention's sizes; 16 x 8k 162 for 171 µs, 16 x 32k 446 for 487, 64 x 8k
# 553 for 622. From 512 on, 64 x 8k takes 484, but 1 x 1k 29 for 20 and 1 x 32k 89 for 55.
_SPLITS = "256/512@1024/1024@8192/2048@32768"


class MlaParams(AttentionParams):
    """The order of latent attention's sums: KV tiles and splits at absolute positions, the same for decode and prefill.

    A score is summed over the compressed KV first, then over the rotary part, in one accumulator.
    """

    kv_split: int | str = _SPLITS
    """As attention has it; sizes grow earlier."""
    block_n: int = Field(default=32, ge=16)
    """KV positions of one tile, which share one running maximum. A tile of 32 takes 36 KB for 512 + 64, which leaves
    room for the queries on every GPU; 64 do not fit the 64 KB of gfx942."""


class MlaTile(AttentionTile):
    """Launch shapes of latent attention, as attention has them; rows are query tokens times heads."""

    decode_block_m: int = Field(ge=16)
    """Rows of a tile of parallel splits."""
    decode_overlap: bool = False
    """Whether parallel splits do the softmax of a KV tile beside the products of others, where `seesaws` holds."""
    prefill_overlap: bool = False
    """Whether what no parallel splits serve is walked in that way too, in tiles of 64 rows, if `walks_pairs` holds."""
    segment_programs: int = Field(default=0, ge=0, le=64)
    """Programs a multiprocessor where a call has as many pairs of sequence and block of heads, or nearly: each walks
    runs of splits. Best as many as run at once. 0: the splits run in parallel there too, as they do where
    decode_overlap is set and `walks_runs` does not hold."""
    segment_parts: int = Field(default=1, ge=1, le=1)
    """1: as many pairs as programs, but for as many as `part_of` idles. With fewer, most would begin within a pair that
    another began, and store the state of each split."""
    segment_warps: int = Field(default=0, ge=0, le=0)
    segment_registers: int = Field(default=0, ge=0, le=0)
    """0: runs of splits take the warps and registers that their kernels name."""
    workspace_mb: int = Field(default=432, ge=0)
    """The most MiB a bound kernel may hold for the partial results of parallel splits: a split of one token takes 257
    KB for 128 heads, 33 KB for 16. docs/latent-attention.md has what batches there is room for."""


def mla_numerics(params: Any, problem: Problem) -> str:
    """`kv_split_mla.<sizes>.<tile>.exp2`, as attention writes it; the rotary part comes after the compressed KV."""
    return f"kv_split_mla.{params.kv_split}.{params.block_n}.exp2"


def seesaws(arch: Arch, problem: Problem, params: Any, tile: MlaTile, max_seqs: int) -> bool:
    """Whether the parallel splits are those of `mla_hopper`: what its layouts are made for."""
    return (
        tile.decode_overlap
        and arch.family == "sm90"
        and (tile.decode_block_m, params.block_n) == (_ASYNC_ROWS, 32)
        and (problem.size("kv_lora_rank"), problem.size("rope_dim")) == (512, 64)
        and max_seqs <= _SEESAW_SEQS
    )


def walks_runs(arch: Arch, problem: Problem, params: Any, tile: MlaTile, max_seqs: int) -> bool:
    """Whether the runs of splits of many sequences are those of `mla_hopper_segments`.

    It folds where a split ends between a tile of the one side and one of the other, so splits hold tiles in pairs.
    """
    return seesaws(arch, problem, params, tile, max_seqs) and all(
        size % (2 * params.block_n) == 0 for _, size in params.ranges
    )


def walks_pairs(arch: Arch, problem: Problem, params: Any, tile: MlaTile, max_seqs: int) -> bool:
    """Whether what no parallel splits serve is walked by `mla_hopper_walk`, in the memory that segments have."""
    return tile.prefill_overlap and tile.segment_programs > 0 and walks_runs(arch, problem, params, tile, max_seqs)


def _fits(arch: Arch, problem: Problem, params: Any, rows: int, stages: int) -> bool:
    """Whether queries, KV tiles and weights are sure to fit a program's shared memory.

    A product that is asynchronous (wgmma, from 64 rows on) has a KV tile more in flight than `mma.sync`. On AMD the
    queries stay in registers. What else the compiler keeps there took an eighth of it at most.
    """
    width = padded(problem.size("kv_lora_rank")) + padded(problem.size("rope_dim"))
    tiles = stages if rows >= _ASYNC_ROWS else max(1, stages - 1)
    queries = 0 if arch.vendor == "amd" else rows * (width + params.block_n)
    needed: int = _ELEMENT_BYTES * (queries + tiles * params.block_n * width)
    return needed <= arch.shared_memory * 7 // 8


def _tallest(arch: Arch, problem: Problem, params: Any) -> int:
    """Rows of the tallest tile of parallel splits. Its accumulator of 512 columns fills 8 warps' registers at 64.

    Only Hopper gets 64: under 64 rows Blackwell has mma.sync, from there on tcgen05, whose bits nobody has compared;
    on the others 64 rows leave no registers or shared memory.
    """
    most = _ASYNC_ROWS if arch.name == "sm90" else 32
    while most > _MATRIX_ROWS and not _fits(arch, problem, params, most, 2):
        most //= 2
    return most


def _stages(arch: Arch, problem: Problem, params: Any, rows: int) -> int:
    """2 where a product is asynchronous, else one more where it fits. 1 on AMD, whose shared memory holds one tile."""
    if arch.vendor == "amd":
        return 1
    return 3 if rows < _ASYNC_ROWS and _fits(arch, problem, params, rows, 3) else 2


def mla_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, MlaTile], ...]:
    """One tile for any number of tokens: the kernels themselves choose between decode and prefill.

    All heads share a KV row, so that a tile of parallel splits is as tall as the heads fill: each row of tiles reads
    the cache once more. One program that walks the splits holds two accumulators, a split's own and that of those
    before.
    """
    most = _tallest(device.arch, problem, params)
    overlap = device.arch.name == "sm90"
    rows = most if overlap else min(most, padded(problem.size("num_heads")))
    walked = min(most, 32)
    tile = MlaTile(
        decode_block_m=rows,
        decode_overlap=overlap,
        decode_warps=8 if rows > _MATRIX_ROWS else 4,
        decode_stages=_stages(device.arch, problem, params, rows),
        prefill_block_m=walked,
        prefill_overlap=overlap,
        prefill_warps=8,
        prefill_stages=_stages(device.arch, problem, params, walked),
        decode_programs=1 if overlap else 2,
        segment_programs=1 if overlap else 0,
    )
    return ((None, tile),)


_FEW_TOKENS = 256
_DECODE_SHAPES = (
    (16, 4, 2),
    (16, 4, 3),
    (16, 8, 3),
    (32, 4, 2),
    (32, 8, 2),
    (32, 8, 3),
    (64, 8, 1),
    (64, 8, 2),
    (64, 8, 3),
)
_DECODE_PROGRAMS = (1, 2, 4)
_PREFILL_SHAPES = ((16, 4, 2), (16, 8, 2), (32, 8, 2), (32, 8, 3))


def mla_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[MlaTile]:
    """Launch shapes to try for calls of m tokens: those of decode up to 256 tokens, else those of prefill.

    Each differs from the default in one of the two only, all are of one class, and all fit shared memory.
    """
    ((_, default),) = mla_tiles(device, problem, params)
    most = _tallest(device.arch, problem, params)
    phase = "decode" if m <= _FEW_TOKENS else "prefill"
    counts = _DECODE_PROGRAMS if phase == "decode" else (default.decode_programs,)
    yield default
    for rows, warps, stages in _DECODE_SHAPES if phase == "decode" else _PREFILL_SHAPES:
        if rows > most or not _fits(device.arch, problem, params, rows, stages):
            continue
        shape = {f"{phase}_block_m": rows, f"{phase}_warps": warps, f"{phase}_stages": stages}
        for count in counts:
            tile = default.model_copy(update=shape | {"decode_programs": count})
            if tile != default:
                yield tile

"""Reduction params, tiles, the default ladder, tiles to try and the class label of attention. Imports no triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_serializer, field_validator, model_validator

from bidispatch.device import Arch, Device
from bidispatch.ops.attention import FP8
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.triton.fields import power_of_two_field

__all__ = [
    "AttentionParams",
    "AttentionTile",
    "attention_numerics",
    "attention_tiles",
    "attention_tiles_for",
    "fp8_unmet",
]

_KB = 1024
_MATRIX_ROWS = 16
"""Rows of the narrowest tile a matrix unit takes."""

# The best split size grew with the context on an H200 (decode, bf16, 32/8 heads of 128): 256 at 1k, 512 at 8k, 1024 at
# 32k, 2048 at 131k. So sizes grow with the absolute position: short contexts have enough splits to fill the GPU, long
# ones few enough to fold. 131072 positions make 120 splits, against 512 of 256 each.
_SPLITS = ((0, 256), (4096, 512), (16384, 1024), (65536, 2048))

_Ranges = tuple[tuple[int, int], ...]


class AttentionParams(Params):
    """The order of attention's sums: KV tiles and splits at absolute positions, the same for decode and prefill."""

    kv_split: int | _Ranges = _SPLITS
    """KV positions that start from a fresh accumulator; the splits are then folded in ascending order. One size, or
    [from position, size] of each range of positions, sizes growing: [[0, 256], [4096, 512]]."""
    block_n: int = Field(default=64, ge=16)
    """KV positions of one tile, which share one running maximum."""

    _sizes = field_validator("block_n")(power_of_two_field)

    @field_validator("kv_split", mode="before")
    @classmethod
    def _lists_are_ranges(cls, value: Any) -> Any:
        """YAML and JSON have lists where a frozen model has tuples."""
        if isinstance(value, list):
            return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
        return value

    @field_serializer("kv_split")
    def _ranges_are_lists(self, value: int | _Ranges) -> int | list[list[int]]:
        """As they are read, so that what was written compares equal."""
        return value if isinstance(value, int) else [list(entry) for entry in value]

    @property
    def ranges(self) -> _Ranges:
        """(from position, size) of each range."""
        return ((0, self.kv_split),) if isinstance(self.kv_split, int) else self.kv_split

    @property
    def lines(self) -> tuple[int, ...]:
        """(size, offset) of each range, flat: split i of a range starts at i · size + offset. Offsets are at most 0."""
        lines: list[int] = []
        before, (start, size) = 0, self.ranges[0]
        for next_start, next_size in (*self.ranges[1:], (None, 0)):
            lines += [size, start - before * size]
            if next_start is not None:
                before += (next_start - start) // size
                start, size = next_start, next_size
        return tuple(lines)

    def splits_up_to(self, positions: int) -> int:
        """How many splits the first `positions` positions have."""
        sizes, offsets = self.lines[::2], self.lines[1::2]
        last = max(positions, 1) - 1
        return 1 + min((last - offset) // size for size, offset in zip(sizes, offsets, strict=True))

    @model_validator(mode="after")
    def _splits_hold_whole_tiles(self) -> AttentionParams:
        ranges = self.ranges
        if not ranges or ranges[0][0] != 0:
            raise ValueError(f"kv_split={self.kv_split} must begin at position 0: [[0, 256], [4096, 512]]")
        for start, size in ranges:
            if size < 1 or size % self.block_n:
                raise ValueError(f"kv_split={size} is not a multiple of block_n={self.block_n}")
            if start < 0:
                raise ValueError(f"kv_split has a range from {start}; positions count from 0")
        for (start, size), (next_start, next_size) in zip(ranges, ranges[1:], strict=False):
            if next_start <= start or next_size <= size:
                raise ValueError(f"kv_split={self.kv_split}: positions and sizes must both grow")
            if (next_start - start) % size:
                raise ValueError(
                    f"kv_split: {next_start} is not a boundary of the splits of {size} from {start}; "
                    f"next are {start + (next_start - start) // size * size} and "
                    f"{start + ((next_start - start) // size + 1) * size}"
                )
        return self


class AttentionTile(Tile):
    """Launch shapes of attention: `decode` where splits run in parallel, `prefill` where one program walks them."""

    decode_block_m: int = Field(ge=16)
    """Rows (query tokens times grouped heads) of a tile, at least: binding takes what a KV head's group and the limits'
    max_query_len fill, up to prefill_block_m rows, so that a sequence's keys are read once."""
    decode_warps: int = Field(ge=1, le=16)
    decode_stages: int = Field(ge=1)
    prefill_block_m: int = Field(ge=16)
    prefill_warps: int = Field(ge=1, le=16)
    prefill_stages: int = Field(ge=1)
    decode_query_len: int = Field(default=16, ge=0)
    """Sequences of up to this many query tokens in a call have their splits run in parallel, workspace allowing."""
    decode_programs: int = Field(default=8, ge=1, le=64)
    """Programs of the parallel splits a multiprocessor, at most; they share out the splits there are."""
    workspace_mb: int = Field(default=256, ge=0)
    """The most MiB a bound kernel may hold for the partial results of parallel splits."""

    _sizes = field_validator("decode_block_m", "decode_warps", "prefill_block_m", "prefill_warps")(power_of_two_field)


def attention_numerics(params: Any, problem: Problem) -> str:
    """`kv_split.<sizes>.<tile>.exp2`: absolute splits, left fold, row sums by the matrix unit, weights by exp2.

    Sizes as in 256/512@4096/1024@16384: 256 from position 0, 512 from 4096, 1024 from 16384.
    """
    sizes = "/".join(f"{size}@{start}" if start else str(size) for start, size in params.ranges)
    return f"kv_split.{sizes}.{params.block_n}.exp2"


def fp8_unmet(device: Device, problem: Problem) -> str | None:
    """An fp8 cache needs a GPU whose Triton target has float8_e4m3fn: sm89 and later, and gfx942."""
    if problem["kv_dtype"] != FP8 or device.arch.vendor != "nvidia" or device.arch.order >= 89:
        return None
    return f"needs sm89 or later for kv_dtype={FP8}, which Triton does not convert on {device.arch.name}"


def _stages(arch: Arch, problem: Problem, most: int) -> int:
    """Stages whose KV tiles fit. A stage of 64 positions in bf16 takes 32 KB for a head of 128, so that two leave room
    for three programs on a multiprocessor of sm90 (227 KB)."""
    wide = problem.size("head_dim") > 128
    if problem.dtype == "float32" or (wide and arch.shared_memory < 128 * _KB):
        return 1  # the wide fp32 ones, and any wide ones on a small shared memory, fit once
    return most


def attention_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, AttentionTile], ...]:
    """One tile for any number of tokens: the kernels themselves choose between decode and prefill."""
    wide = problem.size("head_dim") > 128
    single = problem.dtype == "float32"
    stages = _stages(device.arch, problem, 2)
    tile = AttentionTile(
        decode_block_m=_MATRIX_ROWS,
        decode_warps=4,
        decode_stages=stages,
        prefill_block_m=16 if single and wide else 32 if single else 64,
        prefill_warps=8 if wide else 4,
        prefill_stages=stages,
    )
    return ((None, tile),)


# Rows, warps and stages of decode tiles, then of prefill's. What to expect on sm90 (head_dim 128, bf16, KV tiles of 64
# positions, 32 KB a stage): decode is bound by the bytes in flight, stages times programs on a multiprocessor, so 2
# stages of 3 programs and 3 of 2 should be alike, and 2 warps may save barriers where a tile has 16 rows. Prefill has
# wgmma from 64 rows on; 128 rows halve what is read of the keys, with two accumulators of 64 registers a thread in 8
# warps, while two programs of 64 rows hide each other's starts of a split.
_DECODE_SHAPES = ((16, 4, 2), (16, 4, 3), (16, 4, 4), (16, 2, 2), (16, 2, 3), (16, 8, 3), (32, 4, 2), (64, 4, 2))
_DECODE_PROGRAMS = (2, 4, 8, 16)
_PREFILL_SHAPES = ((64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 2), (128, 8, 3), (128, 4, 2), (32, 4, 2), (16, 4, 2))


def attention_tiles_for(device: Device, problem: Problem, params: Any, m: int) -> Iterator[AttentionTile]:
    """Launch shapes to try for calls of m tokens: those of decode up to 256 tokens, else those of prefill.

    Each differs from the default in one of the two only; all are of one class. Only those that fit shared memory.
    """
    (default,) = (tile for _, tile in attention_tiles(device, problem, params))
    yield default
    for rows, warps, stages in _DECODE_SHAPES if m <= _FEW_TOKENS else _PREFILL_SHAPES:
        phase = "decode" if m <= _FEW_TOKENS else "prefill"
        shape = {f"{phase}_block_m": rows, f"{phase}_warps": warps, f"{phase}_stages": stages}
        if not _fits(device.arch, problem, params, rows, stages):
            continue
        if phase == "prefill":
            tiles = [default.model_copy(update=shape)]
        else:
            tiles = [default.model_copy(update=shape | {"decode_programs": count}) for count in _DECODE_PROGRAMS]
        yield from (tile for tile in tiles if tile != default)


_FEW_TOKENS = 256
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, FP8: 1}


def _fits(arch: Arch, problem: Problem, params: Any, rows: int, stages: int) -> bool:
    """Whether the tiles of keys and values and the queries are sure to fit a program's shared memory."""
    width = 1 << (problem.size("head_dim") - 1).bit_length()
    cached = 2 * params.block_n * width * _BYTES[str(problem["kv_dtype"])] * stages
    return cached + rows * (width + params.block_n) * _BYTES[problem.dtype] <= arch.shared_memory

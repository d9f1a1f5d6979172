"""Reduction params, tiles, the default ladder and the class label of attention. Imports no triton, no torch."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from pydantic import Field, field_validator, model_validator

from bidispatch.device import Arch, Device
from bidispatch.ops.attention import FP8
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.triton.fields import BYTES, power_of_two_field

__all__ = [
    "AttentionParams",
    "AttentionTile",
    "attention_numerics",
    "attention_tiles",
    "fits_shared_memory",
    "fp8_unmet",
    "overlaps",
    "padded",
]

_KB = 1024
_MATRIX_ROWS = 16
"""Rows of the narrowest tile a matrix unit takes."""

# The best split size grew with the context on an H200 (decode, bf16, 32/8 heads of 128): 256 at 1k, 512 at 8k, 1024 at
# 32k, 2048 at 131k. So sizes grow with the absolute position: short contexts have enough splits to fill the GPU, long
# ones few enough to fold. 131072 positions make 120 splits, against 512 of 256 each.
_SPLITS = "256/512@4096/1024@16384/2048@65536"

_RANGE = re.compile(r"(\d+)(?:@(\d+))?")


class AttentionParams(Params):
    """The order of attention's sums: KV tiles and splits at absolute positions, the same for decode and prefill."""

    kv_split: int | str = _SPLITS
    """KV positions that start from a fresh accumulator; the splits are then folded in ascending order. One size, or
    growing ones, each with the position it holds from: 256/512@4096 is 256 at first, and 512 from position 4096 on.
    Python callers may give (from position, size) pairs."""
    block_n: int = Field(default=64, ge=16)
    """KV positions of one tile, which share one running maximum."""

    _sizes = field_validator("block_n")(power_of_two_field)

    @field_validator("kv_split", mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> Any:
        """Pairs as text: a param is a plain value, as profiles and records hold it."""
        if isinstance(value, (list, tuple)):
            pairs = [entry for entry in value if isinstance(entry, (list, tuple)) and len(entry) == 2]
            if len(pairs) != len(value) or not pairs:
                raise ValueError(
                    f"kv_split={value!r} is not (from position, size) pairs, such as ((0, 256), (4096, 512))"
                )
            return "/".join(f"{size}@{start}" if start else str(size) for start, size in pairs)
        return value

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(from position, size) of each range."""
        found = [_RANGE.fullmatch(part) for part in str(self.kv_split).split("/")]
        return tuple((int(match[2] or 0), int(match[1])) for match in found if match)

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
        if len(ranges) != len(str(self.kv_split).split("/")) or ranges[0][0] != 0:
            raise ValueError(f"kv_split={self.kv_split!r} is not a size, nor sizes from position 0 on: 256/512@4096")
        for _, size in ranges:
            if size < 1 or size % self.block_n:
                raise ValueError(f"kv_split={size} is not a multiple of block_n={self.block_n}")
        for (start, size), (next_start, next_size) in pairwise(ranges):
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
    decode_registers: int = Field(default=0, ge=0, le=255)
    """The most registers a thread may take on NVIDIA, so that more programs run at once; 0: as the compiler likes."""
    prefill_block_m: int = Field(ge=16)
    prefill_warps: int = Field(ge=1, le=16)
    prefill_stages: int = Field(ge=1)
    prefill_overlap: bool = False
    """Whether prefill does the softmax of a KV tile beside the products of the one before, where `overlaps` holds."""
    decode_query_len: int = Field(default=16, ge=0)
    """Sequences of up to this many query tokens in a call have their splits run in parallel, workspace allowing."""
    decode_programs: int = Field(default=6, ge=1, le=64)
    """Programs of the parallel splits a multiprocessor, at most; they share out the splits there are. Best a multiple
    of those that run at once (2 for a head of 128): once, all end together where the splits are alike; twice, the
    second ones also fill in where some splits are longer."""
    segment_programs: int = Field(default=2, ge=0, le=64)
    """Programs a multiprocessor where a call has many pairs of sequence and KV head (`segment_parts`): each has a part
    of the pairs, as long as others', so best as many as run at once. 0: the splits run in parallel there too."""
    segment_parts: int = Field(default=4, ge=1)
    """Into how many parts a pair may be cut, about: with fewer pairs the splits run in parallel."""
    segment_warps: int = Field(default=0, ge=0, le=16)
    """Of such a program; 0: as many as `decode_warps`."""
    segment_registers: int = Field(default=0, ge=0, le=255)
    """The most registers that a thread of these may take on NVIDIA, as `decode_registers`."""
    workspace_mb: int = Field(default=256, ge=0)
    """The most MiB a bound kernel may hold for the partial results of parallel splits."""

    _sizes = field_validator("decode_block_m", "decode_warps", "segment_warps", "prefill_block_m", "prefill_warps")(
        power_of_two_field
    )


def padded(width: int) -> int:
    """A width as a kernel's block has it: a power of two, at least that of the narrowest product."""
    return max(16, 1 << (width - 1).bit_length())


def attention_numerics(params: Any, problem: Problem) -> str:
    """`kv_split.<sizes>.<tile>.exp2`: absolute splits, left fold, row sums by the matrix unit, weights by exp2.

    Sizes as `kv_split` has them: 256/512@4096 is 256 from position 0 and 512 from 4096.
    """
    return f"kv_split.{params.kv_split}.{params.block_n}.exp2"


def fp8_unmet(device: Device, problem: Problem) -> str | None:
    """An fp8 cache needs a GPU whose Triton target has float8_e4m3fn: sm89 and later, and gfx942."""
    if problem["kv_dtype"] != FP8 or device.arch.vendor != "nvidia" or device.arch.order >= 89:
        return None
    return f"needs sm89 or later for kv_dtype={FP8}, which Triton does not convert on {device.arch.name}"


def overlaps(arch: Arch, problem: Problem, params: Any, tile: AttentionTile) -> bool:
    """Whether prefill is served by `attention_hopper`: what its layouts are made for."""
    return (
        tile.prefill_overlap
        and arch.family == "sm90"
        and (tile.prefill_block_m, tile.prefill_warps, params.block_n) == (128, 8, 64)
        and problem.dtype == problem["kv_dtype"] != "float32"
        and problem.size("head_dim") in (64, 128)
        and not (float(problem["softcap"]) or problem.flag("alibi"))
    )


def fits_shared_memory(arch: Arch, problem: Problem, params: Any, rows: int, stages: int, width: int = 0) -> bool:
    """Whether a program's keys, values, queries and weights fit its shared memory. width: as in `_shared_memory`."""
    return _shared_memory(problem, params, rows, stages, width) <= arch.shared_memory


def _shared_memory(problem: Problem, params: Any, rows: int, stages: int, width: int = 0) -> int:
    """Bytes of a program's keys, values, queries and weights, about.

    Triton holds a buffer of keys and values less than there are stages. Those of an fp8 cache are held again in q's
    dtype. A few KB are left to reductions. width: of the head, rounded up; by default the problem's.
    """
    width = width or 1 << (problem.size("head_dim") - 1).bit_length()
    wide, cached = BYTES[problem.dtype], BYTES[str(problem["kv_dtype"])]
    buffers = max(1, stages - 1) * cached + (wide if cached != wide else 0)
    needed: int = 2 * params.block_n * width * buffers + rows * (width + params.block_n) * wide
    return needed + 4 * _KB


def _stages(arch: Arch, problem: Problem, params: Any, rows: int) -> int:
    """The most stages that fit, up to 3: two buffers, so that a tile is loaded while the one before it is computed."""
    if problem.dtype == "float32":
        return 1
    most = 3 if arch.vendor == "nvidia" else 2
    width = 256 if problem.size("head_dim") > 128 else 128  # two tiles for all heads
    return next(
        (stages for stages in range(most, 1, -1) if fits_shared_memory(arch, problem, params, rows, stages, width)), 1
    )


def attention_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, AttentionTile], ...]:
    """One tile for any number of tokens: the kernels themselves choose between decode and prefill."""
    arch = device.arch
    wide = problem.size("head_dim") > 128
    single = problem.dtype == "float32"
    prefill, warps = (16 if wide else 32, 4) if single else (64, 4)
    if wide:
        warps = 8
    elif not single and arch.family == "sm90":
        prefill, warps = 128, 8  # wgmma: keys are read half as often as with 64 rows
    stages = _stages(arch, problem, params, _MATRIX_ROWS)
    tile = AttentionTile(
        decode_block_m=_MATRIX_ROWS,
        decode_warps=4,
        decode_stages=stages,
        # Two programs of 255 registers a multiprocessor: three of 168, which spill, were 1 to 5 % slower on an H100
        # from 16 sequences of 8192 on, and as fast below.
        decode_registers=0,
        segment_programs=2 if 2 * _shared_memory(problem, params, _MATRIX_ROWS, stages) <= arch.shared_memory else 1,
        prefill_block_m=prefill,
        prefill_warps=warps,
        prefill_stages=_stages(arch, problem, params, prefill),
        prefill_overlap=arch.family == "sm90",
    )
    return ((None, tile),)

"""The host's side of attention in parallel splits, whatever a KV tile holds: packing, workspace, grids, the fold.

`attention` and `mla` launch their own splits and walks by it; both are folded by `fold_kernel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bidispatch.device import Arch
from bidispatch.runtime.context import BindContext, Limits
from bidispatch.runtime.scratch import empties
from bidispatch_backends.triton.attention_kernels import fold_kernel
from bidispatch_backends.triton.attention_params import AttentionParams, AttentionTile
from bidispatch_backends.triton.launch import (
    ArgumentType,
    Constant,
    Launch,
    ceil_div,
    dependent_launch,
    options,
    pointer,
    power_of_two,
)

__all__ = ["SERVER", "Decode", "Packing", "Parallel", "even_parts", "fold_launch", "workspace_types"]

SERVER = Limits(256, 256, 131072, 1)
"""What a server binds decode steps for, about."""

_MOST_SEQS = 4096
"""Sequences whose lengths one program of the parallel splits can count; bound for more, every sequence is walked."""
_UNITS = 128
"""Multiprocessors of a GPU that does not say how many it has."""
_INTERPRETED_UNITS = 4
"""Multiprocessors that Triton's interpreter stands for."""
_FOLDS = 4
"""Programs that share the tokens of one sequence and head in `fold_kernel`, at most."""


@dataclass(frozen=True)
class Packing:
    """How rows of a query tile are made of tokens and of the heads that share a KV head."""

    heads: int
    tokens: int
    head_blocks: int

    @classmethod
    def of(cls, group: int, block_m: int) -> Packing:
        """group: query heads of a KV head."""
        heads = min(group, block_m)
        return cls(heads, block_m // heads, ceil_div(group, heads))


@dataclass(frozen=True)
class Decode:
    """What the limits make of a tile's decode."""

    block_m: int
    most_queries: int
    """Query tokens of a sequence whose splits run in parallel, at most; 0: none do."""
    block_b: int
    capacity: int
    """Splits of tokens that the workspace holds."""

    @classmethod
    def of(
        cls, params: AttentionParams, tile: AttentionTile, limits: Limits, *, heads: int, width: int, block_m: int
    ) -> Decode:
        """heads: of a token. width: of an accumulator. block_m: rows of a tile."""
        most_queries = min(tile.decode_query_len, limits.max_query_len or limits.max_tokens)
        splits = params.splits_up_to(limits.max_seq_len)
        state = heads * (width + 2) * 4
        capacity = min((tile.workspace_mb << 20) // state, splits * limits.max_tokens)
        if capacity < splits or limits.max_seqs > _MOST_SEQS:
            most_queries = 0
        return cls(block_m, most_queries, power_of_two(max(limits.max_seqs, 16)), capacity)

    @property
    def constants(self) -> dict[str, Constant]:
        """What a kernel of parallel splits takes of it."""
        return {"MOST_QUERIES": self.most_queries, "BLOCK_B": self.block_b}


def workspace_types() -> dict[str, ArgumentType]:
    """The arguments that `Parallel.workspace` is passed for."""
    types: dict[str, ArgumentType] = {"bases_ptr": pointer("int32")}
    return types | dict.fromkeys(("maxima_ptr", "totals_ptr", "accs_ptr"), pointer("float32"))


def fold_launch(
    arch: Arch,
    optional: Mapping[str, ArgumentType],
    data: str,
    out_strides: Mapping[str, ArgumentType],
    constants: Mapping[str, Constant],
    warps: int,
    *,
    rows: int = 1,
    span: int = 0,
    dependent: bool = False,
    segments: bool = False,
) -> Launch:
    """`fold_kernel` for one problem. optional: `sinks_ptr` and `v_scales_ptr`. data: the type of the result.

    rows: heads that a program folds at once. span: all of its heads, by default those.
    dependent: launched while the kernel before it still runs, where `dependent_launch` has options for it.
    segments: behind `segment_kernel`, which says in `folded_ptr` what it has folded.
    """
    early = dependent_launch(arch) if dependent else {}
    return Launch(
        fold_kernel,
        dict.fromkeys(("kv_lens_ptr", "query_start_ptr"), pointer("int32"))
        | dict(optional)
        | {"folded_ptr": pointer("int32") if segments else None}
        | workspace_types()
        | {"out_ptr": data}
        | dict.fromkeys(("max_kv", "alone", "stride_v_scale"), "i32")
        | dict(out_strides),
        dict(constants) | {"DEPENDENT": bool(early), "ROWS": rows, "SPAN": span or rows},
        options(arch, warps, 1, fp_fusion=False) | early,
    )


def even_parts(most: int, seqs: int) -> int:
    """Into how many parts so many sequences are cut, `most` or a sixteenth less.

    Best into as many that each has whole sequences, or an equal part of one: those of one length are then cut not at
    all, or, where it is a power of two, where splits end. On an H200 decode of 16 to 64 sequences with 8 KV heads took
    0.82 to 1.03 of the time of 33 or 66 parts for 32 or 64, the loads of cut sequences kept in flight besides.
    """
    even = (parts for parts in range(most, most * 15 // 16, -1) if not parts % seqs or not seqs % parts)
    return next(even, most)


class Parallel:
    """A bound kernel's workspace of splits, and what a call needs to know of its limits."""

    def __init__(
        self,
        context: BindContext,
        decode: Decode,
        *,
        heads: int,
        width: int,
        blocks: int,
        segments: int = 0,
        running: int = 0,
    ) -> None:
        """blocks: tiles of one token's heads. segments: programs of `segment_kernel` a multiprocessor, if any.

        running: what each of these programs holds of its own in memory, in float32.
        """
        limits, tile = context.limits, context.tile
        self.decode = decode
        self._heads, self._limits = heads, limits
        self._page_size = context.problem.size("page_size")
        self._splits = context.params.splits_up_to(limits.max_seq_len)
        self._longest_query = limits.max_query_len or limits.max_tokens
        self._blocks = blocks
        on_gpu = context.device.arch.vendor != "cpu"
        self._units = (context.device.compute_units or _UNITS) if on_gpu else _INTERPRETED_UNITS
        self._programs = self._units * (tile.decode_programs if on_gpu else 1)
        self._segments = segments * (self._units if on_gpu else 1)
        self._parts: int = tile.segment_parts

        states = decode.capacity * heads if decode.most_queries else 0
        seqs = limits.max_seqs if decode.most_queries else 0
        sizes = ((seqs, torch.int32), *((count, torch.float32) for count in (states, states, states * width)))
        folded, running = (limits.max_tokens * heads, self._segments * running) if states and segments else (0, 0)
        *workspace, self.folded, self.running = empties(
            context, *sizes, (folded, torch.int32), (running, torch.float32)
        )
        self.workspace = tuple(workspace)
        self.bases = self.workspace[0]

    def max_kv(self, block_table: torch.Tensor) -> int:
        """KV positions that a sequence may have in a call."""
        return min(self._limits.max_seq_len, block_table.shape[1] * self._page_size)

    def leaves(self, tokens: int) -> bool:
        """Whether a sequence of a call may be left to the walk; always without splits in parallel."""
        decode = self.decode
        return min(tokens, self._longest_query) > decode.most_queries or tokens * self._splits > decode.capacity

    def split_grid(self, tokens: int) -> tuple[int, ...]:
        """Of the splits: no more programs than there can be work."""
        return (min(self._programs, tokens * self._splits * self._blocks),)

    def in_segments(self, seqs: int) -> bool:
        """Whether a call's splits are left to `segment_kernel`: with so many pairs of sequence and heads that one has
        `segment_parts` programs or fewer, but for a sixteenth. Those that begin within a pair that another began store
        the state of each split, as `split_kernel` does: with fewer pairs, nearly all would.
        """
        pairs = seqs * self._blocks if self.decode.most_queries and self._segments else 0
        return pairs > 0 and pairs * self._parts * 16 >= self._segments * 15

    def segment_grid(self, seqs: int) -> tuple[int, ...]:
        """Of `segment_kernel`: as many programs for each tile of a token's heads."""
        return (self._blocks, even_parts(max(1, self._segments // self._blocks), seqs))

    def fold_grid(self, tokens: int, seqs: int, span: int = 1) -> tuple[int, ...]:
        """Of `fold_kernel`. span: heads of a program."""
        return (seqs, self._heads // span, min(_FOLDS, self.decode.most_queries, tokens))

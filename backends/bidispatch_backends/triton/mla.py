"""Multi-head latent attention whose bits for a query depend on its own position and cache alone: launches and binding.

As in `attention`: `latent_split_kernel` and `fold_kernel` serve sequences of few query tokens, `latent_segment_kernel`
and `fold_kernel` those of calls of many sequences, `latent_walk_kernel` the others. On Hopper each has a twin of the
same bits. The absorbed form serves every phase, so that a prefill has the bits of decode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel, Limits, need_max_seq_len, need_positive_scale
from bidispatch_backends.aligned import ALIGNMENT
from bidispatch_backends.triton.attention_launch import (
    SERVER,
    Decode,
    Packing,
    Parallel,
    fold_launch,
    workspace_types,
)
from bidispatch_backends.triton.attention_params import padded
from bidispatch_backends.triton.hopper import WARPS
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, options, pointer
from bidispatch_backends.triton.mla_hopper import SEESAW_ROWS, seesaw_split_kernel
from bidispatch_backends.triton.mla_hopper_segments import seesaw_segment_kernel
from bidispatch_backends.triton.mla_hopper_walk import seesaw_walk_kernel
from bidispatch_backends.triton.mla_kernels import latent_split_kernel, latent_walk_kernel
from bidispatch_backends.triton.mla_params import MlaParams, MlaTile, seesaws, walks_pairs, walks_runs
from bidispatch_backends.triton.mla_segments import latent_segment_kernel

__all__ = ["Runs", "bind_mla", "launches"]

_FOLD_WARPS = 4
_MOST_FOLDED = 16
"""Heads of a program that folds behind segments, at most: they leave it little, mostly nothing."""


class Runs(Parallel):
    """Of `latent_segment_kernel`, whose programs have one order of all pairs."""

    def segment_grid(self, seqs: int) -> tuple[int, ...]:
        return (self._segments,)

    @property
    def pair_grid(self) -> tuple[int, ...]:
        """Of `seesaw_walk_kernel`: one program a multiprocessor, which its shared memory fills."""
        return (self._units,)


@dataclass(frozen=True)
class _Pairs(Launch):
    """Of `seesaw_walk_kernel`, which has a grid of its own, so that what serves other operands is chosen before."""

    def serves(self, *arguments: Any) -> bool:
        """Whether the operands are what the kernel's copies of 16 bytes need."""
        places = (tensor.data_ptr() for tensor in arguments[: self._tensors])
        return not any(size % ALIGNMENT for size in (*places, *self._sizes(arguments)))


@dataclass(frozen=True)
class _Launches:
    """The launches of a bound kernel. A walk is for all sequences, or for those that the parallel splits leave."""

    walk_all: Launch
    walk_rest: Launch
    split: Launch
    fold: Launch
    segment: Launch | None = None
    segment_fold: Launch | None = None
    pairs: _Pairs | None = None
    """In the place of `walk_rest`, where segments have memory of their programs' own."""


def _folded_span(heads: int) -> int:
    """Heads of a program that folds behind segments: a power of two that divides those of a query tile and all."""
    return min(heads & -heads, _MOST_FOLDED)


def _decode_of(problem: Problem, params: MlaParams, tile: MlaTile, limits: Limits) -> Decode:
    heads, width = problem.size("num_heads"), padded(problem.size("kv_lora_rank"))
    return Decode.of(params, tile, limits, heads=heads, width=width, block_m=tile.decode_block_m)


def launches(
    problem: Problem, params: MlaParams, tile: MlaTile, arch: Arch, limits: Limits | None = None
) -> tuple[Launch, ...]:
    """The launches of `latent_walk_kernel` for all sequences and for those that are left, `latent_split_kernel` and
    `fold_kernel`, then, where the tile has segments, `latent_segment_kernel` and `fold_kernel`, and what else stands in
    for the second walk on Hopper.

    limits: by default those of a server, with decode steps of one token.
    """
    made = _launches(problem, params, tile, arch, limits or SERVER)
    return tuple(launch for launch in vars(made).values() if launch is not None)


def _launches(problem: Problem, params: MlaParams, tile: MlaTile, arch: Arch, limits: Limits) -> _Launches:
    decode = _decode_of(problem, params, tile, limits)
    data, index = pointer(problem.dtype), pointer("int32")
    heads, rank, rope = (problem.size(dim) for dim in ("num_heads", "kv_lora_rank", "rope_dim"))
    inputs: dict[str, ArgumentType] = {"q_ptr": data, "kv_ptr": data}
    inputs |= dict.fromkeys(("table_ptr", "kv_lens_ptr", "query_start_ptr"), index)
    strides: dict[str, ArgumentType] = {
        "stride_q_token": heads * (rank + rope),
        "stride_q_head": rank + rope,
        "stride_page": problem.size("page_size") * (rank + rope),
        "stride_slot": rank + rope,
    }
    out_strides: dict[str, ArgumentType] = {"stride_out_token": heads * rank, "stride_out_head": rank}

    def sizes(*names: str) -> dict[str, ArgumentType]:
        scalars: dict[str, ArgumentType] = {"exp2_scale": "fp32"}
        return scalars | dict.fromkeys(names, "i32")

    def packed(block_m: int) -> dict[str, Constant]:
        rows = Packing.of(heads, block_m)
        return {
            "NUM_HEADS": heads,
            "HEADS": rows.heads,
            "TOKENS": rows.tokens,
            "RANK": rank,
            "ROPE": rope,
            "PAGE_SIZE": problem.size("page_size"),
            "SPLITS": params.lines,
            "BLOCK_M": block_m,
            "BLOCK_N": params.block_n,
            "BLOCK_L": padded(rank),
            "BLOCK_R": padded(rope),
        }

    bounded = tile.decode_registers and arch.vendor == "nvidia"
    registers = {"maxnreg": tile.decode_registers} if bounded else {}
    # Without the fusion: the compiler would contract a product and a sum in one kernel and not in the other.
    walk_sizes = sizes("seqs", "max_kv", "stride_table") | strides | out_strides
    walk_all, walk_rest = (
        Launch(
            latent_walk_kernel,
            inputs | {"bases_ptr": bases, "out_ptr": data} | walk_sizes,
            packed(tile.prefill_block_m),
            options(arch, tile.prefill_warps, tile.prefill_stages, fp_fusion=False),
        )
        for bases in (None, index)
    )
    in_gluon = not triton.knobs.runtime.interpret  # which cannot be interpreted
    fold_constants: dict[str, Constant] = {
        "HEADS": heads,
        "GROUP": heads,
        "HEAD_DIM": rank,
        "CAUSAL": True,
        "WINDOW": 0,
        "SPLITS": params.lines,
        "BLOCK_D": padded(rank),
    }
    neither: dict[str, ArgumentType] = {"sinks_ptr": None, "v_scales_ptr": None}
    split = Launch(
        latent_split_kernel,
        inputs | workspace_types() | sizes("seqs", "max_kv", "capacity", "stride_table") | strides,
        packed(tile.decode_block_m) | decode.constants,
        options(arch, tile.decode_warps, tile.decode_stages, fp_fusion=False) | registers,
    )
    if seesaws(arch, problem, params, tile, decode.block_b) and in_gluon:
        split = replace(
            split, kernel=seesaw_split_kernel, options=options(arch, WARPS, 1, fp_fusion=False), unaligned=split
        )
    fold = fold_launch(arch, neither, data, out_strides, fold_constants, _FOLD_WARPS)
    walked = walks_runs(arch, problem, params, tile, decode.block_b) and in_gluon
    if not tile.segment_programs or (tile.decode_overlap and not walked):
        return _Launches(walk_all, walk_rest, split, fold)

    segment_types = inputs | {"folded_ptr": index, "running_ptr": pointer("float32")} | workspace_types()
    segment = Launch(
        latent_segment_kernel,
        segment_types | {"out_ptr": data} | sizes("seqs", "max_kv", "capacity", "stride_table") | strides | out_strides,
        # It holds two accumulators, as the walk does.
        packed(min(tile.decode_block_m, tile.prefill_block_m)) | decode.constants,
        options(arch, tile.prefill_warps, tile.prefill_stages, fp_fusion=False),
    )
    if walked:
        segment = replace(
            segment,
            kernel=seesaw_segment_kernel,
            constants=packed(SEESAW_ROWS) | decode.constants,
            options=options(arch, WARPS, 1, fp_fusion=False),
            unaligned=segment,
        )
    segment_fold = fold_launch(
        arch,
        neither,
        data,
        out_strides,
        fold_constants,
        _FOLD_WARPS,
        span=_folded_span(heads),
        dependent=True,
        segments=True,
    )
    pairs = None
    if walked and walks_pairs(arch, problem, params, tile, decode.block_b):
        pairs = _Pairs(
            seesaw_walk_kernel,
            inputs | {"bases_ptr": index, "running_ptr": pointer("float32"), "out_ptr": data} | walk_sizes,
            packed(SEESAW_ROWS) | {"BLOCK_B": decode.block_b},
            options(arch, WARPS, 1, fp_fusion=False),
        )
    return _Launches(walk_all, walk_rest, split, fold, segment, segment_fold, pairs)


def bind_mla(context: BindContext) -> Kernel:
    """Bind for calls up to `context.limits`; holds the workspace of the parallel splits.

    What is launched follows from the limits and a call's numbers of tokens and sequences; which of the launches serves
    a sequence is decided on the GPU. All give the same bits. A sequence longer than `max_seq_len`, or than its block
    table holds, gives NaN, as one of more query tokens than `max_query_len` may: lengths are only known on the GPU.
    Raises `UsageError` when the limits name no `max_seq_len`.
    """
    problem, params, tile, limits = context.problem, context.params, context.tile, context.limits
    need_max_seq_len(context)
    made = _launches(problem, params, tile, context.device.arch, limits)
    segment, segment_fold = made.segment, made.segment_fold
    decode = _decode_of(problem, params, tile, limits)
    heads, rank = problem.size("num_heads"), problem.size("kv_lora_rank")
    walked = Packing.of(heads, tile.prefill_block_m)
    blocks = Packing.of(heads, decode.block_m).head_blocks
    parallel = Runs(
        context,
        decode,
        heads=heads,
        width=padded(rank),
        blocks=blocks,
        segments=tile.segment_programs if segment else 0,
        running=decode.block_m * padded(rank) if segment and segment.unaligned else 0,
    )
    log2_e, span = math.log2(math.e), _folded_span(heads)

    def mla(
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        need_positive_scale(problem, scale)
        tokens, seqs = q.shape[0], seq_lens.shape[0]
        max_kv = parallel.max_kv(block_table)
        inputs = (q, kv_cache, block_table, seq_lens, query_start_loc)
        strides = (*q.stride()[:2], *kv_cache.stride()[:2])
        table_stride, out_strides = block_table.stride(0), out.stride()[:2]
        exp2_scale = scale * log2_e

        walk, pairs, walk_bases = made.walk_all, None, None
        left = parallel.leaves(tokens)
        if decode.most_queries:
            in_segments = parallel.in_segments(seqs)
            if segment and segment_fold and in_segments:
                fold_now = segment_fold
                segment(
                    parallel.segment_grid(seqs),
                    *inputs,
                    parallel.folded,
                    parallel.running,
                    *parallel.workspace,
                    out,
                    exp2_scale,
                    seqs,
                    max_kv,
                    decode.capacity,
                    table_stride,
                    *strides,
                    *out_strides,
                )
            else:
                fold_now = made.fold
                made.split(
                    parallel.split_grid(tokens),
                    *inputs,
                    *parallel.workspace,
                    exp2_scale,
                    seqs,
                    max_kv,
                    decode.capacity,
                    table_stride,
                    *strides,
                )
            fold_now(
                parallel.fold_grid(tokens, seqs, span if in_segments else 1),
                seq_lens,
                query_start_loc,
                None,
                None,
                parallel.folded if in_segments else None,
                *parallel.workspace,
                out,
                max_kv,
                int(not left),
                0,
                *out_strides,
            )
            walk, pairs, walk_bases = made.walk_rest, made.pairs, parallel.bases
        if left:
            sizes = (exp2_scale, seqs, max_kv, table_stride, *strides, *out_strides)
            in_pairs = (*inputs, walk_bases, parallel.running, out, *sizes)
            if pairs and pairs.serves(*in_pairs):
                pairs(parallel.pair_grid, *in_pairs)
            else:
                grid = (walked.head_blocks, tokens // walked.tokens + seqs)
                walk(grid, *inputs, walk_bases, out, *sizes)

    return mla

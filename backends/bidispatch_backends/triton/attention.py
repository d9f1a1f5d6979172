"""Paged attention whose bits for a query depend on its own position, keys and values alone: launches and binding.

The kernels are in `attention_kernels`, the arithmetic that they share in `attention_state`. A call launches, of these:

- `split_kernel` and `fold_kernel`, for sequences of few query tokens (decode, speculative decode, short chunks);
  `launches` has them twice where a fold may start early;
- `segment_kernel` and `fold_kernel` instead, in calls of many sequences;
- `walk_kernel`, for the others, unless the limits rule them out; its twin in `attention_hopper` where `overlaps` holds.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton

from bidispatch.device import Arch
from bidispatch.errors import UsageError
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel, Limits, need_max_seq_len, need_positive_scale
from bidispatch_backends.triton.attention_hopper import overlapped_walk_kernel
from bidispatch_backends.triton.attention_kernels import segment_kernel, split_kernel, walk_kernel
from bidispatch_backends.triton.attention_launch import (
    SERVER,
    Decode,
    Packing,
    Parallel,
    fold_launch,
    workspace_types,
)
from bidispatch_backends.triton.attention_params import AttentionParams, AttentionTile, overlaps, padded
from bidispatch_backends.triton.hopper import WARPS
from bidispatch_backends.triton.launch import (
    ArgumentType,
    Constant,
    Launch,
    dependent_launch,
    options,
    pointer,
    power_of_two,
)

__all__ = ["bind_attention", "bind_lone_queries", "launches"]

_EARLY_SEQS = 1
"""Sequences of a call whose fold is launched as the splits start, at most; with more it is as they end. It saves one of
1k to 4k 0.4 to 1.1 µs of 8 to 12; 2 of 1k and 2k took 0.93 to 0.97 with it, of 64k and more 0.97 to 1.05 (H200, heads
of 64). Programs that wait cost 4 to 16 of 1k to 8k 3 to 10 % (H100)."""

_LEAST_TILES = 16
"""KV tiles of a multiprocessor's programs of segments: with fewer, half as many programs share them. 2 and 4 sequences
of 1k, of 8 KV heads of 128, then took 0.89 to 0.93 of the time (H200)."""

_MOST_FOLDS = 512
"""Programs that fold one head each behind segments, at most: those of few sequences leave them much. On an H200 8
sequences of 64 heads of 128 took 0.98 of the time of 8 heads each; 16 and 32 of 64 heads of 64 took 1.03 and 1.05.
"""

_SEGMENT_STATE = 4096
"""Elements of an accumulator, at most, of which a program of segments holds two. On sm90 64 rows of 128 would spill 450
bytes a thread; 32 rows spill 140, about as many as 16 rows of 256 with one accumulator."""


def _decode_of(problem: Problem, params: AttentionParams, tile: AttentionTile, limits: Limits) -> Decode:
    """One tile for a sequence's rows, as far as tiles go; where prompts come too, for those of a decode step."""
    steps = limits.max_query_len if 0 < limits.max_query_len <= tile.decode_query_len else 1
    # No taller than prefill's, which may keep to one matrix unit.
    tallest = min(tile.prefill_block_m, 64)
    block_m = max(tile.decode_block_m, min(power_of_two(_group(problem) * steps), tallest))
    heads, width = problem.size("num_heads"), padded(problem.size("head_dim"))
    return Decode.of(params, tile, limits, heads=heads, width=width, block_m=block_m)


def _group(problem: Problem) -> int:
    return problem.size("num_heads") // problem.size("num_kv_heads")


def _folded_rows(problem: Problem) -> int:
    """Heads that a program folds behind segments of many sequences, which leave it little: a power of two, of one KV
    head and tile.
    """
    group = _group(problem)
    return min(group & -group, 8)


def launches(
    problem: Problem, params: AttentionParams, tile: AttentionTile, arch: Arch, limits: Limits | None = None
) -> tuple[Launch, ...]:
    """The launches of `walk_kernel` for all sequences and for those that are left, `split_kernel` and `fold_kernel`,
    `segment_kernel` and `fold_kernel` for few and many heads, and the third and fourth once more where a fold may start
    early.

    limits: by default those of a server, with decode steps of one token.
    """
    limits = limits or SERVER
    data, state, index = (pointer(dtype) for dtype in (problem.dtype, "float32", "int32"))
    cache = pointer(str(problem["kv_dtype"]))
    scaled = problem["kv_dtype"] != problem.dtype
    heads, kv_heads = problem.size("num_heads"), problem.size("num_kv_heads")
    head_dim = problem.size("head_dim")
    inputs: dict[str, ArgumentType] = {"q_ptr": data, "k_ptr": cache, "v_ptr": cache}
    inputs |= dict.fromkeys(("table_ptr", "kv_lens_ptr", "query_start_ptr"), index)
    optional: dict[str, ArgumentType] = {
        "sinks_ptr": state if problem.flag("sinks") else None,
        "slopes_ptr": state if problem.flag("alibi") else None,
        "k_scales_ptr": state if scaled else None,
        "v_scales_ptr": state if scaled else None,
    }
    scales: dict[str, ArgumentType] = {"score_scale": "fp32", "exp2_scale": "fp32"}
    strides: dict[str, ArgumentType] = {"stride_q_token": heads * head_dim, "stride_q_head": head_dim}
    for name in ("k", "v"):
        strides[f"stride_{name}_page"] = problem.size("page_size") * kv_heads * head_dim
        strides[f"stride_{name}_slot"] = kv_heads * head_dim
        strides[f"stride_{name}_head"] = head_dim
    out_strides: dict[str, ArgumentType] = {"stride_out_token": heads * head_dim, "stride_out_head": head_dim}

    def sizes(*names: str) -> dict[str, ArgumentType]:
        return dict.fromkeys(names, "i32")

    widths: dict[str, Constant] = {
        "HEAD_DIM": head_dim,
        "CAUSAL": problem.flag("causal"),
        "WINDOW": problem.size("window"),
        "SPLITS": params.lines,
        "GROUP": _group(problem),
        "BLOCK_D": padded(head_dim),
    }
    walked: dict[str, Constant] = widths | {
        "PAGE_SIZE": problem.size("page_size"),
        "SOFTCAP": float(problem["softcap"]) > 0,
        "ALIBI": problem.flag("alibi"),
        # A product of fp32 has no matrix unit whose order a narrow operand could change.
        "FENCED": scaled
        and problem.dtype in ("bfloat16", "float16")
        and arch.vendor == "nvidia"
        and not triton.knobs.runtime.interpret,
        "BLOCK_N": params.block_n,
    }

    def packed(block_m: int) -> dict[str, Constant]:
        packing = Packing.of(_group(problem), block_m)
        return walked | {"BLOCK_M": block_m, "HEADS": packing.heads, "TOKENS": packing.tokens}

    decode = _decode_of(problem, params, tile, limits)
    # Without the fusion: the compiler would contract a product and a sum in one kernel and not in the other.
    walks = tuple(
        Launch(
            walk_kernel,
            inputs
            | optional
            | {"bases_ptr": bases, "out_ptr": data}
            | scales
            | sizes("seqs", "max_kv", "stride_table", "stride_k_scale", "stride_v_scale")
            | strides
            | out_strides,
            packed(tile.prefill_block_m),
            options(arch, tile.prefill_warps, tile.prefill_stages, fp_fusion=False),
        )
        for bases in (None, index)
    )
    if overlaps(arch, problem, params, tile) and not triton.knobs.runtime.interpret:  # Gluon is not interpreted
        once = options(arch, WARPS, 1, fp_fusion=False)
        walks = tuple(replace(walk, kernel=overlapped_walk_kernel, options=once, unaligned=walk) for walk in walks)

    decoded = packed(decode.block_m) | {"KV_HEADS": kv_heads} | decode.constants

    def compiled(warps: int, registers: int) -> dict[str, int | bool]:
        # The bound was chosen for a tile of one matrix instruction's rows.
        bounded = registers and arch.vendor == "nvidia" and decode.block_m == tile.decode_block_m
        chosen = options(arch, warps, tile.decode_stages, fp_fusion=False)
        return chosen | ({"maxnreg": registers} if bounded else {})

    def fold_of(*, segments: bool = False, rows: int = 1) -> Launch:
        ends = {name: optional[name] for name in ("sinks_ptr", "v_scales_ptr")}
        constants = widths | {"HEADS": heads}
        return fold_launch(
            arch,
            ends,
            data,
            out_strides,
            constants,
            max(1, rows // 2),
            rows=rows,
            dependent=True,
            segments=segments,
        )

    dependent = bool(dependent_launch(arch))

    def split_of(early: bool) -> Launch:
        return Launch(
            split_kernel,
            inputs
            | {name: optional[name] for name in ("slopes_ptr", "k_scales_ptr")}
            | workspace_types()
            | scales
            | sizes("seqs", "max_kv", "capacity", "stride_table", "stride_k_scale")
            | strides,
            decoded | {"DEPENDENT": dependent, "EARLY": early},
            compiled(tile.decode_warps, tile.decode_registers),
        )

    segments = max(tile.segment_programs, 1)
    fewer: dict[str, Constant] = {"HALVINGS": segments.bit_length() - 1, "LEAST_TILES": _LEAST_TILES // segments}
    segment = Launch(
        segment_kernel,
        inputs
        | optional
        | {"folded_ptr": index}
        | workspace_types()
        | {"out_ptr": data}
        | scales
        | sizes("seqs", "max_kv", "capacity", "stride_table", "stride_k_scale", "stride_v_scale")
        | strides
        | out_strides,
        decoded | fewer | {"DEPENDENT": dependent},
        compiled(tile.segment_warps or tile.decode_warps, tile.segment_registers),
    )
    segment_folds = (fold_of(segments=True, rows=rows) for rows in (1, _folded_rows(problem)))
    early = (split_of(True),) if dependent else ()
    return (*walks, split_of(False), fold_of(), segment, *segment_folds, *early)


def bind_lone_queries(context: BindContext, others: Kernel) -> Kernel:
    """`bind_attention` with the sequences of more than one query token left to another kernel of the op.

    others: takes the same arguments, and may write anything to the rows of lone queries. Raises `UsageError` where
    the splits of `max_seqs` lone queries exceed the tile's `workspace_mb`: some would be left, by how many there are.
    """
    problem, params, tile, limits = context.problem, context.params, context.tile, context.limits
    need_max_seq_len(context)
    decode = _decode_of(problem, params, tile, limits)
    needed = params.splits_up_to(limits.max_seq_len) * min(limits.max_seqs, limits.max_tokens)
    if decode.most_queries != 1 or decode.capacity < needed:
        raise UsageError(
            f"{problem}: {limits.max_seqs} lone queries of {limits.max_seq_len} positions have {needed} splits, "
            f"workspace_mb={tile.workspace_mb} holds {decode.capacity} of one query token (decode_query_len="
            f"{tile.decode_query_len}); raise workspace_mb, bind with a smaller max_seqs or max_seq_len, or choose "
            "larger splits (kv_split)"
        )
    return bind_attention(context, others)


def bind_attention(context: BindContext, others: Kernel | None = None) -> Kernel:
    """Bind for calls up to `context.limits`; holds the workspace of the parallel splits.

    Which launches a call makes follows from the limits and its numbers of tokens and sequences; which of them serves a
    sequence is decided on the GPU. All give the same bits. Where `max_query_len` is at most the tile's
    `decode_query_len` and the workspace holds the splits of every token, a call is two launches: bind decode steps
    apart from prompts. A sequence longer than `max_seq_len`, or than its block table holds, gives NaN, as one of more
    query tokens than `max_query_len` may: lengths are only known on the GPU. Raises `UsageError` when the limits name
    no `max_seq_len`.

    others: a kernel of the op in the place of `walk_kernel`; it runs first, since it writes all rows.
    """
    problem, params, tile, limits = context.problem, context.params, context.tile, context.limits
    need_max_seq_len(context)
    walk_all, walk_rest, split, fold, segment, fold_few, fold_many, *early = launches(
        problem, params, tile, context.device.arch, limits
    )
    decode = _decode_of(problem, params, tile, limits)
    heads, kv_heads, head_dim = (problem.size(dim) for dim in ("num_heads", "num_kv_heads", "head_dim"))
    softcap = float(problem["softcap"])
    log2_e = math.log2(math.e)
    walked = Packing.of(_group(problem), tile.prefill_block_m)
    blocks = kv_heads * Packing.of(_group(problem), decode.block_m).head_blocks
    width, rows = padded(head_dim), _folded_rows(problem)
    segments = tile.segment_programs if decode.block_m * width <= _SEGMENT_STATE else 0
    parallel = Parallel(context, decode, heads=heads, width=width, blocks=blocks, segments=segments)

    def attention(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        sinks: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        need_positive_scale(problem, scale)
        tokens, seqs = q.shape[0], seq_lens.shape[0]
        max_kv = parallel.max_kv(block_table)
        scales = (scale / softcap, softcap * log2_e) if softcap else (1.0, scale * log2_e)
        inputs = (q, k_cache, v_cache, block_table, seq_lens, query_start_loc)
        strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
        table_stride, out_strides = block_table.stride(0), out.stride()[:2]
        k_stride = 0 if k_scale is None else k_scale.stride(0)
        v_stride = 0 if v_scale is None else v_scale.stride(0)

        walk, walk_bases = walk_all, None
        left = parallel.leaves(tokens)
        if left and others:
            others(*inputs, sinks, alibi_slopes, k_scale, v_scale, scale, out)
        if decode.most_queries:
            folded = 1
            if in_segments := parallel.in_segments(seqs):
                few = seqs * heads <= _MOST_FOLDS
                fold_now, folded = (fold_few, 1) if few else (fold_many, rows)
                segment(
                    parallel.segment_grid(seqs),
                    *inputs,
                    sinks,
                    alibi_slopes,
                    k_scale,
                    v_scale,
                    parallel.folded,
                    *parallel.workspace,
                    out,
                    *scales,
                    seqs,
                    max_kv,
                    decode.capacity,
                    table_stride,
                    k_stride,
                    v_stride,
                    *strides,
                    *out_strides,
                )
            else:
                fold_now = fold
                split_now = early[0] if early and seqs <= _EARLY_SEQS else split
                split_now(
                    parallel.split_grid(tokens),
                    *inputs,
                    alibi_slopes,
                    k_scale,
                    *parallel.workspace,
                    *scales,
                    seqs,
                    max_kv,
                    decode.capacity,
                    table_stride,
                    k_stride,
                    *strides,
                )
            fold_now(
                parallel.fold_grid(tokens, seqs, folded),
                seq_lens,
                query_start_loc,
                sinks,
                v_scale,
                parallel.folded if in_segments else None,
                *parallel.workspace,
                out,
                max_kv,
                int(not left),
                v_stride,
                *out_strides,
            )
            walk, walk_bases = walk_rest, parallel.bases
        if left and not others:
            walk(
                (tokens // walked.tokens + seqs, kv_heads * walked.head_blocks),
                *inputs,
                sinks,
                alibi_slopes,
                k_scale,
                v_scale,
                walk_bases,
                out,
                *scales,
                seqs,
                max_kv,
                table_stride,
                k_stride,
                v_stride,
                *strides,
                *out_strides,
            )

    return attention

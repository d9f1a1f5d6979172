"""Paged attention whose bits for a query depend on its own position, keys and values alone: launches and binding.

The kernels are in `attention_kernels`, the arithmetic that they share in `attention_state`. A call launches, of these:

- `split_kernel` and `fold_kernel`, for sequences of few query tokens (decode, speculative decode, short chunks);
- `walk_kernel`, for the others, unless the limits rule them out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from bidispatch.device import Arch
from bidispatch.errors import ArgumentError, UsageError
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel, Limits
from bidispatch_backends.triton.attention_kernels import fold_kernel, split_kernel, walk_kernel
from bidispatch_backends.triton.attention_params import AttentionParams, AttentionTile
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, ceil_div, options, pointer, power_of_two

__all__ = ["bind_attention", "dependent_launch", "launches"]

_MOST_SEQS = 4096
"""Sequences whose lengths one program of `split_kernel` can count; bound for more, every sequence is walked."""
_TYPICAL_SEQS = 256
_UNITS = 128
"""Multiprocessors of a GPU that does not say how many it has."""
_FOLDS = 4
"""Programs that share the tokens of one sequence and head in `fold_kernel`, at most."""


@dataclass(frozen=True)
class _Packing:
    """How rows of a query tile are made of tokens and of the heads that share a KV head."""

    heads: int
    tokens: int
    head_blocks: int

    @classmethod
    def of(cls, problem: Problem, block_m: int) -> _Packing:
        group = problem.size("num_heads") // problem.size("num_kv_heads")
        heads = min(group, block_m)
        return cls(heads, block_m // heads, ceil_div(group, heads))


@dataclass(frozen=True)
class _Decode:
    """What the limits make of a tile's decode."""

    block_m: int
    most_queries: int
    """Query tokens of a sequence whose splits run in parallel, at most; 0: none do."""
    block_b: int
    capacity: int
    """Splits of tokens that the workspace holds."""

    @classmethod
    def of(cls, problem: Problem, params: AttentionParams, tile: AttentionTile, limits: Limits) -> _Decode:
        most_queries = min(tile.decode_query_len, limits.max_query_len or limits.max_tokens)
        group = problem.size("num_heads") // problem.size("num_kv_heads")
        # One tile for a sequence's rows, as far as tiles go; where prompts come too, for those of a decode step.
        steps = limits.max_query_len if 0 < limits.max_query_len <= tile.decode_query_len else 1
        block_m = max(tile.decode_block_m, min(power_of_two(group * steps), _tallest(tile)))
        splits = params.splits_up_to(limits.max_seq_len)
        state = problem.size("num_heads") * (_block_d(problem) + 2) * 4
        capacity = min((tile.workspace_mb << 20) // state, splits * limits.max_tokens)
        if capacity < splits or limits.max_seqs > _MOST_SEQS:
            most_queries = 0
        return cls(block_m, most_queries, power_of_two(max(limits.max_seqs, 16)), capacity)


def _tallest(tile: AttentionTile) -> int:
    """The tallest tile of decode: up to 64 rows, and no more than prefill has, which may keep to one matrix unit."""
    return min(tile.prefill_block_m, 64)


def _block_d(problem: Problem) -> int:
    return max(16, power_of_two(problem.size("head_dim")))


def dependent_launch(arch: Arch) -> dict[str, bool]:
    """Options of a fold that starts while its splits still run, and waits for them; none where there is no such launch.

    Programmatic dependent launch, sm90 and later (PTX ISA 9.0, griddepcontrol): hides the µs that a launch takes.
    """
    there = arch.vendor == "nvidia" and arch.order >= 90 and not triton.knobs.runtime.interpret
    return {"launch_pdl": True} if there else {}


def launches(
    problem: Problem, params: AttentionParams, tile: AttentionTile, arch: Arch, limits: Limits | None = None
) -> tuple[Launch, ...]:
    """The launches of `walk_kernel` for all sequences and for those that are left, `split_kernel` and `fold_kernel`.

    limits: by default those of a server, with decode steps of one token.
    """
    limits = limits or Limits(_TYPICAL_SEQS, _TYPICAL_SEQS, 131072, 1)
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
    workspace: dict[str, ArgumentType] = {"bases_ptr": index}
    workspace |= dict.fromkeys(("maxima_ptr", "totals_ptr", "accs_ptr"), state)
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
        "GROUP": heads // kv_heads,
        "BLOCK_D": _block_d(problem),
    }
    walked: dict[str, Constant] = widths | {
        "PAGE_SIZE": problem.size("page_size"),
        "SOFTCAP": float(problem["softcap"]) > 0,
        "ALIBI": problem.flag("alibi"),
        "FENCED": scaled and arch.vendor == "nvidia" and not triton.knobs.runtime.interpret,
        "BLOCK_N": params.block_n,
    }

    def packed(block_m: int) -> dict[str, Constant]:
        packing = _Packing.of(problem, block_m)
        return walked | {"BLOCK_M": block_m, "HEADS": packing.heads, "TOKENS": packing.tokens}

    dependent = dependent_launch(arch)
    decode = _Decode.of(problem, params, tile, limits)
    # The bound was chosen for a tile of one matrix instruction's rows.
    bounded = tile.decode_registers and arch.vendor == "nvidia" and decode.block_m == tile.decode_block_m
    registers = {"maxnreg": tile.decode_registers} if bounded else {}
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
    return (
        *walks,
        Launch(
            split_kernel,
            inputs
            | {name: optional[name] for name in ("slopes_ptr", "k_scales_ptr")}
            | workspace
            | scales
            | sizes("seqs", "max_kv", "capacity", "stride_table", "stride_k_scale")
            | strides,
            packed(decode.block_m)
            | {"KV_HEADS": kv_heads, "MOST_QUERIES": decode.most_queries, "BLOCK_B": decode.block_b}
            | {"DEPENDENT": bool(dependent)},
            options(arch, tile.decode_warps, tile.decode_stages, fp_fusion=False) | registers,
        ),
        Launch(
            fold_kernel,
            {"kv_lens_ptr": index, "query_start_ptr": index}
            | {name: optional[name] for name in ("sinks_ptr", "v_scales_ptr")}
            | workspace
            | {"out_ptr": data}
            | sizes("max_kv", "alone", "stride_v_scale")
            | out_strides,
            widths | {"HEADS": heads, "DEPENDENT": bool(dependent)},
            options(arch, 1, 1, fp_fusion=False) | dependent,
        ),
    )


def bind_attention(context: BindContext) -> Kernel:
    """Bind for calls up to `context.limits`; holds the workspace of the parallel splits.

    Which launches a call makes follows from the limits and its numbers of tokens and sequences; which of them serves a
    sequence is decided on the GPU. All give the same bits. Where `max_query_len` is at most the tile's
    `decode_query_len` and the workspace holds the splits of every token, a call is two launches: bind decode steps
    apart from prompts. A sequence longer than `max_seq_len`, or than its block table holds, gives NaN, as one of more
    query tokens than `max_query_len` may: lengths are only known on the GPU. Raises `UsageError` when the limits name
    no `max_seq_len`.
    """
    problem, params, tile, limits = context.problem, context.params, context.tile, context.limits
    if limits.max_seq_len < 1:
        raise UsageError(f"{problem} is bound without max_seq_len; bind(..., max_seq_len=<longest KV of a sequence>)")
    walk_all, walk_rest, split, fold = launches(problem, params, tile, context.device.arch, limits)
    decode = _Decode.of(problem, params, tile, limits)
    heads, kv_heads, page_size = (problem.size(dim) for dim in ("num_heads", "num_kv_heads", "page_size"))
    softcap = float(problem["softcap"])
    log2_e = math.log2(math.e)
    walked, parallel = _Packing.of(problem, tile.prefill_block_m), _Packing.of(problem, decode.block_m)
    on_gpu = context.device.arch.vendor != "cpu"
    programs = tile.decode_programs * (context.device.compute_units or _UNITS) if on_gpu else 4
    splits = params.splits_up_to(limits.max_seq_len)
    longest_query = limits.max_query_len or limits.max_tokens

    def empty(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device=context.device.torch_device)

    states = decode.capacity * heads if decode.most_queries else 0
    bases = empty(limits.max_seqs if decode.most_queries else 0, torch.int32)
    workspace = (bases, empty(states), empty(states), empty(states * _block_d(problem)))

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
        if not scale > 0:
            raise ArgumentError(f"{problem}: scale must be above 0, not {scale}")
        tokens, seqs = q.shape[0], seq_lens.shape[0]
        max_kv = min(limits.max_seq_len, block_table.shape[1] * page_size)
        scales = (scale / softcap, softcap * log2_e) if softcap else (1.0, scale * log2_e)
        inputs = (q, k_cache, v_cache, block_table, seq_lens, query_start_loc)
        strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
        table_stride, out_strides = block_table.stride(0), out.stride()[:2]
        k_stride = 0 if k_scale is None else k_scale.stride(0)
        v_stride = 0 if v_scale is None else v_scale.stride(0)

        walk, walk_bases = walk_all, None
        # Whether a sequence may be left to the walk; always without splits in parallel.
        left = min(tokens, longest_query) > decode.most_queries or tokens * splits > decode.capacity
        if decode.most_queries:
            work = tokens * splits * kv_heads * parallel.head_blocks
            split(
                (min(programs, work),),
                *inputs,
                alibi_slopes,
                k_scale,
                *workspace,
                *scales,
                seqs,
                max_kv,
                decode.capacity,
                table_stride,
                k_stride,
                *strides,
            )
            fold(
                (seqs, heads, min(_FOLDS, decode.most_queries, tokens)),
                seq_lens,
                query_start_loc,
                sinks,
                v_scale,
                *workspace,
                out,
                max_kv,
                int(not left),
                v_stride,
                *out_strides,
            )
            walk, walk_bases = walk_rest, bases
        if left:
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

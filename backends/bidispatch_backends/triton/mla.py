"""Multi-head latent attention whose bits for a query depend on its own position and cache alone: launches and binding.

As in `attention`: `latent_split_kernel` and `fold_kernel` serve sequences of few query tokens, `latent_walk_kernel` the
others. The absorbed form serves every phase, so that a prefill has the bits of decode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bidispatch.device import Arch
from bidispatch.errors import ArgumentError, UsageError
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel, Limits
from bidispatch_backends.triton.attention import dependent_launch
from bidispatch_backends.triton.attention_kernels import fold_kernel
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, ceil_div, options, pointer, power_of_two
from bidispatch_backends.triton.mla_kernels import latent_split_kernel, latent_walk_kernel
from bidispatch_backends.triton.mla_params import MlaParams, MlaTile

__all__ = ["bind_mla", "launches"]

_MOST_SEQS = 4096
"""Sequences whose lengths one program of the parallel splits can count; bound for more, every sequence is walked."""
_UNITS = 128
"""Multiprocessors of a GPU that does not say how many it has."""
_FOLDS = 4
"""Programs that share the tokens of one sequence and head in `fold_kernel`, at most."""
_FOLD_WARPS = 4
_SERVER = Limits(256, 256, 131072, 1)


@dataclass(frozen=True)
class _Rows:
    """How rows of a query tile are made of tokens and heads."""

    heads: int
    tokens: int
    head_blocks: int

    @classmethod
    def of(cls, problem: Problem, block_m: int) -> _Rows:
        num_heads = problem.size("num_heads")
        heads = min(num_heads, block_m)
        return cls(heads, block_m // heads, ceil_div(num_heads, heads))


@dataclass(frozen=True)
class _Decode:
    """What the limits make of a tile's decode."""

    most_queries: int
    """Query tokens of a sequence whose splits run in parallel, at most; 0: none do."""
    block_b: int
    capacity: int
    """Splits of tokens that the workspace holds."""

    @classmethod
    def of(cls, problem: Problem, params: MlaParams, tile: MlaTile, limits: Limits) -> _Decode:
        most_queries = min(tile.decode_query_len, limits.max_query_len or limits.max_tokens)
        splits = params.splits_up_to(limits.max_seq_len)
        state = problem.size("num_heads") * (_block(problem, "kv_lora_rank") + 2) * 4
        capacity = min((tile.workspace_mb << 20) // state, splits * limits.max_tokens)
        if capacity < splits or limits.max_seqs > _MOST_SEQS:
            most_queries = 0
        return cls(most_queries, power_of_two(max(limits.max_seqs, 16)), capacity)


def _block(problem: Problem, dim: str) -> int:
    return max(16, power_of_two(problem.size(dim)))


def launches(
    problem: Problem, params: MlaParams, tile: MlaTile, arch: Arch, limits: Limits | None = None
) -> tuple[Launch, ...]:
    """The launches of `latent_walk_kernel` for all sequences and for those that are left, `latent_split_kernel` and
    `fold_kernel`.

    limits: by default those of a server, with decode steps of one token.
    """
    decode = _Decode.of(problem, params, tile, limits or _SERVER)
    data, state, index = (pointer(dtype) for dtype in (problem.dtype, "float32", "int32"))
    heads, rank, rope = (problem.size(dim) for dim in ("num_heads", "kv_lora_rank", "rope_dim"))
    inputs: dict[str, ArgumentType] = {"q_ptr": data, "kv_ptr": data}
    inputs |= dict.fromkeys(("table_ptr", "kv_lens_ptr", "query_start_ptr"), index)
    workspace: dict[str, ArgumentType] = {"bases_ptr": index}
    workspace |= dict.fromkeys(("maxima_ptr", "totals_ptr", "accs_ptr"), state)
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
        rows = _Rows.of(problem, block_m)
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
            "BLOCK_L": _block(problem, "kv_lora_rank"),
            "BLOCK_R": _block(problem, "rope_dim"),
        }

    bounded = tile.decode_registers and arch.vendor == "nvidia"
    registers = {"maxnreg": tile.decode_registers} if bounded else {}
    # Without the fusion: the compiler would contract a product and a sum in one kernel and not in the other.
    walks = tuple(
        Launch(
            latent_walk_kernel,
            inputs
            | {"bases_ptr": bases, "out_ptr": data}
            | sizes("seqs", "max_kv", "stride_table")
            | strides
            | out_strides,
            packed(tile.prefill_block_m),
            options(arch, tile.prefill_warps, tile.prefill_stages, fp_fusion=False),
        )
        for bases in (None, index)
    )
    dependent = dependent_launch(arch)
    fold_constants: dict[str, Constant] = {
        "DEPENDENT": bool(dependent),
        "HEADS": heads,
        "GROUP": heads,
        "HEAD_DIM": rank,
        "CAUSAL": True,
        "WINDOW": 0,
        "SPLITS": params.lines,
        "BLOCK_D": _block(problem, "kv_lora_rank"),
    }
    fold_inputs: dict[str, ArgumentType] = {
        "kv_lens_ptr": index,
        "query_start_ptr": index,
        "sinks_ptr": None,
        "v_scales_ptr": None,
    }
    fold_sizes: dict[str, ArgumentType] = {"out_ptr": data}
    fold_sizes |= dict.fromkeys(("max_kv", "alone", "stride_v_scale"), "i32")
    return (
        *walks,
        Launch(
            latent_split_kernel,
            inputs | workspace | sizes("seqs", "max_kv", "capacity", "stride_table") | strides,
            packed(tile.decode_block_m)
            | {"DEPENDENT": bool(dependent), "MOST_QUERIES": decode.most_queries, "BLOCK_B": decode.block_b},
            options(arch, tile.decode_warps, tile.decode_stages, fp_fusion=False) | registers,
        ),
        Launch(
            fold_kernel,
            fold_inputs | workspace | fold_sizes | out_strides,
            fold_constants,
            options(arch, _FOLD_WARPS, 1, fp_fusion=False) | dependent,
        ),
    )


def bind_mla(context: BindContext) -> Kernel:
    """Bind for calls up to `context.limits`; holds the workspace of the parallel splits.

    What is launched follows from the limits and a call's numbers of tokens and sequences; which of the launches serves
    a sequence is decided on the GPU. All give the same bits. A sequence longer than `max_seq_len`, or than its block
    table holds, gives NaN, as one of more query tokens than `max_query_len` may: lengths are only known on the GPU.
    Raises `UsageError` when the limits name no `max_seq_len`.
    """
    problem, params, tile, limits = context.problem, context.params, context.tile, context.limits
    if limits.max_seq_len < 1:
        raise UsageError(f"{problem} is bound without max_seq_len; bind(..., max_seq_len=<longest KV of a sequence>)")
    walk_all, walk_rest, split, fold = launches(problem, params, tile, context.device.arch, limits)
    decode = _Decode.of(problem, params, tile, limits)
    heads, page_size = problem.size("num_heads"), problem.size("page_size")
    walked, parallel = _Rows.of(problem, tile.prefill_block_m), _Rows.of(problem, tile.decode_block_m)
    on_gpu = context.device.arch.vendor != "cpu"
    programs = tile.decode_programs * (context.device.compute_units or _UNITS) if on_gpu else 4
    splits = params.splits_up_to(limits.max_seq_len)
    longest_query = limits.max_query_len or limits.max_tokens
    log2_e = math.log2(math.e)

    def empty(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device=context.device.torch_device)

    states = decode.capacity * heads if decode.most_queries else 0
    bases = empty(limits.max_seqs if decode.most_queries else 0, torch.int32)
    workspace = (bases, empty(states), empty(states), empty(states * _block(problem, "kv_lora_rank")))

    def mla(
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if not scale > 0:
            raise ArgumentError(f"{problem}: scale must be above 0, not {scale}")
        tokens, seqs = q.shape[0], seq_lens.shape[0]
        max_kv = min(limits.max_seq_len, block_table.shape[1] * page_size)
        inputs = (q, kv_cache, block_table, seq_lens, query_start_loc)
        strides = (*q.stride()[:2], *kv_cache.stride()[:2])
        table_stride, out_strides = block_table.stride(0), out.stride()[:2]
        exp2_scale = scale * log2_e

        walk, walk_bases = walk_all, None
        # Whether a sequence may be left to the walk; always without splits in parallel.
        left = not decode.most_queries or (
            min(tokens, longest_query) > decode.most_queries or tokens * splits > decode.capacity
        )
        if decode.most_queries:
            work = tokens * splits * parallel.head_blocks
            split(
                (min(programs, work),),
                *inputs,
                *workspace,
                exp2_scale,
                seqs,
                max_kv,
                decode.capacity,
                table_stride,
                *strides,
            )
            fold(
                (seqs, heads, min(_FOLDS, decode.most_queries, tokens)),
                seq_lens,
                query_start_loc,
                None,
                None,
                *workspace,
                out,
                max_kv,
                int(not left),
                0,
                *out_strides,
            )
            walk, walk_bases = walk_rest, bases
        if left:
            walk(
                (walked.head_blocks, tokens // walked.tokens + seqs),
                *inputs,
                walk_bases,
                out,
                exp2_scale,
                seqs,
                max_kv,
                table_stride,
                *strides,
                *out_strides,
            )

    return mla

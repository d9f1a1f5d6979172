"""FlashAttention 2 and 3 as vLLM calls them: its own build of both, over its paged cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peers.installed import AbsentError, Peer, call_op, load_op

__all__ = ["fa2", "fa3", "fa3_projected"]

PROJECTED_KEY, PROJECTED_VALUE = 128, 128
"""Of DeepSeek-V2 and V3, beside the rotary part: a head of what keys and values are projected up to."""
GRAPH_SPLITS = 32
"""The most splits vLLM lets FA3 take in a CUDA graph (`flash_attn_max_num_splits_for_cuda_graph`)."""


def _operands(call: Any) -> dict[str, torch.Tensor]:
    """As vLLM hands them over: of the latent form the rotary part as q and k, the rest as q_v and v, all views."""
    if call.problem.op == "attention":
        return {"q": call["q"], "k": call["k_cache"], "v": call["v_cache"]}
    rank, cache = call.pool.shape.value_dim, call["kv_cache"].unsqueeze(-2)
    q = call["q"]
    return {"q": q[..., rank:], "q_v": q[..., :rank], "k": cache[..., rank:], "v": cache[..., :rank]}


def _common(call: Any, i: int) -> dict[str, Any]:
    return (
        _operands(call)
        | {
            "out": call.out,
            "cu_seqlens_q": call.query_start_loc,
            "seqused_k": call.seq_lens,
            "max_seqlen_q": call.query,
            "max_seqlen_k": call.context,  # the longest there is, when a graph is captured
            "softmax_scale": call.scalars[0],
            "is_causal": True,
            "softcap": 0.0,
        }
        | {name: call.table(i) for name in ("page_table", "block_table")}
    )


def _launches(call: Any, op: Any, more: dict[str, Any]) -> list[Any]:
    known = {argument.name for argument in op._schema.arguments}
    made = []
    for i in range(call.sets):
        values = {name: value for name, value in (_common(call, i) | more).items() if name in known}
        made.append(call_op(op, values))
    return made


def fa3(call: Any, folders: tuple[Path, ...], *, num_splits: int) -> Peer:
    """`num_splits` 0: FA3's own choice. In decode that is made before the graph runs, from the lengths of the step. The
    latent form too.
    """
    if torch.cuda.get_device_capability(call.pool.device) != (9, 0):
        raise AbsentError("vLLM's FA3 is built for sm90 alone")
    op = load_op("_vllm_fa3_C", "fwd", "_vllm_fa3_C*.so", folders)
    more: dict[str, Any] = {"num_splits": num_splits, "rotary_interleaved": True, "sm_margin": 0}
    more |= {"cp_world_size": 1, "cp_rank": 0}
    if num_splits or call.query > 1:
        launches = _launches(call, op, more)
        return Peer(lambda i: launches[i % len(launches)]())

    schedule = load_op("_vllm_fa3_C", "get_scheduler_metadata", "_vllm_fa3_C*.so", folders)
    shape = call.pool.shape
    asked = {
        "batch_size": call.batch,
        "max_seqlen_q": 1,
        "max_seqlen_k": call.context,
        "num_heads": shape.heads,
        "num_heads_k": shape.kv_heads,
        "headdim": _operands(call)["q"].shape[-1],
        "headdim_v": shape.value_dim,
        "qkv_dtype": call["q"].dtype,
        "seqused_k": call.seq_lens,
        "cu_seqlens_q": call.query_start_loc,
        "page_size": shape.page_size,
        "max_seqlen_k_new": 0,
        "is_causal": True,
        "has_softcap": False,
        "num_splits": GRAPH_SPLITS,
        "sm_margin": 0,
    }
    known = {argument.name for argument in schedule._schema.arguments}

    def metadata() -> torch.Tensor:
        values = asked | {"max_seqlen_k": call.context}
        found: torch.Tensor = call_op(schedule, {name: value for name, value in values.items() if name in known})()
        return found

    kept = metadata()
    launches = _launches(call, op, more | {"num_splits": GRAPH_SPLITS, "scheduler_metadata": kept})
    return Peer(lambda i: launches[i % len(launches)](), lambda: _keep(kept, metadata()))


def fa3_projected(call: Any, folders: tuple[Path, ...]) -> Peer:
    """The prefill that servers run for latent attention: FA3 on keys and values of every head, of prompts without a
    cached prefix. What projects them up is left out, as is what absorbs the queries and projects the results of the
    latent form: for a whole prompt both are as many products.
    """
    if torch.cuda.get_device_capability(call.pool.device) != (9, 0):
        raise AbsentError("vLLM's FA3 is built for sm90 alone")
    op = load_op("_vllm_fa3_C", "fwd", "_vllm_fa3_C*.so", folders)
    shape = call.pool.shape
    width = PROJECTED_KEY + call.problem.size("rope_dim")
    sizes = {"q": width, "k": width, "v": PROJECTED_VALUE, "out": PROJECTED_VALUE}
    values: dict[str, Any] = {
        name: torch.randn(call.tokens, shape.heads, size, device=call.pool.device, dtype=call.out.dtype)
        for name, size in sizes.items()
    }
    values |= {
        "cu_seqlens_q": call.query_start_loc,
        "cu_seqlens_k": call.query_start_loc,
        "max_seqlen_q": call.query,
        "max_seqlen_k": call.query,
        "softmax_scale": width**-0.5,
        "is_causal": True,
        "softcap": 0.0,
        "num_splits": 0,
        "rotary_interleaved": True,
        "sm_margin": 0,
        "cp_world_size": 1,
        "cp_rank": 0,
    }
    known = {argument.name for argument in op._schema.arguments}
    launch = call_op(op, {name: value for name, value in values.items() if name in known})
    return Peer(lambda i: launch())


def _keep(kept: torch.Tensor, fresh: torch.Tensor) -> None:
    """As vLLM does: what is new at the front of the tensor that the graph reads, and zeros behind it."""
    kept.zero_()
    kept[: len(fresh)].copy_(fresh)


def fa2(call: Any, folders: tuple[Path, ...]) -> Peer:
    """FA2 without splits, as vLLM's invariant mode runs it where there is no FA3."""
    op = load_op("_vllm_fa2_C", "varlen_fwd", "_vllm_fa2_C*.so", folders)
    more = {
        "cu_seqlens_k": torch.zeros_like(call.query_start_loc),
        "p_dropout": 0.0,
        "zero_tensors": False,
        "return_softmax": False,
        "num_splits": 1,
    }
    launches = _launches(call, op, more)
    return Peer(lambda i: launches[i % len(launches)]())

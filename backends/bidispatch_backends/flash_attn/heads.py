"""Heads and widths of a problem as FlashAttention is shown them. Imports neither torch nor a library."""

from __future__ import annotations

from dataclasses import dataclass

from bidispatch.ops.schema import Problem

__all__ = ["Heads", "heads_of"]


@dataclass(frozen=True)
class Heads:
    """What `attention` and `attention.mla` differ in here."""

    queries: int
    """Query heads."""
    keys: int
    """KV heads, each of which queries / keys query heads share."""
    query_dim: int
    """Elements of a row of q."""
    value_dim: int
    """Elements of a row of the result."""
    causal: bool = True
    softcap: float = 0.0


def heads_of(problem: Problem) -> Heads:
    """Of a problem of either op. The latent cache is one KV head, whose keys are kv_lora_rank + rope_dim wide."""
    queries = problem.size("num_heads")
    if problem.op == "attention.mla":
        rank = problem.size("kv_lora_rank")
        return Heads(queries, 1, rank + problem.size("rope_dim"), rank)
    head_dim = problem.size("head_dim")
    causal, softcap = problem.flag("causal"), float(problem["softcap"])
    return Heads(queries, problem.size("num_kv_heads"), head_dim, head_dim, causal, softcap)

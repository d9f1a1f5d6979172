"""Reference, inputs and paged batches of multi-head latent attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bidispatch.ops.mla import as_attention
from bidispatch.ops.reference.attention import attention_inputs, paged_batch
from bidispatch.ops.schema import Problem

__all__ = ["attention_mla", "attention_mla_inputs", "latent_batch"]

_QUERY_BLOCK = 64  # rows whose fp64 scores are in memory at once


def attention_mla(
    problem: Problem,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """softmax(q kvᵀ · scale) kv[:, :kv_lora_rank] of every sequence, causal: [tokens, num_heads, kv_lora_rank] in fp64.

    Shapes as in `bidispatch.ops.mla`. Rows of q that no sequence owns are zero here.
    """
    rank, page_size = problem.size("kv_lora_rank"), problem.size("page_size")
    out = torch.zeros(*q.shape[:2], rank, dtype=torch.float64, device=q.device)
    starts = query_start_loc.tolist()
    for index, kv_len in enumerate(seq_lens.tolist()):
        first, stop = starts[index], starts[index + 1]
        pages = block_table[index, : -(-kv_len // page_size)].long()
        latent = kv_cache[pages].flatten(0, 1)[:kv_len].double()
        for row in range(first, stop, _QUERY_BLOCK):
            rows = slice(row, min(row + _QUERY_BLOCK, stop))
            positions = torch.arange(rows.start, rows.stop, device=q.device) + (kv_len - stop)
            hidden = torch.arange(kv_len, device=q.device)[None, :] > positions[:, None]
            scores = torch.einsum("qhd,kd->qhk", q[rows].double(), latent) * scale
            weights = torch.softmax(scores.masked_fill(hidden[:, None], float("-inf")), dim=-1)
            out[rows] = torch.einsum("qhk,kd->qhd", weights, latent[:, :rank])
    return (out,)


def attention_mla_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """The mixed batch of `attention_inputs`, with one latent cache."""
    return _latent(attention_inputs(as_attention(problem), rows, device=device, seed=seed, distribution=distribution))


def latent_batch(
    problem: Problem, query_lens: Sequence[int], kv_lens: Sequence[int], **options: Any
) -> list[torch.Tensor | None]:
    """The arguments of `attention.mla` for given lengths: q, kv_cache, block_table, seq_lens and query_start_loc.

    Options and what is promised of the data are those of `paged_batch`.
    """
    return _latent(paged_batch(as_attention(problem), query_lens, kv_lens, **options))


def _latent(arguments: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The arguments of `attention` with one KV head as those of `attention.mla`: its keys are the latent cache."""
    q, keys, _, table, seq_lens, starts, *_ = arguments
    return [q, None if keys is None else keys.squeeze(2), table, seq_lens, starts]

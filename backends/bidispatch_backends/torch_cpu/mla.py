"""Multi-head latent attention on the processor: the paged attention of this backend, with one KV head."""

from __future__ import annotations

from dataclasses import replace

import torch

from bidispatch import ops
from bidispatch.ops.mla import as_attention
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.torch_cpu.attention import bind_paged_attention

__all__ = ["bind_attention_mla"]


def bind_attention_mla(context: BindContext) -> Kernel:
    """Return the kernel of the op `attention.mla`; it takes the op's arguments, then `scale`, then `out`.

    The values are taken as wide as the keys and the columns behind kv_lora_rank dropped: an eighth more work, and
    every product keeps the one shape that the invariance of `bidispatch_backends.torch_cpu.attention` rests on.
    """
    attention = bind_paged_attention(replace(context, problem=as_attention(context.problem)))
    rank = context.problem.size("kv_lora_rank")
    absent = [None for argument in ops.get("attention").arguments if argument.when]

    def attention_mla(
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        owned = slice(0, int(query_start_loc[-1]))
        latent = kv_cache[:, :, None]
        wide = torch.empty_like(q[owned])
        attention(q[owned], latent, latent, block_table, seq_lens, query_start_loc, *absent, scale, wide)
        out[owned] = wide[..., :rank]

    return attention_mla

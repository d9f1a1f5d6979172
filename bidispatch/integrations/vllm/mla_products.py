"""MLA's products with W_UK and W_UV, a matrix a head, as `bmm`: what absorbs queries, and what gives a head's values.

vLLM's layer calls `torch.bmm` for both, between the first and the last line of `MLAAttention.forward_impl`. Here every
row of a step is a decode's to it, so that what stands in its place is those two products around `forward_mqa`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import ops
from bidispatch.integrations.vllm.host import SERVED, Host, Unserved, name_of, unserved

__all__ = ["forward_impl", "serve"]


def serve(host: Host, name: str, layer: Any) -> None:
    """Give an MLA layer the kernels of its two products. Raises `Unserved` with the reason."""
    if not type(layer.impl).__module__.startswith("bidispatch."):
        raise Unserved("its attention is not the registry's, and splits a step; --attention-backend CUSTOM is")
    if type(layer).forward_impl is not host.classes["mla"].forward_impl:
        raise Unserved(f"{type(layer).__name__} has a forward_impl of its own")
    if layer.impl.num_heads != layer.num_heads:
        raise Unserved(f"its attention has {layer.impl.num_heads} heads and its products {layer.num_heads}")
    heads, rank = int(layer.num_heads), int(layer.kv_lora_rank)
    nope, value = int(layer.qk_nope_head_dim), int(layer.v_head_dim)
    up, down = _dtype(layer, "W_UK_T", (heads, nope, rank)), _dtype(layer, "W_UV", (heads, rank, value))
    texts = (
        host.take(f"{name} (W_UK)", "attention", "bmm", up, {"b": layer.W_UK_T}, n=rank, k=nope),
        host.take(f"{name} (W_UV)", "attention", "bmm", down, {"b": layer.W_UV}, n=value, k=rank),
    )
    setattr(layer, SERVED, texts)


def _dtype(layer: Any, attribute: str, shape: tuple[int, ...]) -> str:
    """The dtype of a weight of this shape."""
    weight = getattr(layer, attribute, None)
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != shape:
        have = list(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise Unserved(f"its {attribute} is {have}, not {list(shape)}: it may be quantised")
    return name_of(weight.dtype, f"its {attribute}")


def forward_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `MLAAttention.forward_impl`. Raises `SelectionError` for results that vLLM would quantise."""

    def served(
        self: Any,
        q: torch.Tensor,
        k_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *quantized: Any,
        **named: Any,
    ) -> Any:
        texts = getattr(self, SERVED, None)
        if texts is None or attn_metadata is None:  # without a step, memory is measured: no product is taken
            arguments = (q, k_c_normed, k_pe, kv_cache, attn_metadata, output, *quantized)
            if texts is None:
                return unserved(self, original, self, *arguments, **named)
            # What a step of as many rows will hold, absorbed queries and latent results, so that it is counted.
            q.new_empty((q.shape[0], self.num_heads, 2 * self.kv_lora_rank + self.qk_rope_head_dim))
            return original(self, *arguments, **named)
        given = [value for value in (*quantized, *named.values()) if value is not None]
        if given or output.dtype != q.dtype:
            raise SelectionError(
                f"{getattr(self, 'layer_name', 'an MLA layer')}: its result is wanted in {output.dtype}, quantised "
                "after attention, or its queries replicated; leave out fuse_attn_quant and context parallelism"
            )
        tokens = attn_metadata.num_actual_tokens
        nope, rank = self.qk_nope_head_dim, self.kv_lora_rank
        q = q[:tokens]
        absorbed = q.new_empty((tokens, self.num_heads, rank + self.qk_rope_head_dim))
        ops.bmm(texts[0], q[..., :nope].transpose(0, 1), self.W_UK_T, absorbed[..., :rank].transpose(0, 1))
        absorbed[..., rank:] = q[..., nope:]
        latent, _ = self.impl.forward_mqa(absorbed, kv_cache, attn_metadata, self)
        values = output[:tokens].view(tokens, self.num_heads, self.v_head_dim)
        ops.bmm(texts[1], latent.transpose(0, 1), self.W_UV, values.transpose(0, 1))
        return output

    return served

"""RMSNorm and Gemma's, with and without the residual: also where Inductor would compile vLLM's own into a reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch.integrations.vllm import ops
from bidispatch.integrations.vllm.host import SERVED, Host, Unserved, name_of, unserved
from bidispatch.ops.schema import DimValue

__all__ = ["forward", "serve"]


_HEADS = {"q_norm": "num_heads", "k_norm": "num_kv_heads"}
"""Norms of heads: what the module around them calls how many there are, on this rank."""


def serve(host: Host, name: str, layer: Any, around: Any = None) -> bool:
    """Give a norm its kernels; False where it is none. Raises `Unserved` with the reason.

    around: the module that holds it, if any.
    """
    bases = {"rms_norm": False, "gemma_norm": True}
    base = next((host.classes[key] for key in bases if isinstance(layer, host.classes[key])), None)
    if base is None:
        return False
    own = type(layer)
    if own.forward_cuda is not base.forward_cuda or own.forward_native is not base.forward_native:
        raise Unserved(f"{own.__name__} has a forward of its own")
    if getattr(layer, "variance_size_override", None) is not None:
        raise Unserved("its variance is of a part of the row (var_hidden_size)")
    (n,) = layer.weight.shape
    dtype = name_of(layer.weight.dtype, "its weight")
    gemma = base is host.classes["gemma_norm"]
    texts = tuple(host.take(name, "norm", op, dtype, n=n, gemma=gemma) for op in ("rms_norm", "fused_add_rms_norm"))
    heads = getattr(around, _HEADS.get(name.rpartition(".")[2], ""), 0)
    text = ""
    if isinstance(heads, int) and heads > 1 and getattr(around, "head_dim", None) == n:  # else it is of all heads
        dims: dict[str, DimValue] = {"head_dim": n, "num_heads": heads - 1, "num_kv_heads": 1, "gemma": gemma}
        text = host.take(name, "norm", "qk_norm", dtype, **dims)
    setattr(layer, SERVED, (*texts, text, heads))
    return True


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `forward_cuda` and of `forward_native`, which vLLM takes where it compiles."""

    def served(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        texts = getattr(self, SERVED, None)
        if texts is None:
            return unserved(self, original, self, x, residual)
        weight = self.weight.data
        if residual is None and texts[2] and x.dim() == 3 and x.shape[1] == texts[3]:
            return ops.head_norm(texts[2], x, weight, self.variance_epsilon)
        if residual is None:
            return ops.rms_norm(texts[0], x, weight, self.variance_epsilon)
        return ops.fused_add_rms_norm(texts[1], x, residual, weight, self.variance_epsilon)

    return served

"""Linear layers: unquantised ones, the router's gate, the output head; and which module serves a quantised one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch.integrations.vllm import fp8_linear, int4_linear, ops
from bidispatch.integrations.vllm.compat import UNIMPORTED
from bidispatch.integrations.vllm.host import SERVED, Host, Unserved, name_of, product_text, unserved

__all__ = ["apply", "gate_forward", "serve"]

_FEW_TOKENS = "_use_min_latency_gemm"
"""The switch of layers of `compat.UNIMPORTED`."""


def serve(host: Host, name: str, layer: Any, aliases: tuple[str, ...] = ()) -> bool:
    """Give a layer its kernels; False where it is no linear layer. Raises `Unserved` with the reason."""
    method = getattr(layer, "quant_method", None)
    kind = type(method)
    if kind is host.classes["head"]:
        if not any(alias.rpartition(".")[2] == "lm_head" for alias in (name, *aliases)):
            return True  # an embedding: rows are looked up
        _plain(host, name, layer, "lm_head")
    elif isinstance(layer, host.classes["gate"]):
        _gate(host, name, layer, kind)
    elif kind is host.classes["linear"]:
        _require_plain_forward(host, layer)
        _plain(host, name, layer, "linear")
    elif kind in {host.classes[method] for method in fp8_linear.METHODS}:
        _require_plain_forward(host, layer)
        fp8_linear.serve(host, name, layer, method)
    elif kind is host.classes["compressed"]:
        _require_plain_forward(host, layer)
        _compressed(host, name, layer)
    elif kind in (host.classes["awq"], host.classes["gptq"]):
        _require_plain_forward(host, layer)
        int4_linear.serve(host, name, layer, method)
    else:
        return False
    return True


def _require_plain_forward(host: Host, layer: Any) -> None:
    """Raise `Unserved` for a layer that may go past its method.

    DeepSeek's fused q_a and kv_a do for few tokens, by a switch of theirs, which is turned off here.
    """
    kind = type(layer)
    home = getattr(kind.forward, "__module__", "")
    if home == host.classes["linear"].__module__:
        return
    for seam in UNIMPORTED:
        if home == seam.module and kind.forward.__qualname__ == seam.path and hasattr(layer, _FEW_TOKENS):
            setattr(layer, _FEW_TOKENS, False)
            return
    raise Unserved(f"{kind.__name__} has a forward of its own ({home}), which may take other kernels")


def _compressed(host: Host, name: str, layer: Any) -> None:
    """A layer of compressed-tensors, by its scheme."""
    scheme = getattr(layer, "scheme", None)
    if type(scheme) is host.classes["compressed_fp8"]:
        fp8_linear.serve(host, name, layer, scheme)
    elif not int4_linear.serve(host, name, layer, scheme):
        raise Unserved(f"weights of {type(scheme).__name__} are not served")


def _weight(layer: Any) -> torch.Tensor:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.stride(-1) != 1:
        raise Unserved("its weight is not a matrix [n, k] with rows in one piece")
    return weight


def _plain(host: Host, name: str, layer: Any, kind: str, **dims: str) -> None:
    weight = _weight(layer)
    n, k = weight.shape
    dtype = name_of(weight.dtype, "its weight")
    has_bias = getattr(layer, "bias", None) is not None
    setattr(layer, SERVED, host.take_product(name, kind, "gemm", dtype, has_bias=has_bias, n=n, k=k, **dims))


def _gate(host: Host, name: str, layer: Any, method: type) -> None:
    if method is not host.classes["linear"]:
        raise Unserved(f"its weight is quantised by {method.__name__}")
    if type(layer).forward is not host.classes["gate"].forward:
        raise Unserved(f"{type(layer).__name__} has a forward of its own")
    weight = _weight(layer)
    out_dtype = getattr(layer, "out_dtype", None) or weight.dtype
    _plain(host, name, layer, "router", role="router", out_dtype=name_of(out_dtype, "its result"))
    layer.bidispatch_out_dtype = out_dtype


def apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `UnquantizedLinearMethod.apply`, and of the embedding's, which is the output head's."""

    def served(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        texts = getattr(layer, SERVED, None)
        if texts is None:
            return unserved(layer, original, self, layer, x, bias)
        return ops.linear(product_text(layer, texts, bias), x, layer.weight, bias, x.dtype)

    return served


def gate_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `GateLinear.forward`, which would take kernels by the number of tokens."""

    def served(self: Any, x: torch.Tensor) -> Any:
        texts = getattr(self, SERVED, None)
        if texts is None:
            return unserved(self, original, self, x)
        kept = self.bias if self.skip_bias_add else None
        bias = None if self.skip_bias_add else self.bias
        text = product_text(self, texts, bias)
        out = ops.linear(text, x.to(self.weight.dtype), self.weight, bias, self.bidispatch_out_dtype)
        return (out, kept) if self.return_bias else out

    return served

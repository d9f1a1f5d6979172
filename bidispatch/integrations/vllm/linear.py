"""Linear layers: unquantised ones, the router's gate, the output head; and which module serves a quantised one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from bidispatch.integrations.vllm import fp8_linear, int4_linear, ops
from bidispatch.integrations.vllm.compat import UNIMPORTED
from bidispatch.integrations.vllm.host import SERVED, Host, Unserved, name_of, product_text, unserved

__all__ = ["apply", "gate_forward", "head_apply", "output_heads", "serve"]

_log = logging.getLogger("vllm.bidispatch")

_FEW_TOKENS = "_use_min_latency_gemm"
"""The switch of layers of `compat.UNIMPORTED`."""


_HEADS = frozenset({"embed_out", "head", "lm_head", "output", "output_layer", "proj_out"})
"""What vLLM's models call their output head, which may be the embedding under a second name."""
_EMBEDDINGS = frozenset({"embed_tokens", "embeddings", "tok_embeddings", "word_embeddings", "wte"})
"""What they call the embedding of tokens, where they have others too."""


def output_heads(model: Any, classes: Mapping[str, Any]) -> dict[int, str]:
    """The modules of a model (by `id`) that logits are made with, each with why it cannot be served, or nothing.

    Those are every `ParallelLMHead` and every embedding that is called as a head is. Where a part of a model that has
    a `LogitsProcessor` has none of these, its embedding of tokens is handed to that: Gemma, Command-R (0.25.1).
    """
    parallel, embedding, logits = (classes[name] for name in ("parallel_head", "embedding", "logits"))
    heads = {
        id(module): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, parallel) or (isinstance(module, embedding) and name.rpartition(".")[2] in _HEADS)
    }
    for part in reversed(list(model.modules())):  # what is inside first
        if not any(isinstance(child, logits) for child in part.children()):
            continue
        found = {name: module for name, module in part.named_modules() if isinstance(module, embedding)}
        if not any(id(module) in heads for module in found.values()):
            named = {name: module for name, module in found.items() if name.rpartition(".")[2] in _EMBEDDINGS}
            heads |= {id(module): module for module in (named or found).values()}
    # vLLM 0.29 and later go past the head's method where its dtype is another (logits_processor.py, `_apply_head`).
    wanted = [getattr(module, "head_dtype", None) for module in model.modules() if isinstance(module, logits)]
    return {key: _past_its_method(module, wanted) for key, module in heads.items()}


def _past_its_method(head: Any, wanted: Collection[torch.dtype | None]) -> str:
    own = getattr(getattr(head, "weight", None), "dtype", None)
    others = [dtype for dtype in wanted if dtype is not None and own is not None and dtype != own]
    if not others:
        return ""
    return f"logits in {others[0]} are made by vLLM, past its method; leave head_dtype out of --hf-overrides"


def serve(host: Host, name: str, layer: Any, heads: Mapping[int, str]) -> bool:
    """Give a layer its kernels; False where it is no linear layer. Raises `Unserved` with the reason.

    heads: what `output_heads` gives.
    """
    method = getattr(layer, "quant_method", None)
    kind = type(method)
    if kind is host.classes["head"] and id(layer) not in heads:
        return True  # an embedding: rows are looked up
    if id(layer) in heads:
        _head(host, name, layer, kind, heads[id(layer)])
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


def _head(host: Host, name: str, layer: Any, method: type, against: str) -> None:
    """The output head. Logits are made by its method; its forward, if it is an embedding too, looks rows up."""
    if against:
        raise Unserved(against)
    if method is not host.classes["head"] and method is not host.classes["linear"]:
        raise Unserved(f"its weight is held by {method.__name__}, by which an output head is not served yet")
    _plain(host, name, layer, "lm_head")


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
    bias = getattr(layer, "bias", None)
    texts = host.take_product(name, kind, "gemm", dtype, bias=bias, weights={"weight": weight}, n=n, k=k, **dims)
    setattr(layer, SERVED, texts)


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
    """In the place of `UnquantizedLinearMethod.apply`."""

    def served(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        texts = getattr(layer, SERVED, None)
        if texts is None:
            return unserved(layer, original, self, layer, x, bias)
        return ops.linear(product_text(layer, texts, bias), x, layer.weight, bias, x.dtype)

    return served


def head_apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `UnquantizedEmbeddingMethod.apply`, the output head's."""
    inner = apply(original)
    said: set[int] = set()

    def served(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        if not hasattr(layer, SERVED) and id(layer) not in said and not torch.compiler.is_compiling():
            said.add(id(layer))
            _log.warning("an output head, %s, runs vLLM's kernel: it was not found as one (NOT PROMISED)", layer)
        return inner(self, layer, x, bias)

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

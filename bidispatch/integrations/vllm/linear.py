"""Linear layers: unquantised ones, the router's gate, the output head, and fp8 ones with scales of 128x128 blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import ops
from bidispatch.integrations.vllm.compat import UNIMPORTED
from bidispatch.integrations.vllm.host import SERVED, Host, Unserved, name_of, unserved
from bidispatch.ops.quantize import FP8, GROUP

__all__ = ["apply", "fp8_apply", "fp8_kernel", "gate_forward", "serve"]

_BLOCK = (GROUP, GROUP)

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
    elif kind is host.classes["fp8_linear"]:
        _require_plain_forward(host, layer)
        _fp8(host, name, layer, method)
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


def _weight(layer: Any) -> torch.Tensor:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.stride(-1) != 1:
        raise Unserved("its weight is not a matrix [n, k] with rows in one piece")
    return weight


def _has_bias(layer: Any) -> bool:
    return getattr(layer, "bias", None) is not None


def _plain(host: Host, name: str, layer: Any, kind: str, **dims: str) -> None:
    weight = _weight(layer)
    n, k = weight.shape
    dtype = name_of(weight.dtype, "its weight")
    # A layer may leave its bias to others, as row-parallel ones of other ranks do: both are bound.
    wanted = (False, True) if _has_bias(layer) else (False,)
    texts = [host.take(name, kind, "gemm", dtype, n=n, k=k, bias=bias, **dims) for bias in wanted]
    setattr(layer, SERVED, (texts[0], texts[-1] if len(texts) > 1 else ""))


def _gate(host: Host, name: str, layer: Any, method: type) -> None:
    if method is not host.classes["linear"]:
        raise Unserved(f"its weight is quantised by {method.__name__}")
    if type(layer).forward is not host.classes["gate"].forward:
        raise Unserved(f"{type(layer).__name__} has a forward of its own")
    weight = _weight(layer)
    out_dtype = getattr(layer, "out_dtype", None) or weight.dtype
    _plain(host, name, layer, "router", role="router", out_dtype=name_of(out_dtype, "its result"))
    layer.bidispatch_out_dtype = out_dtype


def _fp8(host: Host, name: str, layer: Any, method: Any) -> None:
    if not method.block_quant:
        raise Unserved("fp8 with one scale a tensor or a channel is not served yet (gemm.fp8)")
    if tuple(method.weight_block_size) != _BLOCK:
        raise Unserved(f"its blocks are {tuple(method.weight_block_size)}, not {_BLOCK}")
    if not isinstance(method.fp8_linear, host.classes["fp8_plain_kernel"]):
        raise Unserved(f"{type(method.fp8_linear).__name__} was chosen, which may hold the weight in another order")
    weight, scales = _weight(layer), layer.weight_scale_inv
    n, k = weight.shape
    if name_of(weight.dtype, "its weight") != FP8 or scales.dtype is not torch.float32:
        raise Unserved(f"weight and scales are {weight.dtype} and {scales.dtype}, not {FP8} and float32")
    if tuple(scales.shape) != (-(-n // GROUP), -(-k // GROUP)):
        raise Unserved(f"its scales are {list(scales.shape)} for a weight of {[n, k]}")
    dtype = name_of(method.out_dtype, "its result")
    texts = (
        host.take(name, "linear", "quantize.fp8_group", dtype, k=k),
        host.take(name, "linear", "gemm.fp8_block", FP8, n=n, k=k, out_dtype=dtype),
    )
    setattr(layer, SERVED, texts)


def apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `UnquantizedLinearMethod.apply`, and of the embedding's, which is the output head's."""

    def served(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        texts = getattr(layer, SERVED, None)
        if texts is None:
            return unserved(layer, original, self, layer, x, bias)
        return _product(layer, texts, x, bias, x.dtype)

    return served


def _product(layer: Any, texts: tuple[str, str], x: Any, bias: Any, out_dtype: torch.dtype) -> Any:
    if bias is not None and not texts[1]:
        raise SelectionError(f"{type(layer).__name__} is given a bias, but had none when it was loaded")
    return ops.linear(texts[bias is not None], x, layer.weight, bias, out_dtype)


def gate_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `GateLinear.forward`, which would take kernels by the number of tokens."""

    def served(self: Any, x: torch.Tensor) -> Any:
        texts = getattr(self, SERVED, None)
        if texts is None:
            return unserved(self, original, self, x)
        kept = self.bias if self.skip_bias_add else None
        bias = None if self.skip_bias_add else self.bias
        out = _product(self, texts, x.to(self.weight.dtype), bias, self.bidispatch_out_dtype)
        return (out, kept) if self.return_bias else out

    return served


def fp8_apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `Fp8LinearMethod.apply`."""

    def served(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        texts = getattr(layer, SERVED, None)
        if texts is None:
            return unserved(layer, original, self, layer, x, bias)
        return ops.fp8_block_linear(*texts, x, layer.weight, layer.weight_scale_inv, bias)

    return served


def fp8_kernel(original: Callable[..., Any], plain: type) -> Callable[..., Any]:
    """In the place of `init_fp8_linear_kernel`: of block-wise layers, the kernel that leaves the weight as it lies."""

    def chosen(activation_quant_key: Any, weight_quant_key: Any, *arguments: Any, **named: Any) -> Any:
        if activation_quant_key.scale.group_shape.is_per_group() and named.get("force_kernel") is None:
            named["force_kernel"] = plain
        return original(activation_quant_key, weight_quant_key, *arguments, **named)

    return chosen

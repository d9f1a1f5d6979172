"""Linear layers with 4-bit weights: AWQ's, symmetric GPTQ's and compressed-tensors' pack-quantized ones.

Weights are repacked once, when a loaded model is walked, and the checkpoint's are dropped. Until then they lie as they
were loaded: vLLM's mode leaves AWQ's and, since 0.33, compressed-tensors' alone; for the others `int4_kernel` has a
kernel chosen that does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch.int4 import Int4Weight, from_awq, from_compressed, from_gptq
from bidispatch.integrations.vllm import ops
from bidispatch.integrations.vllm.host import SERVED, Host, Unserved, name_of, product_text, unserved
from bidispatch.ops.schema import DimValue

__all__ = ["apply", "checkpoint", "serve"]

_CHECKPOINT = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
)
"""Parameters of the checkpoint's, of all three formats."""

_PACKED = ("bidispatch_weight", "bidispatch_scales", "bidispatch_zeros")
"""What a served layer has in their place."""


def checkpoint(layer: Any, *, zero_points: bool) -> Int4Weight:
    """The weight of a symmetric GPTQ layer, or of one of compressed-tensors, as it was loaded, repacked."""
    if hasattr(layer, "qweight"):
        return from_gptq(layer.qweight.data, None, layer.scales.data)
    zeros = layer.weight_zero_point.data if zero_points else None
    return from_compressed(layer.weight_packed.data, layer.weight_scale.data, zeros)


def _require_kept(scheme: Any) -> None:
    """Raise `Unserved` where another kernel has laid out the weights."""
    if scheme.kernel is not None and not getattr(scheme.kernel, "keeps_checkpoint", False):
        raise Unserved(
            f"{type(scheme.kernel).__name__} was chosen, and holds the weight in a layout of its own; the log says why"
        )


def serve(host: Host, name: str, layer: Any, scheme: Any) -> bool:
    """Give a layer its kernels; False where its scheme is none of these. Raises `Unserved` with the reason."""
    kind = type(scheme)
    if hasattr(layer, _PACKED[0]):  # a model that is walked again
        weight = Int4Weight(*(getattr(layer, attribute) for attribute in _PACKED))
    elif kind is host.classes["awq"]:
        if scheme.quant_config.weight_bits != 4:
            raise Unserved(f"its weights have {scheme.quant_config.weight_bits} bits, not 4")
        weight = from_awq(layer.qweight.data, layer.qzeros.data, layer.scales.data)
    elif kind is host.classes["gptq"]:
        _require_kept(scheme)
        weight = checkpoint(layer, zero_points=False)
    elif kind is host.classes["compressed_int4"]:
        if scheme.num_bits != 4:
            raise Unserved(f"its weights have {scheme.num_bits} bits, not 4")
        _require_kept(scheme)
        weight = checkpoint(layer, zero_points=not scheme.symmetric)
    else:
        return False
    n, k = weight.weight.shape[0], weight.weight.shape[1] * 8
    has_bias = getattr(layer, "bias", None) is not None
    dims: dict[str, DimValue] = {"n": n, "k": k, "group_size": weight.group_size}
    dims["zero_points"] = weight.zeros is not None
    dtype = name_of(weight.scales.dtype, "its scales")
    texts = host.take_product(name, "linear", "gemm.int4", dtype, has_bias=has_bias, **dims)
    for attribute in _CHECKPOINT:
        if attribute in layer._parameters:
            delattr(layer, attribute)
    for attribute, tensor in zip(_PACKED, weight, strict=True):
        layer.register_buffer(attribute, tensor, persistent=False)
    setattr(layer, SERVED, texts)
    return True


def apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of the methods' `apply` and the scheme's `apply_weights`."""

    def served(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        texts = getattr(layer, SERVED, None)
        if texts is None:
            return unserved(layer, original, self, layer, x, bias)
        weight, scales, zeros = (getattr(layer, attribute) for attribute in _PACKED)
        return ops.int4_linear(product_text(layer, texts, bias), x, weight, scales, zeros, bias)

    return served

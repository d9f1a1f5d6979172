"""Linear layers in fp8: scales of 128x128 blocks, of output channels or of the whole weight; x quantised a group, a
token, or by a scale of the checkpoint.

`Fp8LinearMethod`, the methods that quantise a model while it is loaded, and compressed-tensors' W8A8 scheme hold the
same: a kernel `fp8_linear` and the layer's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import ops
from bidispatch.integrations.vllm.host import SERVED, Host, Unserved, name_of, product_text, unserved
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.schema import DimValue

__all__ = ["METHODS", "apply", "kernel", "serve"]

METHODS = ("fp8_linear", "online_tensor", "online_block", "online_channel")
"""Names of `compat.SEAMS`: vLLM's linear methods that are served here."""

_BLOCK = (GROUP, GROUP)
_HOISTED = ("input_quant_key", "_input_quant_key")
"""What a layer that can be given quantised rows is known by, in 0.25.1 and in 0.33.0 (fusion/quant_activation.py)."""


def serve(host: Host, name: str, layer: Any, scheme: Any) -> None:
    """Give a layer its kernels. scheme: what holds `fp8_linear`. Raises `Unserved` with the reason."""
    blocks = getattr(scheme, "weight_block_size", None)
    if blocks is None:
        _whole(host, name, layer, scheme)
    elif tuple(blocks) != _BLOCK:
        raise Unserved(f"its blocks are {tuple(blocks)}, not {_BLOCK}")
    else:
        _blocks(host, name, layer, scheme)
    for attribute in _HOISTED:
        if hasattr(layer, attribute):
            delattr(layer, attribute)


def _of_kind(scheme: Any, kind: type) -> None:
    if not isinstance(scheme.fp8_linear, kind):
        raise Unserved(f"{type(scheme.fp8_linear).__name__} was chosen, which may hold the weight in another order")


def _matrix(weight: Any) -> tuple[int, int]:
    """n and k of an fp8 weight [n, k]."""
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.stride(-1) != 1:
        raise Unserved("its weight is not a matrix [n, k] with rows in one piece")
    if name_of(weight.dtype, "its weight") != FP8:
        raise Unserved(f"its weight is {weight.dtype}, not {FP8}")
    n, k = weight.shape
    return n, k


def _block_scales(layer: Any) -> Any:
    """Under the name that `Fp8LinearMethod` has for them, or compressed-tensors'."""
    return layer.weight_scale_inv if hasattr(layer, "weight_scale_inv") else layer.weight_scale


def _blocks(host: Host, name: str, layer: Any, scheme: Any) -> None:
    _of_kind(scheme, host.classes["fp8_plain_kernel"])
    n, k = _matrix(layer.weight)
    scales = _block_scales(layer)
    if scales.dtype is not torch.float32:
        raise Unserved(f"its scales are {scales.dtype}, not float32")
    if tuple(scales.shape) != (-(-n // GROUP), -(-k // GROUP)):
        raise Unserved(f"its scales are {list(scales.shape)} for a weight of {[n, k]}")
    dtype = name_of(scheme.out_dtype, "its result")
    quantize = host.take(name, "linear", "quantize.fp8_group", dtype, k=k)
    product = host.take(name, "linear", "gemm.fp8_block", FP8, n=n, k=k, out_dtype=dtype)
    setattr(layer, SERVED, ("block", quantize, product, ""))


def _whole(host: Host, name: str, layer: Any, scheme: Any) -> None:
    _of_kind(scheme, host.classes["fp8_whole_kernel"])
    weight = layer.weight.t()  # vLLM's is [k, n], with columns in one piece
    n, k = _matrix(weight)
    logical = getattr(scheme.fp8_linear, "logical_output_size", n)
    inputs = getattr(layer, "input_size_per_partition", getattr(layer, "input_size", k))
    if (logical, inputs) != (n, k):
        raise Unserved(f"its weight was padded from {[logical, inputs]} to {[n, k]}, which is not served yet")
    scales, given = layer.weight_scale, getattr(layer, "input_scale", None)
    for what, tensor, sizes in (("weight", scales, {1, n}), ("input", given, {1})):
        if tensor is not None and (tensor.dtype is not torch.float32 or tensor.numel() not in sizes):
            raise Unserved(f"its {what} scale is {list(tensor.shape)} in {tensor.dtype}, for a weight of {[n, k]}")
    activation = scheme.activation_quant_key.scale
    if activation.static is not (given is not None):
        raise Unserved(f"its rows are quantised {'by a scale' if activation.static else 'without one'} that is missing")
    if given is None and not activation.group_shape.is_per_token():
        raise Unserved("its rows share a scale that follows the batch; one a token, or one that is given, does not")
    bias = getattr(layer, "bias", None)
    if bias is not None and bias.dtype is not scheme.out_dtype:
        raise Unserved(f"its bias is {bias.dtype} and its result {scheme.out_dtype}")
    dtype = name_of(scheme.out_dtype, "its result")
    scaling = "token" if given is None else "tensor"
    quantize = host.take(name, "linear", f"quantize.fp8_{scaling}", dtype, k=k)
    weight_scaling = "tensor" if scales.numel() == 1 else "channel"
    dims: dict[str, DimValue] = {"n": n, "k": k, "out_dtype": dtype, "x_scaling": scaling}
    dims["weight_scaling"] = weight_scaling
    products = host.take_product(name, "linear", "gemm.fp8", FP8, has_bias=bias is not None, **dims)
    setattr(layer, SERVED, (weight_scaling, quantize, *products))


def apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `Fp8LinearMethod.apply` and of the scheme's `apply_weights`."""

    def served(self: Any, layer: Any, x: Any, bias: torch.Tensor | None = None) -> Any:
        texts = getattr(layer, SERVED, None)
        if texts is None:
            return unserved(layer, original, self, layer, x, bias)
        if not isinstance(x, torch.Tensor) or x.dtype is not self.out_dtype:
            raise SelectionError(
                f"{type(layer).__name__} {getattr(layer, 'prefix', '')} is given {getattr(x, 'dtype', type(x))}, and "
                f"quantises rows of {self.out_dtype} itself; leave out vLLM's fused quantisation (fuse_norm_quant, "
                "fuse_act_quant)"
            )
        scaling, quantize, *products = texts
        if scaling == "block":
            return ops.fp8_block_linear(quantize, products[0], x, layer.weight, _block_scales(layer), bias)
        product = product_text(layer, products, bias)
        scales, given = layer.weight_scale.view(-1), layer.input_scale
        whole, channels = (scales, None) if scaling == "tensor" else (None, scales)
        x_scale = None if given is None else given.view(1)
        return ops.fp8_linear(quantize, product, x, x_scale, layer.weight.t(), whole, channels, bias)

    return served


def kernel(original: Callable[..., Any], of_blocks: type, of_whole: type) -> Callable[..., Any]:
    """In the place of `init_fp8_linear_kernel`: kernels of vLLM's that leave the weight as it lies."""

    def chosen(activation_quant_key: Any, weight_quant_key: Any, *arguments: Any, **named: Any) -> Any:
        if named.get("force_kernel") is None:
            grouped = activation_quant_key.scale.group_shape.is_per_group()
            named["force_kernel"] = of_blocks if grouped else of_whole
        return original(activation_quant_key, weight_quant_key, *arguments, **named)

    return chosen

"""What the `quantization_config` of a model's config says of its linear layers and experts. Imports no torch.

A config names layers that are left out by patterns; those are shown as quantised here, but for the output head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.schema import DimValue

__all__ = ["Format", "format_of"]

_BLOCK = [GROUP, GROUP]


@dataclass(frozen=True, slots=True)
class Format:
    """How a linear layer's weight is held: the op that multiplies with it, and what it fixes of its dims."""

    op: str = "gemm"
    dims: Mapping[str, DimValue] = field(default_factory=dict)
    quantize: str = ""
    """The op before it, of fp8."""
    experts: str = ""
    """Why experts of this format are not served, or nothing."""
    reason: str = ""
    """Why its linear layers are not served, or nothing."""

    @property
    def fp8_experts(self) -> bool:
        """Whether experts have fp8 weights that are served."""
        return self.op == "gemm.fp8_block"

    def asked(self, n: int, k: int, dtype: str) -> Iterator[tuple[str, str, Mapping[str, DimValue]]]:
        """What a linear layer [n, k] of a model in `dtype` asks a plan for: ops, their dtypes and dims.

        Where zero points are all 8, a server finds that in the weights and asks for none.
        """
        if self.quantize:
            yield self.quantize, dtype, {"k": k}
            yield self.op, FP8, {"n": n, "k": k, "out_dtype": dtype, **self.dims}
        else:
            group = {"group_size": k} if self.dims.get("group_size") == -1 else {}
            yield self.op, dtype, {"n": n, "k": k, **self.dims, **group}


_NO_EXPERTS = "experts with weights of {} are not served; those with fp8 in blocks of 128x128 are"
_FP8_BLOCK = Format("gemm.fp8_block", quantize="quantize.fp8_group")


def format_of(config: Mapping[str, Any]) -> Format:
    """The format of a model's weights."""
    quantized = config.get("quantization_config")
    if not isinstance(quantized, Mapping):
        return Format()
    method = str(quantized.get("quant_method"))
    if method == "fp8":
        return _fp8(quantized)
    if method in ("awq", "gptq"):
        return _int4(quantized, method)
    if method == "compressed-tensors":
        return _compressed(quantized)
    return _unserved(f"weights of {method} are not served")


def _unserved(reason: str) -> Format:
    return Format(reason=reason, experts=reason)


def _fp8_whole(x_scaling: str, weight_scaling: str) -> Format:
    dims = {"x_scaling": x_scaling, "weight_scaling": weight_scaling}
    return Format("gemm.fp8", dims, f"quantize.fp8_{x_scaling}", _NO_EXPERTS.format("fp8 without blocks"))


def _fp8(quantized: Mapping[str, Any]) -> Format:
    blocks = quantized.get("weight_block_size")
    if blocks is None:
        return _fp8_whole("tensor" if quantized.get("activation_scheme") == "static" else "token", "tensor")
    return _FP8_BLOCK if blocks == _BLOCK else _unserved(f"weights of fp8 in blocks of {blocks} are not served")


def _packed(bits: int, group: int | None, zero_points: bool, of: str) -> Format:
    if bits != 4:
        return _unserved(f"weights of {of} with {bits} bits are not served; 4 are")
    dims: dict[str, DimValue] = {"group_size": int(group or -1), "zero_points": zero_points}
    return Format("gemm.int4", dims, experts=_NO_EXPERTS.format(of))


def _int4(quantized: Mapping[str, Any], method: str) -> Format:
    if quantized.get("desc_act"):
        return _unserved("weights of gptq with desc_act=true are not served: groups lie apart in K")
    if method == "gptq" and not quantized.get("sym", True):
        return _unserved("weights of gptq with zero points are not served, nor read by it")
    bits = int(quantized.get("bits", quantized.get("w_bit", 4)))
    group = quantized.get("group_size", quantized.get("q_group_size"))
    return _packed(bits, group, method == "awq" and bool(quantized.get("zero_point", True)), method)


def _compressed(quantized: Mapping[str, Any]) -> Format:
    groups = list((quantized.get("config_groups") or {}).values())
    if len(groups) != 1:
        return _unserved(f"{len(groups)} groups of compressed-tensors are not told apart here; a server's table does")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if weights.get("type") == "int" and inputs is None:
        if weights.get("actorder") in ("group", True):
            return _unserved("weights of compressed-tensors in activation order are not served")
        return _packed(
            int(bits or 0), weights.get("group_size"), not weights.get("symmetric", True), "compressed-tensors"
        )
    if weights.get("type") == "float" and bits == 8 and inputs:
        if strategy == "block" and weights.get("block_structure") == _BLOCK:
            return _FP8_BLOCK
        scaling = "token" if inputs.get("dynamic") else "tensor"
        if strategy in ("tensor", "channel") and inputs.get("strategy") in ("token", "tensor"):
            return _fp8_whole(scaling, strategy)
    kinds = f"{weights.get('type')}{bits} a {strategy}, rows {'as they are' if not inputs else inputs.get('type')}"
    return _unserved(f"weights of compressed-tensors in {kinds} are not served")

"""Mixture of experts: the choice of experts, and experts on one rank or by expert parallelism.

Experts' weights are unquantised, or fp8 with scales of 128x128 blocks; with a bias or without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import ops
from bidispatch.integrations.vllm.host import SERVED, Host, Unserved, name_of, unserved
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.schema import DimValue

__all__ = [
    "experts_apply",
    "fp8_backends",
    "no_workspaces",
    "routing",
    "serve_experts",
    "serve_router",
    "unquantized_inputs",
]

_ROUTERS = ("router", "grouped_router", "bias_router")

# What vLLM calls an activation: the op's name for it. swigluoai has no parameters there: torch.ops._C.swigluoai_and_mul
# is called with its defaults, whatever the configuration says (fused_moe/activation.py, 0.25.1 to 0.33.0).
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "swigluoai": "swiglu_clamped"}
_SWIGLUOAI = {"alpha": 1.702, "limit": 7.0, "beta": 1.0}
_BLOCK = [GROUP, GROUP]


def serve_router(host: Host, name: str, router: Any, dtype: str) -> None:
    """Give a router its kernels. dtype: the model's. Raises `Unserved` with the reason."""
    kind = next((key for key in _ROUTERS if type(router) is host.classes[key]), None)
    if kind is None:
        raise Unserved(f"{type(router).__name__} is not known here")
    for attribute, meaning in (
        ("num_fused_shared_experts", "shared experts are among the routed ones"),
        ("_hash_indices_table", "tokens choose experts by a table of their ids"),
        ("bias_vl", "image tokens have a bias of their own"),
    ):
        value = getattr(router, attribute, None)
        if value is not None and value != 0:
            raise Unserved(meaning)
    scoring = getattr(router, "scoring_func", "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise Unserved(f"its scores are {scoring}, not softmax or sigmoid")
    bias = getattr(router, "e_score_correction_bias", None)
    count = int(router.global_num_experts)
    dims: dict[str, DimValue] = {
        "experts": count,
        "top_k": int(router.top_k),
        "scoring": scoring,
        "renormalize": bool(router.renormalize),
        "correction_bias": bias is not None,
        "routed_scaling_factor": float(getattr(router, "routed_scaling_factor", 1.0)),
    }
    if kind == "grouped_router":
        groups = int(router.num_expert_group)
        if count <= groups or count % groups:
            raise Unserved(f"{count} experts are no {groups} groups")
        dims |= {"n_group": groups, "topk_group": int(router.topk_group)}
    # Logits are in the dtype of the gate's result, which only a call shows.
    texts = {each: host.take(name, "router", "moe.router", each, **dims) for each in dict.fromkeys(("float32", dtype))}
    setattr(router, SERVED, {getattr(torch, each): text for each, text in texts.items()})


def serve_experts(host: Host, name: str, layer: Any) -> None:
    """Give routed experts their kernel. Raises `Unserved` with the reason."""
    method = layer.quant_method
    experts: Any = getattr(getattr(getattr(method, "moe_kernel", None), "impl", None), "fused_experts", None)
    if type(experts) is not host.classes["experts"]:
        raise Unserved(f"{type(method).__name__} runs {type(experts).__name__}; TritonExperts is what is replaced")
    parallel = layer.moe_config.moe_parallel_config
    against = {
        "a redundant expert's place follows the token (EPLB)": getattr(parallel, "enable_eplb", False),
        "tokens are exchanged between ranks (all2all)": getattr(parallel, "use_all2all_kernels", False),
        "adapters (LoRA) are added inside": getattr(layer.moe_config, "is_lora_enabled", False),
        "weights are applied to what goes in": layer.apply_router_weight_on_input,
    }
    for reason, holds in against.items():
        if holds:
            raise Unserved(f"{reason}, which is not served yet")
    w13, w2 = layer.w13_weight, layer.w2_weight
    count, hidden, intermediate = w2.shape
    if tuple(w13.shape) != (count, 2 * intermediate, hidden):
        raise Unserved(f"its weights are {list(w13.shape)} and {list(w2.shape)}")
    dims: dict[str, DimValue] = {
        "experts": count,
        "top_k": int(layer.top_k),
        "hidden": hidden,
        "intermediate": intermediate,
        "activation": _activation(layer, experts.quant_config),
    }
    if layer.expert_map is not None:
        if layer.expert_map.dtype is not torch.int32:
            raise Unserved(f"its expert map is {layer.expert_map.dtype}")
        dims |= {"expert_map": True, "global_experts": int(layer.global_num_experts)}
    dtype = layer.moe_config.in_dtype
    dims |= _biases(experts, w13, dtype) | _weights(experts, w13, w2, dtype)
    # But for the map: ids of a kernel that is run before the first request are to be experts of this rank.
    weights = {"w13": w13, "w2": w2, "w13_bias": experts.w1_bias, "w2_bias": experts.w2_bias}
    weights |= {"w13_scales": experts.w1_scale, "w2_scales": experts.w2_scale}
    text = host.take(name, "experts", "moe.experts", name_of(dtype, "what goes into it"), weights, **dims)
    setattr(experts, SERVED, text)


def _activation(layer: Any, quant_config: Any) -> str:
    """The op's name for a layer's activation."""
    name = getattr(layer.activation, "value", layer.activation)
    if name not in _ACTIVATIONS:
        raise Unserved(f"activation {name} is not served yet; {', '.join(_ACTIVATIONS)} are")
    # A limit is the quantisation's, else the layer's (0.29.0, ApplyMoEActivationConfig.from_configs).
    given = {}
    for key, ours, theirs in (
        ("limit", "gemm1_clamp_limit", "swiglu_limit"),
        ("alpha", "gemm1_alpha", "swiglu_alpha"),
        ("beta", "gemm1_beta", "swiglu_beta"),
    ):
        value = getattr(quant_config, ours, None)
        given[key] = getattr(layer.moe_config, theirs, None) if value is None else value
    if name == "swigluoai":
        other = {key: value for key, value in given.items() if value is not None and value != _SWIGLUOAI[key]}
        if other:
            raise Unserved(f"its swigluoai is given {other}, which vLLM's kernel does not read: it has {_SWIGLUOAI}")
    elif given["limit"] is not None:
        raise Unserved(f"its {name} is clamped at {given['limit']}, which is not served yet")
    return _ACTIVATIONS[name]


def _biases(experts: Any, w13: torch.Tensor, dtype: torch.dtype) -> dict[str, DimValue]:
    """The dim of a bias on both products. Raises `Unserved` for biases that the op does not take."""
    first, second = experts.w1_bias, experts.w2_bias
    if first is None and second is None:
        return {}
    if first is None or second is None:
        raise Unserved("one of its products has a bias and the other none, which is not served yet")
    count, rows, hidden = w13.shape
    if (tuple(first.shape), tuple(second.shape)) != ((count, rows), (count, hidden)) or {first.dtype, second.dtype} != {
        dtype
    }:
        raise Unserved(
            f"its biases are {list(first.shape)} in {first.dtype} and {list(second.shape)} in {second.dtype}, not "
            f"{[count, rows]} and {[count, hidden]} in {dtype}"
        )
    return {"bias": True}


def _weights(experts: Any, w13: torch.Tensor, w2: torch.Tensor, dtype: torch.dtype) -> dict[str, DimValue]:
    """The dim of the weights' dtype. Raises `Unserved` for quantised ones but fp8 in blocks of 128x128."""
    config = experts.quant_config
    quantized = config.quant_dtype or config.weight_quant_dtype
    if quantized is None:
        if {w13.dtype, w2.dtype} != {dtype}:
            raise Unserved(f"its weights are {w13.dtype} and {w2.dtype}, and what goes into them is {dtype}")
        return {}
    if {config.quant_dtype, config.weight_quant_dtype, w13.dtype, w2.dtype} != {torch.float8_e4m3fn}:
        raise Unserved(f"experts in {quantized}, weights in {w13.dtype} and {w2.dtype}, are not served yet")
    if config.block_shape is None or list(config.block_shape) != _BLOCK:
        blocks = f"in blocks of {list(config.block_shape)}" if config.block_shape else "without blocks"
        raise Unserved(f"fp8 experts with scales {blocks} are not served yet; those with blocks of {_BLOCK} are")
    for kind, weight, scales in (("w13", w13, experts.w1_scale), ("w2", w2, experts.w2_scale)):
        count, n, k = weight.shape
        wanted = (count, -(-n // GROUP), -(-k // GROUP))
        if scales is None or scales.dtype is not torch.float32 or tuple(scales.shape) != wanted:
            have = "none" if scales is None else f"{list(scales.shape)} in {scales.dtype}"
            raise Unserved(f"its scales of {kind} are {have}, not {list(wanted)} in float32")
    return {"weight_dtype": FP8}


def routing(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of a router's `_compute_routing`. Padded rows get experts too, which changes no other row."""

    def served(
        self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, indices_type: Any, *, input_ids: Any = None
    ) -> Any:
        texts = getattr(self, SERVED, None)
        if texts is None:
            return unserved(self, original, self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        text = texts.get(router_logits.dtype)
        if text is None:
            known = ", ".join(map(str, texts))
            raise SelectionError(f"{type(self).__name__} is given logits in {router_logits.dtype}; bound are {known}")
        bias = getattr(self, "e_score_correction_bias", None)
        weights, ids = ops.router(text, self.top_k, router_logits, None if bias is None else bias.data.float())
        return weights, ids if indices_type is None else ids.to(indices_type)

    return served


def experts_apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `TritonExperts.apply`, which subclasses with other weights call too."""

    def served(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        text = getattr(self, SERVED, None)
        arguments = (output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map)
        if text is None:
            return unserved(self, original, self, *arguments, a1q_scale, *rest, **named)
        if a1q_scale is not None:
            raise SelectionError(
                f"{text} is given rows that vLLM has quantised in {hidden_states.dtype}, and does that itself: "
                "expects_unquantized_inputs was replaced and not asked"
            )
        ids, weights = topk_ids.to(torch.int32), topk_weights.float()
        biases, scales = (self.w1_bias, self.w2_bias), (self.w1_scale, self.w2_scale)
        return ops.experts(text, output, hidden_states, w1, w2, weights, ids, *biases, *scales, expert_map)

    return served


def unquantized_inputs(original: property) -> property:
    """In the place of `TritonExperts.expects_unquantized_inputs`: kernels here quantise what goes in themselves."""
    asked = original.fget
    if asked is None:
        raise TypeError("a property without a getter")

    def served(self: Any) -> bool:
        return hasattr(self, SERVED) or bool(asked(self))

    return property(served)


def no_workspaces(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `TritonExperts.workspace_shapes`: kernels here have their own, vLLM's hold the result."""

    def served(self: Any, *arguments: Any, **named: Any) -> Any:
        first, second, out = original(self, *arguments, **named)
        return ((1,), (1,), out) if hasattr(self, SERVED) else (first, second, out)

    return served


def fp8_backends(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `oracle.fp8._get_priority_backends`: the Triton backend first, which leaves weights as they lie.

    vLLM asks each in turn whether it can; one that is named by `--moe-backend` is not asked for here.
    """

    def ordered(*arguments: Any, **named: Any) -> list[Any]:
        return sorted(original(*arguments, **named), key=lambda backend: backend.name != "TRITON")

    return ordered

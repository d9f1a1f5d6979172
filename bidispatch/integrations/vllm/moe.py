"""Mixture of experts: the choice of experts, and unquantised experts on one rank or by expert parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import ops
from bidispatch.integrations.vllm.host import SERVED, Host, Unserved, name_of, unserved
from bidispatch.ops.schema import DimValue

__all__ = ["experts_apply", "routing", "serve_experts", "serve_router"]

_ROUTERS = ("router", "grouped_router", "bias_router")
_ACTIVATIONS = ("silu", "gelu")


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
    if experts.quant_dtype is not None or experts.quant_config.weight_quant_dtype is not None:
        raise Unserved(
            f"experts in {experts.quant_dtype or experts.quant_config.weight_quant_dtype} are not served yet"
        )
    parallel = layer.moe_config.moe_parallel_config
    against = {
        "a redundant expert's place follows the token (EPLB)": getattr(parallel, "enable_eplb", False),
        "tokens are exchanged between ranks (all2all)": getattr(parallel, "use_all2all_kernels", False),
        "adapters (LoRA) are added inside": getattr(layer.moe_config, "is_lora_enabled", False),
        "weights are applied to what goes in": layer.apply_router_weight_on_input,
        "its products have a bias": experts.w1_bias is not None or experts.w2_bias is not None,
        "its activation is clamped": getattr(experts.quant_config, "gemm1_clamp_limit", None) is not None,
    }
    for reason, holds in against.items():
        if holds:
            raise Unserved(f"{reason}, which is not served yet")
    activation = getattr(layer.activation, "value", layer.activation)
    if activation not in _ACTIVATIONS:
        raise Unserved(f"activation {activation} is not served yet; {', '.join(_ACTIVATIONS)} are")
    w13, w2 = layer.w13_weight, layer.w2_weight
    count, hidden, intermediate = w2.shape
    if tuple(w13.shape) != (count, 2 * intermediate, hidden):
        raise Unserved(f"its weights are {list(w13.shape)} and {list(w2.shape)}")
    dims: dict[str, DimValue] = {
        "experts": count,
        "top_k": int(layer.top_k),
        "hidden": hidden,
        "intermediate": intermediate,
        "activation": activation,
    }
    if layer.expert_map is not None:
        if layer.expert_map.dtype is not torch.int32:
            raise Unserved(f"its expert map is {layer.expert_map.dtype}")
        dims |= {"expert_map": True, "global_experts": int(layer.global_num_experts)}
    text = host.take(name, "experts", "moe.experts", name_of(w13.dtype, "its weight"), **dims)
    setattr(experts, SERVED, text)


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
        *rest: Any,
        **named: Any,
    ) -> Any:
        text = getattr(self, SERVED, None)
        arguments = (output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map)
        if text is None:
            return unserved(self, original, self, *arguments, *rest, **named)
        ids, weights = topk_ids.to(torch.int32), topk_weights.float()
        return ops.experts(text, output, hidden_states, w1, w2, weights, ids, expert_map)

    return served

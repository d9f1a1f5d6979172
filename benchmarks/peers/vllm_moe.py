"""vLLM's Triton fused MoE, with the tile it picks by itself or the one of its invariant mode."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from peers.installed import AbsentError

__all__ = ["INVARIANT_TILE", "experts", "invariant", "tuned_file"]

INVARIANT_TILE: Mapping[str, int] = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 32,
    "GROUP_SIZE_M": 8,
    "SPLIT_K": 1,
}
"""What it takes for every M, shape and dtype there (vLLM 0.25.1 and 0.33, fused_moe.py, get_default_config)."""

_FUSED = "vllm.model_executor.layers.fused_moe"


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AbsentError(f"{name} does not import: {error}") from error


def _quantisation(w13_scales: torch.Tensor | None, w2_scales: torch.Tensor | None) -> dict[str, Any]:
    """What tells vLLM of block-scaled fp8 weights."""
    if w13_scales is None:
        return {}
    config = _module(f"{_FUSED}.config")
    try:
        make = config.fp8_w8a8_moe_quant_config
    except AttributeError:
        raise AbsentError("this vllm has no fp8_w8a8_moe_quant_config") from None
    return {"quant_config": make(w1_scale=w13_scales, w2_scale=w2_scales, block_shape=[128, 128])}


def experts(calls: Sequence[Sequence[torch.Tensor | None]], global_experts: int) -> Callable[[int], Any]:
    """`launch(i)` of silu experts on the i-th call's arguments, in the order of `moe.experts`, without biases.

    It allocates its result, as vLLM does. Raises `AbsentError` without vLLM.
    """
    function = _module(f"{_FUSED}.fused_moe").fused_experts
    known = inspect.signature(function).parameters
    configs = [_quantisation(*call[7:9]) for call in calls]

    def launch(i: int) -> Any:
        x, w13, w2, topk_weights, topk_ids, _, _, _, _, expert_map, _ = calls[i % len(calls)]
        named = {"inplace": False, "global_num_experts": global_experts, "expert_map": expert_map}
        named |= configs[i % len(calls)]
        named = {name: value for name, value in named.items() if name in known}
        return function(x, w13, w2, topk_weights, topk_ids, **named)

    return launch


def invariant(launch: Callable[[int], Any]) -> Callable[[int], Any]:
    """The same with the tile of the invariant mode."""
    override = _module(_FUSED).override_config

    def one_tile(i: int) -> Any:
        with override(dict(INVARIANT_TILE)):
            return launch(i)

    return one_tile


def tuned_file(experts_count: int, intermediate: int, fp8: bool) -> str:
    """The file of tuned tiles that it reads for a shape on this GPU, or that there is none."""
    module = _module(f"{_FUSED}.fused_moe")
    dtype, blocks = ("fp8_w8a8", [128, 128]) if fp8 else (None, None)
    name = str(module.get_config_file_name(experts_count, intermediate, dtype, blocks))
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns for every shape that has none
    found = module.get_moe_configs(experts_count, intermediate, dtype, *(blocks or ()))
    return name if found else f"none ({name} is not there)"

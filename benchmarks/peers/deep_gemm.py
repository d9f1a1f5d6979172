"""DeepGEMM's fp8 product called directly, as a host without a dispatch layer would, and vLLM's quantisation."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from bidispatch.ops.quantize import GROUP
from peers.installed import AbsentError

__all__ = ["product", "side_by_side", "vllm_quantiser"]

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]


def product() -> Product:
    """`f(x, x_scales, weight, weight_scales, out)` with the library's own defaults. Raises `AbsentError`."""
    for name in ("deep_gemm", "vllm.third_party.deep_gemm"):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        gemm = library.fp8_gemm_nt
        return lambda x, x_scales, weight, weight_scales, out: gemm((x, x_scales), (weight, weight_scales), out)
    raise AbsentError("neither deep_gemm nor vllm.third_party.deep_gemm can be imported")


def vllm_quantiser() -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """x to (q, scales that lie as DeepGEMM reads them), allocated at each call. Raises `AbsentError`."""
    if importlib.util.find_spec("vllm") is None:
        raise AbsentError("vllm is not installed")
    try:
        utils = importlib.import_module("vllm.model_executor.layers.quantization.utils.fp8_utils")
    except (ImportError, OSError) as error:
        raise AbsentError(f"vllm does not import: {error}") from error
    quantise = utils.per_token_group_quant_fp8
    return lambda x: quantise(x, GROUP, column_major_scales=True, tma_aligned_scales=True, use_ue8m0=False)


def side_by_side(m: int, groups: int, device: torch.device) -> torch.Tensor:
    """Room for scales [m, groups] of which those of a group lie side by side, padded as TMA wants them."""
    return torch.empty_strided((m, groups), (1, -(-m // 4) * 4), dtype=torch.float32, device=device)

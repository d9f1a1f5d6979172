"""A kernel of vLLM's mixed-precision layers that leaves weights to `int4_linear`, chosen where the plan serves them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.scalar_type import scalar_types

from bidispatch import ops as catalogue
from bidispatch.errors import SelectionError, UsageError
from bidispatch.int4 import dequantize
from bidispatch.integrations.vllm.attention import plan_of
from bidispatch.integrations.vllm.host import Unserved, name_of
from bidispatch.integrations.vllm.int4_linear import checkpoint
from bidispatch.ops.schema import DimValue

__all__ = ["KeptWeights", "kernel"]

_log = logging.getLogger("vllm.bidispatch")


class KeptWeights(MPLinearKernel):  # type: ignore[misc]
    """Leaves weights as the checkpoint has them, for what comes after; until then it multiplies with them widened."""

    keeps_checkpoint = True

    @classmethod
    def get_min_capability(cls) -> int:
        """Any: the plan was asked."""
        return 0

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Whether the plan of this worker has a kernel for such a layer, and why not."""
        if c.weight_type not in (scalar_types.uint4b8, scalar_types.uint4):
            return False, f"weights are {c.weight_type}, not of 4 bits"
        if getattr(c, "has_g_idx", False):
            return False, "its groups lie apart in K (activation order)"
        k, n = c.partition_weight_shape
        dims: dict[str, DimValue] = {"n": n, "k": k, "group_size": c.group_size if c.group_size > 0 else k}
        dims["zero_points"] = c.zero_points
        try:
            dtype = name_of(c.act_type, "what goes into it")
            plan_of(get_current_vllm_config()).select_problem(catalogue.get("gemm.int4").problem(dtype, dims))
        except (Unserved, SelectionError, UsageError) as error:
            return False, "; ".join(str(error).splitlines())
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing yet."""

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What a layer gives before it is served, as MLA's is asked for its weight, or if it never is."""
        weight = checkpoint(layer, zero_points=self.config.zero_points)
        return F.linear(x, dequantize(*weight).to(x.dtype), bias)


def kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `choose_mp_linear_kernel`: `KeptWeights` where the plan serves the layer, else vLLM's choice."""

    def chosen(config: Any, *arguments: Any, **named: Any) -> Any:
        served, reason = KeptWeights.can_implement(config)
        if served:
            return KeptWeights
        _log.info("4-bit weight of %s: %s", tuple(config.partition_weight_shape), reason)
        return original(config, *arguments, **named)

    return chosen

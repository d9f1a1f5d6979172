"""What `torch.autocast` does to the functions that are overridden: casts that torch makes below them."""

from __future__ import annotations

from typing import Any

import torch

from bidispatch.integrations.aten.kernels import DTYPES
from bidispatch.rowlocal import names

__all__ = ["is_widened", "lowered"]

_NOT_LOWERED_ON_CPU = frozenset({"mv", "addmv"})
_NOT_LOWERED = frozenset({"dot", "bilinear"})
_WIDENED = names("softmax log_softmax sum layer_norm group_norm logsumexp norm nll_loss mse_loss") | {
    # On the list of torch 2.13, and not on that of 2.11.
    name
    for name in ("rms_norm",)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")
}
_WIDENED_ON_CPU = frozenset({"nll_loss", "mse_loss"})


def lowered(function: str, *tensors: Any) -> tuple[Any, ...]:
    """Operands of a product, in autocast's dtype where it casts that product. The last one says the device."""
    last = tensors[-1]
    if not isinstance(last, torch.Tensor) or not torch.is_autocast_enabled(last.device.type):
        return tensors
    if function in _NOT_LOWERED or (last.device.type == "cpu" and function in _NOT_LOWERED_ON_CPU):
        return tensors
    dtype = torch.get_autocast_dtype(last.device.type)
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in DTYPES else x for x in tensors)


def is_widened(function: str, x: torch.Tensor) -> bool:
    """Whether autocast runs a function in fp32. A processor's list is shorter than a GPU's."""
    if not torch.is_autocast_enabled(x.device.type):
        return False
    return function in (_WIDENED_ON_CPU if x.device.type == "cpu" else _WIDENED)

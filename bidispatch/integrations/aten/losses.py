"""Losses, in their ordinary cases: log_softmax, a gather, and the plan's sum.

A loss that is reduced over the batch holds the whole batch; it is free of everything else. Class weights, smoothed
labels, probabilities as targets and the arguments that torch calls deprecated are not served.
"""

# Arguments have the names that torch gives them.
# ruff: noqa: A002

from __future__ import annotations

from typing import Any

import torch

from bidispatch.integrations.aten import torch_ops
from bidispatch.integrations.aten.autocast import is_widened
from bidispatch.integrations.aten.functions import served

__all__ = ["cross_entropy", "l1_loss", "mse_loss", "nll_loss"]


def cross_entropy(
    handle: int,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`torch.nn.functional.cross_entropy` for class indices."""
    if label_smoothing or not _is_ordinary(input, target, weight, size_average, reduce, reduction):
        return NotImplemented
    dtype = torch.float32 if is_widened("log_softmax", input) else input.dtype
    logs = torch_ops.softmax(handle, input, 1 if input.dim() > 1 else 0, dtype, True)
    return _picked(handle, logs, target, ignore_index, reduction)


def nll_loss(
    handle: int,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    """`torch.nn.functional.nll_loss`."""
    if not _is_ordinary(input, target, weight, size_average, reduce, reduction):
        return NotImplemented
    return _picked(handle, input, target, ignore_index, reduction)


def _is_ordinary(x: Any, target: Any, weight: Any, size_average: Any, reduce: Any, reduction: Any) -> bool:
    if not served(x) or not x.dim() or weight is not None or size_average is not None or reduce is not None:
        return False
    shape = (*x.shape[:1], *x.shape[2:]) if x.dim() > 1 else ()
    return reduction in ("none", "mean", "sum") and target.dtype is torch.int64 and target.shape == shape


def _picked(handle: int, logs: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    """Minus the target's element of each row, those to ignore as 0; their sum, or mean over the others."""
    dim = 1 if logs.dim() > 1 else 0
    ignored = target == ignore_index
    if is_widened("nll_loss", logs):
        logs = logs.float()
    picked = -logs.gather(dim, target.masked_fill(ignored, 0).unsqueeze(dim)).squeeze(dim)
    picked = picked.masked_fill(ignored, 0.0)
    if reduction == "none":
        return picked
    total = torch_ops.reduce(handle, picked, (), False, torch.float32, False)
    if reduction == "mean":
        total = total / (~ignored).sum()
    return total.to(logs.dtype)


def mse_loss(
    handle: int,
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    """`torch.nn.functional.mse_loss`."""
    if not _is_plain(input, target, size_average, reduce, weight):
        return NotImplemented
    difference = input.float() - target.float()
    return _reduced(handle, difference * difference, input, reduction)


def l1_loss(
    handle: int,
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    """`torch.nn.functional.l1_loss`."""
    if not _is_plain(input, target, size_average, reduce, weight):
        return NotImplemented
    return _reduced(handle, (input.float() - target.float()).abs(), input, reduction)


def _is_plain(x: Any, target: Any, size_average: Any, reduce: Any, weight: Any) -> bool:
    if not (served(x) and served(target) and x.dtype is target.dtype and x.shape == target.shape):
        return False
    return size_average is None and reduce is None and weight is None


def _reduced(handle: int, loss: torch.Tensor, x: torch.Tensor, reduction: str) -> Any:
    dtype = torch.float32 if is_widened("mse_loss", x) else x.dtype
    if reduction == "none":
        return loss.to(dtype)
    if reduction not in ("mean", "sum"):
        return NotImplemented
    return torch_ops.reduce(handle, loss, (), False, torch.float32, reduction == "mean").to(dtype)

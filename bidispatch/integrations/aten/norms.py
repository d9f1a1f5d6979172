"""Norms and moments: sums of the plan's, and elementwise functions that round each result correctly, in fp32."""

# Arguments have the names that torch gives them.
# ruff: noqa: A002

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from bidispatch.integrations.aten import torch_ops
from bidispatch.integrations.aten.autocast import is_widened
from bidispatch.integrations.aten.functions import into, is_axis, served
from bidispatch.integrations.aten.kernels import DTYPES

__all__ = [
    "batch_norm",
    "group_norm",
    "layer_norm",
    "linalg_norm",
    "logsumexp",
    "norm",
    "normalize",
    "rms_norm",
    "std",
    "std_mean",
    "var",
    "var_mean",
    "vector_norm",
]


def rms_norm(handle: int, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """`torch.nn.functional.rms_norm`: the plan's kernel where a weight of x's dtype scales the last axis."""
    over = _trailing(input, normalized_shape, weight)
    if over is None:
        return NotImplemented
    if eps is None:
        eps = torch.finfo(input.dtype).eps
    widened = is_widened("rms_norm", input)
    if weight is not None and weight.dtype is input.dtype and len(over) == 1 and not widened:
        return torch_ops.rms_norm(handle, input, weight, eps)
    x = input.float()
    result = _scaled(x / torch.sqrt(_mean(handle, x * x, over) + eps), weight, None, input.shape[over[0] :])
    return result if widened else result.to(input.dtype)


def layer_norm(
    handle: int,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """`torch.nn.functional.layer_norm`."""
    over = _trailing(input, normalized_shape, weight, bias)
    if over is None:
        return NotImplemented
    result = _scaled(_standardized(handle, input.float(), over, eps), weight, bias, input.shape[over[0] :])
    return result if is_widened("layer_norm", input) else result.to(input.dtype)


def batch_norm(
    handle: int,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """`torch.nn.functional.batch_norm` by the running moments. Training takes a batch's own, which is not row-local."""
    if training or not served(input) or input.dim() < 2 or running_mean is None or running_var is None:
        return NotImplemented
    column = (input.shape[1], *(1 for _ in input.shape[2:]))
    result = (input.float() - running_mean.float().view(column)) / torch.sqrt(running_var.float().view(column) + eps)
    return _scaled(result, weight, bias, column).to(input.dtype)


def group_norm(
    handle: int,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """`torch.nn.functional.group_norm`: input [batch, channels, ...]."""
    if not served(input) or input.dim() < 2 or num_groups < 1 or input.shape[1] % num_groups or not input.numel():
        return NotImplemented
    if any(x is not None and x.shape != input.shape[1:2] for x in (weight, bias)):
        return NotImplemented
    groups = input.float().reshape(input.shape[0], num_groups, math.prod(input.shape[1:]) // num_groups)
    result = _standardized(handle, groups, [2], eps).reshape(input.shape)
    column = (input.shape[1], *(1 for _ in input.shape[2:]))
    result = _scaled(result, weight, bias, column)
    return result if is_widened("group_norm", input) else result.to(input.dtype)


def _trailing(x: Any, shape: Any, *scales: Any) -> list[int] | None:
    """The last axes, which `shape` names; None where torch refuses, or there is nothing to serve."""
    if not served(x):
        return None
    sizes = [shape] if isinstance(shape, int) else list(shape)
    if not sizes or len(sizes) > x.dim() or list(x.shape[x.dim() - len(sizes) :]) != sizes:
        return None
    if any(scale is not None and (scale.dtype not in DTYPES or list(scale.shape) != sizes) for scale in scales):
        return None
    return list(range(x.dim() - len(sizes), x.dim()))


def _mean(handle: int, x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    return torch_ops.reduce(handle, x, dims, True, torch.float32, True)


def _scaled(x: torch.Tensor, weight: Any, bias: Any, shape: Sequence[int]) -> torch.Tensor:
    """x · weight + bias in fp32, each viewed in a shape that broadcasts to x's."""
    if weight is not None:
        x = x * weight.float().view(shape)
    return x if bias is None else x + bias.float().view(shape)


def _standardized(handle: int, x: torch.Tensor, dims: Sequence[int], eps: float) -> torch.Tensor:
    centred = x - _mean(handle, x, dims)
    return centred / torch.sqrt(_mean(handle, centred * centred, dims) + eps)


def vector_norm(
    handle: int, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
) -> Any:
    """`torch.linalg.vector_norm`, of orders 1, 2 and infinity."""
    if not served(x) or dtype not in (None, *DTYPES) or ord not in (1, 2, math.inf):
        return NotImplemented
    dims = _dims(x, dim)
    if dims is None or (not x.numel() and ord == math.inf):
        return NotImplemented
    wanted = dtype or (torch.float32 if is_widened("norm", x) else x.dtype)
    wide = x.float()
    if ord == math.inf:
        result = wide.abs().amax(dims or list(range(x.dim())), keepdim)
    elif ord == 1:
        result = torch_ops.reduce(handle, wide.abs(), dims, keepdim, torch.float32, False)
    else:
        result = torch.sqrt(torch_ops.reduce(handle, wide * wide, dims, keepdim, torch.float32, False))
    return into(out, result.to(wanted), x)


def norm(
    handle: int,
    input: Any,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: Any = None,
) -> Any:
    """`torch.norm`: of vectors, or Frobenius'."""
    order = 2 if p in ("fro", None) else p
    return (
        NotImplemented
        if isinstance(order, str)
        else vector_norm(handle, input, order, dim, keepdim, dtype=dtype, out=out)
    )


def linalg_norm(
    handle: int, A: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, *, out: Any = None, dtype: Any = None
) -> Any:
    """`torch.linalg.norm`, where it is of vectors."""
    over = 1 if isinstance(dim, int) else len(dim) if dim is not None else None
    of_vectors = ord is None or over == 1 or (over is None and isinstance(A, torch.Tensor) and A.dim() == 1)
    if not of_vectors:
        return NotImplemented
    return vector_norm(handle, A, 2 if ord is None else ord, dim, keepdim, dtype=dtype, out=out)


def normalize(handle: int, input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    """`torch.nn.functional.normalize`."""
    length = vector_norm(handle, input, p, dim, True)
    return NotImplemented if length is NotImplemented else into(out, input / length.clamp_min(eps), input)


def var(handle: int, input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **options: Any) -> Any:
    """`torch.var`."""
    return _spread(handle, input, dim, unbiased, keepdim, False, **options)


def std(handle: int, input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **options: Any) -> Any:
    """`torch.std`."""
    return _spread(handle, input, dim, unbiased, keepdim, True, **options)


def var_mean(
    handle: int, input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **options: Any
) -> Any:
    """`torch.var_mean`."""
    return _with_mean(handle, var(handle, input, dim, unbiased, keepdim, **options), input, dim, keepdim)


def std_mean(
    handle: int, input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **options: Any
) -> Any:
    """`torch.std_mean`."""
    return _with_mean(handle, std(handle, input, dim, unbiased, keepdim, **options), input, dim, keepdim)


def _with_mean(handle: int, spread: Any, x: Any, dim: Any, keepdim: bool) -> Any:
    if spread is NotImplemented:
        return NotImplemented
    dims = _dims(x, None if isinstance(dim, bool) else dim)
    return spread, torch_ops.reduce(handle, x, dims or (), keepdim, x.dtype, True)


def _spread(
    handle: int,
    x: Any,
    dim: Any,
    unbiased: bool,
    keepdim: bool,
    root: bool,
    *,
    correction: Any = None,
    out: Any = None,
) -> Any:
    """The squares of what differs from the mean, summed over `dim` and divided by its size less the correction."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = _dims(x, dim) if served(x) and x.numel() else None
    if dims is None:
        return NotImplemented
    if correction is None:
        correction = 1 if unbiased else 0
    wide = x.float()
    centred = wide - _mean(handle, wide, dims)
    squares = torch_ops.reduce(handle, centred * centred, dims, keepdim, torch.float32, False)
    count = math.prod([x.shape[axis] for axis in dims]) if dims else x.numel()
    result = squares / max(0, count - correction)
    return into(out, (torch.sqrt(result) if root else result).to(x.dtype), x)


def logsumexp(handle: int, input: Any, dim: Any, keepdim: bool = False, *, out: Any = None) -> Any:
    """`torch.logsumexp` over one axis: the greatest value, less the greatest of log_softmax."""
    dims = _dims(input, dim) if served(input) and input.numel() and input.dim() else None
    if dims is None or len(dims) != 1:
        return NotImplemented
    greatest = input.float().amax(dims, keepdim)
    logs = torch_ops.softmax(handle, input, dims[0], torch.float32, True).amax(dims, keepdim)
    result = torch.where(greatest.isinf(), greatest, greatest - logs)
    return into(out, result if is_widened("logsumexp", input) else result.to(input.dtype), input)


def _dims(x: torch.Tensor, dim: Any) -> list[int] | None:
    """Axes counted from 0, none for all; None where torch refuses them."""
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if not all(is_axis(axis, x) for axis in dims):
        return None
    found = [axis % max(1, x.dim()) for axis in dims]
    return found if len(set(found)) == len(found) else None

"""torch's products, softmaxes and reductions, by torch's signatures, each as one of `torch_ops`.

`NotImplemented` is for what is not served: dtypes that the plan has no kernels for, and arguments that torch refuses.
Nothing here chooses by the number of rows.
"""

# Arguments have the names that torch gives them.
# ruff: noqa: A001, A002

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bidispatch.integrations.aten import torch_ops
from bidispatch.integrations.aten.autocast import is_widened, lowered
from bidispatch.integrations.aten.kernels import DTYPES

__all__ = [
    "addmm",
    "addmm_",
    "baddbmm",
    "baddbmm_",
    "bmm",
    "dot",
    "embedding",
    "functional_log_softmax",
    "functional_softmax",
    "functional_softmin",
    "into",
    "is_axis",
    "linear",
    "log_softmax",
    "matmul",
    "mean",
    "mm",
    "mv",
    "reflected_matmul",
    "served",
    "softmax",
    "sum",
]


def served(x: Any) -> bool:
    """Whether a tensor is of a kind that kernels take. One that only has a shape (meta) is torch's."""
    return isinstance(x, torch.Tensor) and x.dtype in DTYPES and x.layout is torch.strided and not x.is_meta


def linear(handle: int, input: Any, weight: Any, bias: Any = None) -> Any:
    """`torch.nn.functional.linear`."""
    if torch.is_autocast_enabled(weight.device.type):
        input, bias, weight = lowered("linear", input, bias, weight)
    dtype = weight.dtype
    if weight.dim() == 1 and (bias is None or bias.dim() == 0):
        product = matmul(handle, input, weight, function="linear")
        return product if product is NotImplemented or bias is None else product + bias
    if (
        dtype not in DTYPES
        or input.dtype is not dtype
        or weight.dim() != 2
        or input.dim() == 0
        or input.shape[-1] != weight.shape[1]
        or weight.is_meta
        or weight.layout is not torch.strided
    ):
        return NotImplemented
    if bias is not None and (bias.dtype is not dtype or bias.shape != weight.shape[:1]):
        return _linear_with_broadcast(handle, input, weight, bias)
    return torch_ops.linear(handle, input, weight, bias)


def _linear_with_broadcast(handle: int, input: Any, weight: Any, bias: Any) -> Any:
    """A bias of one element, or of one for every row: torch broadcasts it to the product."""
    if bias.dtype is not weight.dtype:
        return NotImplemented
    if bias.dim() <= 1 and bias.numel() == 1:
        return torch_ops.linear(handle, input, weight, bias.reshape(1).expand(weight.shape[0]).contiguous())
    return addmm(handle, bias, input, weight.t()) if input.dim() == 2 else NotImplemented


def embedding(
    handle: int,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """`torch.nn.functional.embedding` moves values, unless it is to scale them."""
    if max_norm is not None:
        return NotImplemented
    return F.embedding(input, weight, padding_idx, None, norm_type, scale_grad_by_freq, sparse)


def mm(handle: int, input: Any, mat2: Any, out_dtype: Any = None, *, out: Any = None) -> Any:
    """`torch.mm`."""
    input, mat2 = lowered("mm", input, mat2)
    if not _multipliable(2, input, mat2) or not _is_out_dtype(out_dtype, input):
        return NotImplemented
    return into(out, torch_ops.mm(handle, input, mat2, out_dtype=out_dtype), input, mat2)


def bmm(handle: int, input: Any, mat2: Any, out_dtype: Any = None, *, out: Any = None) -> Any:
    """`torch.bmm`."""
    input, mat2 = lowered("bmm", input, mat2)
    if not _multipliable(3, input, mat2) or not _is_out_dtype(out_dtype, input):
        return NotImplemented
    return into(out, torch_ops.bmm(handle, input, mat2, out_dtype=out_dtype), input, mat2)


def addmm(
    handle: int,
    input: Any,
    mat1: Any,
    mat2: Any,
    out_dtype: Any = None,
    *,
    beta: Any = 1,
    alpha: Any = 1,
    out: Any = None,
) -> Any:
    """`torch.addmm`: beta · input + alpha · mat1 @ mat2, rounded once."""
    input, mat1, mat2 = lowered("addmm", input, mat1, mat2)
    if not _addable(2, input, mat1, mat2) or not _is_out_dtype(out_dtype, mat1):
        return NotImplemented
    result = torch_ops.mm(handle, mat1, mat2, input, float(beta), float(alpha), out_dtype)
    return into(out, result, input, mat1, mat2)


def addmm_(handle: int, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """`torch.Tensor.addmm_`."""
    result = addmm(handle, input, mat1, mat2, beta=beta, alpha=alpha)
    return result if result is NotImplemented else input.copy_(result)


def baddbmm(
    handle: int,
    input: Any,
    batch1: Any,
    batch2: Any,
    out_dtype: Any = None,
    *,
    beta: Any = 1,
    alpha: Any = 1,
    out: Any = None,
) -> Any:
    """`torch.baddbmm`: beta · input + alpha · batch1 @ batch2, rounded once."""
    input, batch1, batch2 = lowered("baddbmm", input, batch1, batch2)
    if not _addable(3, input, batch1, batch2) or not _is_out_dtype(out_dtype, batch1):
        return NotImplemented
    result = torch_ops.bmm(handle, batch1, batch2, input, float(beta), float(alpha), out_dtype)
    return into(out, result, input, batch1, batch2)


def baddbmm_(handle: int, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """`torch.Tensor.baddbmm_`."""
    result = baddbmm(handle, input, batch1, batch2, beta=beta, alpha=alpha)
    return result if result is NotImplemented else input.copy_(result)


def mv(handle: int, input: Any, vec: Any, *, out: Any = None) -> Any:
    """`torch.mv`."""
    if not (served(input) and served(vec)) or input.dim() != 2 or vec.dim() != 1:
        return NotImplemented
    return matmul(handle, input, vec, out=out, function="mv")


def dot(handle: int, input: Any, tensor: Any, *, out: Any = None) -> Any:
    """`torch.dot`."""
    if not (served(input) and served(tensor)) or input.dim() != 1 or tensor.dim() != 1:
        return NotImplemented
    return matmul(handle, input, tensor, out=out, function="dot")


def matmul(
    handle: int, input: Any, other: Any, *, out: Any = None, out_dtype: Any = None, function: str = "matmul"
) -> Any:
    """`torch.matmul`. A matrix on the right multiplies the rows of all matrices on the left at once.

    `out_dtype` asks for fp32; `function` is what autocast knows the call by.
    """
    if not isinstance(input, torch.Tensor) or not isinstance(other, torch.Tensor):
        return NotImplemented
    input, other = lowered(function, input, other)
    if not (served(input) and served(other)) or input.dtype is not other.dtype or not input.dim() or not other.dim():
        return NotImplemented
    a = input[None] if input.dim() == 1 else input
    b = other[:, None] if other.dim() == 1 else other
    if a.shape[-1] != b.shape[-2]:
        return NotImplemented
    result = _matrices(handle, a, b, out_dtype)
    if input.dim() == 1:
        result = result.squeeze(-2)
    if other.dim() == 1:
        result = result.squeeze(-1)
    return into(out, result, input, other)


def reflected_matmul(handle: int, other: Any, input: Any) -> Any:
    """`torch.Tensor.__rmatmul__`."""
    return matmul(handle, input, other)


def _matrices(handle: int, a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype | None) -> torch.Tensor:
    """a [..., m, k] @ b [..., k, n], leading sizes broadcast."""
    if b.dim() == 2:
        m = a.shape[:-1]
        return torch_ops.mm(handle, a.reshape(m.numel(), a.shape[-1]), b, out_dtype=out_dtype).reshape(*m, b.shape[1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    flat_a = a.expand(*batch, *a.shape[-2:]).reshape(batch.numel(), *a.shape[-2:])
    flat_b = b.expand(*batch, *b.shape[-2:]).reshape(batch.numel(), *b.shape[-2:])
    return torch_ops.bmm(handle, flat_a, flat_b, out_dtype=out_dtype).reshape(*batch, a.shape[-2], b.shape[-1])


def softmax(handle: int, input: Any, dim: Any = None, dtype: Any = None, *, out: Any = None, axis: Any = None) -> Any:
    """`torch.softmax`. It may be called with numpy's name for `dim`, as all that have one."""
    dim = _axis("softmax", dim, axis)
    return _softmax(handle, input, dim, dtype, out, log=False)


def functional_softmax(handle: int, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """`torch.nn.functional.softmax`."""
    return _softmax(handle, input, _default_axis(input, dim), dtype, None, log=False)


def log_softmax(
    handle: int, input: Any, dim: Any = None, dtype: Any = None, *, out: Any = None, axis: Any = None
) -> Any:
    """`torch.log_softmax`."""
    dim = _axis("log_softmax", dim, axis)
    return _softmax(handle, input, dim, dtype, out, log=True)


def functional_log_softmax(handle: int, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """`torch.nn.functional.log_softmax`."""
    return _softmax(handle, input, _default_axis(input, dim), dtype, None, log=True)


def functional_softmin(handle: int, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """`torch.nn.functional.softmin`."""
    return _softmax(handle, -input, _default_axis(input, dim), dtype, None, log=False)


def _default_axis(x: Any, dim: Any) -> Any:
    """Without an axis F.softmax takes one by the number of axes, and warns."""
    return dim if dim is not None else 0 if x.dim() in (0, 1, 3) else 1


def _softmax(handle: int, x: Any, dim: Any, dtype: Any, out: Any, *, log: bool) -> Any:
    if not served(x) or (dtype is not None and dtype not in DTYPES) or not is_axis(dim, x):
        return NotImplemented
    values, out_dtype = _cast_before(x, dtype, "softmax")
    return into(out, torch_ops.softmax(handle, values, dim, out_dtype, log), x)


def mean(
    handle: int,
    input: Any,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    out: Any = None,
    axis: Any = None,
    keepdims: bool = False,
) -> Any:
    """`torch.mean`."""
    return _reduce(handle, input, _axis("mean", dim, axis), keepdim or keepdims, dtype, out, mean=True)


def sum(
    handle: int,
    input: Any,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    out: Any = None,
    axis: Any = None,
    keepdims: bool = False,
) -> Any:
    """`torch.sum`."""
    return _reduce(handle, input, _axis("sum", dim, axis), keepdim or keepdims, dtype, out, mean=False)


def _axis(function: str, dim: Any, axis: Any) -> Any:
    if dim is not None and axis is not None:
        raise TypeError(f"{function}() got dim and axis, which are one argument")
    return dim if axis is None else axis


def _reduce(handle: int, x: Any, dim: Any, keepdim: bool, dtype: Any, out: Any, *, mean: bool) -> Any:
    if not served(x) or (dtype is not None and dtype not in DTYPES):
        return NotImplemented
    dims: Sequence[int] = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    if not builtins.all(is_axis(axis, x) for axis in dims):
        return NotImplemented
    if len({axis % builtins.max(1, x.dim()) for axis in dims}) != len(dims):
        return NotImplemented
    values, out_dtype = _cast_before(x, dtype, "mean" if mean else "sum")
    return into(out, torch_ops.reduce(handle, values, dims, keepdim, out_dtype, mean), x)


def _cast_before(x: torch.Tensor, dtype: torch.dtype | None, function: str) -> tuple[torch.Tensor, torch.dtype]:
    """What `dtype=` asks for: torch rounds x to it first, which changes nothing where it is wider."""
    if dtype is None and is_widened(function, x):
        dtype = torch.float32
    if dtype is None or dtype is x.dtype:
        return x, x.dtype
    return (x, dtype) if dtype is torch.float32 else (x.to(dtype), dtype)


def is_axis(dim: Any, x: torch.Tensor) -> bool:
    ndim = builtins.max(1, x.dim())
    return isinstance(dim, int) and -ndim <= dim < ndim


def _is_out_dtype(out_dtype: Any, x: torch.Tensor) -> bool:
    return out_dtype is None or out_dtype is x.dtype or out_dtype is torch.float32


def _multipliable(ndim: int, a: Any, b: Any) -> bool:
    return (
        served(a)
        and served(b)
        and a.dtype is b.dtype
        and a.dim() == ndim
        and b.dim() == ndim
        and a.shape[-1] == b.shape[-2]
        and a.shape[:-2] == b.shape[:-2]
    )


def _addable(ndim: int, addend: Any, a: Any, b: Any) -> bool:
    """Whether beta · addend broadcasts to a @ b."""
    if not (_multipliable(ndim, a, b) and served(addend)):
        return False
    shape = (*a.shape[:-1], b.shape[-1])
    if addend.dtype not in (a.dtype, torch.float32) or addend.dim() > ndim:
        return False
    return builtins.all(x in (1, y) for x, y in zip(reversed(addend.shape), reversed(shape), strict=False))


def into(out: Any, result: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """Write a result to `out=`, with torch's rules: resized, of the result's dtype, without gradients."""
    if out is None:
        return result
    if torch.is_grad_enabled() and builtins.any(x.requires_grad for x in (out, *tensors)):
        raise RuntimeError("arguments with out=... do not support automatic differentiation, but one requires grad")
    if out.dtype is not result.dtype:
        raise RuntimeError(f"out= must be {result.dtype}, not {out.dtype}")
    if out.device != result.device:
        raise RuntimeError(f"out= must be on {result.device}, not {out.device}")
    if out.shape != result.shape:
        out.resize_(result.shape)
    written: torch.Tensor = out.copy_(result)
    return written

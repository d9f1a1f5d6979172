"""One call, by bound kernels: rows are cut from tensors of any shape, and empty ones need no kernel.

Nothing here chooses by the number of rows, nor, where bits hang on it, by strides, which code outside may let follow
it. A linear layer goes to `gemm`. So does a product of two matrices whose right one lies as the transposed weight of a
layer, if that gives the bits of `bmm`; any other goes there, which takes it as it lies. No autograd: callers see to it
that no gradient is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from bidispatch.errors import ArgumentError
from bidispatch.integrations.aten.kernels import Kernels

__all__ = ["bmm", "linear", "mm", "padded_length", "reduce", "reduced_shape", "rms_norm", "softmax"]

_BUCKET = 128


def linear(kernels: Kernels, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., k] @ weight [n, k].T + bias [n]: [..., n]."""
    n, k = weight.shape
    rows = _last_contiguous(x if x.dim() == 2 else x.reshape(-1, k) if x.numel() else x.flatten(0, -2))
    m = rows.shape[0]
    if not (m and n and k):
        out = _empty_product(rows, n, bias, x.dtype)
    else:
        kernel = kernels.product("gemm", m, n, k, x.dtype, x.dtype, bias is not None)
        out = kernel(rows, _last_contiguous(weight), bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)


def mm(
    kernels: Kernels,
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None,
    beta: float,
    alpha: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """alpha · (a [m, k] @ b [k, n]) + beta · addend, which broadcasts to [m, n]; rounded once to `out_dtype`."""
    _check_shapes(a, b, 2)
    (m, k), n = a.shape, b.shape[1]
    wanted = out_dtype if addend is None else torch.float32
    if not (m and n and k):
        return _finish(a.new_zeros((m, n), dtype=wanted), addend, beta, alpha, out_dtype)
    if b.stride(0) == 1 and b.stride(1) >= k:
        fused = _is_bias(addend, beta, alpha, n, a.dtype, out_dtype)
        wanted = out_dtype if fused else wanted
        if kernels.one_class(n, k, a.dtype, wanted, fused):
            kernel = kernels.product("gemm", m, n, k, a.dtype, wanted, fused)
            out = kernel(_last_contiguous(a), b.t(), addend if fused else None)
            return out if fused else _finish(out, addend, beta, alpha, out_dtype)
    wanted = out_dtype if addend is None else torch.float32
    return _finish(_matrices(kernels, a[None], b[None], wanted)[0], addend, beta, alpha, out_dtype)


def bmm(
    kernels: Kernels,
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None,
    beta: float,
    alpha: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """alpha · (a [z, m, k] @ b [z, k, n]) + beta · addend, which broadcasts to [z, m, n]; rounded once."""
    _check_shapes(a, b, 3)
    (matrices, m, k), n = a.shape, b.shape[2]
    wanted = out_dtype if addend is None else torch.float32
    if not (matrices and m and n and k):
        out = a.new_zeros((matrices, m, n), dtype=wanted)
    else:
        out = _matrices(kernels, a, b, wanted)
    return _finish(out, addend, beta, alpha, out_dtype)


def _matrices(kernels: Kernels, a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """a [z, m, k] @ b [z, k, n]: contiguous. Sizes that the scores of attention change at every step are padded."""
    (_, m, k), n = a.shape, b.shape[2]
    wide, long = padded_length(n), padded_length(k)
    if wide > n or long > k:
        a = F.pad(a, (0, long - k))
        b = F.pad(b, (0, wide - n, 0, long - k))
    out: torch.Tensor = kernels.product("bmm", m, wide, long, a.dtype, out_dtype)(_last_contiguous(a), b)
    return out[:, :, :n].contiguous() if wide > n else out


def softmax(kernels: Kernels, x: torch.Tensor, dim: int, out_dtype: torch.dtype, log: bool) -> torch.Tensor:
    """Softmax of x over `dim`, or its logarithm, in fp32, rounded once to `out_dtype`: contiguous, in x's shape."""
    if not x.numel():
        return x.new_empty(x.shape, dtype=out_dtype)
    moved = (x.view(1) if x.dim() == 0 else x).movedim(dim, -1)
    n = moved.shape[-1]
    rows = moved.reshape(-1, n)
    padded = padded_length(n)
    rows = F.pad(rows, (0, padded - n), value=-math.inf) if padded > n else _last_contiguous(rows)
    kernel = kernels.over_rows("log_softmax" if log else "softmax", rows.shape[0], padded, x.dtype, out_dtype)
    out: torch.Tensor = kernel(rows)[:, :n]
    return out.reshape(moved.shape).movedim(-1, dim).contiguous().view(x.shape)


def reduce(
    kernels: Kernels, x: torch.Tensor, dims: Sequence[int], keepdim: bool, out_dtype: torch.dtype, mean: bool
) -> torch.Tensor:
    """The sum or mean of x over `dims` (all, when there are none), in fp32, rounded once to `out_dtype`.

    The elements of a sum are taken in the order of x's axes, whatever its strides.
    """
    reduced = sorted({dim % max(1, x.dim()) for dim in dims}) if dims else list(range(x.dim()))
    shape = reduced_shape(x, dims, keepdim)
    kept = [dim for dim in range(x.dim()) if dim not in reduced]
    n = math.prod(x.shape[dim] for dim in reduced)
    m = math.prod(x.shape[dim] for dim in kept)
    if not (m and n):
        return x.new_full(shape, math.nan if mean else 0.0, dtype=out_dtype)
    rows = x.permute(*kept, *reduced).reshape(m, n)
    padded = padded_length(n)
    if padded == n:
        kernel = kernels.over_rows("mean" if mean else "sum", m, n, x.dtype, out_dtype)
        whole: torch.Tensor = kernel(_last_contiguous(rows))
        return whole.view(shape)
    total: torch.Tensor = kernels.over_rows("sum", m, padded, x.dtype, torch.float32)(F.pad(rows, (0, padded - n)))
    return (total / n if mean else total).to(out_dtype).view(shape)


def reduced_shape(x: torch.Tensor, dims: Sequence[int], keepdim: bool) -> list[int]:
    """The shape of a sum of x over `dims` (all, when there are none)."""
    reduced = {dim % max(1, x.dim()) for dim in dims} or set(range(x.dim()))
    return [1 if dim in reduced else size for dim, size in enumerate(x.shape) if keepdim or dim not in reduced]


def rms_norm(kernels: Kernels, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis [n], in fp32, rounded once: contiguous, in x's shape."""
    n = x.shape[-1]
    if not x.numel():
        return x.new_empty(x.shape)
    rows = _last_contiguous(x.reshape(-1, n))
    out: torch.Tensor = kernels.norm(rows.shape[0], n, x.dtype)(rows, _last_contiguous(weight), eps=eps)
    return out.view(x.shape)


def padded_length(n: int) -> int:
    """The length that rows of n are padded to, with what adds nothing to their sums.

    A kernel is made for each length of a row, and the scores of attention have another one at every step.
    """
    return 1 << max(4, (n - 1).bit_length()) if n <= _BUCKET else -(-n // _BUCKET) * _BUCKET


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _is_bias(
    addend: torch.Tensor | None, beta: float, alpha: float, n: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> bool:
    """Whether an addend is what `gemm` adds itself, before it rounds, as `_finish` does."""
    return (
        addend is not None
        and beta == alpha == 1
        and addend.shape == (n,)
        and addend.dtype is dtype
        and out_dtype is dtype
        and addend.is_contiguous()
    )


def _finish(
    product: torch.Tensor, addend: torch.Tensor | None, beta: float, alpha: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """Scale and add in fp32, each step rounded; a beta of 0 ignores what the addend holds, as aten does."""
    if addend is None:
        return product
    if alpha != 1:
        product = product * alpha
    if beta != 0:
        product = product + (addend.float() if beta == 1 else addend.float() * beta)
    return product.to(out_dtype)


def _empty_product(rows: torch.Tensor, n: int, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A product with a size of 0: no rows, no columns, or sums of nothing."""
    zeros = rows.new_zeros((rows.shape[0], n), dtype=dtype)
    return zeros if bias is None else zeros + bias


def _check_shapes(a: torch.Tensor, b: torch.Tensor, ndim: int) -> None:
    """What kernels do not see where a size is 0, and say by other names elsewhere."""
    if a.dim() != ndim or b.dim() != ndim or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        raise ArgumentError(f"shapes {list(a.shape)} and {list(b.shape)} cannot be multiplied as {ndim}-d operands")

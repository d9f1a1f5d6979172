"""Contractions in terms of matrix products: einsum, tensordot, inner, addbmm, addmv, multi_dot, bilinear, vecdot.

torch's own choose a path by sizes, which a batch of one may change. Here labels alone decide. The rows of a product are
the axes that come first in its result, so that a batch written first, as is usual, is never the columns.
"""

# Arguments have the names that torch gives them.
# ruff: noqa: A001, A002

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import torch

from bidispatch.integrations.aten import functions, torch_ops
from bidispatch.integrations.aten.autocast import lowered
from bidispatch.integrations.aten.functions import into, served

__all__ = ["addbmm", "addmv", "bilinear", "einsum", "inner", "multi_dot", "tensordot", "vecdot"]


def einsum(handle: int, equation: Any, *operands: Any) -> Any:
    """`torch.einsum`, by an equation in letters: pairs from left to right."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or not operands:
        return NotImplemented
    operands = lowered("einsum", *operands)
    if not all(served(x) and x.dtype is operands[0].dtype for x in operands):
        return NotImplemented
    parsed = _parse(equation, [x.dim() for x in operands])
    if parsed is None:
        return NotImplemented
    inputs, output = parsed
    x, labels = _diagonal(operands[0], inputs[0])
    for index in range(1, len(operands)):
        y, other = _diagonal(operands[index], inputs[index])
        kept = output + "".join(inputs[index + 1 :])
        contracted = _contract(handle, x, labels, y, other, kept)
        if contracted is NotImplemented:
            return NotImplemented
        x, labels = contracted
    x, labels = _summed(handle, x, labels, output)
    return x.permute([labels.index(label) for label in output])


def _parse(equation: str, ndims: Sequence[int]) -> tuple[list[str], str] | None:
    """The labels of each operand and of the result, one letter an axis; None for what torch refuses."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ndims):
        return None
    free = [letter for letter in string.ascii_letters if letter not in equation]
    covered = [ndim - len(term.replace("...", "")) for term, ndim in zip(terms, ndims, strict=True)]
    widest = max([count for term, count in zip(terms, covered, strict=True) if "..." in term], default=0)
    if any(count < 0 or (count and "..." not in term) for term, count in zip(terms, covered, strict=True)):
        return None
    if widest > len(free):
        return None
    dots = "".join(free[:widest])
    inputs = [term.replace("...", dots[widest - count :]) for term, count in zip(terms, covered, strict=True)]
    if not all(letter in string.ascii_letters for term in inputs for letter in term):
        return None
    if arrow:
        output = right.replace("...", dots)
    else:
        letters = "".join(terms).replace("...", "")
        output = dots + "".join(letter for letter in sorted(set(letters)) if letters.count(letter) == 1)
    if len(set(output)) != len(output) or not all(any(letter in term for term in inputs) for letter in output):
        return None
    return inputs, output


def _diagonal(x: torch.Tensor, labels: str) -> tuple[torch.Tensor, str]:
    """Each label once: an axis that is named twice is taken along the diagonal."""
    for label in sorted(set(labels)):
        while labels.count(label) > 1:
            first = labels.index(label)
            second = labels.index(label, first + 1)
            x = x.diagonal(0, first, second)
            labels = labels[:first] + labels[first + 1 : second] + labels[second + 1 :] + label
    return x, labels


def _summed(handle: int, x: torch.Tensor, labels: str, kept: str) -> tuple[torch.Tensor, str]:
    """x summed over the axes whose labels are not kept."""
    dims = [axis for axis, label in enumerate(labels) if label not in kept]
    if not dims:
        return x, labels
    total = torch_ops.reduce(handle, x, dims, False, x.dtype, False)
    return total, "".join(label for label in labels if label in kept)


def _contract(handle: int, a: torch.Tensor, a_labels: str, b: torch.Tensor, b_labels: str, kept: str) -> Any:
    """The product of two operands, summed over what both have and nothing else needs."""
    a, a_labels = _summed(handle, a, a_labels, kept + b_labels)
    b, b_labels = _summed(handle, b, b_labels, kept + a_labels)
    shared = "".join(label for label in a_labels if label in b_labels and label in kept)
    inner = "".join(label for label in a_labels if label in b_labels and label not in kept)
    own = [label for label in kept if (label in a_labels) != (label in b_labels)]
    if own and own[0] in b_labels:
        a, a_labels, b, b_labels = b, b_labels, a, a_labels
    rows = "".join(dict.fromkeys(label for label in kept if label in a_labels and label not in b_labels))
    columns = "".join(dict.fromkeys(label for label in kept if label in b_labels and label not in a_labels))
    size: dict[str, Any] = {}
    for x, labels in ((a, a_labels), (b, b_labels)):
        for label, length in zip(labels, x.shape, strict=True):
            known = size.get(label, 1)
            if known != 1 and length != 1 and length != known:
                return NotImplemented
            size[label] = known if known != 1 else length
    a = _arranged(a, a_labels, shared + rows + inner, size)
    b = _arranged(b, b_labels, shared + inner + columns, size)
    result = shared + rows + columns
    shape = [size[label] for label in result]
    z, m, k, n = [math.prod([size[label] for label in labels]) for labels in (shared, rows, inner, columns)]
    if not inner:
        left = a.reshape(*(size[label] for label in shared + rows), *(1 for _ in columns))
        right = b.reshape(*(size[label] for label in shared), *(1 for _ in rows), *(size[label] for label in columns))
        return left * right, result
    if not shared:
        product = torch_ops.mm(handle, a.reshape(m, k), b.reshape(k, n))
    else:
        product = torch_ops.bmm(handle, a.reshape(z, m, k), b.reshape(z, k, n))
    return product.reshape(shape), result


def _arranged(x: torch.Tensor, labels: str, wanted: str, size: dict[str, Any]) -> torch.Tensor:
    return x.permute([labels.index(label) for label in wanted]).expand([size[label] for label in wanted])


def tensordot(handle: int, a: Any, b: Any, dims: Any = 2, out: Any = None) -> Any:
    """`torch.tensordot`."""
    a, b = lowered("tensordot", a, b)
    if not (served(a) and served(b) and a.dtype is b.dtype) or isinstance(dims, torch.Tensor):
        return NotImplemented
    if isinstance(dims, int):
        if not 0 <= dims <= min(a.dim(), b.dim()):
            return NotImplemented
        over_a, over_b = list(range(a.dim() - dims, a.dim())), list(range(dims))
    else:
        over_a, over_b = ([d] if isinstance(d, int) else list(d) for d in dims)
    over_a = [d % max(1, a.dim()) for d in over_a]
    over_b = [d % max(1, b.dim()) for d in over_b]
    if [a.shape[d] for d in over_a] != [b.shape[d] for d in over_b]:
        return NotImplemented
    rows = [d for d in range(a.dim()) if d not in over_a]
    columns = [d for d in range(b.dim()) if d not in over_b]
    k = math.prod([a.shape[d] for d in over_a])
    shape = [*(a.shape[d] for d in rows), *(b.shape[d] for d in columns)]
    left = a.permute(*rows, *over_a).reshape(math.prod([a.shape[d] for d in rows]), k)
    right = b.permute(*over_b, *columns).reshape(k, math.prod([b.shape[d] for d in columns]))
    return into(out, torch_ops.mm(handle, left, right).reshape(shape), a, b)


def inner(handle: int, input: Any, other: Any, *, out: Any = None) -> Any:
    """`torch.inner`."""
    if not (isinstance(input, torch.Tensor) and isinstance(other, torch.Tensor)) or not input.dim() or not other.dim():
        return NotImplemented
    return tensordot(handle, input, other, ([input.dim() - 1], [other.dim() - 1]), out)


def vecdot(handle: int, x: Any, y: Any, *, dim: int = -1, out: Any = None) -> Any:
    """`torch.linalg.vecdot`: products in fp32, and their sum."""
    x, y = lowered("vecdot", x, y)
    if not (served(x) and served(y) and x.dtype is y.dtype) or not x.dim() or not y.dim():
        return NotImplemented
    result = torch_ops.reduce(handle, x.float() * y.float(), (dim,), False, torch.float32, False)
    return into(out, result.to(x.dtype), x, y)


def addbmm(handle: int, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    """`torch.addbmm`: matrices side by side are one product."""
    input, batch1, batch2 = lowered("addbmm", input, batch1, batch2)
    if not (served(batch1) and served(batch2)) or batch1.dim() != 3 or batch2.dim() != 3:
        return NotImplemented
    if batch1.shape[0] != batch2.shape[0] or batch1.shape[2] != batch2.shape[1]:
        return NotImplemented
    matrices, m, k = batch1.shape
    left = batch1.permute(1, 0, 2).reshape(m, matrices * k)
    right = batch2.reshape(matrices * k, batch2.shape[2])
    return functions.addmm(handle, input, left, right, beta=beta, alpha=alpha, out=out)


def addbmm_(handle: int, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """`torch.Tensor.addbmm_`."""
    result = addbmm(handle, input, batch1, batch2, beta=beta, alpha=alpha)
    return result if result is NotImplemented else input.copy_(result)


def addmv(handle: int, input: Any, mat: Any, vec: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    """`torch.addmv`: a product of one column."""
    input, mat, vec = lowered("addmv", input, mat, vec)
    if not (served(input) and served(mat) and served(vec)) or mat.dim() != 2 or vec.dim() != 1 or input.dim() > 1:
        return NotImplemented
    if input.dim() == 1 and input.shape[0] not in (1, mat.shape[0]):
        return NotImplemented
    column = input.expand(mat.shape[0])[:, None]
    result = functions.addmm(handle, column, mat, vec[:, None], beta=beta, alpha=alpha)
    return result if result is NotImplemented else into(out, result[:, 0], input, mat, vec)


def addmv_(handle: int, input: Any, mat: Any, vec: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """`torch.Tensor.addmv_`."""
    result = addmv(handle, input, mat, vec, beta=beta, alpha=alpha)
    return result if result is NotImplemented else input.copy_(result)


def multi_dot(handle: int, tensors: Any, *, out: Any = None) -> Any:
    """`torch.linalg.multi_dot`: from left to right, since torch's order follows the number of rows."""
    matrices = lowered("multi_dot", *tensors)
    if len(matrices) < 2 or not all(served(x) and x.dtype is matrices[0].dtype for x in matrices):
        return NotImplemented
    result = matrices[0]
    for matrix in matrices[1:]:
        result = functions.matmul(handle, result, matrix)
        if result is NotImplemented:
            return NotImplemented
    return into(out, result, *matrices)


def chain_matmul(handle: int, *matrices: Any, out: Any = None) -> Any:
    """`torch.chain_matmul`."""
    return NotImplemented if len(matrices) < 2 else multi_dot(handle, matrices, out=out)


def bilinear(handle: int, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    """`torch.nn.functional.bilinear`: input1 [..., i], input2 [..., j], weight [o, i, j]; scaled by input2 and summed
    in fp32.
    """
    if not (served(input1) and served(input2) and served(weight)) or weight.dim() != 3:
        return NotImplemented
    if not (input1.dtype is input2.dtype is weight.dtype) or input1.shape[:-1] != input2.shape[:-1]:
        return NotImplemented
    outputs, i, j = weight.shape
    if input1.shape[-1] != i or input2.shape[-1] != j or (bias is not None and bias.shape != (outputs,)):
        return NotImplemented
    rows = input1.reshape(math.prod(input1.shape[:-1]), i)
    columns = weight.permute(1, 0, 2).reshape(i, outputs * j)
    products = torch_ops.mm(handle, rows, columns, out_dtype=torch.float32).reshape(*input1.shape[:-1], outputs, j)
    total = torch_ops.reduce(handle, products * input2.float()[..., None, :], (-1,), False, torch.float32, False)
    return (total if bias is None else total + bias.float()).to(input1.dtype)

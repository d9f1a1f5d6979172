"""Matrix products on the processor: every row goes through torch calls of one shape, whatever the batch.

torch picks another kernel for another number of rows (a matrix-vector product for one row, other tiles for few), and
with it another order of additions. Here a product always has `rows` rows: they are copied into the same buffer, the
rest of it is zero, and a row's result depends neither on its place there nor on what the other rows hold. For that the
columns must fill whole panels too (see `PRODUCT_COLUMNS`): those left over at the end of a weight are a second product,
with a copy of them that is padded with zeros.

How a product is summed inside is torch's affair: fp32 through its BLAS, bf16 and fp16 through oneDNN or torch's own
loops, which accumulate in fp32 and round once. A bias goes through `torch.addmm`, which adds it before that rounding.
Where the result's dtype is not the operands', the operands are widened to fp32 first, the weight at every call.

Measured with torch 2.13 (MKL) on an AVX-512 processor: the bits do not follow the place in a block, with 1 to 64
threads; nor 1 to 4 threads; nor whether the weight is a slice of a merged one.

A bound kernel keeps its buffers, so it must not run in two threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bidispatch.int4 import dequantize
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.torch_cpu.workspace import PRODUCT_COLUMNS, row_blocks, workspace

__all__ = ["bind_bmm", "bind_gemm", "bind_int4"]


class _Product:
    """left [m, k] @ right [k, n] (+ bias [n]) into out [m, n], a block of rows at a time."""

    def __init__(self, context: BindContext) -> None:
        problem = context.problem
        n, k = problem.size("n"), problem.size("k")
        widened = problem["out_dtype"] != problem.dtype
        self._dtype: torch.dtype = torch.float32 if widened else getattr(torch, problem.dtype)
        self._rows: int = context.params.rows
        self._full = n - n % PRODUCT_COLUMNS
        self._block = workspace(self._rows, k, dtype=self._dtype)
        self._result = workspace(self._rows, self._full, dtype=self._dtype)
        # Columns are stored one after another, as a linear layer's weight has them.
        self._rest = workspace(PRODUCT_COLUMNS, k, dtype=self._dtype).T
        self._rest_bias = workspace(PRODUCT_COLUMNS, dtype=self._dtype)
        self._rest_result = workspace(self._rows, PRODUCT_COLUMNS, dtype=self._dtype)

    def __call__(self, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        for columns, part, part_bias, result in self._parts(right, bias):
            for rows in row_blocks(len(left), self._rows):
                used = rows.stop - rows.start
                self._block[:used] = left[rows]
                self._block[used:] = 0
                if part_bias is None:
                    torch.mm(self._block, part, out=result)
                else:
                    torch.addmm(part_bias, self._block, part, out=result)
                out[rows, columns] = result[:used, : columns.stop - columns.start]

    def _parts(
        self, right: torch.Tensor, bias: torch.Tensor | None
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """Which columns of out, the right operand and the bias that give them, and the buffer of their product."""
        full, n = self._full, right.shape[1]
        if full:
            part_bias = None if bias is None else bias[:full].to(self._dtype)
            yield slice(0, full), right[:, :full].to(self._dtype), part_bias, self._result
        if full < n:
            self._rest[:, : n - full] = right[:, full:]
            self._rest[:, n - full :] = 0
            if bias is not None:
                self._rest_bias[: n - full] = bias[full:]
                self._rest_bias[n - full :] = 0
            yield slice(full, n), self._rest, None if bias is None else self._rest_bias, self._rest_result


def bind_gemm(context: BindContext) -> Kernel:
    """Return `kernel(x, weight, bias, out)`; see the op `gemm`."""
    product = _Product(context)

    def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        product(x, weight.T, bias, out)

    return gemm


def bind_int4(context: BindContext) -> Kernel:
    """Return `kernel(x, weight, scales, zeros, bias, out)`; see the op `gemm.int4`.

    Every call dequantises the whole weight, into room that is kept.
    """
    product, problem = _Product(context), context.problem
    whole = workspace(problem.size("n"), problem.size("k"), dtype=getattr(torch, problem.dtype))

    def int4(
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        product(x, dequantize(weight, scales, zeros, out=whole).T, bias, out)

    return int4


def bind_bmm(context: BindContext) -> Kernel:
    """Return `kernel(a, b, out)`; see the op `bmm`.

    One matrix after another: `torch.bmm` would share the matrices among threads, and their number is the batch's.
    """
    product = _Product(context)

    def bmm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        for left, right, result in zip(a, b, out, strict=True):
            product(left, right, None, result)

    return bmm

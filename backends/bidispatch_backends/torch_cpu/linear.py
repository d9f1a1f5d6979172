"""Matrix products on the processor: every row goes through one torch call of one shape, whatever the batch.

torch picks another kernel for another number of rows (a matrix-vector product for one row, other tiles for few), and
with it another order of additions. Here a product always has `rows` rows: they are copied into the same buffer, the
rest of it is zero, and a row's result depends neither on its place there nor on what the other rows hold.

How a product is summed inside is torch's affair: fp32 through its BLAS, bf16 and fp16 through oneDNN or torch's own
loops, which accumulate in fp32 and round once. A bias goes through `torch.addmm`, which adds it before that rounding.
Where the result's dtype is not the operands', the operands are widened to fp32 first, the weight at every call.

Measured with torch 2.13 on an AVX-512 processor, for K of 31 to 4096, N of 48 to 2048, blocks of 8 to 64 rows: the bits
depend neither on the place in the block, nor on 1 to 4 threads, nor on whether the weight is a slice of a merged one.

A bound kernel keeps its buffers, so it must not run in two threads at once.
"""

from __future__ import annotations

import torch

from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.torch_cpu.workspace import row_blocks, workspace

__all__ = ["bind_bmm", "bind_gemm"]


class _Product:
    """left [m, k] @ right [k, n] (+ bias [n]) into out [m, n], a block of rows at a time."""

    def __init__(self, context: BindContext) -> None:
        problem = context.problem
        widened = problem["out_dtype"] != problem.dtype
        self._dtype: torch.dtype = torch.float32 if widened else getattr(torch, problem.dtype)
        self._rows: int = context.params.rows
        self._block = workspace(self._rows, problem.size("k"), dtype=self._dtype)
        self._result = workspace(self._rows, problem.size("n"), dtype=self._dtype)

    def __call__(self, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        right = right.to(self._dtype)
        bias = None if bias is None else bias.to(self._dtype)
        for rows in row_blocks(len(left), self._rows):
            used = rows.stop - rows.start
            self._block[:used] = left[rows]
            self._block[used:] = 0
            if bias is None:
                torch.mm(self._block, right, out=self._result)
            else:
                torch.addmm(bias, self._block, right, out=self._result)
            out[rows] = self._result[:used]


def bind_gemm(context: BindContext) -> Kernel:
    """Return `kernel(x, weight, bias, out)`; see the op `gemm`."""
    product = _Product(context)

    def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        product(x, weight.T, bias, out)

    return gemm


def bind_bmm(context: BindContext) -> Kernel:
    """Return `kernel(a, b, out)`; see the op `bmm`.

    One matrix after another: `torch.bmm` would share the matrices among threads, and their number is the batch's.
    """
    product = _Product(context)

    def bmm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        for left, right, result in zip(a, b, out, strict=True):
            product(left, right, None, result)

    return bmm

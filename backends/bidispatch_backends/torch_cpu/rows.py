"""Norms, gated activations and reductions on the processor, on blocks of rows of one shape, whatever the batch.

Some of torch's element loops end in a scalar tail, whose exp and tanh round otherwise than the vectors' do (F.gelu on
rows of 33 shows it). From 32768 elements on, 16384 in F.gelu, threads share the loop and each part has a tail; a sum
over one row that long is shared too. So rows are copied, in fp32, into a block whose row length is a multiple of 64 and
whose size follows from n alone and stays below those limits: every element then goes through the vector code. A row
longer than a block is cut into pieces of one block's length, which are summed apart and then together.

Copies, products, quotients, square roots and sums of two are exact roundings in either code, and may take any shape.

Measured with torch 2.13 on an AVX-512 processor: the bits do not depend on 1 to 4 threads. (Without the cut, a sum over
40000 elements does, and with 3 threads F.gelu of a row in 32768 elements depends on its place.)

A bound kernel keeps its buffers, so it must not run in two threads at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.torch_cpu.workspace import pad_to, row_blocks, workspace

__all__ = [
    "Blocks",
    "bind_fused_add_rms_norm",
    "bind_gated",
    "bind_gelu_tanh_and_mul",
    "bind_log_softmax",
    "bind_mean",
    "bind_qk_norm",
    "bind_rms_norm",
    "bind_silu_and_mul",
    "bind_softmax",
    "bind_sum",
    "bind_token_logprob",
]

_VECTOR = 64  # elements; a multiple of every vector loop torch has
_MOST_ROWS = 32  # more would make a single row pay for too much padding


class Blocks:
    """The shape of the blocks for rows of n elements: [rows, padded], each row `pieces` pieces long."""

    def __init__(self, n: int, block: int) -> None:
        self.n = n
        self.pieces = -(-n // block)
        self.padded = self.pieces * block if self.pieces > 1 else pad_to(_VECTOR, n)
        self.rows = max(1, min(_MOST_ROWS, block // self.padded))

    def buffer(self) -> torch.Tensor:
        return workspace(self.rows, self.padded)

    def fill(self, buffer: torch.Tensor, rows: torch.Tensor, padding: float = 0.0) -> torch.Tensor:
        """Copy up to `self.rows` rows into the buffer, and `padding` into the rest of it."""
        buffer.fill_(padding)
        buffer[: len(rows), : self.n] = rows
        return buffer

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of each row of [rows, padded]: [rows]."""
        parts = values.view(self.rows * self.pieces, -1).sum(-1)
        return parts.view(self.rows, self.pieces).sum(-1)


class _RmsNorm:
    """x / sqrt(mean(x²) + eps) · factor, for a block."""

    def __init__(self, context: BindContext, dim: str = "n") -> None:
        self.blocks = Blocks(context.problem.size(dim), context.params.block)
        self._gemma = context.problem.flag("gemma")

    def factor(self, weight: torch.Tensor) -> torch.Tensor:
        return 1 + weight.float() if self._gemma else weight.float()

    def __call__(self, block: torch.Tensor, factor: torch.Tensor, eps: float) -> torch.Tensor:
        """[rows, padded] to [rows, n]."""
        root = torch.sqrt(self.blocks.sums(block * block) / self.blocks.n + eps)
        return block[:, : self.blocks.n] / root[:, None] * factor


def bind_rms_norm(context: BindContext) -> Kernel:
    """Return `kernel(x, weight, eps, out)`; see the op `rms_norm`."""
    norm = _RmsNorm(context)
    blocks, buffer = norm.blocks, norm.blocks.buffer()

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        factor = norm.factor(weight)
        for rows in row_blocks(len(x), blocks.rows):
            out[rows] = norm(blocks.fill(buffer, x[rows]), factor, eps)[: rows.stop - rows.start]

    return rms_norm


def bind_qk_norm(context: BindContext) -> Kernel:
    """Return `kernel(q, k, q_weight, k_weight, eps, q_out, k_out)`; see the op `qk_norm`. A head is a row."""
    norm = _RmsNorm(context, "head_dim")
    blocks, buffer = norm.blocks, norm.blocks.buffer()

    def heads(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        factor = norm.factor(weight)
        flat = x.reshape(-1, blocks.n)
        normed = torch.empty_like(flat, memory_format=torch.contiguous_format)
        for rows in row_blocks(len(flat), blocks.rows):
            normed[rows] = norm(blocks.fill(buffer, flat[rows]), factor, eps)[: rows.stop - rows.start]
        out.copy_(normed.view(x.shape))

    def qk_norm(
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
        q_out: torch.Tensor,
        k_out: torch.Tensor,
    ) -> None:
        heads(q, q_weight, eps, q_out)
        heads(k, k_weight, eps, k_out)

    return qk_norm


def bind_fused_add_rms_norm(context: BindContext) -> Kernel:
    """Return `kernel(x, residual, weight, eps, out, residual_out)`; see the op `fused_add_rms_norm`.

    `out` may be x and `residual_out` may be residual: a block is read whole before it is written.
    """
    norm = _RmsNorm(context)
    blocks, buffer, other = norm.blocks, norm.blocks.buffer(), norm.blocks.buffer()
    dtype = getattr(torch, context.problem.dtype)

    def fused_add_rms_norm(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        residual_out: torch.Tensor,
    ) -> None:
        factor = norm.factor(weight)
        for rows in row_blocks(len(x), blocks.rows):
            used = rows.stop - rows.start
            total = blocks.fill(buffer, x[rows]) + blocks.fill(other, residual[rows])
            rounded = total.to(dtype)
            residual_out[rows] = rounded[:used, : blocks.n]
            out[rows] = norm(rounded.float(), factor, eps)[:used]

    return fused_add_rms_norm


def bind_gated(context: BindContext, function: Callable[[torch.Tensor], torch.Tensor]) -> Kernel:
    """Return `kernel(x, out)` for function(first half of a row of x) · the second.

    `function` sees a piece of a row, or several whole rows, so never more than a block.
    """
    n = context.problem.size("n")
    width = min(n, context.params.block)
    blocks = Blocks(width, context.params.block)
    buffer = blocks.buffer()

    def gated(x: torch.Tensor, out: torch.Tensor) -> None:
        for rows in row_blocks(len(x), blocks.rows):
            used = rows.stop - rows.start
            for columns in row_blocks(n, width):
                count = columns.stop - columns.start
                buffer.zero_()
                buffer[:used, :count] = x[rows, columns]
                gate = function(buffer)[:used, :count]
                out[rows, columns] = gate * x[rows, n + columns.start : n + columns.stop].float()

    return gated


def bind_silu_and_mul(context: BindContext) -> Kernel:
    """Return `kernel(x, out)`; see the op `silu_and_mul`."""
    return bind_gated(context, F.silu)


def bind_gelu_tanh_and_mul(context: BindContext) -> Kernel:
    """Return `kernel(x, out)`; see the op `gelu_tanh_and_mul`."""
    return bind_gated(context, lambda block: F.gelu(block, approximate="tanh"))


def _bind_softmax(context: BindContext, function: Callable[[torch.Tensor], torch.Tensor]) -> Kernel:
    """`function` gives a row to one thread, so that a row longer than a block needs no cut."""
    blocks = Blocks(context.problem.size("n"), context.params.block)
    buffer = blocks.buffer()

    def softmax(x: torch.Tensor, out: torch.Tensor) -> None:
        for rows in row_blocks(len(x), blocks.rows):
            result = function(blocks.fill(buffer, x[rows], padding=-math.inf))
            out[rows] = result[: rows.stop - rows.start, : blocks.n]

    return softmax


def bind_softmax(context: BindContext) -> Kernel:
    """Return `kernel(x, out)`; see the op `softmax`."""
    return _bind_softmax(context, lambda block: F.softmax(block, dim=-1))


def bind_log_softmax(context: BindContext) -> Kernel:
    """Return `kernel(x, out)`; see the op `log_softmax`."""
    return _bind_softmax(context, lambda block: F.log_softmax(block, dim=-1))


def bind_token_logprob(context: BindContext) -> Kernel:
    """Return `kernel(x, token_ids, out)`; see the op `token_logprob`."""
    n = context.problem.size("n")
    blocks = Blocks(n, context.params.block)
    buffer = blocks.buffer()

    def token_logprob(x: torch.Tensor, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        known = (token_ids >= 0) & (token_ids < n)
        columns = torch.where(known, token_ids, 0)[:, None]
        for rows in row_blocks(len(x), blocks.rows):
            result = F.log_softmax(blocks.fill(buffer, x[rows], padding=-math.inf), dim=-1)
            out[rows] = result[: rows.stop - rows.start].gather(-1, columns[rows])[:, 0]
        out.masked_fill_(~known, math.nan)

    return token_logprob


def bind_mean(context: BindContext) -> Kernel:
    """Return `kernel(x, out)`; see the op `mean`."""
    return _bind_sum(context, divisor=context.problem.size("n"))


def bind_sum(context: BindContext) -> Kernel:
    """Return `kernel(x, out)`; see the op `sum`."""
    return _bind_sum(context, divisor=1)


def _bind_sum(context: BindContext, divisor: int) -> Kernel:
    blocks = Blocks(context.problem.size("n"), context.params.block)
    buffer = blocks.buffer()

    def row_sum(x: torch.Tensor, out: torch.Tensor) -> None:
        for rows in row_blocks(len(x), blocks.rows):
            out[rows] = (blocks.sums(blocks.fill(buffer, x[rows])) / divisor)[: rows.stop - rows.start]

    return row_sum

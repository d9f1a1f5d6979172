"""`gemm` with fp32 results in chunks of K, each from a fresh accumulator, added in ascending order; then the bias.

In turn: a chunk's product adds to what out holds, in cuBLASLt's epilogue. At once: all chunks as a batch whose results
one kernel adds up, which fills the GPU where rows are few. Either way one rounded addition a chunk, of the same numbers
in the same order.
"""

from __future__ import annotations

import torch

from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch.runtime.scratch import empties
from bidispatch_backends.aligned import is_aligned, on_aligned
from bidispatch_backends.cublaslt.library import ONE, ZERO, cublasLt, current_stream, handle_of
from bidispatch_backends.cublaslt.params import CublasLtTile
from bidispatch_backends.cublaslt.pinned import Pinned
from bidispatch_backends.cublaslt.products import Chunks

__all__ = ["bind_chunks"]

_PARTIAL_BYTES = 4


def bind_chunks(context: BindContext, device: torch.device, chunks: Chunks) -> Kernel:
    """Return `kernel(x, weight, bias, out)`; see the op `gemm`."""
    limit, first = context.limits.max_tokens, context.limits.min_tokens
    rest = Pinned(device, chunks.rest, limit, CublasLtTile(), first) if chunks.rest else None
    in_turn = _InTurn(context, device, chunks, rest)
    at_once = _AtOnce(context, device, chunks, rest) if context.tile.batch_max_m else None
    most_at_once = at_once.rows if at_once else 0

    def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        if not (is_aligned(x) and is_aligned(weight) and is_aligned(out)):
            on_aligned(gemm, x, weight, bias, out=out)
        elif at_once and x.shape[0] <= most_at_once:
            at_once(x, weight, bias, out)
        else:
            in_turn(x, weight, bias, out)

    edges = {most_at_once, *(edge for edge in in_turn.edges if edge > most_at_once)}
    edges.update(rest.edges if rest else (), at_once.edges if at_once else ())
    gemm.edges = tuple(sorted(edge for edge in edges if 0 < edge < limit))  # type: ignore[attr-defined]
    return gemm


class _Way:
    """What both ways share: a launch of one product on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._handle = handle_of(device)
        self._stream_of, self._index = current_stream(device), device.index or 0

    def _launch(
        self, pinned: Pinned, key: tuple[int, int, int, int], x: int, weight: int, out: int, beta: int = ZERO
    ) -> None:
        """out = x @ weight.T + beta * out, all by their addresses; `key` is that of an entry of `pinned`."""
        weight_layout, x_layout, out_layout, algorithm = pinned.entry(*key)
        cublasLt.matmul(
            *(self._handle, pinned.descriptors.operation, ONE, weight, weight_layout, x, x_layout),
            *(beta, out, out_layout, out, out_layout, algorithm, 0, 0, self._stream_of(self._index)),
        )


class _InTurn(_Way):
    """One chunk after another, into out."""

    def __init__(self, context: BindContext, device: torch.device, chunks: Chunks, rest: Pinned | None) -> None:
        super().__init__(device)
        # A tile that runs chunks at once names an algorithm for that.
        tile = CublasLtTile() if context.tile.batch_max_m else context.tile
        limits = context.limits
        single = Pinned(device, chunks.single, limits.max_tokens, tile, limits.min_tokens)
        self.edges = single.edges
        products = [single] * chunks.whole + ([rest] if rest else [])
        self._steps = [
            (product, number * chunks.single.k * chunks.single.item_bytes, ONE if number else ZERO)
            for number, product in enumerate(products)
        ]

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        key = (x.shape[0], x.stride(0), weight.stride(0), out.stride(0))
        x_pointer, weight_pointer, out_pointer = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        for product, start, beta in self._steps:
            self._launch(product, key, x_pointer + start, weight_pointer + start, out_pointer, beta)
        if bias is not None:
            # Apart: in an epilogue it could be added to the last chunk before that is added to the others.
            out.add_(bias)


class _AtOnce(_Way):
    """All whole chunks as a batch, what is left of K after it, and one kernel that adds them up."""

    def __init__(self, context: BindContext, device: torch.device, chunks: Chunks, rest: Pinned | None) -> None:
        super().__init__(device)
        problem = context.problem
        self.rows = min(context.tile.batch_max_m, context.limits.max_tokens)
        self._batch, self._rest = (
            Pinned(device, chunks.batch, self.rows, context.tile, min(context.limits.min_tokens, self.rows)),
            rest,
        )
        self.edges = self._batch.edges
        self._n, self._whole, self._parts = chunks.single.n, chunks.whole, chunks.parts
        self._rest_start = chunks.whole * chunks.single.k * chunks.single.item_bytes
        (self._partials,) = empties(context, (chunks.parts * self.rows * chunks.single.n, torch.float32))
        bind_fold = load_attribute("bidispatch_backends.triton.fold:bind_fold")
        bias_dtype = problem.dtype if problem.flag("bias") else None
        self._fold = bind_fold(str(problem["out_dtype"]), chunks.single.n, bias_dtype, context.device.arch)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        m, n = x.shape[0], self._n
        key = (m, x.stride(0), weight.stride(0), n)
        x_pointer, weight_pointer, partials = x.data_ptr(), weight.data_ptr(), self._partials.data_ptr()
        self._launch(self._batch, key, x_pointer, weight_pointer, partials)
        if self._rest:
            start = self._rest_start
            last = partials + self._whole * m * n * _PARTIAL_BYTES
            self._launch(self._rest, key, x_pointer + start, weight_pointer + start, last)
        self._fold(self._partials[: self._parts * m * n].view(self._parts, m, n), bias, out)

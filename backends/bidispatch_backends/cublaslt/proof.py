"""An algorithm joins a class only after its own proof: it runs once beside the class's reference, bit for bit.

Its product is drawn at random, and in every second column it cancels: each term of the sum over K has its negative
elsewhere, so what is left is the rounding of the order in which they were added. Another order leaves something else,
and rounding to 16 bits cannot hide it. So the kernel itself is proved, with the dtype it will write.

That the reference is what other libraries of the class compute is for `bidispatch verify` to show.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from bidispatch.errors import BackendError
from bidispatch.verify.compare import bits
from bidispatch_backends.cublaslt.algorithms import Algorithm, offered
from bidispatch_backends.cublaslt.library import Descriptors, cublasLt, run
from bidispatch_backends.cublaslt.products import Product

__all__ = ["Prover", "forget_proofs"]

_log = logging.getLogger(__name__)

_ROWS, _COLUMNS, _BATCH = 256, 2048, 2
"""The most of each that a proof computes; K is never cut."""

_verdicts: dict[tuple[Any, ...], bool] = {}


def forget_proofs() -> None:
    """Prove everything anew."""
    _verdicts.clear()


class Prover:
    """Proves algorithms of one product on one device. A verdict holds for the process, for every N."""

    def __init__(self, device: torch.device, product: Product) -> None:
        self._device = device
        batch = min(product.batch, _BATCH)
        self._product = replace(product, n=min(product.n, _COLUMNS), batch=batch, row=product.k * batch)
        self._operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._expected: torch.Tensor | None = None

    def proves(self, algorithm: Algorithm, m: int) -> bool:
        """Whether the algorithm, run on up to m rows, gives the reference's bits.

        Raises `BackendError` where cuBLASLt has no reference for the product.
        """
        product = self._product
        key = (
            *(self._device, algorithm.data, product.dtype, product.out_dtype),
            *(product.k, product.bias, product.batch > 1),
        )
        if key not in _verdicts:
            _verdicts[key] = self._compare(algorithm, min(m, _ROWS))
        return _verdicts[key]

    def _compare(self, algorithm: Algorithm, rows: int) -> bool:
        expected = self._reference()[:, :rows]
        try:
            actual = self._compute(self._product, algorithm, rows)
        except cublasLt.cuBLASLtError as error:
            _log.debug("cuBLASLt algorithm %s does not run for %s: %s", algorithm.config, self._product, error)
            return False
        same = torch.equal(bits(actual), bits(expected))
        if not same:
            _log.info(
                "cuBLASLt algorithm %s adds in another order than its class (k=%d, %s to %s); it is left out",
                *(algorithm.config, self._product.k, self._product.dtype, self._product.out_dtype),
            )
        return same

    def _reference(self) -> torch.Tensor:
        """[batch, rows, columns] by the heuristic's first algorithm at many rows, each product of a batch alone."""
        if self._expected is None:
            single = replace(self._product, batch=1)
            references = offered(self._device, single, _ROWS)
            if not references:
                raise BackendError(
                    f"cuBLASLt has no algorithm for {single} that needs no workspace and adds along K in order; "
                    "`disable: {cublaslt.pinned: ...}` in a profile leaves it out"
                )
            parts = [self._compute(single, references[0], _ROWS, part) for part in range(self._product.batch)]
            self._expected = torch.cat(parts)
        return self._expected

    def _compute(self, product: Product, algorithm: Algorithm, rows: int, part: int = 0) -> torch.Tensor:
        """[product.batch, rows, columns]; a single product reads K from part * k on."""
        x, weight, bias = self._operands or self._draw()
        out_dtype = getattr(torch, product.out_dtype)
        out = torch.full((product.batch, rows, product.n), torch.nan, dtype=out_dtype, device=self._device)
        descriptors = Descriptors(product)
        if product.bias:
            descriptors.point_bias(bias.data_ptr())
        start = part * product.k * x.element_size()
        run(
            self._device,
            descriptors,
            descriptors.layouts(rows, product.row, product.row, product.n),
            algorithm.pointer,
            (x.data_ptr() + start, weight.data_ptr() + start, out.data_ptr()),
        )
        return out

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        product, device = self._product, self._device
        generator = torch.Generator(device).manual_seed(1)  # its own, so that a model's draws stay what they were
        dtype = getattr(torch, product.dtype)
        x = torch.randn(_ROWS, product.row, dtype=dtype, device=device, generator=generator)
        weight = torch.randn(product.n, product.row, dtype=dtype, device=device, generator=generator)
        half = product.k // 2
        for start in range(0, product.row, product.k):
            places = start + torch.randperm(product.k, device=device, generator=generator)
            ones, others = places[:half], places[half : 2 * half]
            x[:, others] = x[:, ones]
            weight[1::2, others] = -weight[1::2, ones]
        bias = torch.randn(product.n, device=device, generator=generator).to(getattr(torch, product.out_dtype))
        bias[1::2] = 0  # it would drown what is left where the rest cancels
        self._operands = x, weight, bias
        return self._operands

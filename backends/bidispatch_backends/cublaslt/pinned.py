"""A product with one algorithm for each range of M, fixed when it is made, and descriptors of the calls it saw."""

from __future__ import annotations

import logging
from bisect import bisect_left
from functools import lru_cache

import torch

from bidispatch.errors import BackendError, InvarianceError
from bidispatch_backends.cublaslt.algorithms import Algorithm, fits, library_version, offered, rebuild
from bidispatch_backends.cublaslt.library import Descriptors
from bidispatch_backends.cublaslt.params import CublasLtTile
from bidispatch_backends.cublaslt.products import Product, buckets
from bidispatch_backends.cublaslt.proof import Prover

__all__ = ["Pinned"]

_log = logging.getLogger(__name__)

_MOST_ENTRIES = 4096

_Choice = tuple[int, Algorithm]
"""The largest M of a range and its algorithm."""


class Pinned:
    """One product on one device.

    entries: for (m, row of x, row of weight, row of out) in elements, the layouts of weight, x and out and the address
        of the algorithm; `prepare` adds one.
    edges: the largest M of each algorithm but the last.
    """

    def __init__(self, device: torch.device, product: Product, limit: int, tile: CublasLtTile, first: int = 1) -> None:
        """Choose an algorithm for every M from `first` to `limit`: the tile's where it serves, else the heuristic's
        first that is proved. Raises `BackendError` where there is none, `InvarianceError` where each adds in another order.
        """
        self.descriptors = Descriptors(product)
        choices = _choose(device, product, limit, tile, first)
        self.edges = tuple(top for top, _ in choices[:-1])
        self.algorithms = tuple(algorithm for _, algorithm in choices)
        self.entries: dict[tuple[int, int, int, int], tuple[int, int, int, int]] = {}

    def prepare(self, m: int, x_row: int, weight_row: int, out_row: int) -> tuple[int, int, int, int]:
        """Make the entry of a layout."""
        if len(self.entries) >= _MOST_ENTRIES:
            self.entries.clear()
            self.descriptors.forget_layouts()
        layouts = self.descriptors.layouts(m, x_row, weight_row, out_row)
        entry = (*layouts, self.algorithms[bisect_left(self.edges, m)].pointer)
        self.entries[m, x_row, weight_row, out_row] = entry
        return entry

    def entry(self, m: int, x_row: int, weight_row: int, out_row: int) -> tuple[int, int, int, int]:
        """The entry of a layout, made where there is none."""
        return self.entries.get((m, x_row, weight_row, out_row)) or self.prepare(m, x_row, weight_row, out_row)


def _choose(device: torch.device, product: Product, limit: int, tile: CublasLtTile, first: int) -> list[_Choice]:
    """Rising ranges of M; neighbours of one algorithm are one range."""
    wanted = _wanted(device, product, tile)
    prover = Prover(device, product)
    choices: list[_Choice] = []
    served = False
    for low, top in buckets(limit, first):
        algorithm = None
        if wanted and all(fits(device, product, wanted, m) for m in (low, top)) and prover.proves(wanted, top):
            algorithm, served = wanted, True
        algorithm = algorithm or _first_proved(device, product, prover, low, top)
        if choices and choices[-1][1] == algorithm:
            choices.pop()
        choices.append((top, algorithm))
    if wanted and not served:
        _tell_refused(product, f"has no use for algorithm {tile.algorithm} with {product}")
    return choices


def _wanted(device: torch.device, product: Product, tile: CublasLtTile) -> Algorithm | None:
    if not tile.algorithm:
        return None
    if tile.version != library_version():
        _tell(f"is loaded, algorithm {tile.algorithm} was found with {tile.version}", logging.WARNING)
        return None
    algorithm = rebuild(device, product, tile.algorithm)
    if algorithm is None:
        _tell_refused(product, f"knows no algorithm {tile.algorithm} for {product}")
    return algorithm


def _tell_refused(product: Product, what: str) -> None:
    # Searches are for results of the operands' dtype; that `verify`, which asks for fp32, cannot have the algorithm
    # deserves no warning.
    _tell(what, logging.WARNING if product.out_dtype == product.dtype else logging.INFO)


@lru_cache(maxsize=1024)
def _tell(what: str, level: int) -> None:
    """Say once, not for every layer, why a tile's algorithm does not serve."""
    _log.log(
        level,
        "cuBLASLt %d %s; its own first choice serves, with the same bits. `bidispatch tune gemm` finds others",
        *(library_version(), what),
    )


def _first_proved(device: torch.device, product: Product, prover: Prover, low: int, top: int) -> Algorithm:
    """The heuristic's first for `top` rows that also serves `low` rows and is proved."""
    known = [found for found in offered(device, product, top) if fits(device, product, found, low)]
    for algorithm in known:
        if prover.proves(algorithm, top):
            return algorithm
    if known:
        raise InvarianceError(
            f"each of the {len(known)} algorithms cuBLASLt offers for {low} to {top} rows of {product} gives other "
            "bits than the first it offers for many rows; `disable: {cublaslt.pinned: ...}` in a profile leaves it out"
        )
    raise BackendError(
        f"cuBLASLt {library_version()} offers no algorithm for {low} to {top} rows of {product} that needs no "
        "workspace and adds along K in order; `disable: {cublaslt.pinned: ...}` in a profile leaves it out"
    )

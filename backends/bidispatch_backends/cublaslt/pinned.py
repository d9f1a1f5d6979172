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
from bidispatch_backends.cublaslt.products import Product
from bidispatch_backends.cublaslt.proof import Prover

__all__ = ["Pinned", "buckets"]

_log = logging.getLogger(__name__)

_TOPS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
_MOST_ENTRIES = 4096

_Choice = tuple[int, Algorithm]
"""The largest M of a range and its algorithm."""


def buckets(limit: int) -> list[tuple[int, int]]:
    """The ranges of M, (lowest, largest), up to the one that holds `limit`: the same whatever the limit is."""
    tops = [*_TOPS]
    while tops[-1] < limit:
        tops.append(2 * tops[-1])
    lows = [1, *(top + 1 for top in tops)]
    return [(low, top) for low, top in zip(lows, tops, strict=False) if low <= limit]


class Pinned:
    """One product on one device.

    entries: for (m, row of x, row of weight, row of out) in elements, the layouts of weight, x and out and the address
        of the algorithm; `prepare` adds one.
    edges: the largest M of each algorithm but the last.
    """

    def __init__(self, device: torch.device, product: Product, limit: int, tile: CublasLtTile) -> None:
        """Choose an algorithm for every M up to `limit`: the tile's where it serves, else the heuristic's first that
        is proved. Raises `BackendError` where there is none, `InvarianceError` where each adds in another order.
        """
        self.descriptors = Descriptors(product)
        choices = _choose(device, product, limit, tile)
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


def _choose(device: torch.device, product: Product, limit: int, tile: CublasLtTile) -> list[_Choice]:
    """Rising ranges of M; neighbours of one algorithm are one range."""
    wanted = _wanted(device, product, tile)
    prover = Prover(device, product)
    choices: list[_Choice] = []
    served = False
    for low, top in buckets(limit):
        algorithm = None
        if wanted and all(fits(device, product, wanted, m) for m in (low, top)) and prover.proves(wanted, top):
            algorithm, served = wanted, True
        algorithm = algorithm or _first_proved(device, product, prover, low, top)
        if choices and choices[-1][1] == algorithm:
            choices.pop()
        choices.append((top, algorithm))
    if wanted and not served:
        _warn_once(
            f"cuBLASLt {library_version()} has no use for algorithm {tile.algorithm} with {product}; its own first "
            "choice serves, with the same bits. `bidispatch tune gemm` finds others"
        )
    return choices


def _wanted(device: torch.device, product: Product, tile: CublasLtTile) -> Algorithm | None:
    if not tile.algorithm:
        return None
    running = library_version()
    if tile.version != running:
        _warn_once(
            f"algorithm {tile.algorithm} was found with cuBLASLt {tile.version}, {running} is loaded; its own first "
            "choice serves, with the same bits. `bidispatch tune gemm` finds others"
        )
        return None
    algorithm = rebuild(device, product, tile.algorithm)
    if algorithm is None:
        _warn_once(
            f"cuBLASLt {running} knows no algorithm {tile.algorithm} for {product}; its own first choice serves, with "
            "the same bits. `bidispatch tune gemm` finds others"
        )
    return algorithm


@lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    _log.warning(message)


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

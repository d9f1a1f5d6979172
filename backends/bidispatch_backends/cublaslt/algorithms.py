"""cuBLASLt's algorithms: which it offers for a product and M, and how one is written down and made again."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from bidispatch.device import Device
from bidispatch.ops.schema import Problem
from bidispatch_backends.aligned import ALIGNMENT
from bidispatch_backends.cublaslt.library import (
    Descriptors,
    compute_type,
    cublasLt,
    data_type,
    handle_of,
    on_device,
    set_attribute,
)
from bidispatch_backends.cublaslt.params import CublasLtParams, CublasLtTile
from bidispatch_backends.cublaslt.products import Product, chunks_of, whole_of

__all__ = ["Algorithm", "fits", "library_version", "offered", "rebuild", "search"]

SEQUENTIAL_FP32_IDS = (55,)
"""Algorithms that multiply fp32 as it is and add along K in order. Measured on an H100 with the cuBLASLt of CUDA 13.0:
id 55 gives the bits of a plain chain of fused multiply-adds, and so of Triton's IEEE tile; ids 11 and 13, which serve
few rows, do not."""

_CONFIG = (
    "ID",
    "TILE_ID",
    "STAGES_ID",
    "CTA_SWIZZLING",
    "CUSTOM_OPTION",
    "CLUSTER_SHAPE_ID",
    "INNER_SHAPE_ID",
)
"""What a configuration holds, in the order it is written. Splits and reductions across them are not in it: none are."""

_MOST_RESULTS = 200

_TILE_COUNTER_BYTES = 4
"""What a check asks for where programs take several tiles each, also of algorithms that the heuristic offers for no
workspace at all. They run without it, with the same bits (H100, cuBLASLt 13.1). A split of K asks for far more."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One algorithm, configured. Two are equal when the library could not tell them apart."""

    config: str
    """id.tile.stages.swizzle.custom.cluster.inner"""
    data: bytes
    buffer: Any = field(compare=False, repr=False)
    """The same bytes where the library reads them."""

    @property
    def pointer(self) -> int:
        return int(self.buffer.ctypes.data)


def library_version() -> int:
    """The version of the cuBLASLt that is loaded, such as 130200."""
    return int(cublasLt.get_version())


@lru_cache(maxsize=4096)
def offered(device: torch.device, product: Product, m: int) -> tuple[Algorithm, ...]:
    """Every algorithm the heuristic offers for m rows without a workspace and without splitting K, each once, in its
    order. For fp32 as it is, only those that are known to add in order. Layers of one shape share the answer.
    """
    trusted = SEQUENTIAL_FP32_IDS if product.is_fp32 else ()
    descriptors = Descriptors(product)
    layouts = descriptors.layouts(m, product.row, product.row, product.n)
    results = _ask(device, descriptors, layouts)
    for number in trusted:  # for few rows the heuristic's own list may hold none of them
        results += _ask(device, descriptors, layouts, number)
    found: dict[str, Algorithm] = {}
    for result in results:
        if result["state"] or result["workspace_size"]:
            continue
        algorithm = _algorithm(np.array([result["algo"]], cublasLt.matmul_algo_dtype))
        splits = _read(algorithm.pointer, "SPLITK_NUM") or 1
        number = int(algorithm.config.partition(".")[0])
        if splits == 1 and not _read(algorithm.pointer, "REDUCTION_SCHEME") and (not trusted or number in trusted):
            found.setdefault(algorithm.config, algorithm)
    return tuple(found.values())


def _ask(
    device: torch.device, descriptors: Descriptors, layouts: tuple[int, int, int], number: int | None = None
) -> list[Any]:
    """Ask the heuristic, among all algorithms or those of one id; an empty list where it supports nothing."""
    results = np.zeros(_MOST_RESULTS, cublasLt.matmul_heuristic_result_dtype)
    count = np.zeros(1, np.int32)
    preference = _preference(limited=number is not None)
    try:
        if number is not None:
            blank = _blank(device, descriptors.product, number)
            if blank is None:
                return []
            results["algo"] = blank[0]
        cublasLt.matmul_algo_get_heuristic(
            *(handle_of(device), descriptors.operation, *layouts, layouts[2], preference),
            *(_MOST_RESULTS, results.ctypes.data, count.ctypes.data),
        )
    except cublasLt.cuBLASLtError as error:
        if "NOT_SUPPORTED" not in str(error):
            raise
        return []
    finally:
        cublasLt.matmul_preference_destroy(preference)
    return list(results[: int(count[0])])


def _preference(limited: bool) -> int:
    values = {"MAX_WORKSPACE_BYTES": 0, "REDUCTION_SCHEME_MASK": 0}
    values |= {f"MIN_ALIGNMENT_{operand}_BYTES": ALIGNMENT for operand in "ABCD"}
    if limited:
        values["SEARCH_MODE"] = int(cublasLt.MatmulSearch.LIMITED_BY_ALGO_ID)
    preference: int = cublasLt.matmul_preference_create()
    for name, value in values.items():
        set_attribute("matmul_preference", preference, name, value)
    return preference


def _blank(device: torch.device, product: Product, number: int) -> Any:
    """An algorithm of that id as the library initialises it, or None where it has none for these dtypes."""
    buffer = np.zeros(1, cublasLt.matmul_algo_dtype)
    kind, out_kind = data_type(product.dtype), data_type(product.out_dtype)
    try:
        cublasLt.matmul_algo_init(
            *(handle_of(device), compute_type(), data_type("float32"), kind, kind, out_kind, out_kind),
            *(number, buffer.ctypes.data),
        )
    except cublasLt.cuBLASLtError:  # however the library words it, this is not an algorithm of this product
        return None
    return buffer


def rebuild(device: torch.device, product: Product, config: str) -> Algorithm | None:
    """The algorithm of a written configuration, or None where this cuBLASLt has no such algorithm."""
    number, *values = (int(word) for word in config.split("."))
    with on_device(device):
        buffer = _blank(device, product, number)
    if buffer is None:
        return None
    for name, value in zip(_CONFIG[1:], values, strict=True):
        if value:  # a blank algorithm has zeros, and lacks the attributes it has no use for
            try:
                set_attribute("matmul_algo_config", buffer.ctypes.data, name, value)
            except cublasLt.cuBLASLtError:
                return None
    return _algorithm(buffer)


def fits(device: torch.device, product: Product, algorithm: Algorithm, m: int) -> bool:
    """Whether the library says the algorithm can serve m rows, without a workspace but for a counter of tiles."""
    descriptors = Descriptors(product)
    layouts = descriptors.layouts(m, product.row, product.row, product.n)
    result = np.zeros(1, cublasLt.matmul_heuristic_result_dtype)
    try:
        with on_device(device):
            cublasLt.matmul_algo_check(
                *(handle_of(device), descriptors.operation, *layouts, layouts[2]),
                *(algorithm.pointer, result.ctypes.data),
            )
    except cublasLt.cuBLASLtError:
        return False
    return not result["state"][0] and result["workspace_size"][0] <= _TILE_COUNTER_BYTES


def _algorithm(buffer: Any) -> Algorithm:
    config = ".".join(str(_read(buffer.ctypes.data, name)) for name in _CONFIG)
    return Algorithm(config, buffer.tobytes(), buffer)


def _read(algorithm: int, name: str) -> int:
    """One attribute of an algorithm; 0 where it has none of that name."""
    attribute = getattr(cublasLt.MatmulAlgoConfigAttribute, name)
    value = np.zeros(1, cublasLt.get_matmul_algo_config_attribute_dtype(int(attribute)))
    written = np.zeros(1, np.uint64)
    try:
        cublasLt.matmul_algo_config_get_attribute(
            algorithm, int(attribute), value.ctypes.data, value.nbytes, written.ctypes.data
        )
    except cublasLt.cuBLASLtError:
        return 0
    return int(value[0])


def search(device: Device, problem: Problem, params: CublasLtParams, m: int) -> list[CublasLtTile]:
    """Every tile that `tune` may try for calls of m rows, the library's first choice first.

    The heuristic names at most eight for an M: those it names for half and for more rows are tried too, where they
    serve m. Where K is walked in chunks there are those that run them in turn, then those that run them at once. Each
    is proved against its class when it is bound, as any other.
    """
    place = torch.device(device.torch_device)
    chunks = chunks_of(problem, params)
    ways = [(whole_of(problem, params), 0)] if chunks is None else [(chunks.single, 0), (chunks.batch, m)]
    version = library_version()
    with on_device(place):
        return [
            CublasLtTile(algorithm=found.config, version=version, batch_max_m=rows)
            for product, rows in ways
            for found in _around(place, product, m)
        ]


def _around(device: torch.device, product: Product, m: int) -> list[Algorithm]:
    here = offered(device, product, m)
    elsewhere = [found for rows in (max(1, m // 2), 2 * m, 4 * m) for found in offered(device, product, rows)]
    others = {found.config: found for found in elsewhere if fits(device, product, found, m)}
    return [*here, *(found for config, found in others.items() if config not in {known.config for known in here})]

"""Memory that a bound kernel keeps, and the sizes that products and rows are cut and padded to."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["PRODUCT_COLUMNS", "pad_to", "row_blocks", "workspace"]

PRODUCT_COLUMNS = 32
"""Every product has a multiple of this many columns. MKL in fp32 gives columns that fill no panel, of the product or of
one thread's share of it, to code whose sums follow the row's place: products of fewer than 12 columns with any number
of threads, of up to 107 with 4 threads, of up to 331 with 16. With 1 to 64 threads no multiple of 16 did."""


def pad_to(multiple: int, size: int) -> int:
    """The least multiple that is no smaller than `size`."""
    return -(-size // multiple) * multiple


def workspace(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uninitialised contiguous memory on the processor, which torch aligns to 64 bytes.

    A kernel bound inside `torch.inference_mode` may be called outside it, where memory made inside cannot be written.
    """
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cpu")


def row_blocks(count: int, rows: int) -> Iterator[slice]:
    """Cut `count` rows into slices of `rows`; the last may be shorter."""
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))

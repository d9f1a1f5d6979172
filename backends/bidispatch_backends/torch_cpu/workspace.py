"""Memory that a bound kernel keeps, and the cutting of rows into blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["row_blocks", "workspace"]


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

"""Operands as libraries want them: rows and addresses on 16 bytes. Imports torch; kernels import it when bound."""

from __future__ import annotations

import torch

from bidispatch.runtime.context import Kernel

__all__ = ["ALIGNMENT", "is_aligned", "on_aligned"]

ALIGNMENT = 16
"""Bytes. What TMA and 16-byte vector loads need of an address and of the distance from one row to the next."""


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a vector, or a matrix with contiguous rows, begins on 16 bytes, and each of its rows does, in a place of
    its own (rows of an expanded tensor share one).
    """
    if tensor.data_ptr() % ALIGNMENT:
        return False
    if tensor.dim() == 1:
        return True
    row = tensor.stride(0)
    return row >= tensor.shape[1] and row * tensor.element_size() % ALIGNMENT == 0


def on_aligned(kernel: Kernel, *operands: torch.Tensor | None, out: torch.Tensor) -> None:
    """Call a kernel, `out` last, with an aligned copy of every tensor that is not aligned. A copy changes no bit."""
    target = out if is_aligned(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    kernel(*(None if operand is None else _aligned(operand) for operand in operands), target)
    if target is not out:
        out.copy_(target)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)

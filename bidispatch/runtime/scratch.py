"""Memory that bound kernels write over one after another: a workspace that keeps nothing from one call to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bidispatch.runtime.context import BindContext

__all__ = ["Scratch", "empties"]

_ALIGNMENT = 256
_STEP = 16 << 20

_Wanted = Sequence[tuple[int, torch.dtype]]


class Scratch:
    """One block of memory a device, for kernels that never run at once: on one stream, called by one thread.

    A kernel that needs more than there is gets a new block, which later ones share; those bound before keep theirs.
    step: what a block's size is a multiple of, so that kernels whose needs hardly differ share one.
    """

    def __init__(self, step: int = _STEP) -> None:
        self._step = step
        self._blocks: dict[str, torch.Tensor] = {}

    def take(self, wanted: _Wanted, device: str) -> tuple[torch.Tensor, ...]:
        """Tensors of so many elements, side by side from the block's beginning. Their contents are another kernel's."""
        sizes = [-(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for count, dtype in wanted]
        block = self._blocks.get(device)
        if block is None or block.numel() < sum(sizes):
            size = -(-sum(sizes) // self._step) * self._step
            block = self._blocks[device] = _uninitialised(size, torch.uint8, device)
        tensors, start = [], 0
        for (count, dtype), size in zip(wanted, sizes, strict=True):
            tensors.append(block[start : start + count * dtype.itemsize].view(dtype))
            start += size
        return tuple(tensors)

    def forget(self) -> None:
        """Leave the blocks to the kernels that have them."""
        self._blocks.clear()


def empties(context: BindContext, *wanted: tuple[int, torch.dtype]) -> tuple[torch.Tensor, ...]:
    """Uninitialised tensors of so many elements each: from the scratch that a kernel is bound with, or its own."""
    device = context.device.torch_device
    if context.scratch is not None:
        return context.scratch.take(wanted, device)
    return tuple(_uninitialised(count, dtype, device) for count, dtype in wanted)


def _uninitialised(count: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """What is made in inference mode could not be written outside of it."""
    with torch.inference_mode(False):
        return torch.empty(count, dtype=dtype, device=device)

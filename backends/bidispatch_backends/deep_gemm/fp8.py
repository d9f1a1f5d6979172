"""`gemm.fp8_block` by DeepGEMM's `fp8_gemm_nt`. Imports the library when a kernel is bound.

It compiles a kernel, for seconds, when a call first needs its tile, as `deep_gemm.bf16` does. Scales of x whose groups
lie side by side (strides 1 and M rounded up to 4, on 16 bytes) go in as they are; others are copied into such a place
first, in a launch of its own: the library's own transposition faults on addresses that are not multiples of 16.
"""

from __future__ import annotations

import torch

from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.aligned import ALIGNMENT, is_aligned, on_aligned
from bidispatch_backends.deep_gemm.library import edges, library

__all__ = ["bind_fp8"]

_FLOATS = ALIGNMENT // torch.float32.itemsize


def bind_fp8(context: BindContext) -> Kernel:
    """Return `kernel(x, x_scales, weight, weight_scales, out)`; see the op `gemm.fp8_block`.

    compiled_dims="" compiles a kernel for every N and K, not one for each.
    """
    gemm = library().fp8_gemm_nt

    def fp8(
        x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, out: torch.Tensor
    ) -> None:
        if not (is_aligned(x) and is_aligned(weight) and is_aligned(out)):

            def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
                fp8(x, x_scales, weight, weight_scales, out)

            on_aligned(product, x, weight, out=out)
            return
        if not _is_transposed(x_scales):
            x_scales = _transposed(x_scales)
        groups = weight_scales.shape[1]
        # A matrix of one row is contiguous to torch, whatever its strides; the library compares them.
        if weight_scales.stride() != (groups, 1) or weight_scales.data_ptr() % ALIGNMENT:
            weight_scales = weight_scales.clone(memory_format=torch.contiguous_format)
        gemm((x, x_scales), (weight, weight_scales), out, compiled_dims="")

    fp8.edges = edges(context.limits)  # type: ignore[attr-defined]
    return fp8


def _is_transposed(scales: torch.Tensor) -> bool:
    """Whether scales [m, groups] lie as TMA reads them."""
    return scales.stride() == (1, _padded(scales)) and scales.data_ptr() % ALIGNMENT == 0


def _transposed(scales: torch.Tensor) -> torch.Tensor:
    """A copy that lies so."""
    strides = (1, _padded(scales))
    return torch.empty_strided(scales.shape, strides, dtype=scales.dtype, device=scales.device).copy_(scales)


def _padded(scales: torch.Tensor) -> int:
    return -(-scales.shape[0] // _FLOATS) * _FLOATS

"""`gemm` by cuBLASLt with K whole in one product; `chunks.py` has fp32 in chunks of K."""

from __future__ import annotations

import torch

from bidispatch.errors import BackendError
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.aligned import ALIGNMENT, is_aligned, on_aligned
from bidispatch_backends.cublaslt.chunks import bind_chunks
from bidispatch_backends.cublaslt.library import ONE, ZERO, cublasLt, current_stream, handle_of, on_device, workspace
from bidispatch_backends.cublaslt.pinned import Pinned
from bidispatch_backends.cublaslt.products import chunks_of, whole_of

__all__ = ["bind_gemm"]


def bind_gemm(context: BindContext) -> Kernel:
    """Return `kernel(x, weight, bias, out)`; see the op `gemm`. Its `edges` are the M at which the algorithm changes.

    Everything cuBLASLt is asked, is asked here: a launch consults no heuristic and reads nothing from the device.
    """
    device = torch.device(context.device.torch_device)
    chunks = chunks_of(context.problem, context.params)
    handle_of(device)  # a library that is not there shall say so before anything else
    try:
        with on_device(device):
            return _bind_whole(context, device) if chunks is None else bind_chunks(context, device, chunks)
    except cublasLt.cuBLASLtError as error:
        raise BackendError(f"cuBLASLt failed while {context.problem} was bound: {error}") from error


def _bind_whole(context: BindContext, device: torch.device) -> Kernel:
    """One product. A bias is added to the accumulator, before it is rounded."""
    product = whole_of(context.problem, context.params)
    limits = context.limits
    pinned = Pinned(device, product, limits.max_tokens, context.tile, limits.min_tokens)
    point_bias = pinned.descriptors.point_bias
    # cuBLASLt takes a bias in out's dtype; widening a 16-bit one is exact.
    widened = None
    if product.bias and product.out_dtype != product.dtype:
        widened = workspace(product.n, device)
        point_bias(widened.data_ptr())
    pointed = 0
    # A launch is host time, so it finds everything in its own variables.
    entries, prepare = pinned.entries, pinned.prepare
    handle, operation, matmul = handle_of(device), pinned.descriptors.operation, cublasLt.matmul
    stream_of, index, one, zero, low_bits = current_stream(device), device.index or 0, ONE, ZERO, ALIGNMENT - 1

    def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        nonlocal pointed
        key = (x.shape[0], x.stride(0), weight.stride(0), out.stride(0))
        x_pointer, weight_pointer, out_pointer = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        entry = entries.get(key)
        if (x_pointer | weight_pointer | out_pointer) & low_bits or (
            entry is None and not (is_aligned(x) and is_aligned(weight) and is_aligned(out))
        ):
            on_aligned(gemm, x, weight, bias, out=out)
            return
        if bias is not None:
            if widened is not None:
                widened.copy_(bias)
            elif (bias_pointer := bias.data_ptr()) != pointed:
                if bias_pointer & low_bits:
                    on_aligned(gemm, x, weight, bias, out=out)
                    return
                point_bias(bias_pointer)
                pointed = bias_pointer
        weight_layout, x_layout, out_layout, algorithm = entry or prepare(*key)
        matmul(
            handle,
            operation,
            one,
            weight_pointer,
            weight_layout,
            x_pointer,
            x_layout,
            zero,
            out_pointer,
            out_layout,
            out_pointer,
            out_layout,
            algorithm,
            0,
            0,
            stream_of(index),
        )

    gemm.edges = pinned.edges  # type: ignore[attr-defined]
    return gemm

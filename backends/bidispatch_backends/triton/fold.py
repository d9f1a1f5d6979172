"""The ordered sum of partial products, for backends whose library gives these and cannot add them in order itself."""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch_backends.triton.launch import ArgumentType, Launch, ceil_div, options, pointer

__all__ = ["bind_fold", "fold_kernel", "fold_launch"]

_BLOCK = 1024


@triton.jit(do_not_specialize=["m", "stride_chunk", "chunks"])
def fold_kernel(partial_ptr, bias_ptr, out_ptr, m, n, stride_out_row, stride_chunk, chunks, BLOCK: tl.constexpr):
    """out = the sum of partial [chunks, m, n] in ascending order, plus bias; BLOCK columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    partial_ptrs = partial_ptr + row * n + columns
    total = tl.load(partial_ptrs, mask=inside, other=0.0)
    for _ in range(1, chunks):
        partial_ptrs += stride_chunk
        total += tl.load(partial_ptrs, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out_row + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def fold_launch(dtype: str, n: int, bias: str | None, arch: Arch) -> Launch:
    """The fold alone: partial [chunks, m, n] fp32 to out [m, n] of a dtype; `bias` is its dtype, or None."""
    arguments: dict[str, ArgumentType] = {
        "partial_ptr": pointer("float32"),
        "bias_ptr": pointer(bias) if bias else None,
        "out_ptr": pointer(dtype),
        "m": "i32",
        "n": n,
        "stride_out_row": n,
        "stride_chunk": "i64",
        "chunks": "i32",
    }
    return Launch(fold_kernel, arguments, {"BLOCK": _BLOCK}, options(arch, 4, num_stages=1, fp_fusion=False))


def bind_fold(dtype: str, n: int, bias: str | None, arch: Arch) -> Callable[..., None]:
    """`fold(partial, bias, out)`: partial [chunks, m, n] fp32, contiguous; bias [n] or None; out [m, n], rows of any
    stride. Launches on the current stream.
    """
    launch = fold_launch(dtype, n, bias, arch)
    blocks = ceil_div(n, _BLOCK)

    def fold(partial: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        chunks, m, _ = partial.shape
        launch((m, blocks), partial, bias, out, m, n, out.stride(0), m * n, chunks)

    return fold

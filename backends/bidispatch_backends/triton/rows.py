"""What kernels over whole rows share: the sum whose order no layout can change, and how wide a tile of rows is.

A tile is [rows, lanes]. The row axis takes no part in a sum, so how many rows a program has changes no bit.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, options

__all__ = ["row_block", "row_launch", "tree_sum"]

# Where halves end and adjacent pairs begin. What lies above is a thread's own in a tile of up to 8 warps of 8 elements
# a thread, and adds without talking; below, pairs go from a thread's elements to its warp's and last to other warps.
_FOLDED = tl.constexpr(2048)


@triton.jit
def row_block(ROWS: tl.constexpr, rows):
    """This program's rows [ROWS, 1], as 64 bits, and which of them exist."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    return row.to(tl.int64), row < rows


@triton.jit
def tree_sum(values):
    """The sum of each row of `values` [rows, a power of two]: [rows].

    The upper half is added to the lower one until 2048 lanes are left, then adjacent pairs are added. A `tl.sum` over
    all lanes follows the layout, and with it the alignment of the row's pointer and the number of warps. A sum of two
    is the same in either order, so this one follows nothing. Lanes of zero change no bit but the sign of a zero.
    """
    for _ in tl.static_range(20):
        if values.shape[1] > _FOLDED:
            values = tl.sum(tl.reshape(values, (values.shape[0], 2, values.shape[1] // 2)), axis=1)
    for _ in tl.static_range(20):
        if values.shape[1] > 1:
            values = tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)), axis=2)
    return tl.reshape(values, (values.shape[0],))


def row_launch(
    kernel: Any, arguments: Mapping[str, ArgumentType], arch: Arch, num_warps: int, **constants: Constant
) -> Launch:
    """A launch of a kernel over rows. `arguments` as in `Launch`."""
    # The contraction of products and sums would be the compiler's choice; the kernels say `tl.fma` where they want it.
    return Launch(kernel, arguments, constants, options(arch, num_warps, num_stages=1, fp_fusion=False))

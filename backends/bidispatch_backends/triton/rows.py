"""What kernels over whole rows share: the sum whose order no layout can change, and their launches."""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, options, power_of_two
from bidispatch_backends.triton.params import RowParams, RowTile

__all__ = ["pairwise_sum", "row_launch"]

_WIDEST_WARP = 64


@triton.jit
def pairwise_sum(lanes):
    """The sum of `lanes` [a power of two], adjacent pairs first.

    A `tl.sum` over all lanes follows the layout, and with it the alignment of the row's pointer and the number of
    warps. A sum of two is the same in either order, so this one follows nothing.
    """
    for _ in tl.static_range(20):
        if lanes.shape[0] > 1:
            lanes = tl.sum(tl.reshape(lanes, (lanes.shape[0] // 2, 2)), axis=1)
    return tl.sum(lanes, axis=0)


def row_launch(
    kernel: Any,
    arguments: Mapping[str, ArgumentType],
    problem: Problem,
    params: RowParams,
    tile: RowTile,
    arch: Arch,
    **constants: Constant,
) -> Launch:
    """A launch of one program a row. `arguments` as in `Launch`, `constants` besides N and BLOCK."""
    n = problem.size("n")
    # Lanes past the row add zeros, which changes no bit. With fewer lanes than threads two threads would hold the
    # same element, and an in-place kernel's slower one would read what the faster one has written.
    block = min(params.block, max(power_of_two(n), _WIDEST_WARP * tile.num_warps))
    # The contraction of products and sums would be the compiler's choice; the kernels say `tl.fma` where they want it.
    return Launch(
        kernel,
        arguments,
        {"N": n, "BLOCK": block, **constants},
        options(arch, tile.num_warps, num_stages=1, fp_fusion=False),
    )

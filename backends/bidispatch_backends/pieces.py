"""Calls of many rows made as calls of fewer, so that what lies between launches takes no more than a given memory.

For kernels whose rows take no part in each other: then no bit follows where a call is cut. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from bidispatch import ops
from bidispatch.runtime.context import Kernel

__all__ = ["in_pieces", "most_rows"]

_STEP = 128
"""Pieces are multiples of it, so that what they hold begins on addresses as aligned as the whole call's: kernels are
compiled apart for other addresses."""


def most_rows(bytes_of: Callable[[int], int], limit: int, rows: int) -> int:
    """The most of so many rows whose workspace has at most `limit` bytes; one step where even that has more.

    bytes_of: the bytes for so many rows, which rise with them.
    """
    if bytes_of(rows) <= limit:
        return rows
    steps = bisect_right(range(1, rows // _STEP + 1), limit, key=lambda step: bytes_of(step * _STEP))
    return min(rows, max(1, steps) * _STEP)


def in_pieces(kernel: Kernel, op: str, most: int, rows: int) -> Kernel:
    """A kernel for calls of up to `rows` rows, of one bound for `most`: pieces of about the same size, in their order.

    How many there are follows the rows of a call alone, which are fixed in a captured graph.
    """
    if most >= rows:
        return kernel
    taken = ops.get(op)
    has_rows = tuple(each.shape[0] == "m" for each in (*taken.arguments, *taken.outputs))
    first = taken.arguments.index(next(each for each in taken.arguments if each.shape[0] == "m"))

    def launch(*arguments: Any) -> None:
        count = len(arguments[first])
        if count <= most:
            kernel(*arguments)
            return
        pieces = -(-count // most)
        size = min(most, -(-count // (pieces * _STEP)) * _STEP)
        for begin in range(0, count, size):
            kernel(
                *(
                    argument[begin : begin + size] if cut and argument is not None else argument
                    for argument, cut in zip(arguments, has_rows, strict=True)
                )
            )

    launch.edges = getattr(kernel, "edges", ())  # type: ignore[attr-defined]
    return launch

"""A check of what a paged batch says, which nobody knows without asking the GPU: on with `BIDISPATCH_DEBUG=1`.

Kernels take block tables, lengths and starts as they are, since they must not wait for the GPU. A page that is not
there is then read from somewhere else, or faults.
"""

from __future__ import annotations

import logging
import os
from itertools import pairwise
from typing import Any

import torch

from bidispatch.errors import ArgumentError
from bidispatch.ops.schema import Op, Problem
from bidispatch.runtime.context import Kernel

__all__ = ["checked", "wanted"]

_log = logging.getLogger(__name__)


def wanted(op: Op) -> bool:
    """Whether calls of this op are to be checked: it pages, and the variable is set when it is bound."""
    return bool(op.caches) and os.environ.get("BIDISPATCH_DEBUG") == "1"


def checked(op: Op, problem: Problem, kernel: Kernel) -> Kernel:
    """The same kernel; each call first reads the batch's integers, and raises `ArgumentError` for those that lie.

    A call that is captured in a CUDA graph cannot be checked: it is warned of, once.
    """
    places = {argument.name: place for place, argument in enumerate(op.arguments)}
    cache = places[op.caches[0]]
    warned = False

    def launch(*arguments: Any) -> None:
        nonlocal warned
        table, lengths, starts = (arguments[places[name]] for name in ("block_table", "seq_lens", "query_start_loc"))
        if table.is_cuda and torch.cuda.is_current_stream_capturing():
            if not warned:
                _log.warning("%s: BIDISPATCH_DEBUG checks no call that is captured in a CUDA graph", problem)
                warned = True
        else:
            _check(problem, table, lengths, starts, len(arguments[places["q"]]), len(arguments[cache]))
        kernel(*arguments)

    launch.edges = getattr(kernel, "edges", ())  # type: ignore[attr-defined]
    return launch


def _check(
    problem: Problem,
    table: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    tokens: int,
    pages: int,
) -> None:
    page_size = problem.size("page_size")
    first, counts = starts.tolist(), lengths.tolist()
    if first[0] != 0 or any(after < before for before, after in pairwise(first)):
        raise ArgumentError(f"{problem}: query_start_loc must start at 0 and never fall, it is {_short(first)}")
    if first[-1] > tokens:
        raise ArgumentError(f"{problem}: query_start_loc ends at {first[-1]}, but q has {tokens} rows")
    room = table.shape[1] * page_size
    for sequence, length in enumerate(counts):
        queries = first[sequence + 1] - first[sequence]
        if not queries <= length:
            raise ArgumentError(f"{problem}: sequence {sequence} has {queries} query rows, but seq_lens says {length}")
        if length > room:
            raise ArgumentError(f"{problem}: sequence {sequence} has {length} positions, its block table {room}")
    begins = torch.arange(table.shape[1], device=table.device) * page_size
    used = begins < lengths[:, None]
    if window := int(problem.dims.get("window", 0)):  # pages behind it may be anybody's
        seen = lengths - starts.diff() - window + 1
        used &= begins + page_size > seen[:, None]
    wrong = (used & ((table < 0) | (table >= pages))).nonzero()
    if len(wrong):
        sequence, index = wrong[0].tolist()
        raise ArgumentError(
            f"{problem}: block_table[{sequence}, {index}] is page {int(table[sequence, index])}, the cache has {pages} "
            f"pages ({len(wrong)} such entries); positions {index * page_size} and on of that sequence are there"
        )


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"

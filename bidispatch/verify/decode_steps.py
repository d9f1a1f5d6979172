"""Attention bound for decode steps, as a server binds it, against the rows that the kernel bound for prompts gives.

What a kernel launches may follow from the most query tokens it was bound for: `triton.paged_attention` then leaves out
the walk of prompts, and packs a sequence's tokens into one tile. No bit may follow from it, since a server takes one
kernel or the other by what a step happens to hold. Imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.sequence_pool import Piece, SequencePool
from bidispatch.verify.subject import Trial

__all__ = ["MOST_QUERIES", "decode_limits", "decode_trials", "named", "replayed_steps"]

MOST_QUERIES = (1, 8)
"""Query tokens of a sequence in a step, at most: without drafts, and with the seven of a speculative decoder."""

_FEW = 5
_FULL_CALLS = 4
_REPLAYS = 3
_EMPTY = 3
_VALUES = (float("nan"), float("inf"))


def named(queries: int) -> str:
    """What a kernel of these limits is called in the names of checks."""
    return "bound for decode steps of " + ("1 token" if queries == 1 else f"up to {queries} tokens")


def decode_limits(sizes: Sizes, queries: int) -> Limits:
    """What a server binds its decode steps for (`StepLimits` in bidispatch/integrations/vllm/limits.py)."""
    return Limits(queries * sizes.max_seqs, sizes.max_seqs, max(sizes.lengths), queries)


def decode_trials(pool: SequencePool, sizes: Sizes, queries: int) -> Iterator[Trial]:
    """Steps alone, a few and many at a time, padded to all that the kernel is bound for, and beside spoiled ones."""
    steps = _steps(pool, queries, _FULL_CALLS * sizes.max_seqs)
    singles, few = max(1, sizes.singles // 2), min(_FEW, sizes.max_seqs)
    yield from pool.in_calls(steps[:singles], 1)
    yield from pool.in_calls(steps[: few * singles], few)
    yield from pool.in_calls(steps, sizes.max_seqs)
    limits = decode_limits(sizes, queries)
    yield pool.trial(steps[: max(1, sizes.max_seqs - _EMPTY)], tokens=limits.max_tokens, seqs=limits.max_seqs)
    for value in _VALUES:
        some = _steps(pool, queries, sizes.max_seqs)
        yield pool.beside_spoiled(some[1:], some[0], value)


def replayed_steps(pool: SequencePool, batch: int, queries: int) -> list[Trial]:
    """Calls of one graph: captured with so many of the longest sequence's last tokens, replayed with other lengths.

    All have tensors of the same shapes and the full block table, as a server captures them. Where a step has fewer
    tokens than the graph, the rest are rows that nobody owns, and where it has fewer sequences, empty ones.
    """
    longest = max(range(len(pool.lengths)), key=lambda index: pool.lengths[index])
    (last,) = pool.decodes(longest, 1)[-1:]
    calls = [[replace(last, query=min(queries, last.kv))] * batch]
    calls += [_steps(pool, queries, batch) for _ in range(_REPLAYS)]
    if batch > _EMPTY:
        calls[-1] = calls[-1][:-_EMPTY]
    return [pool.trial(pieces, tokens=queries * batch, seqs=batch, width=pool.full_width) for pieces in calls]


def _steps(pool: SequencePool, queries: int, count: int) -> list[Piece]:
    """So many steps, drawn from all sequences: about half of as many tokens as there may be, the others of fewer."""
    each = -(-count // len(pool.lengths))
    ends = pool.shuffled([step for index in range(len(pool.lengths)) for step in pool.decodes(index, each)])
    # Without causality a sequence has one end, and short ones have few positions.
    drawn = itertools.islice(itertools.cycle(ends), count)
    return [replace(end, query=min(end.kv, _queries_of(pool, queries))) for end in drawn]


def _queries_of(pool: SequencePool, most: int) -> int:
    return most if most == 1 or pool.integer(0, 1) else pool.integer(1, most)

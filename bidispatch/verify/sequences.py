"""Attention: every query row against the row its sequence gives alone, as one whole prefill. Imports torch.

Below level `sequence` a chunk is only compared with the same chunk alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import MOST_ELEMENTS, Sizes
from bidispatch.verify.decode_steps import MOST_QUERIES, decode_limits, decode_trials, named, replayed_steps
from bidispatch.verify.report import Check
from bidispatch.verify.sequence_pool import Piece, SequencePool
from bidispatch.verify.subject import Subject, Trial, measure

__all__ = ["check_sequences", "graph_groups", "sequence_limits", "stock_check"]

Rebind = Callable[[Limits], Subject]

_DISTRIBUTIONS = ("normal", "positive", "scaled")
_TOKENS_AROUND = (1, 7, 64)
_PADDING = (1, 5, 64)
_GRAPH_BATCHES = (1, 8)
_REPLAYS = 3
_STOCK_STRIDE = 5
_FAR = 4  # another binding's max_seq_len, in multiples of the longest sequence


def sequence_limits(problem: Problem, sizes: Sizes) -> Limits:
    """Limits that every call of `check_sequences` and `graph_groups` fits in."""
    longest = max(sizes.lengths)
    tokens = max(*sizes.rows, *sizes.graph_rows, 2 * longest + max(_PADDING), sizes.max_seqs)
    return Limits(tokens, sizes.max_seqs, longest, longest)


def check_sequences(subject: Subject, level: Invariance, sizes: Sizes, rebind: Rebind | None = None) -> Iterator[Check]:
    """Every check of attention. `rebind` gives the same kernel bound for other limits."""
    pool = SequencePool(subject, sizes.lengths, level)
    yield measure("repeated calls", subject, _repeated(pool, sizes))
    if level < Invariance.BATCH:
        return
    for distribution in _DISTRIBUTIONS:
        drawn = pool if distribution == "normal" else SequencePool(subject, sizes.lengths, level, distribution, seed=1)
        yield measure(f"mixed batches, {distribution}", subject, _mixtures(drawn, sizes))
    if level >= Invariance.SEQUENCE:
        yield measure("decode against prefill", subject, _decodes(pool, sizes))
        for size in sizes.chunks:
            yield measure(f"chunks of {size} against prefill", subject, _chunks(pool, sizes, size))
        yield measure("cached prefix", subject, _prefixes(pool))
    yield measure("page order", subject, _pages(pool, sizes))
    yield measure("neighbours of NaN, inf and huge", subject, _neighbours(pool, sizes))
    yield measure("padding rows and empty sequences", subject, _padding(pool, sizes))
    if rebind is not None:
        longest = max(sizes.lengths)
        for limits in (
            Limits(max(_TOKENS_AROUND), max(_TOKENS_AROUND), longest, max(_TOKENS_AROUND)),
            Limits(2 * longest, 2 * sizes.max_seqs, _FAR * longest, longest),
        ):
            name = f"bound for {limits.max_tokens} tokens and lengths to {limits.max_seq_len}"
            yield measure(name, rebind(limits), _small(pool, limits.max_seqs))
        for queries in MOST_QUERIES:
            bound = rebind(decode_limits(sizes, queries))
            yield measure(named(queries), bound, decode_trials(pool, sizes, queries))


def stock_check(subject: Subject, sizes: Sizes) -> Check:
    """How many rows of plain torch differ from their sequence's own prefill, in mixed batches.

    Of sequences whose scores all fit in memory at once, several times: torch has no other form of a soft cap or ALiBi.
    """
    heads = subject.problem.size("num_heads")
    lengths = [length for length in sizes.lengths if heads * length * length <= MOST_ELEMENTS]
    pool = SequencePool(subject, lengths, Invariance.SEQUENCE)
    # Some sizes of many: torch prepares its kernels anew for each length, and this is told, not judged.
    some = replace(sizes, rows=sizes.rows[::_STOCK_STRIDE])
    return measure("stock torch, mixed batches", subject, _mixtures(pool, some))


def graph_groups(
    subject: Subject, sizes: Sizes, level: Invariance, rebind: Rebind
) -> Iterator[tuple[str, Subject, Iterator[list[Trial]]]]:
    """What is captured and replayed: how the kernel is bound ("" for the limits of `sequence_limits`), the kernel, and
    lists of calls. A graph is captured with the first of a list, the longest, and replayed with all.
    """
    pool = SequencePool(subject, sizes.lengths, level, seed=2)
    yield "", subject, _replayed(pool, sizes)
    for queries in MOST_QUERIES:
        yield named(queries), rebind(decode_limits(sizes, queries)), _replayed_steps(pool, sizes, queries)


def _replayed(pool: SequencePool, sizes: Sizes) -> Iterator[list[Trial]]:
    """Decode batches and mixed ones."""
    yield from _replayed_steps(pool, sizes, 1)
    for tokens in (size for size in sizes.graph_rows if size > 1):
        mixtures = [pool.mixture(tokens, sizes.max_seqs) for _ in range(_REPLAYS)]
        yield [pool.trial(pieces, tokens=tokens, seqs=sizes.max_seqs, width=pool.full_width) for pieces in mixtures]


def _replayed_steps(pool: SequencePool, sizes: Sizes, queries: int) -> Iterator[list[Trial]]:
    for batch in sorted({min(batch, sizes.max_seqs) for batch in _GRAPH_BATCHES} | {sizes.max_seqs}):
        yield replayed_steps(pool, batch, queries)


def _repeated(pool: SequencePool, sizes: Sizes) -> Iterator[Trial]:
    """A batch against itself, run before."""
    for tokens in (1, max(sizes.rows)):
        pieces = pool.mixture(tokens, sizes.max_seqs)
        arguments = pool.arguments(pieces)
        yield Trial(sum(piece.query for piece in pieces), arguments, pool.subject.alone(arguments))


def _mixtures(pool: SequencePool, sizes: Sizes) -> Iterator[Trial]:
    for tokens in sizes.rows:
        yield pool.trial(pool.mixture(tokens, sizes.max_seqs))


def _small(pool: SequencePool, max_seqs: int) -> Iterator[Trial]:
    for tokens in _TOKENS_AROUND:
        yield pool.trial(pool.mixture(tokens, max_seqs))


def _decodes(pool: SequencePool, sizes: Sizes) -> Iterator[Trial]:
    """Decode steps one at a time, a few and many at a time, of one sequence and of all."""
    every = pool.shuffled([step for i in range(len(pool.lengths)) for step in pool.decodes(i, sizes.decodes)])
    yield from pool.in_calls(every[: sizes.singles], 1)
    yield from pool.in_calls(every[: 5 * sizes.singles], 5)
    yield from pool.in_calls(every, sizes.max_seqs)


def _chunks(pool: SequencePool, sizes: Sizes, size: int) -> Iterator[Trial]:
    """Chunks one call each, as an engine runs them, and many in one call, sharing their sequence's pages."""
    cut = [pool.chunks(sequence, size) for sequence in range(len(pool.lengths))]
    yield from pool.in_calls(pool.shuffled([chunk for chunks in cut for chunk in chunks])[: sizes.singles], 1)
    for chunks in cut:
        yield from pool.in_calls(chunks, sizes.max_seqs)


def _prefixes(pool: SequencePool) -> Iterator[Trial]:
    """What is left of a prompt whose first pages are cached already."""
    for sequence, length in enumerate(pool.lengths):
        pages = -(-length // pool.page_size)
        for cached in {1, pages // 2, pages - 1}:
            prefix = cached * pool.page_size
            if 0 < prefix < length:
                yield pool.trial([Piece(sequence, length - prefix, length)])


def _pages(pool: SequencePool, sizes: Sizes) -> Iterator[Trial]:
    """The same sequences in other pages, and behind wider block tables."""
    for order, seed in (("ascending", 0), ("shuffled", 3)):
        other = SequencePool(pool.subject, pool.lengths, pool.level, page_order=order, seed=seed)
        for tokens in _TOKENS_AROUND:
            pieces = pool.mixture(tokens, sizes.max_seqs)
            moved = other.arguments(pieces, width=other.full_width if tokens % 2 else None)
            yield Trial(sum(piece.query for piece in pieces), moved, pool.expected(pieces))


def _neighbours(pool: SequencePool, sizes: Sizes) -> Iterator[Trial]:
    """About half of the sequences keep their values; q and the caches of the others hold what must not leak."""
    huge = torch.finfo(pool.subject.argument_specs[0].dtype).max
    for bad in (float("nan"), float("inf"), float("-inf"), huge):
        for tokens in (size for size in (17, 200) if size <= max(sizes.rows)):
            pieces = pool.mixture(tokens - 1, sizes.max_seqs - 1)
            (kept,) = pool.mixture(1, 1)
            yield pool.beside_spoiled(pieces, kept, bad)


def _padding(pool: SequencePool, sizes: Sizes) -> Iterator[Trial]:
    """Rows that no sequence owns, as a graph's padding, keep their bits; sequences of length 0 change nothing."""
    for padding in _PADDING:
        for tokens in (1, 33):
            pieces = pool.mixture(tokens, sizes.max_seqs - 1)
            owned = sum(piece.query for piece in pieces)
            yield pool.trial(pieces, tokens=owned + padding, seqs=min(sizes.max_seqs, len(pieces) + 3))

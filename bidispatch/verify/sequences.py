"""Attention: every query row against the row its sequence gives alone, as one whole prefill. Imports torch.

Below level `sequence` a chunk is only compared with the same chunk alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from bidispatch.errors import UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.report import Check
from bidispatch.verify.subject import Arguments, Subject, Trial, measure

__all__ = ["SequencePool", "check_sequences", "graph_trials", "sequence_limits", "stock_check"]

_DISTRIBUTIONS = ("normal", "positive", "scaled")
_TOKENS_AROUND = (1, 7, 64)
_PADDING = (1, 5, 64)
_REPLAYS = 3
_STOCK_STRIDE = 5
_FAR = 4  # another binding's max_seq_len, in multiples of the longest sequence


@dataclass(frozen=True, slots=True)
class Piece:
    """The last `query` of the first `kv` positions of one of the pool's sequences."""

    sequence: int
    query: int
    kv: int


class SequencePool:
    """Sequences in one paged cache, what their rows give alone, and batches of pieces of them."""

    def __init__(
        self,
        subject: Subject,
        lengths: Sequence[int],
        level: Invariance,
        distribution: str = "normal",
        *,
        page_order: str = "shuffled",
        seed: int = 0,
    ) -> None:
        self.subject, self.lengths, self.level = subject, tuple(lengths), level
        self.causal = bool(subject.problem.dims.get("causal", True))
        self.page_size = subject.problem.size("page_size")
        build: Callable[..., Arguments] = load_attribute(subject.op.sequences)
        arguments = build(
            subject.problem,
            self.lengths,
            self.lengths,
            sequence_seeds=range(1, len(self.lengths) + 1),
            device=subject.device,
            distribution=distribution,
            page_order=page_order,
            page_seed=seed,
        )
        self._given = dict(zip((argument.name for argument in subject.op.arguments), arguments, strict=True))
        self._q, self._table = self._tensor("q"), self._tensor("block_table")
        self._starts = [sum(self.lengths[:index]) for index in range(len(self.lengths))]
        self._generator = torch.Generator().manual_seed(seed)
        self._alone: dict[Piece, tuple[torch.Tensor, ...]] = {}

    def _tensor(self, name: str) -> torch.Tensor:
        """An argument that every problem of the op has."""
        tensor = self._given[name]
        if tensor is None:
            raise UsageError(
                f"{self.subject.op.name}: its batches have no {name}; {self.subject.op.sequences} makes them"
            )
        return tensor

    def integer(self, low: int, high: int) -> int:
        """A random integer, both ends included."""
        return int(torch.randint(low, high + 1, (1,), generator=self._generator))

    def shuffled(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces in random order."""
        return [pieces[index] for index in torch.randperm(len(pieces), generator=self._generator).tolist()]

    def whole(self, sequence: int) -> Piece:
        """A sequence as one prefill."""
        return Piece(sequence, self.lengths[sequence], self.lengths[sequence])

    def arguments(
        self,
        pieces: Sequence[Piece],
        *,
        tokens: int | None = None,
        seqs: int | None = None,
        width: int | None = None,
        spoil: tuple[frozenset[int], float] | None = None,
    ) -> Arguments:
        """The arguments of a call. Cache slots that no piece may look at hold NaN.

        tokens, seqs: pad to these with rows of NaN that nobody owns and with sequences of length 0. width: of the
        block table. spoil: sequences whose q and cache are overwritten, and with what.
        """
        q = torch.cat([self._q[self._starts[p.sequence] + p.kv - p.query :][: p.query] for p in pieces])
        owned = len(q)
        padding = (owned if tokens is None else tokens) - owned
        empty = (len(pieces) if seqs is None else seqs) - len(pieces)
        q = torch.cat([q, q.new_full((padding, *q.shape[1:]), float("nan"))])
        pages = max(1, *(-(-p.kv // self.page_size) for p in pieces)) if width is None else width
        index = torch.tensor([p.sequence for p in pieces] + [0] * empty, device=self.subject.device)
        kv_lens = [p.kv for p in pieces] + [0] * empty
        query_lens = [p.query for p in pieces] + [0] * empty
        caches = self._visible(pieces)
        if spoil is not None:
            sequences, value = spoil
            row = 0
            for piece in pieces:
                if piece.sequence in sequences:
                    q[row : row + piece.query] = value
                    for cache in caches.values():
                        cache.flatten(0, 1)[self._slots(piece)] = value
                row += piece.query
        starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        made = {
            "q": q,
            **caches,
            "block_table": self._table[index, :pages].contiguous(),
            "seq_lens": torch.tensor(kv_lens, dtype=torch.int32, device=self.subject.device),
            "query_start_loc": starts.to(self.subject.device),
        }
        return [made.get(name, given) for name, given in self._given.items()]

    @property
    def full_width(self) -> int:
        """The width of a block table that holds the longest sequence."""
        return self._table.shape[1]

    def _slots(self, piece: Piece) -> torch.Tensor:
        """Where the positions of a piece are in the cache."""
        positions = torch.arange(piece.kv, device=self.subject.device)
        pages = self._table[piece.sequence].long()[positions // self.page_size]
        return pages * self.page_size + positions % self.page_size

    def _visible(self, pieces: Sequence[Piece]) -> dict[str, torch.Tensor]:
        """Copies of the caches with NaN in every slot that no piece owns."""
        longest: dict[int, Piece] = {}
        for piece in pieces:
            if piece.sequence not in longest or longest[piece.sequence].kv < piece.kv:
                longest[piece.sequence] = piece
        slots = torch.cat([self._slots(piece) for piece in longest.values()])
        caches = {}
        for name in self.subject.op.caches:
            cache = self._tensor(name)
            caches[name] = torch.full_like(cache, float("nan"))
            caches[name].flatten(0, 1)[slots] = cache.flatten(0, 1)[slots]
        return caches

    def _expected_of(self, piece: Piece) -> tuple[torch.Tensor, ...]:
        source = piece
        if self.level >= Invariance.SEQUENCE:
            # A query that sees the whole sequence, also what is behind it, is only equal where the sequence ends there.
            source = self.whole(piece.sequence) if self.causal else replace(piece, query=piece.kv)
        if source not in self._alone:
            self._alone[source] = self.subject.alone(self.arguments([source]))
        first = source.query - source.kv + piece.kv - piece.query
        return tuple(rows[first : first + piece.query] for rows in self._alone[source])

    def expected(self, pieces: Sequence[Piece]) -> tuple[torch.Tensor, ...]:
        """What the rows of these pieces give alone."""
        return tuple(torch.cat(rows) for rows in zip(*map(self._expected_of, pieces), strict=True))

    def trial(
        self, pieces: Sequence[Piece], *, tokens: int | None = None, seqs: int | None = None, width: int | None = None
    ) -> Trial:
        """A call of these pieces; rows of padding must stay as they were."""
        owned = sum(piece.query for piece in pieces)
        total = owned if tokens is None else tokens
        index = torch.arange(total, device=self.subject.device)
        return Trial(
            total,
            self.arguments(pieces, tokens=tokens, seqs=seqs, width=width),
            self.expected(pieces),
            rows=index[:owned],
            untouched=index[owned:],
        )

    def mixture(self, tokens: int, max_seqs: int) -> list[Piece]:
        """Decodes, chunks and whole prompts at random, of at most so many tokens and, where possible, exactly."""
        pieces: list[Piece] = []
        left = tokens
        while left and len(pieces) < max_seqs:
            sequence = self.integer(0, len(self.lengths) - 1)
            length = self.lengths[sequence]
            most = min(left, length)
            last = len(pieces) == max_seqs - 1
            query = most if last else (1, self.integer(1, most), most)[self.integer(0, 2)]
            kv = self.integer(query, length) if self.causal else length
            pieces.append(Piece(sequence, query, kv))
            left -= query
        return pieces

    def decodes(self, sequence: int, count: int) -> list[Piece]:
        """Decode steps of a sequence: its first and last positions and random ones, at most `count`."""
        length = self.lengths[sequence]
        if not self.causal:
            return [Piece(sequence, 1, length)]
        positions = {0, length - 1, *(p for p in (self.page_size - 1, self.page_size) if p < length)}
        order = torch.randperm(length, generator=self._generator).tolist()
        positions |= set(order[: max(0, count - len(positions))])
        return [Piece(sequence, 1, position + 1) for position in sorted(positions)]

    def chunks(self, sequence: int, size: int) -> list[Piece]:
        """A sequence cut into chunks; the last may be shorter. Without causality only the end of a sequence is one."""
        length = self.lengths[sequence]
        if not self.causal:
            return [Piece(sequence, min(size, length), length)]
        ends = [*range(size, length, size), length]
        return [Piece(sequence, end - start, end) for start, end in zip([0, *ends], ends, strict=False)]


def sequence_limits(problem: Problem, sizes: Sizes) -> Limits:
    """Limits that every call of `check_sequences` and `graph_trials` fits in."""
    longest = max(sizes.lengths)
    tokens = max(*sizes.rows, *sizes.graph_rows, 2 * longest + max(_PADDING), sizes.max_seqs)
    return Limits(tokens, sizes.max_seqs, longest, longest)


def check_sequences(
    subject: Subject, level: Invariance, sizes: Sizes, rebind: Callable[[Limits], Subject] | None = None
) -> Iterator[Check]:
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


def stock_check(subject: Subject, sizes: Sizes) -> Check:
    """How many rows of plain torch differ from their sequence's own prefill, in mixed batches."""
    pool = SequencePool(subject, sizes.lengths, Invariance.SEQUENCE)
    # Some sizes of many: torch prepares its kernels anew for each length, and this is told, not judged.
    some = replace(sizes, rows=sizes.rows[::_STOCK_STRIDE])
    return measure("stock torch, mixed batches", subject, _mixtures(pool, some))


def graph_trials(subject: Subject, sizes: Sizes, level: Invariance) -> Iterator[list[Trial]]:
    """Decode batches and mixed ones. A graph is captured with the first, the longest, and replayed with all.

    All calls of a list have tensors of the same shapes, with the full block table, as a server captures them.
    """
    pool = SequencePool(subject, sizes.lengths, level, seed=2)
    longest = max(range(len(pool.lengths)), key=lambda index: pool.lengths[index])
    for batch in (1, 8, sizes.max_seqs):
        steps = [pool.decodes(longest, 1)[-1:] * batch]
        for _ in range(_REPLAYS):
            every = [step for index in range(len(pool.lengths)) for step in pool.decodes(index, 4)]
            steps.append(pool.shuffled(every)[:batch])
        yield [pool.trial(pieces, tokens=batch, seqs=batch, width=pool.full_width) for pieces in steps]
    for tokens in (size for size in sizes.graph_rows if size > 1):
        mixtures = [pool.mixture(tokens, sizes.max_seqs) for _ in range(_REPLAYS)]
        yield [pool.trial(pieces, tokens=tokens, seqs=sizes.max_seqs, width=pool.full_width) for pieces in mixtures]


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
    yield from _in_calls(pool, every[: sizes.singles], 1)
    yield from _in_calls(pool, every[: 5 * sizes.singles], 5)
    yield from _in_calls(pool, every, sizes.max_seqs)


def _chunks(pool: SequencePool, sizes: Sizes, size: int) -> Iterator[Trial]:
    """Chunks one call each, as an engine runs them, and many in one call, sharing their sequence's pages."""
    cut = [pool.chunks(sequence, size) for sequence in range(len(pool.lengths))]
    yield from _in_calls(pool, pool.shuffled([chunk for chunks in cut for chunk in chunks])[: sizes.singles], 1)
    for chunks in cut:
        yield from _in_calls(pool, chunks, sizes.max_seqs)


def _in_calls(pool: SequencePool, pieces: Sequence[Piece], count: int) -> Iterator[Trial]:
    """So many pieces a call, in random order."""
    for first in range(0, len(pieces), count):
        yield pool.trial(pool.shuffled(pieces[first : first + count]))


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
            kept = pool.mixture(1, 1)
            bystanders = frozenset(range(0, len(pool.lengths), 2)) - {kept[0].sequence}
            pieces = pool.shuffled([*pieces, *kept])
            mine = [piece.sequence not in bystanders for piece in pieces]
            owners = torch.tensor([own for own, p in zip(mine, pieces, strict=True) for _ in range(p.query)])
            yield Trial(
                len(owners),
                pool.arguments(pieces, spoil=(bystanders, bad)),
                pool.expected([piece for own, piece in zip(mine, pieces, strict=True) if own]),
                rows=owners.nonzero()[:, 0].to(pool.subject.device),
            )


def _padding(pool: SequencePool, sizes: Sizes) -> Iterator[Trial]:
    """Rows that no sequence owns, as a graph's padding, keep their bits; sequences of length 0 change nothing."""
    for padding in _PADDING:
        for tokens in (1, 33):
            pieces = pool.mixture(tokens, sizes.max_seqs - 1)
            owned = sum(piece.query for piece in pieces)
            yield pool.trial(pieces, tokens=owned + padding, seqs=min(sizes.max_seqs, len(pieces) + 3))

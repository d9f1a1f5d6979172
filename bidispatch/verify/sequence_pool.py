"""Sequences in one paged cache, what their rows give alone, and calls made of pieces of them. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from bidispatch.errors import UsageError
from bidispatch.invariance import Invariance
from bidispatch.runtime.bind import load_attribute
from bidispatch.verify.subject import Arguments, Subject, Trial

__all__ = ["Piece", "SequencePool"]


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

    def in_calls(self, pieces: Sequence[Piece], count: int) -> Iterator[Trial]:
        """So many pieces a call, in random order."""
        for first in range(0, len(pieces), count):
            yield self.trial(self.shuffled(pieces[first : first + count]))

    def beside_spoiled(self, pieces: Sequence[Piece], kept: Piece, value: float) -> Trial:
        """A call of these pieces and of `kept`, in random order. About half of the sequences keep their values, that of
        `kept` among them; q and the caches of the others hold `value`, which must not leak.
        """
        bystanders = frozenset(range(0, len(self.lengths), 2)) - {kept.sequence}
        mixed = self.shuffled([*pieces, kept])
        mine = [piece.sequence not in bystanders for piece in mixed]
        owners = torch.tensor([own for own, piece in zip(mine, mixed, strict=True) for _ in range(piece.query)])
        return Trial(
            len(owners),
            self.arguments(mixed, spoil=(bystanders, value)),
            self.expected([piece for own, piece in zip(mine, mixed, strict=True) if own]),
            rows=owners.nonzero()[:, 0].to(self.subject.device),
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

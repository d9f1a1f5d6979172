"""How a batch is parted into plans, so that nothing FlashInfer decides for a plan depends on who shares it.

FlashInfer 0.6.13 and 0.7.2 (include/flashinfer/attention/scheduler.cuh, `PrefillSplitQOKVIndptr` and `PrefillPlan`;
include/flashinfer/utils.cuh, `FA2DetermineCtaTileQ`) decide for a whole plan:

- the rows of a query tile, from the *mean* of the requests' packed lengths (query tokens x grouped heads), rounded
  down: 16 up to a mean of 16, 64 up to 64 (and for head_dim 256), else 128. The tiles reduce in different orders.
- whether partial results are written and merged: when any request has more than one split.
- the size of a split, unless it is fixed.

Requests of one part agree on all of it: their packed lengths lie in one of the three ranges, so their mean does too,
and either all have one split or all have several. Which part a request is in follows from its own lengths alone.

The workspace is reckoned as 0.6.13 does (0.7 takes no more): a part is planned in as many groups as it takes to stay
within it. It reserves fp32 and whole tiles for every query head, though a tile already holds a group of heads and the
kernels store their dtype: a plan that is given less is refused. Pure Python: no torch, no flashinfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["INDEX_BYTES", "Layout", "Part", "Request", "groups", "most_bytes", "worst_bytes"]

INDEX_BYTES = 8 << 20
"""What a FlashInfer wrapper has for its tables of work items."""
_INDEX_SLACK = 4096
_BYTES_AN_ITEM = 13  # three int32 and a bool
_RANGES = (16, 64)
"""The largest packed lengths of the first two ranges."""
_FLOAT_BYTES = 4
_SLACK = 64  # two buffers, each aligned


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence of a call: its place in the batch, its first row of q, its query tokens and KV positions."""

    index: int
    row: int
    query: int
    kv: int


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """What requests that may share a plan have in common: the range of their packed lengths, and the split.

    split: KV positions of a split, 0 where each of them is one split.
    """

    range: int
    split: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What the parting needs of a problem and its params."""

    heads: int
    group: int
    head_dim: int
    decode_split: int
    prefill_split: int

    def part_of(self, query: int, kv: int) -> Part:
        """The part of a request, from its own lengths."""
        packed = query * self.group
        number = sum(packed > most for most in _RANGES)
        split = self.decode_split if self.decodes(query) else self.prefill_split
        return Part(number, split if split and kv > split else 0)

    def decodes(self, query: int) -> bool:
        """Whether a query takes decode's split: one token, however many heads share its KV, or few of few heads."""
        return query == 1 or query * self.group <= _RANGES[0]

    def tile_rows(self, number: int) -> int:
        """Rows of the query tile FlashInfer takes for a range, on Ampere and newer."""
        return (16, 64, 64 if self.head_dim >= 256 else 128)[number]

    def items(self, part: Part, query: int, kv: int) -> int:
        """Work items of a request: its query tiles, each for every split."""
        tiles = -(-query * self.group // self.tile_rows(part.range))
        return tiles * (-(-kv // part.split) if part.split else 1)

    def float_bytes(self, part: Part, items: int) -> int:
        """Bytes of partial results: a tile of fp32 values, and one sum a row, for each item and query head."""
        if not part.split:
            return 0
        return self.heads * items * self.tile_rows(part.range) * (self.head_dim + 1) * _FLOAT_BYTES + _SLACK

    def least(self, number: int) -> int:
        """The shortest query that a range may have."""
        return _RANGES[number - 1] // self.group + 1 if number else 1

    def longest(self, number: int, max_query: int) -> int:
        """The longest query of a range, at most `max_query` tokens; 0 where the range has none."""
        longest = max_query if number == len(_RANGES) else min(max_query, _RANGES[number] // self.group)
        return longest if longest >= self.least(number) else 0


def index_bytes(items: int, rows: int, requests: int) -> int:
    """Bytes of a plan's tables: three indices and a flag an item, an offset a row, two offsets a request."""
    return _BYTES_AN_ITEM * items + 4 * (rows + 1) + 8 * (requests + 1) + _INDEX_SLACK


def worst_bytes(layout: Layout, max_query: int, max_kv: int) -> Iterator[tuple[Part, int, int, int]]:
    """(part, query, float bytes, index bytes) of the largest single requests that limits allow, by rising query."""
    limit = min(max_query, max_kv)
    longest = [layout.longest(number, limit) for number in range(len(_RANGES) + 1)]
    for query in sorted({1, *longest} - {0}):
        part = layout.part_of(query, max_kv)
        items = layout.items(part, query, max_kv)
        yield part, query, layout.float_bytes(part, items), index_bytes(items, query, 1)


def most_bytes(layout: Layout, max_query: int, max_kv: int, max_tokens: int, max_seqs: int) -> int:
    """The float bytes that no part of a call within limits exceeds: with them, each part is one plan."""
    most = 0
    for part, query, _, _ in worst_bytes(layout, max_query, max_kv):
        requests = min(max_seqs, max(1, max_tokens // layout.least(part.range)))
        # Of each request's tiles all but the last are full, and the full ones share the call's tokens.
        full = max_tokens * layout.group // layout.tile_rows(part.range)
        whole = layout.items(Part(part.range, 0), query, max_kv)
        splits = -(-max_kv // part.split) if part.split else 1
        most = max(most, layout.float_bytes(part, min(requests * whole, full + requests) * splits))
    return most


def groups(layout: Layout, requests: Iterable[Request], workspace: int) -> Iterator[tuple[Part, Sequence[Request]]]:
    """Part requests into plans that fit a workspace of so many bytes. Requests without rows are left out.

    A single request is taken to fit: binding has made sure of it (`worst_bytes`).
    """
    parts: dict[Part, list[Request]] = {}
    for request in requests:
        if request.query:
            parts.setdefault(layout.part_of(request.query, request.kv), []).append(request)
    for part, members in sorted(parts.items()):
        yield from ((part, group) for group in _fitting(layout, part, members, workspace))


def _fitting(layout: Layout, part: Part, members: Sequence[Request], workspace: int) -> Iterator[Sequence[Request]]:
    group: list[Request] = []
    items = rows = 0
    for request in members:
        more = layout.items(part, request.query, request.kv)
        over = (
            layout.float_bytes(part, items + more) > workspace
            or index_bytes(items + more, rows + request.query, len(group) + 1) > INDEX_BYTES
        )
        if group and over:
            yield group
            group, items, rows = [], 0, 0
        group.append(request)
        items, rows = items + more, rows + request.query
    yield group

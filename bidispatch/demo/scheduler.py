"""Continuous batching without tensors: which tokens of which request run in a step, and in which pages. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bidispatch.errors import UsageError

__all__ = ["Active", "Chunk", "EngineLimits", "PagePool", "Request", "Scheduler"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue greedily for exactly `max_new_tokens` tokens."""

    id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival_step: int = 0
    """The step from which on it may be admitted."""
    forced_tokens: tuple[int, ...] | None = None
    """Tokens to go on with instead of the ones decoded (teacher forcing), one for each new token."""

    @property
    def positions(self) -> int:
        """KV positions it fills. Its last token is decoded and never fed back."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of an engine. Raises `UsageError` for sizes that cannot serve."""

    max_tokens: int
    """Token budget of a step."""
    max_seqs: int
    """Requests served at once."""
    max_seq_len: int
    """KV positions a request may fill."""
    page_size: int
    pages: int
    """Pages of the pool, for all requests together."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_seqs", "max_seq_len", "page_size", "pages"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_seqs > self.max_tokens:
            raise UsageError(
                f"max_seqs={self.max_seqs} is above max_tokens={self.max_tokens}: a step decodes one token of each "
                "request served; raise max_tokens or lower max_seqs"
            )

    def pages_for(self, positions: int) -> int:
        """Pages that hold so many KV positions."""
        return -(-positions // self.page_size)

    @property
    def max_pages(self) -> int:
        """Width of a block table: pages of the longest request."""
        return self.pages_for(self.max_seq_len)


class PagePool:
    """Free pages. Last freed, first taken, so requests end up with pages in any order, used by others before."""

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages))

    @property
    def available(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """Take pages out of the pool; the caller has looked at `available`."""
        if count > len(self._free):
            raise UsageError(f"{count} pages asked for, {len(self._free)} are free; wait for a request to finish")
        return tuple(self._free.pop() for _ in range(count))

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)


@dataclass(slots=True, eq=False)
class Active:
    """A request that is being served. It owns pages for all its positions from admission to its last token."""

    request: Request
    pages: tuple[int, ...]
    computed: int = 0
    """Positions whose keys and values are in the cache."""
    generated: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Tokens there are to feed: the prompt and what has been generated."""
        return len(self.request.prompt) + len(self.generated)

    @property
    def decoding(self) -> bool:
        return self.computed >= len(self.request.prompt)

    @property
    def finished(self) -> bool:
        return len(self.generated) == self.request.max_new_tokens

    def token(self, position: int) -> int:
        """The token fed at a position."""
        prompt = self.request.prompt
        return prompt[position] if position < len(prompt) else self.generated[position - len(prompt)]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one request runs in one step: positions `start` to `start + length`."""

    active: Active
    start: int
    length: int
    samples: bool
    """Whether its last row gives the next token: nothing known is left to feed after it."""

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def decodes(self) -> bool:
        """Whether this is a decode of one token, not a piece of a prompt."""
        return self.start >= len(self.active.request.prompt)


class Scheduler:
    """Decodes first, then prompts in order of admission, then new requests, within the token budget of a step.

    A request is admitted in order of arrival, once the pages for all its positions are free, so none is ever
    preempted. Raises `UsageError`, before anything runs, for requests that could never be served.
    """

    def __init__(self, limits: EngineLimits, requests: Sequence[Request], pool: PagePool | None = None) -> None:
        self._limits = limits
        self._pool = PagePool(limits.pages) if pool is None else pool
        self._waiting = deque(sorted(requests, key=lambda request: request.arrival_step))
        self._running: list[Active] = []
        self._step = 0
        _check(limits, requests)

    @property
    def done(self) -> bool:
        return not self._waiting and not self._running

    @property
    def running(self) -> tuple[Active, ...]:
        return tuple(self._running)

    def schedule(self) -> tuple[Chunk, ...]:
        """The chunks of the next step, decodes first. Steps in which nobody has arrived yet are skipped."""
        if not self._running and self._waiting:
            self._step = max(self._step, self._waiting[0].arrival_step)
        chunks = [_chunk(active, 1) for active in self._running if active.decoding]
        budget = self._limits.max_tokens - len(chunks)
        for active in self._running:
            if not active.decoding and budget:
                chunks.append(_chunk(active, budget))
                budget -= chunks[-1].length
        while budget and (admitted := self._admit()):
            chunks.append(_chunk(admitted, budget))
            budget -= chunks[-1].length
        return tuple(chunks)

    def commit(self, chunks: Sequence[Chunk], tokens: Mapping[int, int]) -> None:
        """Book a step that has run. `tokens` holds, by request id, the token each sampling chunk goes on with."""
        for chunk in chunks:
            chunk.active.computed = chunk.stop
            if chunk.samples:
                chunk.active.generated.append(tokens[chunk.active.request.id])
        for active in [active for active in self._running if active.finished]:
            self._running.remove(active)
            self._pool.give_back(active.pages)
        self._step += 1

    def _admit(self) -> Active | None:
        if not self._waiting or len(self._running) == self._limits.max_seqs:
            return None
        request = self._waiting[0]
        pages = self._limits.pages_for(request.positions)
        if request.arrival_step > self._step or pages > self._pool.available:
            return None
        self._waiting.popleft()
        self._running.append(Active(request, self._pool.take(pages)))
        return self._running[-1]


def _chunk(active: Active, budget: int) -> Chunk:
    """The next piece of a request that fits the budget."""
    left = active.known - active.computed
    length = min(budget, left)
    return Chunk(active, active.computed, length, samples=length == left)


def _check(limits: EngineLimits, requests: Sequence[Request]) -> None:
    ids = [request.id for request in requests]
    if len(set(ids)) != len(ids):
        raise UsageError(f"request ids must differ; {sorted({i for i in ids if ids.count(i) > 1})} are given twice")
    for request in requests:
        name = f"request {request.id}"
        if not request.prompt or request.max_new_tokens < 1:
            raise UsageError(
                f"{name} has {len(request.prompt)} prompt tokens and wants {request.max_new_tokens} new ones; "
                "it needs at least one of each"
            )
        if request.forced_tokens is not None and len(request.forced_tokens) != request.max_new_tokens:
            raise UsageError(
                f"{name} has {len(request.forced_tokens)} forced tokens for {request.max_new_tokens} new ones; "
                "give one for each"
            )
        if request.positions > limits.max_seq_len:
            raise UsageError(
                f"{name} fills {request.positions} KV positions, the engine is built for {limits.max_seq_len}; "
                "raise max_seq_len or shorten the request"
            )
        if (pages := limits.pages_for(request.positions)) > limits.pages:
            raise UsageError(
                f"{name} needs {pages} pages of {limits.page_size} positions, the pool has {limits.pages}; "
                "raise pages or shorten the request"
            )

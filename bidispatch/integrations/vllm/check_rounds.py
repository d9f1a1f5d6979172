"""The requests of a check, and the ways in which each is served: alone first, then as a busy server might."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bidispatch.errors import UsageError
from bidispatch.integrations.vllm.check_compare import Round, Served, compare
from bidispatch.integrations.vllm.check_steps import Steps

__all__ = ["Server", "Workload", "draw", "need_sizes", "run"]

SHORTEST = 5
BATCHES = (2, 4, 8, 16, 32, 64)


class Server(Protocol):
    """What a check needs of an engine; `check_engine.ServedEngine` is one."""

    steps: Steps

    @property
    def budget(self) -> int:
        """Tokens of a step."""

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""

    def tokens_a_step(self, budget: int) -> Any:
        """A context in which steps are smaller."""

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: Sequence[int],
        *,
        arrivals: Sequence[int] | None = None,
        starve: bool = False,
        names: list[str] | None = None,
    ) -> list[Served]:
        """Serve prompts greedily, in this order."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of random tokens, how many new tokens each gets, and the seed of orders."""

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    shared: tuple[int, ...]
    """Which prompts begin with the beginning of the one before them."""
    seed: int = 0

    def __len__(self) -> int:
        return len(self.prompts)


def need_sizes(prompts: int, longest: int, new_tokens: int) -> None:
    """Raise `UsageError` for sizes that prove nothing."""
    if prompts < 2 or longest < 2 * SHORTEST or new_tokens < 2:
        raise UsageError(
            f"a check needs at least 2 prompts, {2 * SHORTEST} tokens in the longest and 2 new tokens, not "
            f"{prompts}, {longest} and {new_tokens}; see --prompts, --longest and --new-tokens"
        )


def draw(vocabulary: int, *, prompts: int, longest: int, new_tokens: int, page: int = 16, seed: int = 0) -> Workload:
    """Prompts of 5 to `longest` tokens, equally spaced by ratio; a quarter share the beginning of another.

    page: positions of a page of the KV cache. Half of the prompts end a few tokens before a page does, so that
    decoding soon needs another.

    Raises `UsageError` for sizes that prove nothing.
    """
    need_sizes(prompts, longest, new_tokens)
    random_ = random.Random(seed)  # noqa: S311 - prompts, not secrets
    own = max(2, prompts - prompts // 4)
    lengths = [round(SHORTEST * (longest / SHORTEST) ** (index / (own - 1))) for index in range(own)]
    for index in range(1, own, 2):
        short = 1 + index // 2 % max(1, min(6, new_tokens // 2))
        end = max(1, round(lengths[index] / page)) * page - short
        lengths[index] = end if SHORTEST <= end <= longest else lengths[index]
    drawn = [tuple(random_.randrange(vocabulary) for _ in range(length)) for length in lengths]
    shared = []
    # The longest share most, and only they are sure to share whole pages.
    for index in range(prompts - own):
        first = drawn[own - 1 - index]
        cut = max(1, len(first) * 2 // 3)
        tail = tuple(random_.randrange(vocabulary) for _ in range(max(1, min(97, len(first) - cut))))
        shared.append(len(drawn))
        drawn.append(first[:cut] + tail)
    counts = tuple(random_.randint(max(2, new_tokens // 2), new_tokens) for _ in drawn)
    return Workload(tuple(drawn), counts, tuple(shared), seed)


@dataclass(slots=True)
class _Check:
    server: Server
    work: Workload
    say: Callable[[str], None]
    rounds: list[Round] = field(default_factory=list)
    alone: list[Served] = field(default_factory=list)
    ends: list[frozenset[int]] = field(default_factory=list)
    """Where each prompt was cut when served alone."""

    def reference(self) -> None:
        began = time.monotonic()
        for index in range(len(self.work)):
            self.server.forget_prefixes()
            names: list[str] = []
            self.alone += self.server.serve([self.work.prompts[index]], [self.work.new_tokens[index]], names=names)
            self.ends.append(self._ends(names[0], index))
        self.say(f"{len(self.work)} requests alone: {time.monotonic() - began:.1f} s")

    def group(
        self,
        name: str,
        groups: Sequence[Sequence[int]],
        *,
        warm: bool = False,
        staggered: bool = False,
        starve: bool = False,
    ) -> None:
        """Serve groups of requests, one after the other, and compare each request with itself alone."""
        began = time.monotonic()
        found = Round(name)
        for group in groups:
            if not warm:
                self.server.forget_prefixes()
            names: list[str] = []
            served = self.server.serve(
                [self.work.prompts[index] for index in group],
                [self.work.new_tokens[index] for index in group],
                arrivals=[2 * place for place in range(len(group))] if staggered else None,
                starve=starve,
                names=names,
            )
            for index, request, given in zip(group, names, served, strict=True):
                compare(found, self._text(index), self.alone[index], given)
                self.server.steps.counters.cut_elsewhere += self._ends(request, index) != self.ends[index]
        self._keep(found, began)

    def continued(self, name: str, chosen: Sequence[int], *, warm: bool) -> None:
        """A prompt with its first new tokens as a prompt: its next token against what decoding gave."""
        began = time.monotonic()
        found = Round(name)
        for index in chosen:
            tokens = self.alone[index].tokens
            for place in sorted({1, len(tokens) // 2, len(tokens) - 1}):
                if not warm:
                    self.server.forget_prefixes()
                prompt = self.work.prompts[index] + tokens[:place]
                (given,) = self.server.serve([prompt], [1])
                compare(found, f"{self._text(index)} and {place} new", self.alone[index].only(place), given)
        self._keep(found, began)

    def _ends(self, request: str, index: int) -> frozenset[int]:
        length = len(self.work.prompts[index])
        return frozenset(end for _, end in self.server.steps.chunks_of(request) if end < length)

    def _text(self, index: int) -> str:
        return f"request {index} ({len(self.work.prompts[index])} tokens)"

    def _keep(self, found: Round, began: float) -> None:
        self.rounds.append(found)
        worst = "identical" if found.identical else (
            f"{found.positions_differ} of {found.positions} differ, by up to {found.difference.largest:.3g}; "
            f"first: {found.first}"
        )  # fmt: skip
        self.say(f"{found.name}: {worst} ({time.monotonic() - began:.1f} s)")


def run(server: Server, work: Workload, *, most: int, say: Callable[[str], None] = lambda text: None) -> list[Round]:
    """Serve everything in every way, compared with each request alone.

    most: requests at once. say: told of each round as it ends.
    """
    check = _Check(server, work, say)
    everything = list(range(len(work)))
    shuffle = random.Random(work.seed + 1).shuffle  # noqa: S311 - orders, not secrets
    mixed = list(everything)
    shuffle(mixed)
    check.reference()
    check.group("alone again", [[index] for index in mixed[:8]])
    for size in (size for size in BATCHES if size <= most):
        check.group(f"batches of {size}", [mixed[at : at + size] for at in range(0, len(mixed), size)])
    most = min(most, len(work))
    check.group(f"{most} at once, longest last", _groups(everything, most))
    check.group(f"{most} at once, longest first", _groups(everything[::-1], most))
    shuffle(mixed)
    check.group("arriving one by one", [mixed], staggered=True)
    for share in (4, 31):
        budget = max(server.budget // share, 2 * most + 1)
        shuffle(mixed)
        with server.tokens_a_step(budget):
            check.group(f"steps of {budget} tokens", [mixed])
    budget = max(server.budget // 13, 17)
    with server.tokens_a_step(budget):
        check.group(f"alone, in steps of {budget} tokens", [[index] for index in everything[-8:]])
    # What is in the prefix cache now came from all of these.
    check.group("prefix cached", [mixed], warm=True)
    check.group("prefix cached, alone", [[index] for index in mixed[:16]], warm=True)
    if work.shared:
        parents = [len(work) - len(work.shared) - 1 - place for place in range(len(work.shared))]
        server.forget_prefixes()
        check.group("whose beginning others share", [parents], warm=True)
        check.group("with a beginning of others", [list(work.shared)], warm=True)
    some = everything[:: max(1, len(work) // 8)]
    check.group("some together", [some])
    check.continued("decode against prefill, prefix cached", some, warm=True)
    check.continued("decode against prefill", some, warm=False)
    check.group("preempted", [mixed[:most]], starve=True)
    return check.rounds


def _groups(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[at : at + size]) for at in range(0, len(order), size)]

"""What a request gave alone against what it gave otherwise: top values of every new token, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bidispatch.demo.compare import Difference

__all__ = ["Round", "Served", "compare", "totals"]


@dataclass(frozen=True, slots=True)
class Served:
    """What a request gave: its new tokens, and at each the top of the vocabulary as {token: value}."""

    tokens: tuple[int, ...]
    top: tuple[Mapping[int, float], ...]

    def only(self, index: int) -> Served:
        """One of its new tokens alone."""
        return Served(self.tokens[index : index + 1], self.top[index : index + 1])


@dataclass(slots=True)
class Round:
    """One way of serving, compared with each request alone."""

    name: str
    difference: Difference = field(default_factory=Difference)
    requests: int = 0
    requests_differ: int = 0
    positions: int = 0
    """New tokens compared: up to and including the first whose token differs."""
    positions_differ: int = 0
    tokens_differ: int = 0
    first: str = ""
    """The first request and position that differed."""

    @property
    def identical(self) -> bool:
        """Whether something was compared and nothing differed."""
        return self.positions > 0 and not (self.positions_differ or self.tokens_differ)

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return {
            "name": self.name,
            "requests": self.requests,
            "requests_differ": self.requests_differ,
            "comparisons": self.positions,
            "comparisons_differ": self.positions_differ,
            "values": self.difference.values_compared,
            "values_differ": self.difference.values_differ,
            "tokens_differ": self.tokens_differ,
            "max_logprob_difference": self.difference.largest,
            "first": self.first,
        }


def compare(found: Round, request: str, alone: Served, other: Served) -> None:
    """Add a request to a round. Where a token differs, what follows has another prefix and is not compared."""
    found.requests += 1
    differ_before = found.positions_differ + found.tokens_differ
    if len(alone.tokens) != len(other.tokens):
        found.tokens_differ += 1
        found.first = found.first or f"{request}: {len(other.tokens)} new tokens, {len(alone.tokens)} alone"
    for index in range(min(len(alone.tokens), len(other.tokens))):
        found.positions += 1
        values = found.difference.values_differ
        found.difference.add(*_aligned(alone.top[index], other.top[index]))
        moved = found.difference.values_differ > values
        found.positions_differ += moved
        ended = alone.tokens[index] != other.tokens[index]
        found.tokens_differ += ended
        if moved or ended:
            found.first = found.first or f"{request}, new token {index}"
        if ended:
            break
    found.requests_differ += found.positions_differ + found.tokens_differ > differ_before


def totals(rounds: Sequence[Round]) -> Round:
    """All rounds as one."""
    total = Round("all")
    for each in rounds:
        total.requests += each.requests
        total.requests_differ += each.requests_differ
        total.positions += each.positions
        total.positions_differ += each.positions_differ
        total.tokens_differ += each.tokens_differ
        total.difference.values_compared += each.difference.values_compared
        total.difference.values_differ += each.difference.values_differ
        total.difference.largest = max(total.difference.largest, each.difference.largest)
        total.first = total.first or (f"{each.name}: {each.first}" if each.first else "")
    return total


def _aligned(left: Mapping[int, float], right: Mapping[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the same tokens side by side; what only one side has, in order: equal values at the end of the top
    may be taken from the vocabulary in any order.
    """
    common = [token for token in left if token in right]
    sides = []
    for mine, other in ((left, right), (right, left)):
        rest = sorted((value for token, value in mine.items() if token not in other), reverse=True)
        sides.append([mine[token] for token in common] + rest)
    longest = max(map(len, sides))
    first, second = (torch.tensor(side + [math.nan] * (longest - len(side)), dtype=torch.float32) for side in sides)
    return first, second

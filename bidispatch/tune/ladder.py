"""From the times of every M to a ladder: the winner of each, and neighbours of one kernel as one rung. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bidispatch.profiles.tiles import TunedRung
from bidispatch.registry import Implementation, Params, Tile

__all__ = ["EVEN", "Choice", "Step", "merged", "served", "winner"]

EVEN = 0.015
"""Times closer than this are one time: then what served the M before stays, or what the profile lists first."""


@dataclass(frozen=True)
class Choice:
    """A kernel that can serve: an implementation with its params and one launch shape."""

    implementation: Implementation
    params: Params
    tile: Tile | None

    @cached_property
    def key(self) -> str:
        """Equal for equal kernels, in every process."""
        tile = self.tile.model_dump() if self.tile else None
        return json.dumps([self.implementation.name, self.params.model_dump(), tile], sort_keys=True)

    def __str__(self) -> str:
        return f"{self.implementation.name} {self.tile or ''}".rstrip()


@dataclass(frozen=True, slots=True)
class Step:
    """What won at one M, and its microseconds."""

    m: int
    choice: Choice
    us: float


def winner(times: Mapping[str, float], order: Sequence[str], before: str | None) -> str:
    """The key of the fastest; among even ones that which won before, else the first in `order`."""
    best = min(times.values())
    even = [key for key in order if key in times and times[key] <= best * (1 + EVEN)]
    return before if before in even else even[0]


def served(steps: Sequence[Step]) -> list[tuple[Choice, int, int]]:
    """Each winner with the first and the last M of a range it serves: from where the one before ended."""
    ranges: list[tuple[Choice, int, int]] = []
    low = 1
    for step in steps:
        if ranges and ranges[-1][0].key == step.choice.key:
            low = ranges.pop()[1]
        ranges.append((step.choice, low, step.m))
        low = step.m + 1
    return ranges


def merged(steps: Sequence[Step]) -> list[TunedRung]:
    """Rungs by rising M: each serves up to the largest M it won at, the last any more."""
    rungs: list[TunedRung] = []
    previous: Choice | None = None
    for step in steps:
        choice = step.choice
        rung = TunedRung(
            impl=choice.implementation.name,
            max_m=step.m,
            params=choice.params.model_dump(exclude_defaults=True),
            tile=choice.tile.model_dump(exclude_defaults=True) if choice.tile else None,
            us=round(step.us, 2),
        )
        if previous is not None and previous.key == choice.key:
            rungs.pop()
        rungs.append(rung)
        previous = choice
    if rungs:
        rungs[-1] = rungs[-1].model_copy(update={"max_m": None})
    return rungs

"""A resolved profile: a chain of files merged, each rule and candidate knowing the file and line it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bidispatch.invariance import Invariance
from bidispatch.ops.schema import DimValue, Problem
from bidispatch.profiles.schema import Condition

__all__ = ["Profile", "ProfileCandidate", "ProfileRule", "Source", "TunedSource"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where something was said: a file and line, or an environment variable or call (line 0)."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class ProfileCandidate:
    """An implementation a rule offers, for calls of up to `max_m` rows."""

    impl: str
    source: Source
    max_m: int | None = None
    params: Mapping[str, DimValue] = field(default_factory=dict)
    tile: Mapping[str, DimValue] | None = None


@dataclass(frozen=True, slots=True)
class TunedSource:
    """A file of tuned ladders: where it is, how it is shown, and where a profile names it."""

    path: Path
    shown: str
    source: Source


@dataclass(frozen=True, slots=True)
class ProfileRule:
    """Candidates for the problems it matches."""

    dtypes: tuple[str, ...]
    when: Mapping[str, DimValue | Condition]
    numerics: str | None
    candidates: tuple[ProfileCandidate, ...]
    source: Source
    tuned: tuple[TunedSource, ...] = ()

    def mismatch(self, problem: Problem) -> str | None:
        """Why the rule is not for this problem, or None."""
        if problem.dtype not in self.dtypes:
            return f"it is for {', '.join(self.dtypes)}"
        for dim, condition in self.when.items():
            if why := _unmet(dim, condition, problem[dim]):
                return why
        return None


def _unmet(dim: str, condition: DimValue | Condition, value: DimValue) -> str | None:
    if not isinstance(condition, Condition):
        return None if value == condition else f"{dim} is {value}, not {condition}"
    if condition.multiple_of is not None and int(value) % condition.multiple_of:
        return f"{dim}={value} is not a multiple of {condition.multiple_of}"
    if condition.min is not None and float(value) < condition.min:
        return f"{dim}={value} is under {condition.min}"
    if condition.max is not None and float(value) > condition.max:
        return f"{dim}={value} is over {condition.max}"
    if condition.one_of is not None and value not in condition.one_of:
        return f"{dim}={value} is not one of {', '.join(map(str, condition.one_of))}"
    return None


@dataclass(frozen=True, slots=True)
class Profile:
    """What a plan follows. `chain` names the files merged, the base first; `note` says what was unusual."""

    name: str
    chain: tuple[str, ...]
    require: Invariance
    trust: str
    rules: Mapping[str, tuple[ProfileRule, ...]]
    prefer: tuple[tuple[str, Source], ...] = ()
    disable: Mapping[str, tuple[str, Source]] = field(default_factory=dict)
    note: str = ""
    match: Mapping[str, str | None] | None = None

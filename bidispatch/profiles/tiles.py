"""Tuned ladders: the JSON files that `bidispatch tune` writes and a profile rule names under `tuned`.

Tools write these files, people do not. A ladder found on one GPU may serve another of the same arch: launch shapes
never change bits.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from bidispatch.errors import Fault, ProfileError
from bidispatch.files import write_whole
from bidispatch.ops.schema import Problem

__all__ = ["Searched", "TunedEntry", "TunedFile", "TunedRung", "read_tuned", "write_tuned"]

Scalar = bool | int | float | str


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TunedRung(_Part):
    """A candidate as a profile would write it, and the microseconds it took at its largest M."""

    impl: str
    max_m: int | None = Field(default=None, gt=0)
    params: dict[str, Scalar] = Field(default_factory=dict)
    tile: dict[str, Scalar] | None = None
    us: float | None = None


class Searched(_Part):
    """What a ladder is the best of."""

    rows: tuple[PositiveInt, ...] = Field(min_length=1)
    """The M that were timed, rising."""
    implementations: tuple[str, ...] = Field(min_length=1)
    """Those of the class that were tried, each once."""

    @field_validator("rows")
    @classmethod
    def _rise(cls, rows: tuple[int, ...]) -> tuple[int, ...]:
        if list(rows) != sorted(set(rows)):
            raise ValueError(f"rows must rise: {list(rows)}")
        return rows

    def covers(self, other: Searched) -> bool:
        """Whether all that the other names was searched."""
        return set(other.rows) <= set(self.rows) and set(other.implementations) <= set(self.implementations)


class TunedEntry(_Part):
    """The ladder of one problem, by rising M, all of one class, compared bit by bit where it was found."""

    op: str
    dtype: str
    dims: dict[str, Scalar]
    """The dims that matter to it: it serves every problem that has these."""
    numerics: str
    rungs: list[TunedRung]
    comparisons: int = Field(ge=0)
    """Rows compared with the class's reference before it was written, all equal."""
    made: str
    searched: Searched | None = None
    """None in files that are older than this was noted: such a ladder serves, and is found again when asked for."""

    def serves(self, problem: Problem) -> bool:
        """Whether the ladder is for this problem."""
        same = self.op == problem.op and self.dtype == problem.dtype
        return same and all(problem.dims.get(name) == value for name, value in self.dims.items())


class TunedFile(_Part):
    """A file of ladders, and the environment they were found in, as `bidispatch.environment.describe` gives it."""

    format: Literal["bidispatch-tiles"] = "bidispatch-tiles"
    version: Literal[1] = 1
    environment: dict[str, Any]
    entries: list[TunedEntry]

    @property
    def arch(self) -> str:
        """The arch they were found on."""
        return str(self.environment.get("arch", ""))

    @property
    def device(self) -> str:
        """The device they were found on."""
        return str(self.environment.get("device", ""))

    @property
    def place(self) -> str:
        """Device and arch, for people."""
        return f"{self.device} ({self.arch})" if self.device else self.arch

    def find(self, problem: Problem) -> TunedEntry | None:
        """The first ladder that is for a problem."""
        return next((entry for entry in self.entries if entry.serves(problem)), None)


def read_tuned(path: Path) -> TunedFile:
    """Read a file. Raises `ProfileError` where it is not there, or was not written by `tune`."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise _fault(path, f"cannot be read ({error.strerror})") from error
    return _read(path, changed)


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> TunedFile:
    try:
        return TunedFile.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _fault(path, f"cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise _fault(path, f"was not written by `bidispatch tune` ({where or 'the file'}: {first['msg']})") from error


def _fault(path: Path, what: str) -> ProfileError:
    message = f"this file of tuned ladders {what}; `bidispatch tune` makes one, or take it out of the rule's `tuned`"
    return ProfileError([Fault(str(path), 0, 0, message)])


def write_tuned(path: Path, file: TunedFile) -> None:
    """Write a file whole, a rung a line, so that a reader never sees half of it and a diff shows what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(file.model_dump(mode="json", exclude={"entries"}), indent=1).removesuffix("\n}")
    text = f'{head},\n "entries": [{",".join(_entry_text(entry) for entry in file.entries)}\n ]\n}}\n'
    write_whole(path, text, 0o644)  # data for every user


def _entry_text(entry: TunedEntry) -> str:
    head = json.dumps(entry.model_dump(mode="json", exclude={"rungs"})).removesuffix("}")
    rungs = ",".join(f"\n    {json.dumps(rung.model_dump(mode='json', exclude_none=True))}" for rung in entry.rungs)
    return f'\n  {head}, "rungs": [{rungs}\n  ]}}'

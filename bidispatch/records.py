"""Records: what `verify` proved or refuted, with the environment it holds for. Tools write them; nobody edits them.

One JSON file a device, in the user's data folder or `$BIDISPATCH_RECORDS_DIR`; written whole, under a lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidispatch.device import Device
from bidispatch.environment import describe, hard_part
from bidispatch.errors import RecordError, UsageError
from bidispatch.files import prepare_folder, write_whole
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.planning.selection import Selection
from bidispatch.registry import Rung

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["Record", "RecordStore", "Refutation", "records_folder"]

_FORMAT = "bidispatch-records"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """A proof, on one device, that one ladder held its bits for one problem."""

    problem: str
    """`Problem.key`."""
    ladder: str
    """`Selection.ladder_key`."""
    numerics: str
    level: str
    comparisons: int
    """Rows compared bit by bit, all equal."""
    cuda_graph: bool
    made: str
    """When, as an ISO date and time with offset."""
    environment: Mapping[str, Any]

    def proves(self, selection: Selection, environment: Mapping[str, Any]) -> bool:
        """Whether it is about this ladder, in this environment, at least at the level claimed."""
        return (
            self.problem == selection.problem.key
            and self.ladder == selection.ladder_key
            and self.numerics == selection.numerics
            and self.comparisons > 0
            and Invariance.parse(self.level) >= selection.level
            and hard_part(dict(self.environment)) == hard_part(dict(environment))
        )


@dataclass(frozen=True, slots=True)
class Refutation:
    """A finding, on one device, that one rung's bits differed from those of the ladder it stood in."""

    problem: str
    """`Problem.key`."""
    rung: str
    """`Rung.key`."""
    found: str
    """What differed, as the check says it."""
    retry: str
    """The command that tries again."""
    made: str
    """When, as an ISO date and time with offset."""
    environment: Mapping[str, Any]
    """Of the rung's own implementation."""


def records_folder() -> Path:
    """Where records live: `$BIDISPATCH_RECORDS_DIR`, else the platform's data folder for bidispatch."""
    if chosen := os.environ.get("BIDISPATCH_RECORDS_DIR"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_data_dir("bidispatch", appauthor=False)) / "records"


@lru_cache(maxsize=1)
def _adapters() -> tuple[TypeAdapter[list[Record]], TypeAdapter[list[Refutation]]]:
    from pydantic import TypeAdapter

    return TypeAdapter(list[Record]), TypeAdapter(list[Refutation])


class RecordStore:
    """The records of one device."""

    def __init__(self, device: Device, folder: Path | None = None) -> None:
        self._device = device
        self.path = (folder or records_folder()) / f"{device.arch.name}-{device.slug}.json"

    def load(self) -> list[Record]:
        """Every record. Raises `RecordError` for a file that is truncated or not ours."""
        return self._read()[0]

    def _read(self) -> tuple[list[Record], list[Refutation]]:
        if not self.path.exists():
            return [], []
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecordError(
                f"{self.path} is not a readable record file ({error}); "
                "delete it and run `bidispatch verify --all --record`"
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise RecordError(f"{self.path} was not written by bidispatch; move it away, or set BIDISPATCH_RECORDS_DIR")
        if content.get("version") != _VERSION:
            raise RecordError(
                f"{self.path} has format version {content.get('version')!r}, this bidispatch reads {_VERSION}; "
                "move it away and run `bidispatch verify --all --record` to make it anew"
            )
        from pydantic import ValidationError

        try:
            of_records, of_refutations = _adapters()
            records = of_records.validate_python(content.get("records"))
            refutations = of_refutations.validate_python(content.get("refuted", []))  # files had none at first
            for record in records:
                Invariance.parse(record.level)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            raise RecordError(
                f"{self.path} has a record that is not whole ({where}: {first['msg']}); delete the file"
            ) from error
        except UsageError as error:
            raise RecordError(f"{self.path} has a record that is not whole ({error}); delete the file") from error
        return records, refutations

    def find(self, selection: Selection) -> Record | None:
        """The newest record that proves a selection here and now, or None."""
        records = self.load()
        if not records or selection.device.predicted:
            return None
        environment = describe(self._device, {rung.implementation for rung in selection.rungs})
        proofs = [record for record in records if record.proves(selection, environment)]
        return max(proofs, key=lambda record: record.made, default=None)

    def refutations(self, problem: Problem, rungs: Sequence[Rung]) -> list[Refutation]:
        """What speaks here and now against these rungs for a problem."""
        wanted = _whatever_n(problem.key)
        known = {each.rung: each for each in self._read()[1] if _whatever_n(each.problem) == wanted}
        found = [(known[rung.key], rung) for rung in rungs if rung.key in known] if known else []
        return [
            refutation
            for refutation, rung in found
            if hard_part(dict(refutation.environment)) == hard_part(describe(self._device, {rung.implementation}))
        ]

    def prepare(self) -> None:
        """Make the folder. Raises `RecordError` where records cannot be written, best known before the work."""
        folder = self.path.parent
        try:
            prepare_folder(folder)
        except OSError as error:
            raise RecordError(f"records cannot be written to {folder}: {error}; set BIDISPATCH_RECORDS_DIR") from error

    def add(
        self, records: Sequence[Record], refuted: Sequence[Refutation] = (), held: Sequence[Refutation] = ()
    ) -> None:
        """Write records and refutations, replacing those about the same thing in the same environment, and take out
        the refutations of rungs that `held` now. Safe against other writers.
        """
        from filelock import FileLock

        self.prepare()
        with FileLock(f"{self.path}.lock"):
            old_records, old_refuted = self._read()
            fresh = {_identity(record) for record in records}
            settled = {_identity(refutation) for refutation in (*refuted, *held)}
            kept = [record for record in old_records if _identity(record) not in fresh]
            still = [refutation for refutation in old_refuted if _identity(refutation) not in settled]
            content = {
                "format": _FORMAT,
                "version": _VERSION,
                "records": [asdict(record) for record in [*kept, *records]],
                "refuted": [asdict(refutation) for refutation in [*still, *refuted]],
            }
            write_whole(self.path, json.dumps(content, indent=1) + "\n")


def _whatever_n(problem: str) -> str:
    """A `Problem.key` without n where hosts merge and shard weights by n: a class must not follow it there, so a rung
    that differs at one n serves none.
    """
    content = json.loads(problem)
    if content["dims"].get("role") == "linear":
        del content["dims"]["n"]
    return json.dumps(content, sort_keys=True)


def _identity(entry: Record | Refutation) -> str:
    about = [entry.ladder, entry.level] if isinstance(entry, Record) else [entry.rung]
    return json.dumps([entry.problem, *about, hard_part(dict(entry.environment))], sort_keys=True)

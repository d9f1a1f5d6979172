"""What bidispatch raises.

::

    BidispatchError
    ├── UsageError(ValueError)          an op, arch, dtype, dim or option nobody knows
    ├── ProfileError(ValueError)        a profile is wrong; every fault of the file at once, each path:line:column
    ├── RecordError(ValueError)         a record file is truncated or not ours
    ├── ArgumentError(ValueError)       tensors that do not fit what the kernel was bound for
    ├── SelectionError(LookupError)     nothing fits, or a forced choice does not; carries every decision
    ├── BackendError(ImportError)       a backend that was chosen does not import; the cause is chained
    ├── DeviceError(RuntimeError)       this machine lacks what was asked for
    ├── InvarianceError(RuntimeError)   bits differed; carries the smallest failing pair
    └── PlanFrozenError(RuntimeError)   a frozen plan was asked for something new

Every message says what was asked, what is there, and what to type next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bidispatch.planning.decisions import Decision

__all__ = [
    "ArgumentError",
    "BackendError",
    "BidispatchError",
    "DeviceError",
    "Fault",
    "InvarianceError",
    "PlanFrozenError",
    "ProfileError",
    "RecordError",
    "SelectionError",
    "UsageError",
    "did_you_mean",
]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


class BidispatchError(Exception):
    """Base of everything bidispatch raises on purpose."""


class UsageError(BidispatchError, ValueError):
    """An op, arch, dtype, dim or option that does not exist."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a profile. `line` and `column` count from 1; 0 when the file has no such place."""

    path: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: {self.message}"


class ProfileError(BidispatchError, ValueError):
    """A profile is wrong. `faults` holds all of them, in file order."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class RecordError(BidispatchError, ValueError):
    """A record file is truncated, or was not written by bidispatch."""


class ArgumentError(BidispatchError, ValueError):
    """Tensors whose shape, dtype, device or layout is not what the kernel was bound for."""


class SelectionError(BidispatchError, LookupError):
    """No implementation fits. `decisions` holds every candidate with all its reasons."""

    def __init__(self, message: str, decisions: Sequence[Decision] = ()) -> None:
        self.decisions = tuple(decisions)
        trace = "".join(f"\n  {decision}" for decision in self.decisions)
        super().__init__(message + trace)


class BackendError(BidispatchError, ImportError):
    """A backend or kernel that was chosen cannot be imported. The import's own exception is `__cause__`."""


class DeviceError(BidispatchError, RuntimeError):
    """This machine lacks the device, driver or package that was asked for."""


class InvarianceError(BidispatchError, RuntimeError):
    """Two computations of the same row gave different bits."""


class PlanFrozenError(BidispatchError, RuntimeError):
    """A frozen plan was asked to select or bind something it had not selected before."""

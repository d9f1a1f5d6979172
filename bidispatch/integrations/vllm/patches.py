"""Attributes put in the place of others, all or none, and put back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["Patches"]

_ABSENT = object()


class Patches:
    """What has been replaced, in order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def replace(self, holder: Any, name: str, value: Any) -> None:
        """Put `value` at `holder.name`. What stood there itself, and not what it inherited, is what `undo` restores."""
        before = vars(holder).get(name, _ABSENT) if inspect.isclass(holder) else getattr(holder, name, _ABSENT)
        setattr(holder, name, value)
        if before is _ABSENT:
            self._undo.append(lambda: delattr(holder, name))
        else:
            self._undo.append(lambda: setattr(holder, name, before))

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Have `undo` called in its turn, for what was patched elsewhere."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Put everything back, the last first."""
        while self._undo:
            self._undo.pop()()

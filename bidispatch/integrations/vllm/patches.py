"""Attributes put in the place of others, all or none, and put back."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["Patches"]

_ABSENT = object()


class Patches:
    """What has been replaced, in order."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any]] = []

    def __len__(self) -> int:
        return len(self._done)

    def replace(self, holder: Any, name: str, value: Any) -> None:
        """Put `value` at `holder.name`. What stood there itself, and not what it inherited, is what `undo` restores."""
        before = vars(holder).get(name, _ABSENT) if inspect.isclass(holder) else getattr(holder, name, _ABSENT)
        setattr(holder, name, value)
        self._done.append((holder, name, before))

    def undo(self) -> None:
        """Put everything back, the last first."""
        while self._done:
            holder, name, before = self._done.pop()
            if before is _ABSENT:
                delattr(holder, name)
            else:
                setattr(holder, name, before)

"""The invariance levels: what a result for one request is free of."""

from __future__ import annotations

import enum

from bidispatch.errors import UsageError, did_you_mean

__all__ = ["Invariance"]


class Invariance(enum.IntEnum):
    """How much may change around a request without changing its bits; a higher level includes the lower."""

    RUN = 1
    """Same inputs, same bits."""
    BATCH = 2
    """Also free of the batch size, the position in the batch, and the neighbours."""
    SEQUENCE = 3
    """Also free of chunking and prefix caching; prefill and decode agree. What continuous batching needs."""
    TOPOLOGY = 4
    """Also free of the tensor-parallel size."""

    @classmethod
    def parse(cls, text: str) -> Invariance:
        """Return the level of that name, in any case; raise `UsageError` for another name."""
        names = [level.label for level in cls]
        if text.lower() not in names:
            raise UsageError(
                f"unknown invariance level {text!r}; the levels are {', '.join(names)}{did_you_mean(text, names)}"
            )
        return cls[text.upper()]

    @property
    def label(self) -> str:
        """The name profiles and commands use: `batch`, `sequence`, ..."""
        return self.name.lower()

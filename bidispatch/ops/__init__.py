"""The catalogue: every op by name, one module a family. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from bidispatch.errors import UsageError, did_you_mean
from bidispatch.ops import activation, attention, int4, linear, mla, norm, planned, reduction
from bidispatch.ops.schema import Op

__all__ = ["CATALOGUE", "get"]

CATALOGUE: Mapping[str, Op] = {
    op.name: op for family in (linear, int4, norm, activation, reduction, attention, mla, planned) for op in family.OPS
}


def get(name: str) -> Op:
    """Return the op of that name; raise `UsageError` for a name the catalogue does not have."""
    try:
        return CATALOGUE[name]
    except KeyError:
        raise UsageError(f"unknown op {name!r}; known: {', '.join(CATALOGUE)}{did_you_mean(name, CATALOGUE)}") from None

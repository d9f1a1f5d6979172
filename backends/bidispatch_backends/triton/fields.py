"""Checks that the fields of params and tiles share. Imports no triton, no torch."""

from __future__ import annotations

__all__ = ["power_of_two_field"]


def power_of_two_field(value: int) -> int:
    """Return the value; raise ValueError, which pydantic reports, for one that is not a power of two."""
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two")
    return value

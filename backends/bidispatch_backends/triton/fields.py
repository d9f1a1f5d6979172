"""What params and tiles share: checks of fields, sizes of dtypes. Imports no triton, no torch."""

from __future__ import annotations

from bidispatch.ops.quantize import FP8

__all__ = ["BYTES", "power_of_two_field"]

BYTES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, FP8: 1}
"""Of an element."""


def power_of_two_field(value: int) -> int:
    """Return the value; raise ValueError, which pydantic reports, for one that is not a power of two."""
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two")
    return value

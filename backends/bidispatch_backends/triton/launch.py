"""A kernel with everything a launch fixes before it knows the batch: constants and compiler options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bidispatch.device import Arch

__all__ = ["ArgumentType", "Constant", "Launch", "ceil_div", "options", "pointer", "power_of_two"]

Constant = int | float | bool | str
"""What a `tl.constexpr` argument of these kernels may be."""

ArgumentType = str | int | None
"""What `Launch.arguments` says of an argument."""

_TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64"}


@dataclass(frozen=True)
class Launch:
    """One kernel, its constants and its compiler options, made when a kernel is bound.

    `arguments` describes what is passed at each call, in order, for contiguous and aligned tensors: a Triton type
    (`*bf16`, `fp32`), the value of an integer that does not follow the batch, `"i32"` for one that does, or None
    for a tensor the problem does not have. Compiling ahead of time reads it; a launch does not.
    """

    kernel: Any
    arguments: Mapping[str, ArgumentType]
    constants: Mapping[str, Constant]
    options: Mapping[str, int | bool]

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch on the current stream."""
        self.kernel[grid](*arguments, **self.constants, **self.options)


def options(arch: Arch, num_warps: int, num_stages: int, *, fp_fusion: bool) -> dict[str, int | bool]:
    """Compiler options, all of them named: Triton's own defaults change between versions.

    fp_fusion: whether the compiler may contract a product and a sum. It may only where a kernel has no such pair
        outside of a matrix product.
    """
    chosen: dict[str, int | bool] = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "num_ctas": 1,
        "enable_fp_fusion": fp_fusion,
    }
    if arch.vendor == "amd":
        # The shape of the matrix instruction is part of the order of additions; left at 0 it follows the tile.
        chosen |= {"matrix_instr_nonkdim": 16, "kpack": 1}
    return chosen


def pointer(dtype: str) -> str:
    """Triton's name for a pointer to a dtype: `*bf16`."""
    return f"*{_TRITON_TYPES[dtype]}"


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()

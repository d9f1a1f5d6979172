"""A kernel with everything a launch fixes before it knows the batch: constants and compiler options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

from bidispatch.device import Arch

__all__ = ["ArgumentType", "Constant", "Launch", "ceil_div", "options", "pointer", "power_of_two"]

Constant = int | float | bool | str
"""What a `tl.constexpr` argument of these kernels may be."""

ArgumentType = str | int | None
"""What `Launch.arguments` says of an argument."""

_ALIGNMENT = 16
"""Bytes; Triton compiles another binary for pointers that are not multiples of it."""

_TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32"}


@dataclass(frozen=True)
class Launch:
    """One kernel, its constants and its compiler options, made when a kernel is bound.

    `arguments` describes what is passed at each call, in order, tensors first, for contiguous and aligned tensors: a
    Triton type (`*bf16`, `fp32`), the value of an integer that does not follow the batch, `"i32"` or `"i64"` for one
    that does, or None for a tensor the problem does not have. Constants are in the kernel's order, behind them.
    """

    kernel: Any
    arguments: Mapping[str, ArgumentType]
    constants: Mapping[str, Constant]
    options: Mapping[str, int | bool]
    _compiled: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _tensors(self) -> int:
        """How many arguments are tensors."""
        return sum(value is None or str(value).startswith("*") for value in self.arguments.values())

    @cached_property
    def _specialised(self) -> Callable[[tuple[Any, ...]], Any]:
        """Picks the arguments whose values a binary may depend on: integers but those that follow the batch."""
        kinds = list(self.arguments.values())
        return itemgetter(
            *(i for i, kind in enumerate(kinds) if i >= self._tensors and not isinstance(kind, str)), 0, 0
        )

    @cached_property
    def _constants(self) -> tuple[Constant, ...]:
        return tuple(self.constants.values())

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch on the current stream.

        Triton's own launcher works out at every call which binary the arguments need, which costs more than many
        kernels run. Here the binary is remembered by the integers it may depend on, for tensors that are aligned.
        """
        places = 0
        for tensor in arguments[: self._tensors]:
            if tensor is not None:
                places |= tensor.data_ptr()
        if places % _ALIGNMENT:
            self.kernel[grid](*arguments, **self.constants, **self.options)
            return
        key = self._specialised(arguments)[:-2]
        compiled = self._compiled.get(key)
        if compiled is None:
            # The interpreter compiles nothing, and gives None.
            self._compiled[key] = self.kernel[grid](*arguments, **self.constants, **self.options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *self._constants)


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

"""A kernel with everything a launch fixes before it knows the batch: constants and compiler options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

import triton

from bidispatch.device import Arch

__all__ = ["ArgumentType", "Constant", "Launch", "ceil_div", "dependent_launch", "options", "pointer", "power_of_two"]

Constant = int | float | bool | str | tuple[int, ...]
"""What a `tl.constexpr` argument of these kernels may be."""

ArgumentType = str | int | None
"""What `Launch.arguments` says of an argument."""

_ALIGNMENT = 16
"""Bytes; Triton compiles another binary for pointers that are not multiples of it."""

_SIZES = ("i32", "i64")
_BEYOND_32_BITS = 2**31

_TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_TRITON_TYPES |= {"int8": "i8", "int32": "i32", "int64": "i64"}
_TRITON_TYPES |= {"float8_e4m3fn": "fp8e4nv"}


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
    unaligned: Launch | None = None
    """Of a kernel whose copies are of 16 bytes: what is launched, on the same grid, for operands that do not allow it:
    addresses that are no multiples of 16 bytes, or sizes among the arguments that are no multiples of 16."""
    _compiled: dict[Any, Callable[..., None]] = field(init=False, default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for a description that would let a remembered binary serve arguments it was not made for."""
        names = list(self.kernel.arg_names)
        behind = set(names[len(self.arguments) :])
        if names[: len(self.arguments)] != list(self.arguments) or behind != set(self.constants):
            raise ValueError(f"{self.kernel} takes {names}, described as {[*self.arguments, *self.constants]}")
        free = [name for name, kind in self.arguments.items() if kind in _SIZES]
        specialised = [name for name in free if name not in (getattr(self.kernel, "do_not_specialize", None) or free)]
        if specialised:
            raise ValueError(f"{self.kernel}: name {', '.join(specialised)} in do_not_specialize")

    @cached_property
    def _tensors(self) -> int:
        """How many arguments are tensors."""
        return sum(value is None or str(value).startswith("*") for value in self.arguments.values())

    @cached_property
    def _specialised(self) -> Callable[[tuple[Any, ...]], Any]:
        """Picks the arguments whose values a binary may depend on: integers but those that follow the batch."""
        kinds = list(self.arguments.values())
        chosen = [i for i, kind in enumerate(kinds) if i >= self._tensors and not isinstance(kind, str)]
        return itemgetter(*chosen) if chosen else lambda arguments: ()

    def _sizes(self, arguments: tuple[Any, ...]) -> tuple[int, ...]:
        """The arguments whose values a binary may depend on."""
        chosen = self._specialised(arguments)
        return chosen if isinstance(chosen, tuple) else (chosen,)

    @cached_property
    def _wide(self) -> int:
        """Where an argument is that may exceed 32 bits in some calls, or -1."""
        kinds = list(self.arguments.values())
        return kinds.index("i64") if "i64" in kinds else -1

    @cached_property
    def _constants(self) -> tuple[Constant, ...]:
        return tuple(self.constants[name] for name in self.kernel.arg_names if name in self.constants)

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch on the current stream.

        Triton's own launcher works out at every call which binary the arguments need, which takes longer than many
        kernels run. Here the binary is remembered by the integers it may depend on, for tensors that are aligned.
        """
        pointers: list[int | None] = []
        places = 0
        for tensor in arguments[: self._tensors]:
            place = None if tensor is None else tensor.data_ptr()
            pointers.append(place)
            places |= place or 0
        aligned = not places % _ALIGNMENT
        key = self._specialised(arguments)
        if self._wide >= 0:
            key = key, arguments[self._wide] >= _BEYOND_32_BITS
        binary = self._compiled.get(key)
        if binary is not None and aligned:
            binary((*grid, 1, 1)[:3], *pointers, *arguments[self._tensors :], *self._constants)
            return
        if self.unaligned and (not aligned or any(size % _ALIGNMENT for size in self._sizes(arguments))):
            self.unaligned(grid, *arguments)
            return
        compiled = self.kernel[grid](*arguments, **self.constants, **self.options)
        if aligned and compiled is not None:  # the interpreter compiles nothing, and is asked again
            self._compiled[key] = _launcher(compiled)


def _launcher(compiled: Any) -> Callable[..., None]:
    """What launches a binary for a grid of three sizes and addresses, where Triton would ask the driver about tensors.

    What `compiled[grid]` does for a profiler's hooks takes a seventh of a launch (Triton 3.6), without hooks too.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    current, runtime = triton.runtime.driver.active, triton.knobs.runtime

    def launch(grid: tuple[int, int, int], *arguments: Any) -> None:
        if _is_set(runtime.launch_enter_hook) or _is_set(runtime.launch_exit_hook):
            compiled[grid](*arguments)
            return
        stream = current.get_current_stream(current.get_current_device())
        run(*grid, stream, function, metadata, None, None, None, *arguments)

    return launch


def _is_set(hook: Any) -> bool:
    """Whether a hook would call anything: a chain of them is always there since Triton 3.5."""
    return bool(getattr(hook, "calls", hook))


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


def dependent_launch(arch: Arch) -> dict[str, bool]:
    """Options of a kernel that starts while the one before it runs and waits for it; none where that cannot be.

    Programmatic dependent launch, sm90 and later (PTX ISA 9.0, griddepcontrol): hides the µs that a launch takes.
    """
    there = arch.vendor == "nvidia" and arch.order >= 90 and not triton.knobs.runtime.interpret
    return {"launch_pdl": True} if there else {}


def pointer(dtype: str) -> str:
    """Triton's name for a pointer to a dtype: `*bf16`."""
    return f"*{_TRITON_TYPES[dtype]}"


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()

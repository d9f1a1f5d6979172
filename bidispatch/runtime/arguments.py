"""Argument checks: from the catalogue's shapes to a test on host sizes. Reads nothing from the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from bidispatch.errors import ArgumentError
from bidispatch.ops.schema import SAME_DTYPE, Argument, Problem

__all__ = ["TensorSpec", "check_tensors", "output_shape", "tensor_specs"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An `Argument` resolved for one problem: run-time sizes first, then the axes that are known."""

    name: str
    dtype: torch.dtype
    ndim: int
    sizes: tuple[tuple[int, str, int], ...]
    """(axis, run-time size, offset): the axis must hold that size plus the offset."""
    known: tuple[tuple[int, int], ...]
    """(axis, size) of the axes after those."""
    present: bool
    any_strides: bool
    when: str
    """What of a problem this tensor belongs to, as `Argument.when` says it."""

    @property
    def head(self) -> int:
        """How many leading axes are run-time sizes."""
        return len(self.sizes)


def tensor_specs(arguments: Sequence[Argument], problem: Problem) -> tuple[TensorSpec, ...]:
    """Resolve the catalogue's arguments for one problem."""
    return tuple(_resolve(argument, problem) for argument in arguments)


def _resolve(argument: Argument, problem: Problem) -> TensorSpec:
    known = [_known_size(axis, problem) for axis in argument.shape]
    head = next((i for i in range(len(known)) if None not in known[i:]), len(known))
    sizes = []
    for axis in range(head):
        size, _, offset = str(argument.shape[axis]).partition("+")
        sizes.append((axis, size, int(offset or 0)))
    dtype = argument.dtype
    if dtype == SAME_DTYPE:
        dtype = problem.dtype
    elif dtype in problem.dims:
        dtype = str(problem[dtype])
    return TensorSpec(
        name=argument.name,
        dtype=getattr(torch, dtype),
        ndim=len(known),
        sizes=tuple(sizes),
        known=tuple((axis, size) for axis, size in enumerate(known) if axis >= head and size is not None),
        present=argument.present(problem),
        any_strides=argument.any_strides,
        when=argument.when,
    )


def _known_size(axis: str | int, problem: Problem) -> int | None:
    if isinstance(axis, int):
        return axis
    factor, times, dim = axis.partition("*")
    if times:
        return int(factor) * problem.size(dim)
    dim, over, divisor = axis.partition("/")
    if over:
        return -(-problem.size(dim) // (int(divisor) if divisor.isdigit() else problem.size(divisor)))
    summands = axis.split("+")
    return sum(map(problem.size, summands)) if all(dim in problem.dims for dim in summands) else None


def output_shape(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of an output, from the run-time sizes its arguments had."""
    return (*(sizes[size] + offset for _, size, offset in spec.sizes), *(size for _, size in spec.known))


def check_tensors(
    problem: Problem,
    specs: Sequence[TensorSpec],
    tensors: Sequence[Any],
    device: torch.device,
    sizes: dict[str, int] | None = None,
) -> dict[str, int]:
    """Check every tensor against its spec and return the run-time sizes; raise `ArgumentError` at the first misfit."""
    sizes = {} if sizes is None else sizes
    grad = torch.is_grad_enabled()
    for spec, tensor in zip(specs, tensors, strict=True):
        if tensor is None:
            if spec.present:
                raise ArgumentError(f"{problem}: {spec.name} is missing")
            continue
        try:
            shape = tensor.shape
        except AttributeError:
            raise ArgumentError(f"{problem}: {spec.name} must be a tensor, not {type(tensor).__name__}") from None
        if (
            len(shape) != spec.ndim
            or not spec.present
            or tensor.dtype is not spec.dtype
            or tensor.device != device
            or not (spec.any_strides or tensor.is_contiguous() or tensor.stride(-1) == 1 or shape[-1] == 1)
            or (grad and tensor.requires_grad)
        ):
            _fail(problem, spec, tensor, device)
        for axis, known in spec.known:
            if shape[axis] != known:
                _fail(problem, spec, tensor, device)
        for axis, size, offset in spec.sizes:
            actual = shape[axis] - offset
            if sizes.setdefault(size, actual) != actual:
                raise ArgumentError(
                    f"{problem}: {spec.name} has {shape[axis]} on axis {axis}, "
                    f"but {size} is {sizes[size]} by an argument before it"
                )
    return sizes


def _fail(problem: Problem, spec: TensorSpec, tensor: Any, device: torch.device) -> NoReturn:
    if not spec.present:
        wanted = spec.when if "=" in spec.when else f"{spec.when}=true"
        raise ArgumentError(f"{problem}: {spec.name} given, but it was bound without; select with {wanted}")
    if len(tensor.shape) != spec.ndim or any(tensor.shape[axis] != size for axis, size in spec.known):
        sizes = [size + (f"+{offset}" if offset else "") for _, size, offset in spec.sizes]
        wanted = ", ".join([*sizes, *(str(size) for _, size in spec.known)])
        raise ArgumentError(f"{problem}: {spec.name} must be [{wanted}], not {list(tensor.shape)}")
    if tensor.dtype is not spec.dtype:
        raise ArgumentError(f"{problem}: {spec.name} must be {spec.dtype}, not {tensor.dtype}")
    if tensor.device != device:
        raise ArgumentError(f"{problem}: {spec.name} is on {tensor.device}, the kernel was bound for {device}")
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ArgumentError(
            f"{problem}: {spec.name} requires grad, and a bound kernel has no backward; "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
    raise ArgumentError(
        f"{problem}: the last axis of {spec.name} must be contiguous, its strides are {tensor.stride()}; "
        "pass .contiguous()"
    )

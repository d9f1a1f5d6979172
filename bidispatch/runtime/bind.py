"""Binding: import each rung's kernel and make one callable of the ladder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.errors import ArgumentError, BackendError, DeviceError
from bidispatch.ops.schema import Op, Problem
from bidispatch.registry import Implementation, Rung
from bidispatch.runtime import paging
from bidispatch.runtime.bound import BoundKernel
from bidispatch.runtime.context import BindContext, Kernel, Limits
from bidispatch.runtime.scratch import Scratch

__all__ = ["bind", "load_attribute"]


def load_attribute(path: str) -> Any:
    """Import `"module:attribute"`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def bind(
    problem: Problem, device: Device, rungs: Sequence[Rung], limits: Limits, scratch: Scratch | None = None
) -> BoundKernel:
    """Bind every rung for calls up to `limits`. scratch: shared with kernels that never run at once with this one;
    without it the rungs, of which a call runs one, share one of their own.

    Raises `DeviceError` when the plan was made for a device that is not here, `BackendError` when a kernel's
    library does not import, `ArgumentError` for limits that allow no call.
    """
    if device.predicted:
        raise DeviceError(
            f"planned for {device.arch.name}, which this machine does not have; "
            "plan with device='auto' to bind kernels here"
        )
    if device.arch.vendor != "cpu" and not torch.cuda.is_available():
        raise DeviceError(f"{device.name} is here, but this torch ({torch.__version__}) cannot use it")
    scratch = scratch or Scratch(step=1)
    op = ops.get(problem.op)
    _check_limits(op, limits)
    contexts = []
    first = limits.min_tokens
    for rung in rungs:
        contexts.append(BindContext(device, problem, rung.params, rung.tile, _limits_of(rung, limits, first), scratch))
        first = (rung.max_m or 0) + 1
    kernels: list[Kernel] = []
    # The rung of most rows first: what it has of the scratch, those of fewer rows have room in.
    for rung, context in zip(reversed(rungs), reversed(contexts), strict=True):
        kernel = _load(rung.implementation, context)
        if paging.wanted(op):
            kernel = paging.checked(op, problem, kernel)
        several = device.arch.vendor != "cpu" and torch.cuda.device_count() > 1
        kernels.insert(0, _on_device(kernel, device.index) if several else kernel)
    return BoundKernel(op, problem, device, rungs, kernels, limits)


def _limits_of(rung: Rung, limits: Limits, first: int) -> Limits:
    """A rung sees the rows it serves and no others: it prepares for no more."""
    most = limits.max_tokens if rung.max_m is None else min(limits.max_tokens, rung.max_m)
    return replace(limits, max_tokens=most, min_tokens=min(first, most))


def _check_limits(op: Op, limits: Limits) -> None:
    has_sequences = any("seqs" in argument.shape for argument in op.arguments)
    needed = ("max_tokens", "max_seqs", "max_seq_len") if has_sequences else ("max_tokens",)
    for name in needed:
        if getattr(limits, name) < 1:
            raise ArgumentError(f"{op.name} needs bind({name}=...) of at least 1, not {getattr(limits, name)}")


def _on_device(kernel: Kernel, index: int) -> Kernel:
    """Launch on the GPU the kernel was bound for, whichever is current: Triton and CUDA launch on the current one."""
    current = torch.cuda.current_device

    def launch(*arguments: Any) -> None:
        if current() == index:
            kernel(*arguments)
        else:
            with torch.cuda.device(index):
                kernel(*arguments)

    launch.edges = getattr(kernel, "edges", ())  # type: ignore[attr-defined]
    return launch


def _load(implementation: Implementation, context: BindContext) -> Kernel:
    try:
        bind_function: Callable[[BindContext], Kernel] = load_attribute(implementation.load)
    except Exception as error:  # another package's import: it may raise anything
        raise _broken(implementation, error) from error
    try:
        return bind_function(context)
    except ImportError as error:
        raise _broken(implementation, error) from error


def _broken(implementation: Implementation, error: Exception) -> BackendError:
    return BackendError(
        f"{implementation.name} was chosen, but {implementation.load} does not load: {type(error).__name__}: {error}; "
        f"`disable: {{{implementation.name}: ...}}` in a profile leaves it out"
    )

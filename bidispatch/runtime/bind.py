"""Binding: import each rung's kernel and make one callable of the ladder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.errors import BackendError, DeviceError
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Rung
from bidispatch.runtime.bound import BoundKernel
from bidispatch.runtime.context import BindContext, Limits

__all__ = ["bind", "load_attribute"]


def load_attribute(path: str) -> Any:
    """Import `"module:attribute"`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def bind(problem: Problem, device: Device, rungs: Sequence[Rung], limits: Limits) -> BoundKernel:
    """Bind every rung for calls up to `limits`.

    Raises `DeviceError` when the plan was made for a device that is not here, `BackendError` when a kernel's
    library does not import.
    """
    if device.predicted:
        raise DeviceError(
            f"planned for {device.arch.name}, which this machine does not have; "
            "plan with device='auto' to bind kernels here"
        )
    if device.arch.vendor != "cpu" and not torch.cuda.is_available():
        raise DeviceError(f"{device.name} is here, but this torch ({torch.__version__}) cannot use it")
    op = ops.get(problem.op)
    kernels = []
    for rung in rungs:
        context = BindContext(device, problem, rung.params, rung.tile, limits)
        kernels.append(_load(rung.implementation)(context))
    return BoundKernel(op, problem, device, rungs, kernels, limits)


def _load(implementation: Implementation) -> Callable[[BindContext], Any]:
    try:
        return load_attribute(implementation.load)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise BackendError(
            f"{implementation.name} was chosen, but {implementation.load} does not load: {error}; "
            f"`disable: {{{implementation.name}: ...}}` in a profile leaves it out"
        ) from error

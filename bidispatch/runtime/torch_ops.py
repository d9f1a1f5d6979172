"""`torch.ops.bidispatch.<op>`: one torch.library op per op of the catalogue, out variant.

The op is opaque to Dynamo and to dispatch modes, so the rung is chosen when it runs and never frozen into a graph.
Its first argument is the handle of a bound kernel.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from bidispatch import ops
from bidispatch.ops.schema import Op

if TYPE_CHECKING:
    from bidispatch.runtime.bound import BoundKernel

__all__ = ["NAMESPACE", "call"]

NAMESPACE = "bidispatch"

_kernels: list[weakref.ref[BoundKernel]] = []


def call(kernel: BoundKernel, everything: tuple[Any, ...]) -> None:
    """Launch a bound kernel through its torch op. `everything` is what `BoundKernel.launch` takes."""
    if kernel.handle < 0:
        kernel.handle = len(_kernels)
        _kernels.append(weakref.ref(kernel))
    _torch_op(kernel.op.name)(kernel.handle, *everything)


@lru_cache(maxsize=1)
def _library() -> torch.library.Library:
    return torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


@lru_cache(maxsize=64)
def _torch_op(name: str) -> Any:
    """Define the op at its first use. A process that loads us twice finds it there."""
    torch_name = name.replace(".", "_")
    namespace = getattr(torch.ops, NAMESPACE)
    if not hasattr(namespace, torch_name):
        library = _library()
        library.define(_schema(torch_name, ops.get(name)))  # type: ignore[no-untyped-call]
        library.impl(torch_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{NAMESPACE}::{torch_name}", _fake, lib=library)
    return getattr(namespace, torch_name).default


def _schema(torch_name: str, op: Op) -> str:
    fields = ["int kernel"]
    fields += [f"Tensor{'?' if argument.when else ''} {argument.name}" for argument in op.arguments]
    fields += [f"float {scalar.name}" for scalar in op.scalars]
    fields += [f"Tensor(a{i}!) {output.name}" for i, output in enumerate(op.outputs)]
    return f"{torch_name}({', '.join(fields)}) -> ()"


def _run(kernel: int, *everything: Any) -> None:
    bound = _kernels[kernel]()
    if bound is None:
        raise RuntimeError(f"bound kernel {kernel} is gone: keep a reference to it as long as a graph may call it")
    bound.launch(*everything)


def _fake(kernel: int, *everything: Any) -> None:
    """The outputs are arguments: nothing to infer."""

"""Everything else, in eager: a function is run with every aten op that it comes to under a dispatch mode.

Composite ops are taken apart; products, softmaxes and sums become the plan's kernels; row-local ops run; what is left
raises. It works below autograd, so that gradients are torch's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from bidispatch.integrations.aten import blocks
from bidispatch.integrations.aten.aten_table import ATEN
from bidispatch.integrations.aten.refusal import is_empty, refuse
from bidispatch.rowlocal import Kind, classify
from bidispatch.runtime.torch_ops import NAMESPACE

__all__ = ["Guard"]


class Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ops of one call of `function`. `refuses` says whether what nothing serves raises, or is left to torch."""

    def __init__(self, handle: int, function: Any, refuses: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._handle = handle
        self._function = function
        self._refuses = refuses

    @staticmethod
    def is_active() -> bool:
        """Whether a call is guarded already, by a context inside this one."""
        return any(isinstance(mode, Guard) for mode in _get_current_dispatch_mode_stack())

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func.namespace == NAMESPACE:
            return func(*args, **named)
        ours = ATEN.get(func)
        if ours is not None:
            # Autocast has been applied above, and autograd is there too.
            with torch.no_grad(), torch._C._DisableAutocast():
                result = ours(self._handle, *args, **named)
            if result is not NotImplemented:
                return result
        tensors = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, torch.Tensor)]
        if all(tensor.is_meta for tensor in tensors):
            return func(*args, **named)
        kind, _ = classify(func, args, named, tensors)
        if kind is Kind.POINTWISE and any(tensor.device.type == "cpu" for tensor in tensors):
            result = blocks.pointwise(func, args, named)
            if result is not NotImplemented:
                return result
        elif kind is not Kind.UNKNOWN:
            return func(*args, **named)
        with self:
            parts = func.decompose(*args, **named)
        if parts is not NotImplemented:
            return parts
        if self._refuses and not is_empty(func, args, named):
            refuse(func, args, named, self._function)
        return func(*args, **named)

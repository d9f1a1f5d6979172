"""The context `aten_overrides`, and the one table of what it overrides.

A mode on torch functions, because Dynamo traces it: what a compiled graph holds is our op, put there before anything
is decomposed. Calls that torch makes below its functions, in C++, are not seen; `bidispatch audit` lists them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bidispatch.integrations.aten import elementwise, functions
from bidispatch.integrations.aten.attention import scaled_dot_product_attention
from bidispatch.integrations.aten.kernels import handle_of
from bidispatch.planning.plan import Plan

__all__ = ["OVERRIDDEN", "aten_overrides"]

_Tensor = torch.Tensor

OVERRIDDEN: Mapping[Any, Callable[..., Any]] = {
    F.linear: functions.linear,
    torch.mm: functions.mm,
    _Tensor.mm: functions.mm,
    torch.mv: functions.matmul,
    _Tensor.mv: functions.matmul,
    torch.dot: functions.matmul,
    _Tensor.dot: functions.matmul,
    torch.bmm: functions.bmm,
    _Tensor.bmm: functions.bmm,
    torch.matmul: functions.matmul,
    _Tensor.matmul: functions.matmul,
    _Tensor.__matmul__: functions.matmul,
    _Tensor.__rmatmul__: functions.reflected_matmul,
    operator.matmul: functions.matmul,
    torch.addmm: functions.addmm,
    _Tensor.addmm: functions.addmm,
    _Tensor.addmm_: functions.addmm_,
    torch.baddbmm: functions.baddbmm,
    _Tensor.baddbmm: functions.baddbmm,
    _Tensor.baddbmm_: functions.baddbmm_,
    torch.softmax: functions.softmax,
    _Tensor.softmax: functions.softmax,
    torch.special.softmax: functions.softmax,
    F.softmax: functions.functional_softmax,
    torch.log_softmax: functions.log_softmax,
    _Tensor.log_softmax: functions.log_softmax,
    torch.special.log_softmax: functions.log_softmax,
    F.log_softmax: functions.functional_log_softmax,
    torch.mean: functions.mean,
    _Tensor.mean: functions.mean,
    torch.sum: functions.sum,
    _Tensor.sum: functions.sum,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    **elementwise.OVERRIDDEN,
}
"""What is overridden, and by what: a function of a plan's handle and torch's own arguments, `NotImplemented` where the
call is left to torch."""


class _Overrides(TorchFunctionMode):
    """While it is active, functions of the table are a plan's kernels."""

    def __init__(self, plan: Plan, max_tokens: int) -> None:
        self.handle = handle_of(plan, max_tokens)

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        ours = OVERRIDDEN.get(func)
        if ours is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        result = ours(self.handle, *args, **kwargs) if kwargs else ours(self.handle, *args)
        if result is NotImplemented:
            return func(*args, **kwargs) if kwargs else func(*args)
        return result


def aten_overrides(plan: Plan, *, max_tokens: int = 8192) -> TorchFunctionMode:
    """A context in which the torch functions of `OVERRIDDEN` are the plan's kernels.

    All others run as they are: a row of `einsum` or `rms_norm`, say, may follow the batch. `bidispatch audit` lists
    what a model runs.

    ``with aten_overrides(plan): model(x)``. Serves bfloat16, float16 and float32; tensors of other dtypes stay with
    torch. Gradients flow; only the bits of the forward are promised. A kernel is bound at its first use, for
    `max_tokens` rows, and again for the next power of two of more. Contexts nest, the inner one serves; leaving one,
    by an exception too, restores what was there. It holds for the thread that entered it.

    What the plan cannot serve of these raises `SelectionError`; binding during CUDA graph capture `ArgumentError`.
    Raises `DeviceError` for a plan made for a device that is not here, `ArgumentError` for max_tokens below 1.
    """
    return _Overrides(plan, max_tokens)

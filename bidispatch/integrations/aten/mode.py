"""The context `aten_overrides`, and the one table of what it overrides.

A mode on torch functions, because Dynamo traces it: what a compiled graph holds is our op, put there before anything
is decomposed. A function is one of three kinds: in the table, it is the plan's; row-local, it runs as it is; any other
runs under the guard, which looks at every op that it comes to, and raises in a trace, where there is no such guard.
"""

from __future__ import annotations

import operator
import types as python_types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bidispatch.errors import BidispatchError, UsageError, did_you_mean
from bidispatch.integrations.aten import contractions, elementwise, functions, losses, norms
from bidispatch.integrations.aten.aten_table import ATEN
from bidispatch.integrations.aten.attention import scaled_dot_product_attention
from bidispatch.integrations.aten.direct import ROW_LOCAL, is_ours, only_integers, runs_as_it_is
from bidispatch.integrations.aten.guard import Guard
from bidispatch.integrations.aten.kernels import handle_of
from bidispatch.integrations.aten.multihead import multi_head_attention_forward
from bidispatch.planning.plan import Plan

__all__ = ["OVERRIDDEN", "aten_overrides"]

_Tensor = torch.Tensor

OVERRIDDEN: Mapping[Any, Callable[..., Any]] = {
    F.linear: functions.linear,
    torch.mm: functions.mm,
    _Tensor.mm: functions.mm,
    torch.mv: functions.mv,
    _Tensor.mv: functions.mv,
    torch.dot: functions.dot,
    _Tensor.dot: functions.dot,
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
    torch.addbmm: contractions.addbmm,
    _Tensor.addbmm: contractions.addbmm,
    _Tensor.addbmm_: contractions.addbmm_,
    torch.addmv: contractions.addmv,
    _Tensor.addmv: contractions.addmv,
    _Tensor.addmv_: contractions.addmv_,
    torch.einsum: contractions.einsum,
    torch.tensordot: contractions.tensordot,
    torch.inner: contractions.inner,
    _Tensor.inner: contractions.inner,
    torch.chain_matmul: contractions.chain_matmul,
    torch.linalg.multi_dot: contractions.multi_dot,
    torch.linalg.vecdot: contractions.vecdot,
    torch.linalg.matmul: functions.matmul,
    F.bilinear: contractions.bilinear,
    torch.softmax: functions.softmax,
    _Tensor.softmax: functions.softmax,
    torch.special.softmax: functions.softmax,
    F.softmax: functions.functional_softmax,
    F.softmin: functions.functional_softmin,
    torch.log_softmax: functions.log_softmax,
    _Tensor.log_softmax: functions.log_softmax,
    torch.special.log_softmax: functions.log_softmax,
    F.log_softmax: functions.functional_log_softmax,
    torch.logsumexp: norms.logsumexp,
    _Tensor.logsumexp: norms.logsumexp,
    torch.special.logsumexp: norms.logsumexp,
    torch.mean: functions.mean,
    _Tensor.mean: functions.mean,
    torch.sum: functions.sum,
    _Tensor.sum: functions.sum,
    torch.var: norms.var,
    _Tensor.var: norms.var,
    torch.std: norms.std,
    _Tensor.std: norms.std,
    torch.var_mean: norms.var_mean,
    torch.std_mean: norms.std_mean,
    torch.norm: norms.norm,
    _Tensor.norm: norms.norm,
    torch.linalg.norm: norms.linalg_norm,
    torch.linalg.vector_norm: norms.vector_norm,
    F.normalize: norms.normalize,
    F.rms_norm: norms.rms_norm,
    torch.rms_norm: norms.rms_norm,
    F.layer_norm: norms.layer_norm,
    torch.layer_norm: norms.layer_norm,
    F.group_norm: norms.group_norm,
    torch.group_norm: norms.group_norm,
    F.batch_norm: norms.batch_norm,
    F.cross_entropy: losses.cross_entropy,
    F.nll_loss: losses.nll_loss,
    F.mse_loss: losses.mse_loss,
    F.l1_loss: losses.l1_loss,
    F.embedding: functions.embedding,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention_forward,
    **elementwise.OVERRIDDEN,
}
"""What is overridden, and by what: a function of a plan's handle and torch's own arguments, `NotImplemented` where the
call is not of the kind that it serves."""

_UNCOVERED = ("refuse", "torch")


class _Overrides(TorchFunctionMode):
    """While it is active, functions of the table are a plan's kernels."""

    def __init__(self, plan: Plan, max_tokens: int, refuses: bool) -> None:
        self.handle = handle_of(plan, max_tokens)
        self.refuses = refuses

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        ours = OVERRIDDEN.get(func)
        if ours is None:
            # With other arguments, and on a processor, a function may be more than its name says.
            if not kwargs and ROW_LOCAL.get(func) is True:
                return func(*args)
        else:
            result = ours(self.handle, *args, **kwargs) if kwargs else ours(self.handle, *args)
            if result is not NotImplemented:
                return result
        # An op of ours holds a plan's kernels: a compiled graph calls it.
        if is_ours(func) or runs_as_it_is(func, args, kwargs) or (ours is not None and only_integers(args, kwargs)):
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._run_guarded(func, args, kwargs or {})

    def _run_guarded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return self._trace(func, args, kwargs)
        # An attribute; a backward pass, which is not promised; or a call that an inner context guards.
        if type(func) is python_types.MethodWrapperType or torch._C._current_graph_task_id() != -1 or Guard.is_active():
            return func(*args, **kwargs)
        with Guard(self.handle, func, self.refuses):
            return func(*args, **kwargs)

    def _trace(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What Dynamo sees of the rest. It cannot trace a guard, nor an exception with more than a message."""
        ours = ATEN.get(func)
        result = NotImplemented if ours is None else ours(self.handle, *args, **kwargs)
        if result is not NotImplemented:
            return result
        if self.refuses:
            raise BidispatchError(
                f"aten_overrides: {func} with these arguments is not served in a compiled graph, and nothing says "
                "that its result for a row is free of the other rows; use a function of docs/pytorch.md instead, keep "
                "it out of the graph, or enter aten_overrides(plan, uncovered='torch') to leave such ones to torch"
            )
        return func(*args, **kwargs)


def aten_overrides(plan: Plan, *, max_tokens: int = 8192, uncovered: str = "refuse") -> TorchFunctionMode:
    """A context in which no row of torch's functions follows the batch: by the plan's kernels, or an error.

    ``with aten_overrides(plan): model(x)``. The functions of `OVERRIDDEN` are the plan's kernels. Those that are known
    to be row-local run as they are (`direct.ROW_LOCAL`), and so do random ones. Any other is taken apart into aten ops,
    of which each is served, is row-local or raises `SelectionError`; in a compiled graph such a function raises.
    `uncovered="torch"` leaves to torch what would raise. Nothing of that sees TorchScript, collectives, kernels that
    are launched without being a torch op, or other threads.

    Serves bfloat16, float16 and float32; integers are exact, and are torch's. Gradients flow; only the bits of the
    forward are promised. A kernel is bound at its first use, for `max_tokens` rows, and again for the next power of two
    of more. Contexts nest, the inner one serves; leaving one, by an exception too, restores what was there. It holds
    for the thread that entered it.

    What the plan cannot serve raises `SelectionError`; binding during CUDA graph capture `ArgumentError`. Raises
    `DeviceError` for a plan made for a device that is not here, `ArgumentError` for max_tokens below 1, `UsageError`
    for another word for `uncovered`.
    """
    if uncovered not in _UNCOVERED:
        hint = did_you_mean(uncovered, _UNCOVERED)
        raise UsageError(f"aten_overrides takes uncovered='refuse' or 'torch', not {uncovered!r}{hint}")
    return _Overrides(plan, max_tokens, uncovered == "refuse")

"""Which aten ops are the plan's, and by what: for the guard, and for callers of `torch.ops.aten` themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bidispatch.integrations.aten import contractions, functions, norms
from bidispatch.integrations.aten.attention import scaled_dot_product_attention

__all__ = ["ATEN"]


def _softmax(handle: int, x: Any, dim: Any, half_to_float: bool, *, out: Any = None) -> Any:
    return functions.softmax(handle, x, dim, torch.float32 if half_to_float else None, out=out)


def _log_softmax(handle: int, x: Any, dim: Any, half_to_float: bool, *, out: Any = None) -> Any:
    return functions.log_softmax(handle, x, dim, torch.float32 if half_to_float else None, out=out)


def _sum_all(handle: int, x: Any, *, dtype: Any = None, out: Any = None) -> Any:
    return functions.sum(handle, x, dtype=dtype, out=out)


def _mean_all(handle: int, x: Any, *, dtype: Any = None, out: Any = None) -> Any:
    return functions.mean(handle, x, dtype=dtype, out=out)


_HANDLERS: Mapping[str, Callable[..., Any]] = {
    "linear": functions.linear,
    "mm": functions.mm,
    "bmm": functions.bmm,
    "mv": functions.mv,
    "dot": functions.dot,
    "addmm": functions.addmm,
    "addmm_": functions.addmm_,
    "baddbmm": functions.baddbmm,
    "baddbmm_": functions.baddbmm_,
    "addbmm": contractions.addbmm,
    "addbmm_": contractions.addbmm_,
    "addmv": contractions.addmv,
    "addmv_": contractions.addmv_,
    "matmul": functions.matmul,
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "linalg_vector_norm": norms.vector_norm,
    "linalg_vecdot": contractions.vecdot,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
# Ops with overloads that take their arguments in other ways, each by itself.
_OVERLOADS: Mapping[str, Callable[..., Any]] = {
    "sum.default": _sum_all,
    "sum.out": _sum_all,
    "sum.dim_IntList": functions.sum,
    "sum.IntList_out": functions.sum,
    "mean.default": _mean_all,
    "mean.dtype_out": _mean_all,
    "mean.dim": functions.mean,
    "mean.out": functions.mean,
    "softmax.int": functions.softmax,
    "softmax.int_out": functions.softmax,
    "log_softmax.int": functions.log_softmax,
    "log_softmax.int_out": functions.log_softmax,
    "var.correction": norms.var,
    "var.correction_out": norms.var,
    "std.correction": norms.std,
    "std.correction_out": norms.std,
    "var_mean.correction": norms.var_mean,
    "std_mean.correction": norms.std_mean,
    "norm.Scalar": norms.norm,
    "norm.ScalarOpt_dim": norms.norm,
    "norm.ScalarOpt_dim_dtype": norms.norm,
    "logsumexp.default": norms.logsumexp,
    "logsumexp.out": norms.logsumexp,
}


def _table() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = {}
    for name, handler in _HANDLERS.items():
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            found[packet] = handler
            found.update({getattr(packet, overload): handler for overload in packet.overloads()})
    for name, handler in _OVERLOADS.items():
        base, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, base, None), overload, None)
        if op is not None:
            found[op] = handler
    return found


ATEN: Mapping[Any, Callable[..., Any]] = _table()
"""By overload, and by packet where all overloads take the same. Each handler takes the handle, then the op's own
arguments, and may return `NotImplemented`."""

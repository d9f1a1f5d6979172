"""Which of torch's functions run as they are: a set made once, by `bidispatch.rowlocal`, from torch's own lists.

A function in C is judged by the aten op of its name. A function in Python may run anything, so those that are here are
named one by one. Only a dict: a common function pays one lookup, and Dynamo can trace it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from bidispatch.rowlocal import ADDING_ARGUMENTS, RANDOM, REASON_OF, has_floats, is_pointwise, names
from bidispatch.runtime.torch_ops import NAMESPACE

__all__ = ["ROW_LOCAL", "is_ours", "only_integers", "runs_as_it_is", "tensors_in"]

_OPERATORS = {
    "and": "bitwise_and",
    "idiv": "div",
    "invert": "bitwise_not",
    "getitem": "index",
    "matmul": "matmul",
    "mod": "remainder",
    "or": "bitwise_or",
    "pos": "positive",
    "setitem": "index_put",
    "truediv": "div",
    "xor": "bitwise_xor",
    "floordiv": "floor_divide",
}

# Of tensors, moving no values or each as it is, or looking at them: no aten op has their names.
_OTHERS = names(
    "__bool__ __complex__ __delitem__ __dir__ __float__ __hash__ __index__ __int__ __long__ __nonzero__ "
    "__new__ _has_symbolic_sizes_strides _is_view _is_zerotensor _nested_tensor_size _version apply_ "
    "as_subclass as_tensor asarray bfloat16 bool byte cdouble cfloat chalf char conj cpu cuda data_ptr "
    "dense_dim dim double element_size float from_file from_numpy frombuffer get_device half has_names int "
    "is_coalesced is_complex is_conj is_contiguous is_distributed is_floating_point is_inference is_neg "
    "is_nonzero is_set_to is_signed is_sparse is_storage is_tensor itemsize long ndimension nelement new "
    "new_tensor numpy promote_types requires_grad_ result_type retain_grad can_cast short sparse_dim "
    "storage_type tensor to tolist type untyped_storage _set_grad_enabled _cast_Float _cast_Half nested_size"
)

# Backward passes, which `torch.autograd` and `Tensor.backward` run, are not promised.
_IN_PYTHON = {
    torch.autograd: "backward grad",
    torch.Tensor: "__array__ __array_wrap__ __contains__ __deepcopy__ __dlpack__ __dlpack_device__ __floordiv__ "
    "__format__ __iter__ __len__ __rdiv__ __reduce_ex__ __repr__ __reversed__ __rfloordiv__ __rsub__ __rtruediv__ "
    "__setstate__ _clear_non_serializable_cached_data backward detach detach_ dim_order is_shared module_load "
    "register_hook register_post_accumulate_grad_hook resize resize_as share_memory_ split storage storage_type "
    "unflatten unique unique_consecutive",
    torch: "atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors cartesian_prod meshgrid split sym_float "
    "sym_int sym_ite sym_max sym_min sym_not sym_sum unique unique_consecutive unravel_index",
    F: "hardtanh max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
    "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d one_hot pad relu relu6 "
    "threshold _threshold unfold alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout rrelu",
}
_POINTWISE_IN_PYTHON = {
    torch.Tensor: "__pow__ __rmod__ __rpow__ pow pow_",
    torch: "pow",
    F: "celu elu glu hardsigmoid hardswish leaky_relu mish selu silu softsign tanhshrink",
}


# Where torch says that an op of ours, or one overload of it, is from.
_OURS = f"torch._ops.{NAMESPACE}"


def _functions() -> Iterator[Any]:
    """All that a mode on torch functions may be handed, but what reads and writes attributes."""
    for members in torch.overrides.get_overridable_functions().values():
        yield from members
    yield from torch.overrides.get_ignored_functions()
    yield torch._C._set_grad_enabled


def _kind_of(func: Any) -> bool | None:
    """True for what is exact everywhere, False for what is elementwise, None for what nothing is known of."""
    name = func.__name__
    if name in _OTHERS:
        return True
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        for prefix in ("", "r", "i"):
            base = name[len(prefix) :]
            if name.startswith(prefix) and hasattr(torch.ops.aten, _OPERATORS.get(base, base)):
                name = _OPERATORS.get(base, base)
                break
    else:
        name = name.removesuffix("_")
    if name == "index_put" and func is not torch.Tensor.__setitem__:
        return None  # it may accumulate
    if name in REASON_OF or name in RANDOM:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return None
    return False if is_pointwise(getattr(packet, packet.overloads()[0])) else None


def _row_local() -> dict[Any, bool]:
    found: dict[Any, bool] = {}
    for func in _functions():
        # An attribute's access is a method-wrapper, of which Dynamo can make no key.
        if isinstance(func, (types.FunctionType, types.MethodWrapperType, type)) or not hasattr(func, "__name__"):
            continue
        kind = _kind_of(func)
        if kind is not None:
            found[func] = kind
    for table, exact in ((_IN_PYTHON, True), (_POINTWISE_IN_PYTHON, False)):
        for home, text in table.items():
            for name in text.split():
                if hasattr(home, name):
                    found[getattr(home, name)] = exact
    return found


ROW_LOCAL: Mapping[Any, bool] = _row_local()
"""Functions that no row of follows the batch: True where that holds on every device, False for elementwise ones, whose
vector loops on a processor may round their tails otherwise. The first include those that are random by request."""


def runs_as_it_is(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a call cannot make a row follow the batch, so that torch may run it."""
    exact = ROW_LOCAL.get(func)
    if exact is None:
        return False
    if kwargs:
        for name in kwargs:
            if name in ADDING_ARGUMENTS and kwargs[name] not in (1, False, None):
                return False
    if exact:
        return True
    return all(x.device.type != "cpu" or x.is_meta for x in tensors_in(args, kwargs)) or only_integers(args, kwargs)


def only_integers(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether nothing in a call's arguments asks for or holds what additions round, or values at all."""
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, torch.dtype) and (value.is_floating_point or value.is_complex):
            return False
    tensors = [x for x in tensors_in(args, kwargs) if not x.is_meta]
    return not has_floats(tensors)


def tensors_in(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> list[torch.Tensor]:
    """The tensors among arguments, those in lists and tuples too."""
    found: list[torch.Tensor] = []
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(x for x in value if isinstance(x, torch.Tensor))
    return found


def is_ours(func: Any) -> bool:
    """Whether a function is an op of ours: it holds a plan's kernels."""
    return getattr(func, "__module__", None) == _OURS

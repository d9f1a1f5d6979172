"""Which plain torch ops cannot make a row's bits follow the batch, each with the reason: for the audit and overrides.

What is not here is uncovered. Names are those of `aten`, without overload and without the underscore of in-place ops.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "ADDING_ARGUMENTS",
    "EXACT_ON_INTEGERS",
    "GROUPS",
    "RANDOM",
    "REASON_OF",
    "Group",
    "Kind",
    "classify",
    "has_floats",
    "is_pointwise",
    "name_of",
    "names",
]


@dataclass(frozen=True, slots=True)
class Group:
    """Ops that are safe for one reason."""

    reason: str
    names: frozenset[str]


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def _group(reason: str, ops: str) -> Group:
    return Group(reason, names(ops))


GROUPS: tuple[Group, ...] = (
    _group(
        "view: moves no data",
        "adjoint alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to chunk conj _conj "
        "data detach diagonal dsplit expand expand_as flatten hsplit imag lift lift_fresh matrix_H mH mT movedim "
        "moveaxis narrow numpy_T permute positive ravel real _reshape_alias reshape reshape_as resolve_conj "
        "resolve_neg select slice split split_with_sizes squeeze swapaxes swapdims t tensor_split transpose unbind "
        "unfold unflatten _unsafe_view unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as "
        "view_as_complex view_as_real vsplit",
    ),
    _group(
        "copy: every value arrives as it was",
        "argwhere block_diag cartesian_prod cat channel_shuffle clone column_stack combinations complex concat "
        "concatenate constant_pad_nd contiguous copy diag diag_embed diagonal_copy diagonal_scatter dstack fliplr "
        "flipud flip hstack im2col lift_fresh_copy meshgrid pad pixel_shuffle pixel_unshuffle repeat "
        "repeat_interleave roll rot90 row_stack select_scatter slice_scatter stack tile tril triu vstack",
    ),
    _group("cast: rounds each value alone", "_to_copy to type_as"),
    _group(
        "creation: takes no values",
        "arange empty empty_like empty_permuted empty_strided eye fill full full_like linspace new_empty "
        "new_empty_strided new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices triu_indices zero "
        "zeros zeros_like",
    ),
    _group(
        "gather or scatter: moves values, adds none",
        "embedding gather index index_copy index_fill index_put _index_put_impl _unsafe_index index_select "
        "masked_fill masked_scatter masked_select nonzero one_hot scatter take take_along_dim where",
    ),
    _group(
        "comparison or logic: exact",
        "all allclose any bitwise_and bitwise_not bitwise_or bitwise_xor eq equal ge greater greater_equal gt "
        "is_nonzero isclose isfinite isin isinf isnan isneginf isposinf isreal le less less_equal logical_and "
        "logical_not logical_or logical_xor lt ne not_equal signbit",
    ),
    _group(
        "selection of a value: exact, in any order",
        "adaptive_max_pool2d adaptive_max_pool3d amax amin aminmax argmax argmin argsort bucketize clamp clamp_max "
        "clamp_min clip cummax cummin fmax fmin hardtanh kthvalue max max_pool2d_with_indices "
        "max_pool3d_with_indices maximum median min minimum mode msort nan_to_num searchsorted sort topk _unique "
        "_unique2 unique_consecutive unique_dim",
    ),
    _group(
        "elementwise, each result correctly rounded from its own operands",
        "abs absolute add ceil copysign deg2rad div divide fix floor floor_divide frac mul multiply neg negative "
        "outer ger reciprocal relu relu6 round rsub sgn sign sqrt square sub subtract true_divide trunc",
    ),
    _group("a value read by the host", "_local_scalar_dense item"),
    _group(
        "no values: a shape, a layout, memory",
        "dense_dim is_pinned is_same_size is_set_to numel pin_memory _pin_memory record_stream resize resize_as set "
        "size sparse_dim storage_offset stride sym_numel sym_size sym_storage_offset sym_stride",
    ),
)

REASON_OF: Mapping[str, str] = {name: group.reason for group in GROUPS for name in group.names}

EXACT_ON_INTEGERS = names(
    "addbmm addmm addmv addr baddbmm bincount bmm count_nonzero cumprod cumsum diff dot inner matmul mm mv prod sum "
    "trace vdot"
)
"""Where everything is an integer or a bool, these are exact: the order of additions changes nothing."""

RANDOM = names(
    "alpha_dropout bernoulli cauchy dropout dropout1d dropout2d dropout3d exponential feature_alpha_dropout "
    "feature_dropout geometric log_normal multinomial native_dropout normal poisson rand rand_like randint "
    "randint_like randn randn_like random randperm rrelu rrelu_with_noise uniform"
)
"""Random because that is what was asked for. The audit lists them; the overrides let them run."""

ADDING_ARGUMENTS = frozenset({"accumulate", "alpha", "reduce"})
"""Arguments with which a listed op adds after all. alpha makes a sum of a product, which may be fused or not."""

_ADDING_OVERLOADS = ("reduce",)
# What compiled graphs call of their own.
_EXACT_ELSEWHERE = frozenset(
    {
        ("prims", "convert_element_type"),
        ("prims", "device_put"),
        ("prims", "view_of"),
        ("inductor", "_alloc_from_pool"),
        ("inductor", "_reinterpret_tensor"),
        ("inductor", "resize_storage_bytes"),
    }
)
_POINTWISE_WITHOUT_TAG = names("hardswish hardswish_ log_sigmoid log_sigmoid_forward _prelu_kernel prelu")


class Kind(enum.Enum):
    """What is known of one call."""

    EXACT = "row-local everywhere"
    POINTWISE = "row-local where every element runs the same instructions"
    RANDOM = "random by request"
    UNKNOWN = "may follow the batch"


def name_of(func: Any) -> str:
    """The name of an aten op, as the groups have it."""
    name: str = func._schema.name.partition("::")[2]
    return name if name.startswith("__") else name.removesuffix("_")


@functools.cache
def is_pointwise(func: Any) -> bool:
    """Whether torch says of an aten op that each element of its result comes from one of each operand only.

    It says so of the functional overloads, and not of all of those with `out=`.
    """
    name = func._schema.name.partition("::")[2]
    if name in _POINTWISE_WITHOUT_TAG:
        return True
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    taking = [
        op
        for op in (func, *overloads)
        if any("Tensor" in str(argument.type) for argument in op._schema.arguments)
        and not any(argument.is_out for argument in op._schema.arguments)
    ]
    seeded = torch.Tag.nondeterministic_seeded
    return bool(taking) and all(torch.Tag.pointwise in op.tags and seeded not in op.tags for op in taking)


def has_floats(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether any holds what additions round."""
    return any(tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized for tensor in tensors)


def classify(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Iterable[torch.Tensor]
) -> tuple[Kind, str]:
    """What is known of one call of an `OpOverload`, and why. `tensors` are all that go in, and come out if known."""
    name = name_of(func)
    if (func.namespace, name) in _EXACT_ELSEWHERE:
        return Kind.EXACT, "moves values, or casts each alone"
    if func.namespace != "aten":
        return Kind.UNKNOWN, _UNKNOWN
    dtype = kwargs.get("dtype")
    integers = not has_floats(tensors) and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    if integers and name in EXACT_ON_INTEGERS:
        return Kind.EXACT, "a sum of integers: exact in any order"
    if name in REASON_OF and not _adds(func, args, kwargs):
        return Kind.EXACT, REASON_OF[name]
    if name in RANDOM:
        return Kind.RANDOM, "random by request"
    if name == "pow" and len(args) > 1 and isinstance(args[1], int) and args[1] == 2:
        return Kind.EXACT, "a square: one product, correctly rounded"
    if is_pointwise(func):
        return (Kind.EXACT, "elementwise on integers: exact") if integers else (Kind.POINTWISE, _POINTWISE)
    return Kind.UNKNOWN, _UNKNOWN


_POINTWISE = "elementwise: on a GPU every element runs the same instructions"
_UNKNOWN = "nothing says that its result for a row is free of the other rows"


def _adds(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call of a listed op does more than its name says."""
    if any(part in func._overloadname for part in _ADDING_OVERLOADS):
        return True
    values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    values.update(kwargs)
    return bool(values.get("accumulate", False)) or values.get("alpha", 1) != 1

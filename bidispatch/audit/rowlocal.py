"""Plain torch ops that cannot make a row's bits follow the batch: data, each group with the reason. No torch.

What is not here is uncovered. Names are those of `aten`, without overload and without the underscore of in-place ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ADDING_OVERLOADS", "GROUPS", "INTEGER_SUMS", "REASON_OF", "Group"]


@dataclass(frozen=True, slots=True)
class Group:
    """Ops that are safe for one reason."""

    reason: str
    names: frozenset[str]


def _group(reason: str, names: str) -> Group:
    return Group(reason, frozenset(names.split()))


GROUPS: tuple[Group, ...] = (
    _group(
        "view: moves no data",
        "alias as_strided chunk detach diagonal expand expand_as flatten lift_fresh movedim narrow permute real "
        "_reshape_alias reshape select slice split split_with_sizes squeeze swapaxes t transpose unbind unfold "
        "unflatten _unsafe_view unsqueeze view view_as view_as_complex view_as_real",
    ),
    _group(
        "copy: every value arrives as it was",
        "cat clone concat constant_pad_nd contiguous copy flip hstack lift_fresh_copy repeat repeat_interleave roll "
        "select_scatter slice_scatter stack tile tril triu vstack",
    ),
    _group("cast: rounds each value alone", "_to_copy to type_as"),
    _group(
        "creation: takes no values",
        "arange empty empty_like empty_permuted empty_strided eye fill full full_like new_empty new_empty_strided "
        "new_full new_ones new_zeros ones ones_like scalar_tensor zero zeros zeros_like",
    ),
    _group(
        "gather or scatter: moves values, adds none",
        "embedding gather index index_copy index_fill index_put _index_put_impl _unsafe_index index_select "
        "masked_fill masked_scatter masked_select nonzero one_hot scatter take take_along_dim where",
    ),
    _group(
        "comparison or logic: exact",
        "all any bitwise_and bitwise_not bitwise_or bitwise_xor eq equal ge gt is_nonzero isfinite isin isinf isnan "
        "le logical_and logical_not logical_or logical_xor lt ne signbit",
    ),
    _group(
        "selection of a value: exact, in any order",
        "amax amin argmax argmin argsort bucketize clamp clamp_max clamp_min fmax fmin kthvalue max maximum min "
        "minimum searchsorted sort topk",
    ),
    _group(
        "elementwise, each result correctly rounded from its own operands",
        "abs add ceil div floor floor_divide frac mul neg reciprocal relu round rsub sgn sign sqrt square sub trunc",
    ),
    _group("a value read by the host", "_local_scalar_dense item"),
)

REASON_OF: Mapping[str, str] = {name: group.reason for group in GROUPS for name in group.names}

INTEGER_SUMS = frozenset({"bincount", "count_nonzero", "cumsum", "prod", "sum"})
"""Sums that are exact where everything is an integer or a bool: there the order of additions changes nothing."""

ADDING_OVERLOADS = ("reduce",)
"""Overloads of the ops above that add after all, by a part of their name: `scatter.reduce`."""

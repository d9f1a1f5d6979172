"""The router of a mixture of experts: scores, and the best experts of each token. A token's row is one of a program's.

Each round takes the largest of integers made of a score and an index: the best score, the lower index of equal ones.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.launch import ArgumentType, Launch, ceil_div, pointer, power_of_two
from bidispatch_backends.triton.params import RowTile, row_width
from bidispatch_backends.triton.rows import row_block, row_launch, tree_sum

__all__ = ["bind_router", "launches", "router_kernel"]

_LOG2_E = tl.constexpr(math.log2(math.e))
_LEAST = tl.constexpr(-(2**63))
"""Below every key."""
_DOWN = tl.constexpr(0x7FFFFFFF)
"""Flips an index, or the magnitude of a negative float, so that it falls where it rose."""


@triton.jit
def _keys(scores, indices):
    """64-bit integers that sort as scores do, and those of one score against their indices. NaN is as -inf."""
    scores = tl.where(scores == scores, scores, float("-inf")) + 0.0  # -0 becomes 0, which it equals
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & _DOWN)  # of negative numbers the order of the bits is the other way
    return (ordered.to(tl.int64) << 32) | (indices ^ _DOWN).to(tl.int64)


@triton.jit
def _index(key):
    """The index in a key."""
    return (key & _DOWN).to(tl.int32) ^ _DOWN


@triton.jit
def _score(key):
    """The score in a key."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & _DOWN)).to(tl.float32, bitcast=True)


@triton.jit
def _in_best_groups(
    keys,
    experts,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TWO: tl.constexpr,
):
    """Whether each expert is in one of the TOPK_GROUP groups whose best, or the sum of whose TWO best, is largest."""
    lanes = tl.arange(0, BLOCK_G)[None, :]
    group_keys = tl.full((keys.shape[0], BLOCK_G), _LEAST, tl.int64)
    for group in tl.static_range(GROUPS):
        members = tl.where(experts // GROUP_SIZE == group, keys, _LEAST)
        best = tl.max(members, axis=1)[:, None]
        score = _score(best)
        if TWO:
            score += _score(tl.max(tl.where(members == best, _LEAST, members), axis=1)[:, None])
        group_keys = tl.where(lanes == group, _keys(score, lanes), group_keys)
    chosen = experts < 0
    for _ in tl.static_range(TOPK_GROUP):
        best = tl.max(group_keys, axis=1)[:, None]
        chosen = chosen | (experts // GROUP_SIZE == _index(best))
        group_keys = tl.where(group_keys == best, _LEAST, group_keys)
    return chosen


@triton.jit(do_not_specialize=["rows"])
def router_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    stride_logits,
    stride_weights,
    stride_ids,
    rows,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SCALING: tl.constexpr,
):
    """weights and ids [rows, TOP_K] of logits [rows, EXPERTS], `ROWS` rows a program."""
    row, live = row_block(ROWS, rows)
    experts = tl.arange(0, BLOCK)[None, :]
    there = experts < EXPERTS
    logits = tl.load(logits_ptr + row * stride_logits + experts, mask=live & there, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp2(-logits * _LOG2_E))
    else:
        powers = tl.exp2((logits - tl.max(logits, axis=1)[:, None]) * _LOG2_E)
        scores = powers / tree_sum(powers)[:, None]
    choice = logits  # scores rise with them, and may tie where they do not
    if bias_ptr is not None:
        choice = scores + tl.load(bias_ptr + experts, mask=there, other=0.0)
    keys = tl.where(there, _keys(choice, experts), _LEAST)
    if GROUPS > 1:
        TWO: tl.constexpr = bias_ptr is not None
        open_to = _in_best_groups(keys, experts, EXPERTS // GROUPS, GROUPS, BLOCK_G, TOPK_GROUP, TWO)
        keys = tl.where(open_to, keys, _LEAST)

    slots = tl.arange(0, BLOCK_S)[None, :]
    ids = tl.zeros((ROWS, BLOCK_S), dtype=tl.int32)
    weights = tl.zeros((ROWS, BLOCK_S), dtype=tl.float32)
    total = tl.zeros((ROWS, 1), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        best = tl.max(keys, axis=1)[:, None]
        keys = tl.where(keys == best, _LEAST, keys)
        expert = _index(best)
        # One term of it is not 0.
        weight = tl.sum(tl.where(experts == expert, scores, 0.0), axis=1)[:, None]
        total += weight
        ids = tl.where(slots == slot, expert, ids)
        weights = tl.where(slots == slot, weight, weights)
    if RENORMALIZE:
        weights = tl.where(total == 0.0, 0.0, weights / total)
    weights *= SCALING
    inside = live & (slots < TOP_K)
    tl.store(weights_ptr + row * stride_weights + slots, weights, mask=inside)
    tl.store(ids_ptr + row * stride_ids + slots, ids, mask=inside)


def launches(problem: Problem, params: Params, tile: RowTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `moe.router`."""
    experts, top_k, groups = (problem.size(dim) for dim in ("experts", "top_k", "n_group"))
    arguments: dict[str, ArgumentType] = {
        "logits_ptr": pointer(problem.dtype),
        "bias_ptr": pointer("float32") if problem.flag("correction_bias") else None,
        "weights_ptr": pointer("float32"),
        "ids_ptr": pointer("int32"),
        "stride_logits": experts,
        "stride_weights": top_k,
        "stride_ids": top_k,
        "rows": "i32",
    }
    launch = row_launch(
        router_kernel,
        arguments,
        arch,
        tile.num_warps,
        EXPERTS=experts,
        BLOCK=row_width(experts, power_of_two(experts)),
        ROWS=tile.rows,
        TOP_K=top_k,
        BLOCK_S=power_of_two(top_k),
        SIGMOID=problem["scoring"] == "sigmoid",
        RENORMALIZE=problem.flag("renormalize"),
        GROUPS=groups,
        BLOCK_G=power_of_two(groups),
        TOPK_GROUP=problem.size("topk_group"),
        SCALING=float(problem["routed_scaling_factor"]),
    )
    return (launch,)


def bind_router(context: BindContext) -> Kernel:
    """logits [m, experts], correction_bias [experts] or None, weights and ids [m, top_k]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    per_program = context.tile.rows

    def router(logits: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor, ids: torch.Tensor) -> None:
        rows = logits.shape[0]
        strides = (logits.stride(0), weights.stride(0), ids.stride(0))
        launch((ceil_div(rows, per_program),), logits, bias, weights, ids, *strides, rows)

    return router

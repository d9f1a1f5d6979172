"""The router of a mixture of experts: scores, and the best experts of each token. A token's row is one of a program's.

Each round takes the best score that is left, and of equal ones the lowest index: a maximum and a minimum, which are
exact in any order.
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
_NO_LANE = tl.constexpr(2**31 - 1)


@triton.jit
def _best(values, free, lanes):
    """The largest of each row's values that are free, and its lane, the lowest of equal ones: [rows, 1] each."""
    value = tl.max(tl.where(free, values, float("-inf")), axis=1)[:, None]
    lane = tl.min(tl.where(free & (values == value), lanes, _NO_LANE), axis=1)[:, None]
    return value, lane


@triton.jit
def _in_best_groups(
    choice,
    experts,
    there,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TWO: tl.constexpr,
):
    """Whether each expert is in one of the TOPK_GROUP groups whose best, or the sum of whose TWO best, is largest."""
    groups = tl.arange(0, BLOCK_G)[None, :]
    scores = tl.full((choice.shape[0], BLOCK_G), float("-inf"), tl.float32)
    for group in tl.static_range(GROUPS):
        members = there & (experts // GROUP_SIZE == group)
        score, first = _best(choice, members, experts)
        if TWO:
            second, _ = _best(choice, members & (experts != first), experts)
            score = _number(score + second)
        scores = tl.where(groups == group, score, scores)
    free = (scores == scores) & (groups < GROUPS)
    chosen = experts < 0
    for _ in tl.static_range(TOPK_GROUP):
        _, group = _best(scores, free, groups)
        free = free & (groups != group)
        chosen = chosen | (experts // GROUP_SIZE == group)
    return chosen


@triton.jit
def _number(values):
    """NaN as -inf, so that every row has experts to choose."""
    return tl.where(values == values, values, float("-inf"))


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
    choice = _number(choice)
    free = (choice == choice) & there
    if GROUPS > 1:
        TWO: tl.constexpr = bias_ptr is not None
        free = free & _in_best_groups(choice, experts, there, EXPERTS // GROUPS, GROUPS, BLOCK_G, TOPK_GROUP, TWO)

    slots = tl.arange(0, BLOCK_S)[None, :]
    ids = tl.zeros((ROWS, BLOCK_S), dtype=tl.int32)
    weights = tl.zeros((ROWS, BLOCK_S), dtype=tl.float32)
    total = tl.zeros((ROWS, 1), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        _, expert = _best(choice, free, experts)
        free = free & (experts != expert)
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

"""`moe.experts`: two grouped products over blocks of pairs of one expert, and a sum in the order of the slots.

Three kernels for few pairs, where each program finds its block by counting; a sort before them for more. Bound once
for the most rows of a call: grids have room for every way that pairs can spread over experts, and what of a grid has
nothing to do is found on the device.
"""

from __future__ import annotations

from typing import Any

import torch

from bidispatch.device import Arch
from bidispatch.ops.moe import known_experts
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params
from bidispatch.runtime.context import BindContext, Kernel, Limits
from bidispatch_backends.triton.launch import (
    ArgumentType,
    Constant,
    Launch,
    ceil_div,
    dependent_launch,
    options,
    pointer,
    power_of_two,
)
from bidispatch_backends.triton.moe_kernels import down_kernel, gate_up_kernel, sort_kernel, sum_kernel
from bidispatch_backends.triton.moe_params import ExpertsTile

__all__ = ["bind_experts", "launches"]

_SORT_PAIRS, _SORT_WARPS = 2048, 8
_SUM_BLOCK, _SUM_WARPS = 1024, 4
_FEWEST_LANES = 32


def _is_sorted(problem: Problem, tile: ExpertsTile, limits: Limits | None) -> bool:
    """Whether a kernel sorts: where the tile says so, and where more rows may come than it counts by itself."""
    pairs = 0 if limits is None else limits.max_tokens * problem.size("top_k")
    return not tile.counted or pairs > tile.counted


def launches(
    problem: Problem, params: Params, tile: ExpertsTile, arch: Arch, limits: Limits | None = None
) -> tuple[Launch, ...]:
    """The launches of `moe.experts` in their order: three, or four with the sort. limits: as few rows as the tile takes
    if not given.
    """
    hidden, inner, top_k = problem.size("hidden"), problem.size("intermediate"), problem.size("top_k")
    in_order = _is_sorted(problem, tile, limits)
    dependent = dependent_launch(arch)
    data, integers = pointer(problem.dtype), pointer("int32")
    out = pointer(str(problem["out_dtype"]))
    bias = data if problem.flag("bias") else None
    ids: dict[str, ArgumentType] = {"ids_ptr": integers, "expert_map_ptr": None}
    if problem.flag("expert_map"):
        ids["expert_map_ptr"] = integers
    tables: dict[str, ArgumentType] = dict.fromkeys(("order_ptr", "blocks_ptr"), integers if in_order else None)
    shared: dict[str, Constant] = {
        "TOP_K": top_k,
        "EXPERTS": problem.size("experts"),
        "KNOWN": known_experts(problem.dims),
    }
    grouping: dict[str, Constant] = {
        "SORTED": in_order,
        "DEPENDENT": bool(dependent),
        "BLOCK_P": max(_FEWEST_LANES, power_of_two(max(1, tile.counted))),
    }
    sort = Launch(
        sort_kernel,
        {**ids, **tables, "pairs": "i32", "stride_ids": top_k},
        {
            **shared,
            "DEPENDENT": bool(dependent),
            "BLOCK_E": max(_FEWEST_LANES, power_of_two(problem.size("experts") + 1)),
            "BLOCK_P": _SORT_PAIRS,
            "BLOCK_M": tile.block_m,
        },
        options(arch, _SORT_WARPS, 1, fp_fusion=False),
    )
    gate_up = Launch(
        gate_up_kernel,
        {"x_ptr": data, "w13_ptr": data, "bias_ptr": bias, **ids, **tables, "act_ptr": data}
        | {"pairs": "i32", "stride_x": hidden, "stride_expert": 2 * inner * hidden, "stride_row": hidden}
        | {"stride_bias": 2 * inner, "stride_ids": top_k},
        {
            **shared,
            "HIDDEN": hidden,
            "INNER": inner,
            "ACTIVATION": str(problem["activation"]),
            "ALPHA": float(problem["swiglu_alpha"]),
            "LIMIT": float(problem["swiglu_limit"]),
            **grouping,
            **_blocks(tile, "up", hidden),
        },
        _compiler(arch, tile, "up") | (dependent if in_order else {}),
    )
    down = Launch(
        down_kernel,
        {"act_ptr": data, "w2_ptr": data, "bias_ptr": bias, "weights_ptr": pointer("float32"), **ids, **tables}
        | {"parts_ptr": out, "pairs": "i32", "stride_expert": hidden * inner, "stride_row": inner}
        | {"stride_bias": hidden, "stride_weights": top_k, "stride_ids": top_k},
        {**shared, "HIDDEN": hidden, "INNER": inner, **grouping, **_blocks(tile, "down", inner)},
        _compiler(arch, tile, "down") | dependent,
    )
    add = Launch(
        sum_kernel,
        {"parts_ptr": out, **ids, "add_ptr": data if problem.flag("shared") else None, "out_ptr": out}
        | {"stride_ids": top_k, "stride_add": hidden, "stride_out": hidden},
        {**shared, "HIDDEN": hidden, "DEPENDENT": bool(dependent), "BLOCK": _sum_block(hidden)},
        options(arch, _SUM_WARPS, 1, fp_fusion=False) | dependent,
    )
    return (sort, gate_up, down, add) if in_order else (gate_up, down, add)


def _compiler(arch: Arch, tile: ExpertsTile, which: str) -> dict[str, int | bool]:
    """No fusion of products and sums: what follows the matrix unit is the same arithmetic in every tile."""
    product = tile.product(which)
    return options(arch, product.num_warps, product.num_stages, fp_fusion=False)


def _blocks(tile: ExpertsTile, which: str, k: int) -> dict[str, Constant]:
    product = tile.product(which)
    return {
        "BLOCK_M": product.block_m,
        "BLOCK_N": product.block_n,
        "BLOCK_K": product.block_k,
        "SWAP": product.swap,
        "GROUP_M": product.group_m,
        "K_IS_EVEN": k % product.block_k == 0,
    }


def _sum_block(hidden: int) -> int:
    return min(_SUM_BLOCK, power_of_two(hidden))


def _most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Blocks of any spread of pairs over experts: one each for as many experts as there can be, the rest full."""
    begun = min(pairs, experts)
    return begun + (pairs - begun) // block_m


class _Experts:
    """A bound kernel: its launches, and workspaces for the most rows."""

    def __init__(self, context: BindContext) -> None:
        problem, tile = context.problem, context.tile
        arch, limits = context.device.arch, context.limits
        self._top_k, self._experts = problem.size("top_k"), problem.size("experts")
        self._block_m = tile.block_m
        hidden, inner = problem.size("hidden"), problem.size("intermediate")
        self._sort: Launch | None = None
        if _is_sorted(problem, tile, limits):
            self._sort, self._gate_up, self._down, self._add = launches(problem, context.params, tile, arch, limits)
        else:
            self._gate_up, self._down, self._add = launches(problem, context.params, tile, arch, limits)
        self._tiles_up = ceil_div(inner, tile.up_block_n // 2)
        self._tiles_down = ceil_div(hidden, tile.down_block_n)
        self._tiles_sum = ceil_div(hidden, _sum_block(hidden))
        pairs = limits.max_tokens * self._top_k

        def empty(count: int, dtype: str) -> torch.Tensor:
            return torch.empty(count, dtype=getattr(torch, dtype), device=context.device.torch_device)

        self._act = empty(pairs * inner, problem.dtype)
        self._parts = empty(pairs * hidden, str(problem["out_dtype"]))
        self._tables: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if self._sort:
            blocks = _most_blocks(pairs, self._experts, self._block_m)
            self._tables = (empty(pairs, "int32"), empty(3 * (blocks + 1), "int32"))

    def __call__(
        self,
        x: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
        expert_map: torch.Tensor | None,
        add: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        m = x.shape[0]
        pairs, stride_ids = m * self._top_k, topk_ids.stride(0)
        blocks = pairs
        if self._sort:
            self._sort((self._experts,), topk_ids, expert_map, *self._tables, pairs, stride_ids)
            blocks = _most_blocks(pairs, self._experts, self._block_m)
        self._gate_up(
            (blocks * self._tiles_up,),
            *(x, w13, w13_bias, topk_ids, expert_map, *self._tables, self._act),
            *(pairs, x.stride(0), w13.stride(0), w13.stride(1), _row(w13_bias), stride_ids),
        )
        self._down(
            (blocks * self._tiles_down,),
            *(self._act, w2, w2_bias, topk_weights, topk_ids, expert_map, *self._tables, self._parts),
            *(pairs, w2.stride(0), w2.stride(1), _row(w2_bias), topk_weights.stride(0), stride_ids),
        )
        self._add(
            (m, self._tiles_sum),
            *(self._parts, topk_ids, expert_map, add, out, stride_ids, _row(add), out.stride(0)),
        )


def _row(tensor: Any) -> int:
    """The distance between rows of a tensor that need not be there."""
    return 0 if tensor is None else int(tensor.stride(0))


def bind_experts(context: BindContext) -> Kernel:
    """x [m, hidden], w13 [experts, 2·intermediate, hidden], w2 [experts, hidden, intermediate], topk_weights and
    topk_ids [m, top_k], w13_bias, w2_bias, expert_map and add or None each, out [m, hidden]; last axes contiguous.

    Holds max_tokens · top_k rows of intermediate elements and of hidden ones.
    """
    return _Experts(context)

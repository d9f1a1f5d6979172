"""`moe.experts`: two grouped products over blocks of pairs of one expert, and a sum in the order of the slots.

Three kernels for few pairs, where each program finds its block by counting; a sort before them for more. Bound once
for the most rows of a call: grids have room for every way that pairs can spread over experts, and what of a grid has
nothing to do is found on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from bidispatch import ops
from bidispatch.device import Arch
from bidispatch.ops.moe import known_experts
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params
from bidispatch.runtime.context import BindContext, Kernel, Limits
from bidispatch.runtime.scratch import empties
from bidispatch_backends.pieces import in_pieces
from bidispatch_backends.triton.fp8_params import tile_fault
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
from bidispatch_backends.triton.moe_params import (
    ExpertsTile,
    experts_workspaces,
    is_sorted,
    most_blocks,
    most_tokens,
)
from bidispatch_backends.triton.params import element_tiles
from bidispatch_backends.triton.quantize import bind_quantize_fp8_group

__all__ = [
    "SORT_WARPS",
    "bind_experts",
    "id_arguments",
    "id_constants",
    "launches",
    "row_stride",
    "sort_lanes",
    "sum_block",
    "sum_launch",
]

_SORT_PAIRS, _FEWEST_SORTED, SORT_WARPS = 2048, 256, 8
_SUM_BLOCK, _SUM_WARPS = 1024, 4
_FEWEST_LANES = 32


def launches(
    problem: Problem, params: Any, tile: ExpertsTile, arch: Arch, limits: Limits | None = None
) -> tuple[Launch, ...]:
    """The launches of `moe.experts` in their order: three, or four with the sort. limits: as few rows as the tile takes
    if not given.
    """
    hidden, inner, top_k = problem.size("hidden"), problem.size("intermediate"), problem.size("top_k")
    in_order = is_sorted(problem, tile, limits.max_tokens if limits else 0)
    dependent = dependent_launch(arch)
    data, integers = pointer(problem.dtype), pointer("int32")
    fp8 = problem["weight_dtype"] == FP8
    if fp8:
        for which in ("up", "down"):
            if fault := tile_fault(arch, params, tile.product(which)):
                raise ValueError(fault)
            if tile.product(which).block_k != GROUP:
                raise ValueError(f"{which}_block_k={tile.product(which).block_k}: fp8 has a scale every {GROUP} of K")
    operand = pointer(FP8) if fp8 else data
    scales = pointer("float32") if fp8 else None
    out = pointer(str(problem["out_dtype"]))
    bias = data if problem.flag("bias") else None
    ids = id_arguments(problem)
    tables: dict[str, ArgumentType] = dict.fromkeys(("order_ptr", "blocks_ptr"), integers if in_order else None)
    shared = id_constants(problem)
    products: dict[str, Constant] = {"WIDEN": fp8 and params.products == "fp16"}
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
            **sort_lanes(problem, limits),
            "BLOCK_M": tile.block_m,
        },
        options(arch, SORT_WARPS, 1, fp_fusion=False),
    )
    gate_up = Launch(
        gate_up_kernel,
        {"x_ptr": operand, "x_scales_ptr": scales, "w13_ptr": operand, "w13_scales_ptr": scales, "bias_ptr": bias}
        | {**ids, **tables, "act_ptr": data}
        | {"pairs": "i32", "stride_x": hidden, "stride_expert": 2 * inner * hidden, "stride_row": hidden}
        | {"stride_bias": 2 * inner, "stride_scales": _scales_of(2 * inner, hidden), "stride_ids": top_k},
        {
            **shared,
            "HIDDEN": hidden,
            "INNER": inner,
            "ACTIVATION": str(problem["activation"]),
            "ALPHA": float(problem["swiglu_alpha"]),
            "LIMIT": float(problem["swiglu_limit"]),
            **grouping,
            **_blocks(tile, "up", hidden),
            **products,
        },
        _compiler(arch, tile, "up") | (dependent if in_order else {}),
    )
    down = Launch(
        down_kernel,
        {"act_ptr": operand, "act_scales_ptr": scales, "w2_ptr": operand, "w2_scales_ptr": scales, "bias_ptr": bias}
        | {"weights_ptr": pointer("float32"), **ids, **tables}
        | {"parts_ptr": out, "pairs": "i32", "stride_expert": hidden * inner, "stride_row": inner}
        | {"stride_bias": hidden, "stride_scales": _scales_of(hidden, inner)}
        | {"stride_weights": top_k, "stride_ids": top_k},
        {**shared, "HIDDEN": hidden, "INNER": inner, **grouping, **_blocks(tile, "down", inner), **products},
        _compiler(arch, tile, "down") | dependent,
    )
    add = sum_launch(problem, arch)
    return (sort, gate_up, down, add) if in_order else (gate_up, down, add)


def id_arguments(problem: Problem) -> dict[str, ArgumentType]:
    """What says which experts tokens have, of every kernel that asks."""
    integers = pointer("int32")
    return {"ids_ptr": integers, "expert_map_ptr": integers if problem.flag("expert_map") else None}


def id_constants(problem: Problem) -> dict[str, Constant]:
    """The sizes that ids are read with."""
    experts = problem.size("experts")
    return {"TOP_K": problem.size("top_k"), "EXPERTS": experts, "KNOWN": known_experts(problem.dims)}


def sort_lanes(problem: Problem, limits: Limits | None) -> dict[str, Constant]:
    """Lanes of a program that sorts: for every expert, and for as many pairs at a time as there can be."""
    pairs = _SORT_PAIRS
    if limits is not None:
        pairs = min(pairs, max(_FEWEST_SORTED, power_of_two(limits.max_tokens * problem.size("top_k"))))
    return {"BLOCK_E": max(_FEWEST_LANES, power_of_two(problem.size("experts") + 1)), "BLOCK_P": pairs}


def sum_launch(problem: Problem, arch: Arch, *, placed: bool = False) -> Launch:
    """The sum over a token's slots. placed: of parts that a table says the rows of, and that have no weight yet; it
    then waits for the kernel before it.
    """
    hidden, top_k = problem.size("hidden"), problem.size("top_k")
    dependent = {} if placed else dependent_launch(arch)
    data, out, integers = pointer(problem.dtype), pointer(str(problem["out_dtype"])), pointer("int32")
    where: dict[str, ArgumentType] = {"rows_ptr": None, "weights_ptr": None, **id_arguments(problem)}
    if placed:
        where = {"rows_ptr": integers, "weights_ptr": pointer("float32"), "ids_ptr": None, "expert_map_ptr": None}
    return Launch(
        sum_kernel,
        {"parts_ptr": data if placed else out, **where}
        | {"add_ptr": data if problem.flag("shared") else None, "out_ptr": out}
        | {"stride_weights": top_k if placed else 0, "stride_ids": 0 if placed else top_k}
        | {"stride_add": hidden, "stride_out": hidden},
        {**id_constants(problem), "HIDDEN": hidden, "DEPENDENT": bool(dependent), "BLOCK": sum_block(hidden)},
        options(arch, _SUM_WARPS, 1, fp_fusion=False) | dependent,
    )


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


def _scales_of(n: int, k: int) -> int:
    """Scales of an fp8 weight [n, k]."""
    return ceil_div(n, GROUP) * ceil_div(k, GROUP)


def sum_block(hidden: int) -> int:
    """Columns of a program of the sum."""
    return min(_SUM_BLOCK, power_of_two(hidden))


class _Experts:
    """A bound kernel: its launches, and workspaces for the most rows."""

    def __init__(self, context: BindContext) -> None:
        problem, tile = context.problem, context.tile
        arch, limits = context.device.arch, context.limits
        self._top_k, self._experts = problem.size("top_k"), problem.size("experts")
        self._block_m = tile.block_m
        hidden, inner = problem.size("hidden"), problem.size("intermediate")
        self._sort: Launch | None = None
        if is_sorted(problem, tile, limits.max_tokens):
            self._sort, self._gate_up, self._down, self._add = launches(problem, context.params, tile, arch, limits)
        else:
            self._gate_up, self._down, self._add = launches(problem, context.params, tile, arch, limits)
        self._tiles_up = ceil_div(inner, tile.up_block_n // 2)
        self._tiles_down = ceil_div(hidden, tile.down_block_n)
        self._tiles_sum = ceil_div(hidden, sum_block(hidden))
        wanted = experts_workspaces(problem, tile, limits.max_tokens)
        room = dict(zip(wanted, empties(context, *_torch_types(wanted.values())), strict=True))
        self._tables = room.get("order"), room.get("blocks")
        self._parts = room["parts"]
        self._quantize = _Quantize(context, room) if problem["weight_dtype"] == FP8 else None
        self._act = self._parts.view(getattr(torch, problem.dtype)) if self._quantize else room["act"]

    def __call__(
        self,
        x: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
        w13_scales: torch.Tensor | None,
        w2_scales: torch.Tensor | None,
        expert_map: torch.Tensor | None,
        add: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        m = x.shape[0]
        pairs, stride_ids = m * self._top_k, topk_ids.stride(0)
        blocks = pairs
        rows, row_scales = (x, None) if self._quantize is None else self._quantize.tokens(x)
        if self._sort:
            self._sort((self._experts,), topk_ids, expert_map, *self._tables, pairs, stride_ids)
            blocks = most_blocks(pairs, self._experts, self._block_m)
        self._gate_up(
            (blocks * self._tiles_up,),
            *(rows, row_scales, w13, w13_scales, w13_bias, topk_ids, expert_map, *self._tables, self._act),
            *(
                pairs,
                rows.stride(0),
                w13.stride(0),
                w13.stride(1),
                row_stride(w13_bias),
                row_stride(w13_scales),
                stride_ids,
            ),
        )
        act, act_scales = (self._act, None) if self._quantize is None else self._quantize.pairs(self._act, pairs)
        self._down(
            (blocks * self._tiles_down,),
            *(act, act_scales, w2, w2_scales, w2_bias, topk_weights, topk_ids, expert_map, *self._tables, self._parts),
            *(
                pairs,
                w2.stride(0),
                w2.stride(1),
                row_stride(w2_bias),
                row_stride(w2_scales),
                topk_weights.stride(0),
                stride_ids,
            ),
        )
        self._add(
            (m, self._tiles_sum),
            *(self._parts, None, None, topk_ids, expert_map, add, out, 0, stride_ids, row_stride(add), out.stride(0)),
        )


class _Quantize:
    """x and the activation in fp8, and their scales: what the products of fp8 weights take."""

    def __init__(self, context: BindContext, room: Mapping[str, torch.Tensor]) -> None:
        hidden, inner = context.problem.size("hidden"), context.problem.size("intermediate")
        self._inner = inner
        self._kernels = tuple(bind_quantize_fp8_group(_quantization(context, k)) for k in (hidden, inner))
        self._of_tokens, self._of_pairs = (
            (room[name].view(-1, k), room[f"{name}_scales"].view(-1, k // GROUP))
            for name, k in (("x", hidden), ("act", inner))
        )

    def tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [m, hidden] and its scales [m, hidden/128]."""
        q, scales = (each[: len(x)] for each in self._of_tokens)
        self._kernels[0](x, q, scales)
        return q, scales

    def pairs(self, act: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `count` rows of act, among them rows that no pair has, whose result nobody reads."""
        q, scales = (each[:count] for each in self._of_pairs)
        self._kernels[1](act[: count * self._inner].view(count, self._inner), q, scales)
        return q, scales


def _torch_types(wanted: Iterable[tuple[int, str]]) -> list[tuple[int, torch.dtype]]:
    return [(count, getattr(torch, dtype)) for count, dtype in wanted]


def _quantization(context: BindContext, k: int) -> BindContext:
    """The binding of `quantize.fp8_group` for rows of k elements, with the tile that it takes for many rows."""
    dims = {"k": k, "scale_format": context.problem["scale_format"]}
    problem = ops.get("quantize.fp8_group").problem(context.problem.dtype, dims)
    _, tile = element_tiles(context.device, problem, Params())[-1]
    return replace(context, problem=problem, params=Params(), tile=tile)


def row_stride(tensor: Any) -> int:
    """The distance between rows of a tensor that need not be there."""
    return 0 if tensor is None else int(tensor.stride(0))


def bind_experts(context: BindContext) -> Kernel:
    """x [m, hidden], w13 [experts, 2·intermediate, hidden], w2 [experts, hidden, intermediate], topk_weights and
    topk_ids [m, top_k], then w13_bias, w2_bias, w13_scales, w2_scales, expert_map and add or None each, and out
    [m, hidden]; last axes contiguous.

    Holds top_k rows of intermediate elements and of hidden ones for each of so many tokens as the tile's
    `workspace_mb` has room for. A call of more is made in pieces, all by the tile that the whole call has.
    """
    rows = context.limits.max_tokens
    most = most_tokens(context.problem, context.tile, rows)
    limits = replace(context.limits, max_tokens=most, min_tokens=min(context.limits.min_tokens, most))
    return in_pieces(_Experts(replace(context, limits=limits)), "moe.experts", most, rows)

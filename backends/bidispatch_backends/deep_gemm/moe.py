"""`moe.experts` by DeepGEMM's grouped products, with kernels of ours around them. Imports the library when bound.

Six launches: rows are placed, x is copied (for fp8 weights, quantised) into them, gate and up multiplied, activated,
down multiplied, and the parts weighted and added. What each has to do is found on the device, so that a captured graph
serves any routing. Of the contiguous layout all blocks there can be are given to the library, which skips those that
pad; of the masked one every group, with its number of rows on the device.

The library compiles a kernel, for seconds, when a call first needs its tile, as `deep_gemm.fp8` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bidispatch.errors import BackendError
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.aligned import ALIGNMENT
from bidispatch_backends.deep_gemm.library import edges, library
from bidispatch_backends.deep_gemm.moe_params import BLOCK_ROWS, Room, expected_rows, most_tokens
from bidispatch_backends.pieces import in_pieces
from bidispatch_backends.triton.expert_rows import row_block, row_launches
from bidispatch_backends.triton.launch import ceil_div
from bidispatch_backends.triton.moe import row_stride, sum_block

__all__ = ["bind_experts"]

_PRODUCTS = {
    ("bf16", "masked"): "m_grouped_bf16_gemm_nt_masked",
    ("bf16", "contiguous"): "m_grouped_bf16_gemm_nt_contiguous",
    ("fp8", "masked"): "fp8_m_grouped_gemm_nt_masked",
    ("fp8", "contiguous"): "m_grouped_fp8_gemm_nt_contiguous",
}
"""What the library calls the grouped products, in each layout of the rows."""


class _Rows:
    """The workspaces as a call with so many rows sees them."""

    def __init__(self, room: Room, experts: _Experts) -> None:
        self.rows = room.rows
        lead = (room.groups, room.rows) if experts.masked else (room.rows,)
        count = room.groups * room.rows

        def view(memory: torch.Tensor, dtype: torch.dtype, width: int) -> torch.Tensor:
            return memory.view(dtype)[: count * width].view(*lead, width)

        def scales(memory: torch.Tensor | None, k: int) -> torch.Tensor | None:
            if memory is None:
                return None
            groups = k // GROUP
            by_group = memory[: count * groups].view(*lead[:-1], groups, room.rows)
            return by_group.transpose(-1, -2)

        hidden, inner = experts.hidden, experts.inner
        self.x = view(experts.wide, experts.operand, hidden)
        self.parts = view(experts.wide, experts.data, hidden)
        self.both = view(experts.both, experts.data, 2 * inner)
        self.act = view(experts.act, experts.operand, inner)
        self.x_scales, self.act_scales = scales(experts.x_scales, hidden), scales(experts.act_scales, inner)


class _Experts:
    """A bound kernel: its launches, the library's products, and workspaces for the most rows."""

    def __init__(self, context: BindContext) -> None:
        problem, limits, tile = context.problem, context.limits, context.tile
        self._problem, self._tile = problem, tile
        self.masked = tile.layout == "masked"
        self._top_k, self._experts = problem.size("top_k"), problem.size("experts")
        self.hidden, self.inner = problem.size("hidden"), problem.size("intermediate")
        self._fp8 = problem["weight_dtype"] == FP8
        self.data = getattr(torch, problem.dtype)
        self.operand = torch.float8_e4m3fn if self._fp8 else self.data
        room = Room.of(problem, tile, limits.max_tokens)
        self._launches = row_launches(problem, context.device.arch, limits, masked=self.masked, block_rows=BLOCK_ROWS)

        def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(count, dtype=dtype, device=context.device.torch_device)

        rows = room.groups * room.rows
        self.wide = empty(rows * self.hidden, self.data)  # x, which nobody reads once there are parts
        self.both, self.act = empty(rows * 2 * self.inner, self.data), empty(rows * self.inner, self.operand)
        self.x_scales = empty(rows * (self.hidden // GROUP), torch.float32) if self._fp8 else None
        self.act_scales = empty(rows * (self.inner // GROUP), torch.float32) if self._fp8 else None
        self._rows_of_pairs = empty(limits.max_tokens * self._top_k, torch.int32)
        self._table = empty(self._experts if self.masked else rows, torch.int32)
        self._views: dict[int, _Rows] = {room.rows: _Rows(room, self)}
        self._of_masked = self._views[room.rows]
        deep_gemm = library()
        self._alignment = deep_gemm.get_mk_alignment_for_contiguous_layout
        self._product = getattr(deep_gemm, _PRODUCTS["fp8" if self._fp8 else "bf16", tile.layout])
        self._expected = expected_rows(problem, limits.max_tokens)
        if not self.masked:
            self.edges = edges(limits)

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
        pairs = m * self._top_k
        here = self._of_masked if self.masked else self._contiguous(m)
        launches, rows_of_pairs = self._launches, self._rows_of_pairs
        launches.place(
            (self._experts,),
            *(topk_ids, expert_map, rows_of_pairs, self._table, pairs, here.rows, topk_ids.stride(0)),
        )
        launches.scatter(
            (m, ceil_div(self.hidden, row_block(self.hidden))),
            *(x, rows_of_pairs, here.x, here.x_scales, here.rows, x.stride(0)),
        )
        self._multiply(here.x, here.x_scales, w13, w13_scales, here.both)
        launches.activate(
            (pairs, ceil_div(self.inner, row_block(self.inner))),
            *(here.both, rows_of_pairs, here.act, here.act_scales, here.rows),
        )
        self._multiply(here.act, here.act_scales, w2, w2_scales, here.parts)
        launches.add(
            (m, ceil_div(self.hidden, sum_block(self.hidden))),
            *(here.parts, rows_of_pairs, topk_weights, None, None, add, out),
            *(topk_weights.stride(0), 0, row_stride(add), out.stride(0)),
        )

    def _contiguous(self, m: int) -> _Rows:
        """The workspaces of a call of m tokens: as many blocks as any spread of them can have.

        Raises `BackendError` where the host has told the library to expect experts at other places.
        """
        if BLOCK_ROWS % self._alignment():
            raise BackendError(
                f"DeepGEMM is set to groups that begin at multiples of {self._alignment()} rows, these begin at "
                f"multiples of {BLOCK_ROWS}; deep_gemm.set_mk_alignment_for_contiguous_layout({BLOCK_ROWS})"
            )
        room = Room.of(self._problem, self._tile, m)
        if room.rows not in self._views:
            self._views[room.rows] = _Rows(room, self)
        return self._views[room.rows]

    def _multiply(
        self,
        rows: torch.Tensor,
        row_scales: torch.Tensor | None,
        weight: torch.Tensor,
        weight_scales: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """out = rows · weight of each row's expert. compiled_dims="": one kernel for every N and K."""
        left: Any = rows
        right: Any = _whole(weight)
        if weight_scales is not None:
            left, right = (rows, row_scales), (right, _whole(weight_scales))
        expected = (self._expected,) if self.masked else ()
        self._product(left, right, out, self._table_of(out), *expected, compiled_dims="")

    def _table_of(self, out: torch.Tensor) -> torch.Tensor:
        return self._table if self.masked else self._table[: len(out)]


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight whose experts lie behind each other without gaps, on 16 bytes: what the library's descriptors say of it.

    Others are copied, at every call. Strides are compared, since an axis of one element has any and is contiguous.
    """
    _, n, k = weight.shape
    if weight.stride() == (n * k, k, 1) and weight.data_ptr() % ALIGNMENT == 0:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


def bind_experts(context: BindContext) -> Kernel:
    """x [m, hidden], w13 [experts, 2·intermediate, hidden], w2 [experts, hidden, intermediate], topk_weights and
    topk_ids [m, top_k], then two biases of None, w13_scales, w2_scales, expert_map and add or None each, and out
    [m, hidden]; last axes contiguous. Weights that have gaps are copied.

    Holds the rows of `moe_params.Room`. Its `edges` are some of the M at which the library's tile may change in the
    contiguous layout, where it follows the number of blocks. A call that `workspace_mb` has no room for is made in
    pieces.
    """
    rows = context.limits.max_tokens
    most = most_tokens(context.problem, context.tile, rows)
    limits = replace(context.limits, max_tokens=most, min_tokens=min(context.limits.min_tokens, most))
    return in_pieces(_Experts(replace(context, limits=limits)), "moe.experts", most, rows)

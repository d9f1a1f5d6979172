"""The mixture of experts on the processor: one expert after another, its rows through products of one shape.

A bound kernel keeps its buffers, so it must not run in two threads at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from bidispatch import ops
from bidispatch.ops.moe import known_experts
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.torch_cpu.linear import Product, spread
from bidispatch_backends.torch_cpu.params import RowParams
from bidispatch_backends.torch_cpu.quantize import bind_quantize_fp8_group
from bidispatch_backends.torch_cpu.rows import Blocks, bind_gated
from bidispatch_backends.torch_cpu.workspace import row_blocks

__all__ = ["bind_moe", "bind_moe_router"]

_DOWN = 0x7FFFFFFF
_LEAST = -(2**63)


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """int64 that sort as fp32 scores do over the last axis, and equal ones by falling index. NaN is as -inf."""
    bits = (torch.where(scores.isnan(), -math.inf, scores) + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ _DOWN, bits)
    return (ordered << 32) | (_DOWN - torch.arange(scores.shape[-1]))


def bind_moe_router(context: BindContext) -> Kernel:
    """Return `kernel(logits, correction_bias, weights, ids)`; see the op `moe.router`."""
    problem = context.problem
    experts, top_k, groups = (problem.size(dim) for dim in ("experts", "top_k", "n_group"))
    sigmoid, scaling = problem["scoring"] == "sigmoid", float(problem["routed_scaling_factor"])
    blocks = Blocks(experts, context.params.block)
    buffer = blocks.buffer()

    def scores_of(logits: torch.Tensor) -> torch.Tensor:
        block = blocks.fill(buffer, logits, padding=-math.inf)
        return (torch.sigmoid(block) if sigmoid else F.softmax(block, dim=-1))[: len(logits), :experts]

    def chosen(choice: torch.Tensor, two: bool) -> torch.Tensor:
        keys = _keys(choice)
        if groups > 1:
            by_group = torch.where(choice.isnan(), -math.inf, choice).view(len(choice), groups, -1)
            best = by_group.topk(2, dim=-1).values.sum(-1) if two else by_group.amax(-1)
            open_groups = _keys(best).topk(problem.size("topk_group"), dim=-1).indices
            shut = torch.ones(best.shape, dtype=torch.bool).scatter_(1, open_groups, False)
            keys = keys.masked_fill(shut.repeat_interleave(experts // groups, dim=1), _LEAST)
        return keys.topk(top_k, dim=-1).indices

    def router(logits: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor, ids: torch.Tensor) -> None:
        for rows in row_blocks(len(logits), blocks.rows):
            part = logits[rows].float()
            scores = scores_of(part).clone()
            found = chosen(part if bias is None else scores + bias, bias is not None)
            of_found = scores.gather(1, found)
            if problem.flag("renormalize"):
                total = of_found[:, 0].clone()
                for slot in range(1, top_k):
                    total += of_found[:, slot]
                of_found = torch.where(total[:, None] == 0, 0.0, of_found / total[:, None])
            weights[rows] = of_found * scaling
            ids[rows] = found.int()

    return router


class _Experts:
    """A bound kernel: both products, and the activation between them."""

    def __init__(self, context: BindContext) -> None:
        problem = context.problem
        self._problem, self._context = problem, context
        self._experts, self._known = problem.size("experts"), known_experts(problem.dims)
        self._hidden, self._inner = problem.size("hidden"), problem.size("intermediate")
        self._dtype = getattr(torch, problem.dtype)
        self._part_dtype = getattr(torch, str(problem["out_dtype"]))

        self._fp8 = problem["weight_dtype"] == FP8
        dtype = "float32" if self._fp8 else problem.dtype

        def product(n: int, k: int) -> Product:
            dims = {"n": n, "k": k, "out_dtype": "float32"}
            return Product(replace(context, problem=ops.get("gemm").problem(dtype, dims)))

        self._gate_up = product(2 * self._inner, self._hidden)
        self._down = product(self._hidden, self._inner)
        rows = replace(context, problem=ops.get("silu_and_mul").problem(problem.dtype, {"n": self._inner}))
        self._gated = bind_gated(replace(rows, params=RowParams()), self._function())

    def _function(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What is taken of a gate, times an up."""
        activation, alpha = self._problem["activation"], float(self._problem["swiglu_alpha"])
        if activation == "swiglu_clamped":
            return lambda gate: gate * torch.sigmoid(alpha * gate)
        return F.silu if activation == "silu" else F.gelu

    def _rounded(self, rows: torch.Tensor) -> torch.Tensor:
        """What the product takes: of fp8 weights, the rows as `quantize.fp8_group` rounds them, widened to fp32."""
        if not self._fp8:
            return rows
        count, k = rows.shape
        problem = ops.get("quantize.fp8_group").problem(
            self._problem.dtype, {"k": k, "scale_format": self._problem["scale_format"]}
        )
        q, scales = torch.empty(count, k, dtype=torch.float8_e4m3fn), torch.empty(count, k // GROUP)
        bind_quantize_fp8_group(replace(self._context, problem=problem))(rows, q, scales)
        return q.float() * spread(scales, k, 1)

    def _halves(self, both: torch.Tensor) -> torch.Tensor:
        """Gate, then up; of `swiglu_clamped` as they are multiplied."""
        if self._problem["activation"] != "swiglu_clamped":
            return both
        limit = float(self._problem["swiglu_limit"])
        return torch.cat([both[:, ::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit) + 1], dim=1)

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
        ids = topk_ids.long()
        known = (ids >= 0) & (ids < self._known)
        local = torch.where(known, ids, 0)
        if expert_map is not None:
            local = expert_map.long()[local]
        local = torch.where(known & (local >= 0) & (local < self._experts), local, -1)
        parts = torch.zeros(*ids.shape, self._hidden, dtype=self._part_dtype)
        for expert in sorted(set(local.flatten().tolist()) - {-1}):
            tokens, slots = (local == expert).nonzero(as_tuple=True)
            both = torch.empty(len(tokens), 2 * self._inner)
            first, second = w13[expert], w2[expert]
            if w13_scales is not None and w2_scales is not None:
                first, second = _widened(first, w13_scales[expert]), _widened(second, w2_scales[expert])
            self._gate_up(self._rounded(x[tokens]), first.T, _row(w13_bias, expert), both)
            act = torch.empty(len(tokens), self._inner, dtype=self._dtype)
            self._gated(self._halves(both), act)
            result = torch.empty(len(tokens), self._hidden)
            self._down(self._rounded(act), second.T, _row(w2_bias, expert), result)
            parts[tokens, slots] = (result * topk_weights[tokens, slots, None]).to(self._part_dtype)
        total = torch.zeros(len(x), self._hidden)
        for slot in range(ids.shape[1]):
            total += parts[:, slot].float()
        if add is not None:
            total += add.float()
        out.copy_(total)


def _widened(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """An fp8 weight [n, k] times the scales of its blocks, in fp32."""
    n, k = weight.shape
    return weight.float() * spread(spread(scales, k, 1), n, 0)


def _row(tensor: Any, index: int) -> Any:
    return None if tensor is None else tensor[index]


def bind_moe(context: BindContext) -> Kernel:
    """Return `kernel(x, w13, w2, weights, ids, w13_bias, w2_bias, expert_map, add, out)`; see the op `moe.experts`."""
    return _Experts(context)

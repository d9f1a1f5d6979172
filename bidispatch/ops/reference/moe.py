"""References and inputs of the mixture of experts."""

from __future__ import annotations

import torch

from bidispatch.ops.moe import known_experts
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.reference.draw import draw
from bidispatch.ops.reference.linear import block_scales, widened_blocks
from bidispatch.ops.reference.quantize import group_scales, spread
from bidispatch.ops.schema import Problem

__all__ = ["experts", "experts_inputs", "gated", "local_experts", "quantized", "router", "router_inputs"]


def router(problem: Problem, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """weights [m, top_k] in float64 and ids [m, top_k] int32 for logits [m, experts] and a bias [experts] or None.

    Grouped choice and bias as DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a group's score is the sum of its two best
    biased scores, without a bias its best. Ties go to the lower index, of groups and of experts; NaN is below all.
    Without a bias the logits choose: scores rise with them, and could only tie where they do not.
    """
    top_k, groups = problem.size("top_k"), problem.size("n_group")
    values = logits.double()
    scores = torch.sigmoid(values) if problem["scoring"] == "sigmoid" else torch.softmax(values, dim=-1)
    choice = values if bias is None else scores + bias.double()
    choice = choice.masked_fill(choice.isnan(), -torch.inf)
    open_to = torch.ones_like(choice, dtype=torch.bool)
    if groups > 1:
        by_group = choice.view(len(choice), groups, -1)
        best = by_group.amax(-1) if bias is None else by_group.topk(2, dim=-1).values.sum(-1)
        best = best.masked_fill(best.isnan(), -torch.inf)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, : problem.size("topk_group")]
        open_groups = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
        open_to = open_groups.repeat_interleave(by_group.shape[-1], dim=1)
    # Two stable sorts: by value, then what is open before what is not.
    order = choice.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(1, (~open_to).gather(1, order).sort(dim=-1, stable=True).indices)
    ids = order[:, :top_k]
    weights = scores.gather(1, ids)
    if problem.flag("renormalize"):
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total == 0, 0.0, weights / total)
    return weights * float(problem["routed_scaling_factor"]), ids.int()


def router_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """logits [rows, experts], every eighth row with many ties; the bias where the problem has one."""
    experts = problem.size("experts")
    # Scaled ones within what exp takes in fp32, or all scores of a row may be 0.
    scale = 2.0**-7 if distribution == "scaled" else 1.0
    logits = draw(
        (rows, experts), (seed, "logits"), dtype=problem.dtype, device=device, distribution=distribution, scale=scale
    )
    logits[::8] = logits[::8].round()
    if not problem.flag("correction_bias"):
        return [logits, None]
    return [logits, draw((experts,), (seed, "bias"), dtype="float32", device=device, scale=0.1)]


def gated(problem: Problem, both: torch.Tensor) -> torch.Tensor:
    """The activation of [rows, 2 · intermediate]: [rows, intermediate], in the dtype given.

    swiglu_clamped: openai/gpt-oss and `swigluoai_and_mul` of vLLM 0.25.1, whose gate and up alternate.
    """
    if problem["activation"] == "swiglu_clamped":
        alpha, limit = float(problem["swiglu_alpha"]), float(problem["swiglu_limit"])
        gate, up = both[..., ::2].clamp(max=limit), both[..., 1::2].clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    gate, up = both.chunk(2, dim=-1)
    function = torch.nn.functional.silu if problem["activation"] == "silu" else torch.nn.functional.gelu
    return function(gate) * up


def local_experts(problem: Problem, topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Which of the rank's experts each id names, -1 for none: [m, top_k] int64."""
    ids = topk_ids.long()
    known = (ids >= 0) & (ids < known_experts(problem.dims))
    local = torch.where(known, ids, 0)
    if expert_map is not None:
        local = expert_map.long()[local]
    known &= (local >= 0) & (local < problem.size("experts"))
    return torch.where(known, local, -1)


def experts(
    problem: Problem,
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
) -> tuple[torch.Tensor, ...]:
    """out [m, hidden] in float64; shapes as in the catalogue.

    Nothing is rounded on the way but what fp8 weights multiply, to fp8, since that is part of what they mean.
    """
    local = local_experts(problem, topk_ids, expert_map)
    rows = quantized(problem, x)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device) if add is None else add.double()
    for expert in sorted(set(local.flatten().tolist()) - {-1}):
        tokens, slots = (local == expert).nonzero(as_tuple=True)
        both = rows[tokens] @ _widened(w13, w13_scales, expert).T
        if w13_bias is not None:
            both += w13_bias[expert].double()
        act = quantized(problem, gated(problem, both))
        part = act @ _widened(w2, w2_scales, expert).T
        if w2_bias is not None:
            part += w2_bias[expert].double()
        out = out.index_add(0, tokens, part * topk_weights[tokens, slots, None].double())
    return (out,)


def quantized(problem: Problem, rows: torch.Tensor) -> torch.Tensor:
    """rows [m, k] in float64, of a problem with fp8 weights as its dtype and then `quantize.fp8_group` round them."""
    if problem["weight_dtype"] != FP8:
        return rows.double()
    rows = rows.to(getattr(torch, problem.dtype))
    scales = spread(group_scales(problem, rows), rows.shape[1])
    return (rows.float() / scales.float()).to(torch.float8_e4m3fn).double() * scales


def _widened(weight: torch.Tensor, scales: torch.Tensor | None, expert: int) -> torch.Tensor:
    """An expert's weight [n, k] in float64."""
    return weight[expert].double() if scales is None else widened_blocks(weight[expert], scales[expert])


_FEW_EXPERTS = 8
"""Of each second row: so that a batch has experts with many rows, and others with none."""


def experts_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x; weights of scale 1/sqrt(width); ids that are distinct in a row, and in every fifth row one of -1 and one that
    no expert has; a map under which this rank has every n-th expert of all; the rest where the problem has it.
    """
    experts, top_k = problem.size("experts"), problem.size("top_k")
    hidden, inner = problem.size("hidden"), problem.size("intermediate")
    everywhere = known_experts(problem.dims)
    # gate · up would leave fp16, and so would what comes after it.
    small = 2.0**-6 if (distribution, problem.dtype) == ("scaled", "float16") else 1.0

    def values(name: str, *shape: int, scale: float = 1.0, dtype: str = problem.dtype) -> torch.Tensor:
        return draw(shape, (seed, name), dtype=dtype, device=device, distribution=distribution, scale=scale)

    order = draw((rows, everywhere), (seed, "ids"), dtype="float32", device=device)
    order[1::2, _FEW_EXPERTS:] -= 100.0
    ids = order.topk(top_k, dim=-1).indices.int()
    ids[2::5, 0] = -1
    ids[2::5, top_k - 1] = everywhere + 1
    weights = draw((rows, top_k), (seed, "weights"), dtype="float32", device=device).softmax(-1)
    bias, mapped = problem.flag("bias"), problem.flag("expert_map")
    expert_map = None
    if mapped:
        expert_map = torch.full((everywhere,), -1, dtype=torch.int32, device=device)
        mine = torch.arange(experts, device=device)
        expert_map[mine * (everywhere // experts)] = mine.int()
    fp8 = problem["weight_dtype"] == FP8

    def weight(name: str, n: int, k: int) -> torch.Tensor:
        return values(name, experts, n, k, dtype=FP8) if fp8 else values(name, experts, n, k, scale=small * k**-0.5)

    def scales(name: str, n: int, k: int) -> torch.Tensor | None:
        return block_scales(problem, (experts, n // GROUP, k // GROUP), (seed, name), device, k**-0.5) if fp8 else None

    return [
        values("x", rows, hidden),
        weight("w13", 2 * inner, hidden),
        weight("w2", hidden, inner),
        weights,
        ids,
        values("w13_bias", experts, 2 * inner, scale=small) if bias else None,
        values("w2_bias", experts, hidden, scale=small) if bias else None,
        scales("w13_scales", 2 * inner, hidden),
        scales("w2_scales", hidden, inner),
        expert_map,
        values("add", rows, hidden) if problem.flag("shared") else None,
    ]

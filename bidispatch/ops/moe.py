"""Mixture of experts: `moe.router` chooses the experts of each token, `moe.experts` runs them and sums what they give.

Ids that name no expert of the rank (padding of -1, out of range, another rank's by `expert_map`) contribute nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from bidispatch.ops.quantize import FP8, GROUP, SCALE_FORMAT
from bidispatch.ops.schema import SAME_DTYPE, WIDE_DTYPES, Argument, Dim, DimValue, Op

__all__ = ["OPS", "known_experts"]


def known_experts(dims: Mapping[str, DimValue]) -> int:
    """How many experts the ids of `moe.experts` may name: those of all ranks together."""
    return int(dims["global_experts"]) or int(dims["experts"])


def _blocks(n: str, k: str) -> tuple[str, str, str]:
    """The shape of the scales of an fp8 weight [experts, n, k]."""
    return "experts", f"{n}/{GROUP}", f"{k}/{GROUP}"


def _router_conflict(dims: Mapping[str, DimValue]) -> str | None:
    experts, top_k = int(dims["experts"]), int(dims["top_k"])
    groups, chosen = int(dims["n_group"]), int(dims["topk_group"])
    if top_k > experts:
        return f"top_k={top_k} exceeds experts={experts}"
    if experts % groups:
        return f"experts={experts} is not divided by n_group={groups}"
    if chosen > groups:
        return f"topk_group={chosen} exceeds n_group={groups}"
    if chosen * (experts // groups) < top_k:
        return f"topk_group={chosen} groups have {chosen * (experts // groups)} experts, fewer than top_k={top_k}"
    if groups > 1 and dims["correction_bias"] and experts // groups < 2:
        return f"n_group={groups} leaves one expert a group, whose score would be the sum of its two best"
    return None


def _experts_conflict(dims: Mapping[str, DimValue]) -> str | None:
    experts, top_k, everywhere = int(dims["experts"]), int(dims["top_k"]), int(dims["global_experts"])
    if everywhere and not dims["expert_map"] and everywhere != experts:
        return (
            f"global_experts={everywhere} differs from experts={experts}: "
            "expert_map=true says which of them are on this rank"
        )
    if dims["expert_map"] and everywhere < experts:
        return f"expert_map needs global_experts of at least experts={experts}, not {everywhere}"
    if dims["weight_dtype"] not in (dims[SAME_DTYPE], FP8):
        return f"weight_dtype is {dims[SAME_DTYPE]} or {FP8}, not {dims['weight_dtype']}"
    if dims["weight_dtype"] == FP8:
        uneven = [name for name in ("hidden", "intermediate") if int(dims[name]) % GROUP]
        if uneven:
            return f"weight_dtype={FP8} needs {uneven[0]} a multiple of {GROUP}, not {dims[uneven[0]]}"
    if top_k > known_experts(dims):
        return f"top_k={top_k} exceeds the {known_experts(dims)} experts there are"
    return None


ROUTER = Op(
    name="moe.router",
    summary="the top_k experts of each token, best first, and their weights",
    dims=(
        Dim("experts", int, "experts of the layer, on all ranks", minimum=1, typical=128),
        Dim("top_k", int, "experts of a token", minimum=1, typical=8),
        Dim("scoring", str, "how logits become scores", default="softmax", choices=("softmax", "sigmoid")),
        Dim("renormalize", bool, "whether a token's weights are divided by their sum, in the order of top_k", True),
        Dim("correction_bias", bool, "whether a bias per expert is added to the scores that choose", default=False),
        Dim("n_group", int, "groups of experts; 1: no groups", default=1, minimum=1),
        Dim("topk_group", int, "groups whose experts may be chosen", default=1, minimum=1),
        Dim("routed_scaling_factor", float, "what the weights are multiplied by last", default=1.0),
    ),
    arguments=(
        Argument("logits", ("m", "experts")),
        Argument("correction_bias", ("experts",), dtype="float32", when="correction_bias"),
    ),
    outputs=(
        Argument("weights", ("m", "top_k"), dtype="float32"),
        Argument("ids", ("m", "top_k"), dtype="int32"),
    ),
    dtypes=("float32", "bfloat16", "float16"),
    reference="bidispatch.ops.reference.moe:router",
    inputs="bidispatch.ops.reference.moe:router_inputs",
    stock="bidispatch.ops.stock:moe_router",
    conflict=_router_conflict,
)

EXPERTS = Op(
    name="moe.experts",
    summary="the gated MLP of each chosen expert, weighted and summed over a token's experts in the order of its slots",
    dims=(
        Dim("experts", int, "experts on this rank", minimum=1, typical=128),
        Dim("top_k", int, "slots of a token", minimum=1, typical=8),
        Dim("hidden", int, "width of a token", minimum=1, typical=2048),
        Dim("intermediate", int, "width between the two products, on this rank", minimum=1, typical=96),
        Dim(
            "activation",
            str,
            "silu(gate) · up; gelu, the erf form; swiglu_clamped: gate · sigmoid(alpha · gate) · (up + 1), gate at "
            "most limit and up within ±limit, whose rows in w13 alternate: gate, up, gate, up",
            default="silu",
            choices=("silu", "gelu", "swiglu_clamped"),
        ),
        Dim("swiglu_alpha", float, "alpha of swiglu_clamped", default=1.702),
        Dim("swiglu_limit", float, "limit of swiglu_clamped", default=7.0),
        Dim("bias", bool, "whether both products have a bias, added in fp32", default=False),
        Dim(
            "weight_dtype",
            str,
            "dtype of both weights; float8_e4m3fn has a scale for each 128x128 block, and what is multiplied by it is "
            "rounded as by quantize.fp8_group",
            default=SAME_DTYPE,
            choices=(SAME_DTYPE, "bfloat16", "float16", FP8),
        ),
        SCALE_FORMAT,
        Dim("expert_map", bool, "whether a map says which experts are on this rank", default=False),
        Dim("global_experts", int, "experts that ids may name; 0: those of this rank", default=0, minimum=0),
        Dim("shared", bool, "whether the result of shared experts is added, in fp32, last", default=False),
        Dim(
            "out_dtype",
            str,
            "dtype of the result, and of each expert's weighted part of it before the sum",
            default=SAME_DTYPE,
            choices=(SAME_DTYPE, *WIDE_DTYPES),
        ),
    ),
    arguments=(
        Argument("x", ("m", "hidden")),
        Argument("w13", ("experts", "2*intermediate", "hidden"), dtype="weight_dtype"),
        Argument("w2", ("experts", "hidden", "intermediate"), dtype="weight_dtype"),
        Argument("topk_weights", ("m", "top_k"), dtype="float32"),
        Argument("topk_ids", ("m", "top_k"), dtype="int32"),
        Argument("w13_bias", ("experts", "2*intermediate"), when="bias"),
        Argument("w2_bias", ("experts", "hidden"), when="bias"),
        Argument("w13_scales", _blocks("2*intermediate", "hidden"), dtype="float32", when=f"weight_dtype={FP8}"),
        Argument("w2_scales", _blocks("hidden", "intermediate"), dtype="float32", when=f"weight_dtype={FP8}"),
        Argument("expert_map", ("global_experts",), dtype="int32", when="expert_map"),
        Argument("add", ("m", "hidden"), when="shared"),
    ),
    outputs=(Argument("out", ("m", "hidden"), dtype="out_dtype"),),
    dtypes=("bfloat16", "float16"),
    reference="bidispatch.ops.reference.moe:experts",
    inputs="bidispatch.ops.reference.moe:experts_inputs",
    stock="bidispatch.ops.stock:moe_experts",
    conflict=_experts_conflict,
)

OPS = (ROUTER, EXPERTS)

"""Quantisation of activations to fp8: in groups of 128, by itself and behind the ops that come before an fp8 product;
with one scale a token; and with one that is given.

A group is 128 neighbours of a row; the last one of a row is shorter where 128 does not divide it. Its scale is
max(amax, 1e-10) / 448 in fp32, and its values are x / scale, each rounded once to the nearest even e4m3. With
`scale_format=ue8m0` the scale is at least 1e-10 and rounded up to a power of two first, and still stored as fp32. Both
are what vLLM's `per_token_group_fp8_quant` computes, bit for bit where a row is finite
(csrc/libtorch_stable/quantization/w8a8/fp8/per_token_group_quant.cu at 00aa9038).

NaN stays NaN and takes no part in the maximum. A group that holds an infinity has an infinite scale; its infinities
become NaN and its other values 0, so that a product with it is NaN. (vLLM clamps, and makes -448 of both.)

A token's scale is amax / 448 in fp32, at least 1 / (448 · 512), as vLLM's `dynamic_per_token_scaled_fp8_quant` has it
(csrc/libtorch_stable/quantization/w8a8/fp8/common.cu, 0.25.1); NaN and infinities as above. With a scale that is given,
values beyond ±448 times it become ±448, as in `static_scaled_fp8_quant`. Both are quotients here, and products with a
reciprocal there, which may round to the neighbour.
"""

from __future__ import annotations

from dataclasses import replace

from bidispatch.ops import activation, norm
from bidispatch.ops.schema import Argument, Dim, Op, Problem

__all__ = ["FP8", "FUSED", "GROUP", "OPS", "SCALE_FORMAT", "unfused"]

FP8 = "float8_e4m3fn"
GROUP = 128
"""Elements of a group, and rows and columns of a block of a weight."""

SCALE_FORMAT = Dim(
    "scale_format",
    str,
    "ue8m0: every scale is a power of two, as Blackwell's matrix unit takes them; float: any fp32",
    default="float",
    choices=("float", "ue8m0"),
)


def _scales(of: str) -> Argument:
    """Any strides: DeepGEMM wants the scales of one group side by side, which a transposed tensor is."""
    return Argument("scales", ("m", f"{of}/{GROUP}"), dtype="float32", any_strides=True)


QUANTIZE = Op(
    name="quantize.fp8_group",
    summary="x in fp8, with an fp32 scale for each 128 elements of a row",
    dims=(Dim("k", int, "row length, cut into groups of 128", minimum=1, typical=4096), SCALE_FORMAT),
    arguments=(Argument("x", ("m", "k")),),
    outputs=(Argument("q", ("m", "k"), dtype=FP8), _scales("k")),
    reference="bidispatch.ops.reference.quantize:fp8_group",
    inputs="bidispatch.ops.reference.quantize:row_inputs",
    stock="bidispatch.ops.stock:fp8_group",
)


_FUSED = ("silu_and_mul", "rms_norm", "fused_add_rms_norm")

FUSED = {f"{op.name}.fp8_group": op for op in (*activation.OPS, *norm.OPS) if op.name in _FUSED}
"""The op without quantisation, by the name of the one with it."""


def unfused(problem: Problem) -> tuple[Problem, Problem]:
    """The problems of the two ops that a fused one joins: what comes before, and `quantize.fp8_group` of its result."""
    op = FUSED[problem.op]
    before = op.problem(problem.dtype, {name: problem[name] for name in op.dim_names})
    dims = {"k": problem.size("n"), SCALE_FORMAT.name: problem[SCALE_FORMAT.name]}
    return before, QUANTIZE.problem(problem.dtype, dims)


def _quantized(name: str, op: Op) -> Op:
    """An op whose first output [m, n] is rounded to the problem's dtype, as it is without this, and then quantised."""
    _, *others = op.outputs
    return replace(
        op,
        name=name,
        summary=f"{op.name}, rounded, then quantize.fp8_group",
        dims=(*op.dims, SCALE_FORMAT),
        outputs=(Argument("q", ("m", "n"), dtype=FP8), _scales("n"), *others),
        reference="bidispatch.ops.reference.quantize:fused",
        stock="bidispatch.ops.stock:fused_fp8_group",
    )


QUANTIZE_TOKEN = Op(
    name="quantize.fp8_token",
    summary="x in fp8, with an fp32 scale for each row",
    dims=(Dim("k", int, "row length", minimum=1, typical=4096),),
    arguments=(Argument("x", ("m", "k")),),
    outputs=(Argument("q", ("m", "k"), dtype=FP8), Argument("scales", ("m",), dtype="float32")),
    reference="bidispatch.ops.reference.quantize:fp8_token",
    inputs="bidispatch.ops.reference.quantize:row_inputs",
    stock="bidispatch.ops.stock:fp8_token",
)

QUANTIZE_TENSOR = Op(
    name="quantize.fp8_tensor",
    summary="x over a given fp32 scale in fp8, at most 448 in magnitude",
    dims=(Dim("k", int, "row length", minimum=1, typical=4096),),
    arguments=(Argument("x", ("m", "k")), Argument("scale", (1,), dtype="float32")),
    outputs=(Argument("q", ("m", "k"), dtype=FP8),),
    reference="bidispatch.ops.reference.quantize:fp8_tensor",
    inputs="bidispatch.ops.reference.quantize:fp8_tensor_inputs",
    stock="bidispatch.ops.stock:fp8_tensor",
)

OPS = (QUANTIZE, QUANTIZE_TOKEN, QUANTIZE_TENSOR, *(_quantized(name, op) for name, op in FUSED.items()))

"""`gemm.int4`: a matrix product whose weight is 4-bit integers with scales for groups of K (AWQ, GPTQ checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping

from bidispatch.ops.linear import OUT_DTYPE
from bidispatch.ops.schema import Argument, Dim, DimValue, Op

__all__ = ["K_BLOCK", "OPS", "SYMMETRIC_ZERO"]

K_BLOCK = 128
"""Elements of K that the packed layout permutes among themselves; see `bidispatch.int4`."""

SYMMETRIC_ZERO = 8
"""The zero point of every group where a problem has none."""


def _groups_do_not_fit(dims: Mapping[str, DimValue]) -> str | None:
    k, group = int(dims["k"]), int(dims["group_size"])
    if k % K_BLOCK:
        return f"k={k} is not a multiple of {K_BLOCK}, the block that the packed layout is made of"
    if k % group or (K_BLOCK % group and group % K_BLOCK):
        return (
            f"group_size={group} must divide k={k}, and divide {K_BLOCK} or be a multiple of it; "
            "checkpoints have 32, 64 or 128, and k where a column has one scale"
        )
    return None


GEMM_INT4 = Op(
    name="gemm.int4",
    summary="x @ weight.T + bias with 4-bit weights: (q - zero) * scale, rounded to the dtype, is the weight",
    dims=(
        Dim("n", int, "output features", minimum=1, typical=4096),
        Dim("k", int, "input features, the summed axis", minimum=1, typical=4096),
        Dim("group_size", int, "elements of K that share a scale, and a zero point", default=128, minimum=8),
        Dim(
            "zero_points",
            bool,
            "whether each group has a zero point, as AWQ's do; without, it is 8 (symmetric GPTQ)",
            default=False,
        ),
        Dim("bias", bool, "whether a bias is added, in fp32, before the result is rounded", default=False),
        OUT_DTYPE,
    ),
    arguments=(
        Argument("x", ("m", "k")),
        Argument("weight", ("n", "k/8"), dtype="int32"),
        Argument("scales", ("k/group_size", "n")),
        Argument("zeros", ("k/group_size", "n"), dtype="int8", when="zero_points"),
        Argument("bias", ("n",), when="bias"),
    ),
    outputs=(Argument("out", ("m", "n"), dtype="out_dtype"),),
    dtypes=("bfloat16", "float16"),
    reference="bidispatch.ops.reference.int4:gemm_int4",
    inputs="bidispatch.ops.reference.int4:gemm_int4_inputs",
    stock="bidispatch.ops.stock:gemm_int4",
    conflict=_groups_do_not_fit,
)

OPS = (GEMM_INT4,)

"""Root-mean-square norms over the last axis (arXiv 1910.07467), plain and fused with the residual add."""

from __future__ import annotations

from bidispatch.ops.schema import Argument, Dim, Op, Scalar

__all__ = ["OPS"]

_DIMS = (
    Dim("n", int, "row length, the summed axis", minimum=1, typical=4096),
    Dim("gemma", bool, "scale by 1 + weight, as Gemma does, instead of by weight", default=False),
)
_EPS = Scalar("eps", 1e-6, "added to the mean square")

RMS_NORM = Op(
    name="rms_norm",
    summary="x / sqrt(mean(x²) + eps) · weight, in fp32, rounded once",
    dims=_DIMS,
    arguments=(Argument("x", ("m", "n")), Argument("weight", ("n",))),
    scalars=(_EPS,),
    outputs=(Argument("out", ("m", "n")),),
    reference="bidispatch.ops.reference.norm:rms_norm",
    inputs="bidispatch.ops.reference.norm:rms_norm_inputs",
    stock="bidispatch.ops.stock:rms_norm",
)

FUSED_ADD_RMS_NORM = Op(
    name="fused_add_rms_norm",
    summary="residual_out = x + residual, rounded; out = rms_norm(residual_out)",
    dims=_DIMS,
    arguments=(Argument("x", ("m", "n")), Argument("residual", ("m", "n")), Argument("weight", ("n",))),
    scalars=(_EPS,),
    outputs=(Argument("out", ("m", "n")), Argument("residual_out", ("m", "n"))),
    reference="bidispatch.ops.reference.norm:fused_add_rms_norm",
    inputs="bidispatch.ops.reference.norm:fused_add_rms_norm_inputs",
    stock="bidispatch.ops.stock:fused_add_rms_norm",
)

OPS = (RMS_NORM, FUSED_ADD_RMS_NORM)

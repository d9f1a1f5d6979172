"""Root-mean-square norms (arXiv 1910.07467): over rows, fused with the residual add, and over heads of q and k."""

from __future__ import annotations

from bidispatch.ops.heads import heads_conflict
from bidispatch.ops.schema import Argument, Dim, Op, Scalar

__all__ = ["OPS"]

_GEMMA = Dim("gemma", bool, "scale by 1 + weight, as Gemma does, instead of by weight", default=False)
_DIMS = (Dim("n", int, "row length, the summed axis", minimum=1, typical=4096), _GEMMA)
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


QK_NORM = Op(
    name="qk_norm",
    summary="rms_norm of each head of q and of k, both in one launch",
    dims=(
        Dim("head_dim", int, "elements of a head, the summed axis", minimum=1, typical=128),
        Dim("num_heads", int, "heads of q", minimum=1, typical=32),
        Dim("num_kv_heads", int, "heads of k; divides num_heads", minimum=1, typical=8),
        _GEMMA,
    ),
    # Tokens and heads may be strided: q and k are slices of the row that a merged projection gives.
    arguments=(
        Argument("q", ("m", "num_heads", "head_dim")),
        Argument("k", ("m", "num_kv_heads", "head_dim")),
        Argument("q_weight", ("head_dim",)),
        Argument("k_weight", ("head_dim",)),
    ),
    scalars=(_EPS,),
    outputs=(
        Argument("q_out", ("m", "num_heads", "head_dim")),
        Argument("k_out", ("m", "num_kv_heads", "head_dim")),
    ),
    reference="bidispatch.ops.reference.norm:qk_norm",
    inputs="bidispatch.ops.reference.norm:qk_norm_inputs",
    stock="bidispatch.ops.stock:qk_norm",
    conflict=heads_conflict,
)

OPS = (RMS_NORM, FUSED_ADD_RMS_NORM, QK_NORM)

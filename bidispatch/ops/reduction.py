"""Reductions over the last axis: softmax, log_softmax, token_logprob, mean, sum."""

from __future__ import annotations

from bidispatch.ops.schema import SAME_DTYPE, WIDE_DTYPES, Argument, Dim, Op

__all__ = ["OPS"]


def _over_rows(name: str, summary: str, out_shape: tuple[str, ...]) -> Op:
    return Op(
        name=name,
        summary=summary,
        dims=(
            Dim("n", int, "row length, the summed axis", minimum=1, typical=4096),
            Dim(
                "out_dtype",
                str,
                "dtype of the result, rounded once from fp32",
                default=SAME_DTYPE,
                choices=(SAME_DTYPE, *WIDE_DTYPES),
            ),
        ),
        arguments=(Argument("x", ("m", "n")),),
        outputs=(Argument("out", out_shape, dtype="out_dtype"),),
        reference=f"bidispatch.ops.reference.reduction:{name}",
        inputs="bidispatch.ops.reference.reduction:row_inputs",
        stock=f"bidispatch.ops.stock:{name}",
    )


TOKEN_LOGPROB = Op(
    name="token_logprob",
    summary="log_softmax of each row at one token, in fp32; NaN where the row has no such token",
    dims=(Dim("n", int, "row length, the size of the vocabulary", minimum=1, typical=4096),),
    arguments=(Argument("x", ("m", "n")), Argument("token_ids", ("m",), dtype="int64")),
    outputs=(Argument("out", ("m",), dtype="float32"),),
    reference="bidispatch.ops.reference.reduction:token_logprob",
    inputs="bidispatch.ops.reference.reduction:token_logprob_inputs",
    stock="bidispatch.ops.stock:token_logprob",
)

OPS = (
    _over_rows("softmax", "exp(x - max) / sum(exp(x - max)) of each row", ("m", "n")),
    _over_rows("log_softmax", "x - max - log(sum(exp(x - max))) of each row", ("m", "n")),
    TOKEN_LOGPROB,
    _over_rows("mean", "the mean of each row", ("m",)),
    _over_rows("sum", "the sum of each row", ("m",)),
)

"""Matrix products: `gemm` (a linear layer), `bmm`, and block-scaled fp8, which is planned."""

from __future__ import annotations

from bidispatch.ops.schema import SAME_DTYPE, WIDE_DTYPES, Argument, Dim, Op

__all__ = ["OPS", "OUT_DTYPE"]

OUT_DTYPE = Dim(
    "out_dtype",
    str,
    "dtype of the result, rounded once from the fp32 accumulator",
    default=SAME_DTYPE,
    choices=(SAME_DTYPE, *WIDE_DTYPES),
)
"""A dim of the products."""

GEMM = Op(
    name="gemm",
    summary="x @ weight.T + bias, as torch.nn.functional.linear",
    dims=(
        Dim("n", int, "output features", minimum=1, typical=4096),
        Dim("k", int, "input features, the summed axis", minimum=1, typical=4096),
        Dim("bias", bool, "whether a bias is added, in fp32, before the result is rounded", default=False),
        OUT_DTYPE,
        Dim(
            "role",
            str,
            "linear: a host may merge or shard the weight by rows, so nothing that fixes bits may follow n; "
            "router: nobody does",
            default="linear",
            choices=("linear", "router"),
        ),
    ),
    arguments=(
        Argument("x", ("m", "k")),
        Argument("weight", ("n", "k")),
        Argument("bias", ("n",), when="bias"),
    ),
    outputs=(Argument("out", ("m", "n"), dtype="out_dtype"),),
    reference="bidispatch.ops.reference.linear:gemm",
    inputs="bidispatch.ops.reference.linear:gemm_inputs",
    stock="bidispatch.ops.stock:gemm",
)

BMM = Op(
    name="bmm",
    summary="a @ b for each matrix of a batch, as torch.bmm; rows of one matrix are the tokens",
    dims=(
        Dim("n", int, "columns of b", minimum=1, typical=128),
        Dim("k", int, "the summed axis", minimum=1, typical=512),
        OUT_DTYPE,
    ),
    arguments=(Argument("a", ("matrices", "m", "k")), Argument("b", ("matrices", "k", "n"), any_strides=True)),
    outputs=(Argument("out", ("matrices", "m", "n"), dtype="out_dtype"),),
    reference="bidispatch.ops.reference.linear:bmm",
    inputs="bidispatch.ops.reference.linear:bmm_inputs",
    stock="bidispatch.ops.stock:bmm",
    row_axis=1,
)

GEMM_FP8_BLOCK = Op(
    name="gemm.fp8_block",
    summary="fp8 product with 1x128 activation and 128x128 weight scales",
    dims=(
        Dim("n", int, "output features", minimum=1, typical=4096),
        Dim("k", int, "input features, the summed axis", minimum=1, typical=4096),
    ),
    dtypes=("float8_e4m3fn",),
)

OPS = (GEMM, BMM, GEMM_FP8_BLOCK)

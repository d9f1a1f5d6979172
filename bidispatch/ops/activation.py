"""Gated activations: the first half of a row goes through the function and multiplies the second half."""

from __future__ import annotations

from bidispatch.ops.schema import Argument, Dim, Op

__all__ = ["OPS"]


def _gated(name: str, summary: str) -> Op:
    return Op(
        name=name,
        summary=summary,
        dims=(Dim("n", int, "width of the result; a row of x is twice that", minimum=1, typical=12288),),
        arguments=(Argument("x", ("m", "2*n")),),
        outputs=(Argument("out", ("m", "n")),),
        reference=f"bidispatch.ops.reference.activation:{name}",
        inputs="bidispatch.ops.reference.activation:gated_inputs",
        stock=f"bidispatch.ops.stock:{name}",
    )


OPS = (
    _gated("silu_and_mul", "silu(x[:, :n]) · x[:, n:]"),
    _gated("gelu_tanh_and_mul", "gelu(x[:, :n]), tanh form, · x[:, n:]"),
)

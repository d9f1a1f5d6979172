"""How far a kernel is from the fp64 reference, so that none passes by being invariant and wrong. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import Limits
from bidispatch.verify.report import Accuracy
from bidispatch.verify.subject import Arguments, Canvas, Subject, limits_for

__all__ = ["LIMITS", "MOST_OF_STOCK", "allowed", "measure_accuracy"]

LIMITS = {torch.float32: 5e-5, torch.float16: 8e-4, torch.bfloat16: 5e-3, torch.float8_e4m3fn: 4e-2, torch.int32: 5e-3}
"""The largest ‖out − ref‖ / ‖ref‖ that is rounding, by the dtype of the output. Of integers, the share that differ:
scores that differ in fp64 may tie in fp32.

fp8, fp16 and bf16 round once at the end (2.6e-2, 2e-4 and 2e-3), attention also its weights. fp32 leaves no room for
operands rounded to TF32 (about 3e-4).
"""

MOST_OF_STOCK = {torch.float32: 4.0, torch.float16: 1.05, torch.bfloat16: 1.05}
"""How much further off than stock a product may be, by the dtype of the output: 16 bits are rounding, whatever the
order; in fp32 stock may split a long sum, which is nearer."""

_HELD_TO_STOCK = ("gemm", "gemm.int4", "bmm", "moe.experts")
_FEW = 4096

# A Hopper matrix unit truncates the sum at each step of 16: with K=12288 and nothing but positive terms an H200 is
# 5.5e-5 off, whichever kernel runs. A limit of one unit in the last place a step is twice that.
_MATRIX_STEP, _LAST_PLACE = 16, 2.0**-23

# While an fp8 instruction adds, Hopper keeps about 14 bits of the sum (arXiv 2412.19437, 3.3.2) and cuts off the rest
# of each of its 32 products: half a unit of the last place for each. Kernels take the sum out every 128 of K.
_FP8 = 16 * 2.0**-13

# fp32 scores of scaled q and k reach 2^24: their last place is then wider than the softmax.
_OVER_SEQUENCES = ("normal", "positive")
_ALL = ("normal", "positive", "scaled")


def measure_accuracy(
    subject: Subject,
    rebind: Callable[[Limits], Subject],
    rows: int,
    stock: Subject | None = None,
    own_rounding: float = 0.0,
) -> Iterator[Accuracy]:
    """‖out − ref‖ / ‖ref‖ of each output for each distribution, in calls of so many rows; stock's beside it.

    `rebind` gives the kernel under test, bound for the calls that the op's generator makes. own_rounding: that of its
    class (`Implementation.own_rounding`).
    """
    reference: Callable[..., tuple[torch.Tensor, ...]] = load_attribute(subject.op.reference)
    calls = {
        distribution: subject.inputs(rows, distribution=distribution, seed=3)
        for distribution in _distributions(subject.problem, over_sequences=bool(subject.op.sequences))
    }
    bound = rebind(limits_for(subject.problem, calls.values()))
    for distribution, arguments in calls.items():
        references = reference(subject.problem, *arguments, *subject.scalars)
        outputs = _outputs(bound, arguments)
        plain = _outputs(stock, arguments) if stock is not None else [None] * len(outputs)
        for name, out, other, wanted in zip(subject.output_names, outputs, plain, references, strict=True):
            yield Accuracy(
                name,
                distribution,
                _error(out, wanted),
                allowed(subject.problem, out.dtype, own_rounding),
                stock=None if other is None else _error(other, wanted),
                most_of_stock=_most_of_stock(subject.problem, distribution, out),
            )


def _distributions(problem: Problem, *, over_sequences: bool) -> tuple[str, ...]:
    if over_sequences:
        return _OVER_SEQUENCES
    # What lies between two products is beyond fp16 in the others.
    return _ALL[:1] if "intermediate" in problem.dims and problem.dtype == "float16" else _ALL


def _outputs(subject: Subject, arguments: Arguments) -> list[torch.Tensor]:
    canvas = Canvas(subject, arguments, salt=0)
    subject.call(arguments, canvas.outputs)
    return list(canvas.outputs)


def _most_of_stock(problem: Problem, distribution: str, out: torch.Tensor) -> float | None:
    """Products are held to stock's error on data such as models have. Few elements say little about either.

    The other distributions are made to find differences: one sum in the order of K is further off there than a split
    one, as it must be.
    """
    if problem.op not in _HELD_TO_STOCK or distribution != "normal" or out.numel() < _FEW:
        return None
    if problem.dims.get("weight_dtype") == "float8_e4m3fn":  # stock multiplies in fp32; fp8 instructions keep 14 bits
        return None
    return MOST_OF_STOCK[out.dtype]


def allowed(problem: Problem, dtype: torch.dtype, own_rounding: float = 0.0) -> float:
    """The largest error of an output of this dtype that passes. What a class rounds of its own is independent of what
    the op's definition and the arithmetic round: squares add.
    """
    return math.hypot(_limit(problem, dtype), own_rounding)


def _limit(problem: Problem, dtype: torch.dtype) -> float:
    if "intermediate" in problem.dims:  # what lies between two products is rounded to the problem's dtype
        limit = max(LIMITS[dtype], LIMITS[getattr(torch, problem.dtype)])
        if problem["weight_dtype"] == "float8_e4m3fn":
            # Where the activation rounds to the next fp8 value, 2^-4 away at most: one in a hundred or fewer.
            limit += _FP8 + 5e-3
        return limit
    if problem.dtype == "float8_e4m3fn":
        return LIMITS[dtype] + _FP8
    if dtype is torch.float32 and "scale_format" in problem.dims:
        # A scale is that of values rounded to the problem's dtype, the nearest of which may be another in fp64.
        return LIMITS[getattr(torch, problem.dtype)]
    if dtype is not torch.float32 or problem.dtype == "float32" or "k" not in problem.dims:
        return LIMITS[dtype]
    return max(LIMITS[dtype], problem.size("k") / _MATRIX_STEP * _LAST_PLACE)


def _error(out: torch.Tensor, reference: torch.Tensor) -> float:
    if not out.is_floating_point():
        return float((out != reference).double().mean())
    error = float((out.double() - reference).norm() / reference.norm())
    return error if math.isfinite(error) else math.inf

"""How far a kernel is from the fp64 reference, so that none passes by being invariant and wrong. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import Limits
from bidispatch.verify.report import Accuracy
from bidispatch.verify.subject import Canvas, Subject, limits_for

__all__ = ["LIMITS", "measure_accuracy"]

LIMITS = {torch.float32: 5e-5, torch.float16: 8e-4, torch.bfloat16: 5e-3}
"""The largest ‖out − ref‖ / ‖ref‖ that is rounding, by the dtype of the output.

fp16 and bf16 round once at the end (2e-4 and 2e-3), attention also its weights. fp32 leaves no room for operands
rounded to TF32 (about 3e-4).
"""

# A Hopper matrix unit truncates the sum at each step of 16: with K=12288 and nothing but positive terms an H200 is
# 5.5e-5 off, whichever kernel runs. A limit of one unit in the last place a step is twice that.
_MATRIX_STEP, _LAST_PLACE = 16, 2.0**-23

# fp32 scores of scaled q and k reach 2^24: their last place is then wider than the softmax.
_DISTRIBUTIONS = {"attention": ("normal", "positive")}
_ALL = ("normal", "positive", "scaled")


def measure_accuracy(subject: Subject, rebind: Callable[[Limits], Subject], rows: int) -> Iterator[Accuracy]:
    """‖out − ref‖ / ‖ref‖ of each output for each distribution, in calls of so many rows.

    `rebind` gives the kernel under test, bound for the calls that the op's generator makes.
    """
    reference: Callable[..., tuple[torch.Tensor, ...]] = load_attribute(subject.op.reference)
    calls = {
        distribution: subject.inputs(rows, distribution=distribution, seed=3)
        for distribution in _DISTRIBUTIONS.get(subject.op.name, _ALL)
    }
    bound = rebind(limits_for(subject.problem, calls.values()))
    for distribution, arguments in calls.items():
        canvas = Canvas(bound, arguments, salt=0)
        bound.call(arguments, canvas.outputs)
        references = reference(subject.problem, *arguments, *subject.scalars)
        for name, out, wanted in zip(subject.output_names, canvas.outputs, references, strict=True):
            yield Accuracy(name, distribution, _error(out, wanted), _limit(subject.problem, out.dtype))


def _limit(problem: Problem, dtype: torch.dtype) -> float:
    if dtype is not torch.float32 or problem.dtype == "float32" or "k" not in problem.dims:
        return LIMITS[dtype]
    return max(LIMITS[dtype], problem.size("k") / _MATRIX_STEP * _LAST_PLACE)


def _error(out: torch.Tensor, reference: torch.Tensor) -> float:
    error = float((out.double() - reference).norm() / reference.norm())
    return error if math.isfinite(error) else math.inf

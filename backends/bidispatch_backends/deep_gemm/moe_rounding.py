"""How far the roundings that the grouped products' class has of its own move a result. Imports no torch, no library."""

from __future__ import annotations

import math

from bidispatch.ops.quantize import FP8
from bidispatch.ops.schema import Problem

__all__ = ["grouped_rounding"]

# bf16 has 8 significant bits: a value of mantissa m, 1 to 2, moves by up to 2^-8 / m of itself, by half of that on the
# mean. Mantissas are taken to be spread evenly in the logarithm: the mean of 1/m is then 1/(2 ln 2), of m 1/ln 2, and
# that of m², by which the norm of a result weighs, 1.5/ln 2.
_HALF_PLACE = 2.0**-8
_MEAN = _HALF_PLACE / 2 * (1 / (2 * math.log(2)))
_MEAN_SQUARE = _HALF_PLACE**2 / 3 * (0.375 / math.log(2))

# silu(gate) · up moves by (1 + gate · (1 - sigmoid(gate))) times what gate does, relatively; that is 1.28 at most for
# gates above 0, 1.30 of gelu. Below 0 it is more, of values near none.
_OF_GATE = 1.3

# A step of e4m3 is 2^-3 / m of a value: weighed as above, two thirds of 2^-3.
_STEP = 2.0**-3 * (2 / 3)


def grouped_rounding(problem: Problem) -> float:
    """‖difference‖ / ‖result‖ that is to be expected of gate, up and parts rounded to bf16, at most.

    Gate and up are independent, so their squares add. Of fp8 weights the activation is rounded to the next fp8 value
    after them: one that has moved by d lands on another with the probability d / step, and then a whole step away, so
    the mean square is d · step. d is what gate and up move it by, and as much again for the scale of its group, which
    follows the group's largest. A part rounded is a result rounded: sums of independent parts keep the ratio.
    """
    if problem["weight_dtype"] == FP8:
        activation = 2 * (_OF_GATE + 1) * _MEAN * _STEP
    else:
        activation = (_OF_GATE**2 + 1) * _MEAN_SQUARE
    return math.sqrt(activation + _MEAN_SQUARE)

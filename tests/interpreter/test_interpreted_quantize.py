"""`quantize.fp8_token` and `quantize.fp8_tensor`: the bits of their definition, and of a row alone."""

from __future__ import annotations

import math

import pytest
import torch
from interpreted import DTYPES, bind, draw_inputs, poisoned_outputs, rows_that_differ, run, same_bits

from bidispatch import ops
from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute
from bidispatch_backends.triton.params import ElementTile

FP8 = torch.float8_e4m3fn
OPS = ("quantize.fp8_token", "quantize.fp8_tensor")
TILES = (ElementTile(block=512, num_warps=2), ElementTile(block=2048, num_warps=4), ElementTile(block=64, num_warps=1))


def problem_of(op: str, k: int, dtype: str = "float32") -> Problem:
    return ops.get(op).problem(dtype, {"k": k})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 40, 512, 1003, 4100])
def test_bits_are_those_of_the_definition_in_every_tile(op: str, dtype: str, k: int) -> None:
    problem = problem_of(op, k, dtype)
    for distribution in ("normal", "scaled"):
        arguments = draw_inputs(problem, 3, distribution=distribution)
        arguments[0][1] = 0
        wanted = load_attribute(ops.get(op).stock)(problem, *arguments)
        for tile in TILES:
            for one, other in zip(run(problem, arguments, bind(problem, tile=tile)), wanted, strict=True):
                assert same_bits(one, other), (distribution, tile)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_beside_anything(op: str, dtype: str) -> None:
    problem = problem_of(op, 700, dtype)
    kernel = bind(problem)
    assert rows_that_differ(problem, lambda arguments: run(problem, arguments, kernel)) == 0


def test_a_scale_of_all_rows_is_caught() -> None:
    """Negative control: dynamic scales of a whole tensor follow the neighbours."""
    problem = problem_of("quantize.fp8_token", 256)

    def run_rows(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
        x = arguments[0].nan_to_num(0, 0, 0)
        scale = x.abs().amax() / 448
        return [(x / scale).to(FP8), scale.expand(len(x)).clone()]

    assert rows_that_differ(problem, run_rows) > 0


def test_rows_that_are_not_finite_and_values_beyond_the_scale() -> None:
    x = torch.ones(4, 300)
    x[0, 3], x[1, 3], x[2] = math.nan, math.inf, math.nan
    q, scales = run(problem_of("quantize.fp8_token", 300), [x])
    assert q.float().isnan().sum(1).tolist() == [1, 1, 300, 0]
    least = float(torch.tensor(1 / (448 * 512)))
    assert scales.tolist() == [scales[3].item(), math.inf, least, float(torch.tensor(1.0) / 448)]
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1e6, -1e6, 1.0]])
    (q,) = run(problem_of("quantize.fp8_tensor", 6), [x, torch.tensor([0.5])])
    assert q[0, 0].float().isnan()
    assert q[0, 1:].float().tolist() == [448.0, -448.0, 448.0, -448.0, 2.0]


@pytest.mark.parametrize("op", OPS)
def test_strided_rows_give_the_same_bits_and_nothing_around_them_is_written(op: str) -> None:
    problem = problem_of(op, 300)
    arguments = draw_inputs(problem, 5)
    wide = torch.full((5, 309), math.nan)
    wide[:, 4:-5] = arguments[0]
    plain = run(problem, arguments)
    outputs = poisoned_outputs(problem, arguments)
    room = torch.zeros(5, 320, dtype=FP8)
    outputs[0] = room[:, 7:307]
    bind(problem)(wide[:, 4:-5], *arguments[1:], *outputs)
    assert all(same_bits(one, other) for one, other in zip(plain, outputs, strict=True))
    assert (room[:, :7].float() == 0).all()
    assert (room[:, 307:].float() == 0).all()

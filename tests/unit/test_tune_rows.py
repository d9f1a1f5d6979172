"""`tune` of ops that have no weight and several outputs: the router and what quantises rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bidispatch import ops
from bidispatch.bench.operands import operands_of
from bidispatch.device import ARCHS, Device
from bidispatch.errors import UsageError
from bidispatch.ops import quantize
from bidispatch.ops.schema import Problem
from bidispatch.planning.plan import Plan, plan
from bidispatch.registry import Implementation, Params, default_registry
from bidispatch.runtime.bind import load_attribute
from bidispatch.tune.ladder import Choice
from bidispatch.tune.models import router_shape, row_shapes
from bidispatch.tune.proof import Prover
from bidispatch.tune.search import contenders

CPU = Device(ARCHS["cpu"], "Some CPU")
MODELS = Path(__file__).resolve().parents[2] / "benchmarks" / "models"
PROBLEMS = {
    "moe.router": {"experts": 20, "top_k": 3},
    **{op.name: {"k" if "k" in op.dim_names else "n": 256} for op in quantize.OPS},
}


def problem_of(op: str) -> Problem:
    return ops.get(op).problem(ops.get(op).dtypes[0], PROBLEMS[op])


def sound_of(problem: Problem) -> tuple[Implementation, Params]:
    (found,) = default_registry().find("cpu", problem.op, problem.dtype)
    return found, found.params()


def bind_tampered(context):
    """The sound kernel, but for one bit of the last output in the last row of calls of more than 4 rows."""
    sound = load_attribute(sound_of(context.problem)[0].load)(context)

    def kernel(*arguments):
        sound(*arguments)
        if len(arguments[0]) > 4:
            last = arguments[-1][-1:].view(torch.int8)
            last.flatten()[-1] ^= 1

    return kernel


def winner(problem: Problem, load: str = "") -> Choice:
    """The processor's kernel under another name, or another of its params."""
    sound, params = sound_of(problem)
    return Choice(replace(sound, name="a.winner", load=load or sound.load), params, None)


@pytest.mark.parametrize("op", PROBLEMS)
def test_a_winner_is_compared_in_every_output(op: str) -> None:
    problem = problem_of(op)
    prover = Prover(CPU, problem, [sound_of(problem)], 20)
    check = prover.check(winner(problem), 9, 20)
    assert (check.passed, check.rows > 80) == (True, True)
    assert prover.comparisons == check.rows


@pytest.mark.parametrize("op", PROBLEMS)
def test_control_a_bit_of_the_last_output_is_found(op: str) -> None:
    problem = problem_of(op)
    check = Prover(CPU, problem, [sound_of(problem)], 20).check(winner(problem, f"{__name__}:bind_tampered"), 9, 20)
    assert not check.passed
    assert check.differing > 0


def gpu_plan() -> Plan:
    return plan(Device(ARCHS["sm90"], "NVIDIA H200"))


@pytest.mark.parametrize("op", PROBLEMS)
@pytest.mark.parametrize("m", [1, 8, 4096])
def test_every_op_has_launch_shapes_to_try_its_own_among_them(op: str, m: int) -> None:
    problem, chosen = problem_of(op), gpu_plan()
    rivals = contenders(chosen, problem)
    assert rivals.tried
    for implementation, params in rivals.tried:
        tiles = list(load_attribute(implementation.search)(chosen.device, problem, params, m))
        assert len(tiles) == len(set(map(str, tiles)))
        assert len(tiles) >= (1 if m == 1 else 3)
        assert all(implementation.tile.model_validate(tile.model_dump()) == tile for tile in tiles)


@pytest.mark.parametrize("op", PROBLEMS)
def test_calls_to_time_fit_the_op(op: str) -> None:
    made = operands_of(problem_of(op), torch.device("cpu"))
    assert [len(call) for call in made.calls(3)] == [len(ops.get(op).arguments)]
    assert made.estimate_us(4096) > made.estimate_us(1) > 0


@pytest.mark.parametrize(
    ("model", "op", "sizes"),
    [
        ("qwen3-8b", "quantize.fp8_group", {4096, 12288}),
        ("qwen3-8b", "rms_norm.fp8_group", {4096}),
        ("qwen3-8b", "silu_and_mul.fp8_group", {12288}),
        ("deepseek-v3-cut", "quantize.fp8_token", {256, 512, 1536, 2048, 2304, 7168}),
        ("deepseek-v3-cut", "fused_add_rms_norm.fp8_group", {7168}),
        ("deepseek-v3-cut", "silu_and_mul.fp8_group", {256, 2304}),
    ],
)
def test_the_rows_of_a_model(model: str, op: str, sizes: set[int]) -> None:
    shapes = row_shapes(op, MODELS / f"{model}.json", 8 if "v3" in model else 1)
    assert {value for shape in shapes for value in shape.dims.values()} == sizes
    for shape in shapes:
        ops.get(op).problem("bfloat16", shape.dims)


def test_the_router_of_a_model() -> None:
    dims = router_shape(MODELS / "deepseek-v3-cut.json").dims
    assert dims == {
        "experts": 256, "top_k": 8, "scoring": "sigmoid", "renormalize": True, "correction_bias": True,
        "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    }  # fmt: skip
    ops.get("moe.router").problem("float32", dims)
    with pytest.raises(UsageError, match="has no experts"):
        router_shape(MODELS / "qwen3-8b.json")


def test_a_model_without_such_rows_is_refused(tmp_path: Path) -> None:
    config = json.loads((MODELS / "qwen3-30b-a3b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"no layer of .* reads what silu_and_mul.fp8_group gives"):
        row_shapes("silu_and_mul.fp8_group", tmp_path)

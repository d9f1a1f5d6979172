"""`tune` without a GPU: fake implementations, a fake timer, and the real proof, file and command line."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_configs import QWEN3_8B

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.errors import SelectionError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.shapes import Shape
from bidispatch.planning.plan import Plan
from bidispatch.profiles.load import ProfileStore
from bidispatch.profiles.tiles import read_tuned, write_tuned
from bidispatch.records import RecordStore
from bidispatch.registry import Implementation, Params, Registry, Tile
from bidispatch.tune import runner
from bidispatch.tune import search as searching
from bidispatch.tune.ladder import Choice, Step, merged, winner
from bidispatch.tune.models import model_shapes
from bidispatch.tune.runner import tune
from bidispatch.tune.search import contenders

CPU = Device(ARCHS["cpu"], "Some CPU")
ROWS = (1, 8, 64)


class Size(Tile):
    block: int = 1


def bind_sound(context):
    """Products in fp64, each row alone: free of M."""

    def kernel(x, weight, bias, out):
        for row in range(len(x)):
            total = (x[row] * weight).double().sum(-1)
            out[row] = (total if bias is None else total + bias.double()).to(out.dtype)

    return kernel


def bind_tampered(context):
    """The same, but for one bit in the last row of calls of more than 4 rows."""
    sound = bind_sound(context)

    def kernel(x, weight, bias, out):
        sound(x, weight, bias, out)
        if len(x) > 4:
            out[-1, 0] = torch.nextafter(out[-1, 0], torch.tensor(float("inf")))

    return kernel


def sizes(device, problem, params, m):
    return [Size(block=block) for block in (1, 2, 4)]


def fake(name, load="bind_sound", label="c", **fields):
    return Implementation(
        name=name,
        op="gemm",
        load=f"{__name__}:{load}",
        archs=("cpu",),
        dtypes=("float32",),
        numerics=lambda params, problem: label,
        params=Params,
        tile=Size,
        tiles=lambda device, problem, params: ((None, Size()),),
        search=f"{__name__}:sizes",
        **fields,
    )


@pytest.fixture
def plan(tmp_path):
    """A plan whose profile lists some fakes."""

    def make(*implementations, numerics=None):
        registry = Registry()
        for implementation in implementations:
            registry.register(implementation)
        listed = ", ".join(f"{{impl: {i.name}}}" for i in implementations)
        dtypes = ", ".join(implementations[0].dtypes)
        rule = f"    - dtypes: [{dtypes}]\n      {f'numerics: {numerics}' if numerics else 'when: {}'}\n"
        (tmp_path / "cpu.yaml").write_text(
            f"schema_version: 1\nname: cpu\nops:\n  gemm:\n{rule}      candidates: [{listed}]\n"
        )
        profile = ProfileStore(registry, builtin=tmp_path, user=tmp_path / "none").for_device(CPU)
        return Plan(CPU, profile, registry, RecordStore(CPU, tmp_path), Invariance.BATCH)

    return make


def problem(n=5, k=16):
    return ops.get("gemm").problem("float32", {"n": n, "k": k})


def search(plan, problem, rows, timer, only=()):
    """The search for what a plan gives a problem."""
    return searching.search(plan.device, problem, contenders(plan, problem, only), rows, timer)


def timer_of(rule):
    """A timer that knows each kernel's time: `rule(name, block, m)`."""

    def timer(problem, m, kernels, brief):
        found = {}
        for key in kernels:
            name, _, tile = json.loads(key)
            found[key] = rule(name, tile["block"], m)
        return found

    return timer


def test_each_m_gets_its_fastest_and_neighbours_become_one_rung(plan):
    timer = timer_of(lambda name, block, m: 10.0 + abs(block - {1: 1, 8: 4, 64: 4}[m]) + (name == "b.gemm"))
    found = search(plan(fake("a.gemm"), fake("b.gemm")), problem(), ROWS, timer)
    rungs = merged(found.steps)
    assert [(rung.impl, rung.max_m, rung.tile) for rung in rungs] == [
        ("a.gemm", 1, {}),
        ("a.gemm", None, {"block": 4}),
    ]
    assert (found.numerics, found.tried, found.refused) == ("c", 6, ())
    assert found.comparisons > 0


def test_what_was_slow_for_few_rows_is_tried_again_for_more_but_not_for_each(plan):
    """Never again would miss the fastest of many rows; at every M would take as long as the others together."""
    rows, looks = tuple(2**i for i in range(10)), []

    def us(name, block, m):
        return {1: 1.0, 2: 9.0 if m < 32 else 0.5, 4: 9.0}[block]

    def timer(problem, m, kernels, brief):
        found = timer_of(us)(problem, m, kernels, brief)
        looks.extend((m, json.loads(key)[2]["block"]) for key in kernels if brief)
        return found

    rungs = merged(search(plan(fake("a.gemm")), problem(n=1, k=1), rows, timer).steps)
    assert [(rung.max_m, rung.tile) for rung in rungs] == [(32, {}), (None, {"block": 2})]
    assert [rows.index(m) for m, block in looks if block == 4] == [0, 3, 6, 9]
    assert [rows.index(m) for m, block in looks if block == 2] == [0, 3, *range(6, 10)]


def test_a_fast_kernel_that_gives_other_bits_is_refused_and_the_next_one_serves(plan):
    """Negative control: without the proof it would win everywhere. Calls of up to 4 rows it gets right, and loses."""
    timer = timer_of(lambda name, block, m: 1.0 if name == "b.gemm" else 2.0 + block)
    found = search(plan(fake("a.gemm"), fake("b.gemm", "bind_tampered")), problem(), ROWS, timer)
    assert [step.choice.implementation.name for step in found.steps] == ["a.gemm", "a.gemm", "a.gemm"]
    assert len(found.refused) == 3
    assert all("rows differ" in text for text in found.refused)


def test_another_class_and_what_does_not_fit_take_no_part(plan):
    made = plan(fake("a.gemm", label="d"), fake("b.gemm"), fake("c.gemm"), numerics="c")
    rivals = contenders(made, problem())
    assert (rivals.numerics, rivals.names) == ("c", ("b.gemm", "c.gemm"))
    rivals = contenders(made, problem(), ["c.gemm"])
    assert (rivals.names, [i.name for i, _ in rivals.everyone]) == (("c.gemm",), ["b.gemm", "c.gemm"])
    with pytest.raises(SelectionError, match="nothing that can be tuned"):
        contenders(made, problem(), ["a.gemm"])


def test_who_may_serve_is_asked_once_for_a_shape(plan, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "contenders", lambda *words: asked.append(words) or contenders(*words))
    monkeypatch.setattr(searching, "contenders", runner.contenders)
    timer = timer_of(lambda name, block, m: float(block))
    tune(plan(fake("a.gemm")), [problem()], tmp_path / "gemm.json", timer, rows=ROWS)
    assert len(asked) == 1


def test_what_nothing_runs_is_an_error(plan):
    with pytest.raises(SelectionError, match="nothing in class c runs 1 rows"):
        search(plan(fake("a.gemm")), problem(), ROWS, lambda *arguments: {})


def test_a_rerun_keeps_what_is_there_and_again_does_not(plan, tmp_path):
    made, path = plan(fake("a.gemm")), tmp_path / "tiles" / "gemm.json"
    timer = timer_of(lambda name, block, m: float(block))
    problems = [problem(), problem(n=7)]
    first = tune(made, problems[:1], path, timer, rows=ROWS)
    second = tune(made, problems, path, timer, rows=ROWS)
    assert (first.passed, [outcome.kept for outcome in second.outcomes]) == (True, [True, False])
    assert [entry.dims["n"] for entry in read_tuned(path).entries] == [5, 7]
    third = tune(made, problems, path, timer, rows=ROWS, again=True)
    assert [outcome.kept for outcome in third.outcomes] == [False, False]
    assert len(read_tuned(path).entries) == 2


def test_a_ladder_is_kept_only_for_what_it_was_searched_for(plan, tmp_path):
    """What was found among less is found again, and nothing that was searched before is left out of it."""
    made, path = plan(fake("a.gemm"), fake("b.gemm")), tmp_path / "gemm.json"
    timer = timer_of(lambda name, block, m: float(block) + (name == "b.gemm"))

    def run(rows, only=(), **options):
        (outcome,) = tune(made, [problem()], path, timer, rows=rows, only=only, **options).outcomes
        return outcome.kept, outcome.entry.searched.rows, outcome.entry.searched.implementations

    assert run((8, 1), ["a.gemm"]) == (False, (1, 8), ("a.gemm",))
    assert run((8,), ["a.gemm"]) == (True, (1, 8), ("a.gemm",))
    assert run((64,), ["a.gemm"]) == (False, (1, 8, 64), ("a.gemm",))
    assert run((8,), ["b.gemm"]) == (False, (1, 8, 64), ("a.gemm", "b.gemm"))
    assert run(ROWS) == (True, ROWS, ("a.gemm", "b.gemm"))
    assert run((1,), ["b.gemm"], again=True) == (False, (1,), ("b.gemm",))
    assert run(ROWS) == (False, ROWS, ("a.gemm", "b.gemm"))


def test_a_ladder_of_before_that_was_noted_is_found_again(plan, tmp_path):
    made, path = plan(fake("a.gemm")), tmp_path / "gemm.json"
    timer = timer_of(lambda name, block, m: float(block))
    tune(made, [problem()], path, timer, rows=ROWS)
    file = read_tuned(path)
    write_tuned(path, file.model_copy(update={"entries": [file.entries[0].model_copy(update={"searched": None})]}))
    assert [outcome.kept for outcome in tune(made, [problem()], path, timer, rows=ROWS).outcomes] == [False]


def test_a_half_precision_runs_like_the_other_only_where_that_was_searched_as_far(plan, tmp_path):
    made, path, seen = plan(halves()), tmp_path / "gemm.json", []

    def timer(problem, m, kernels, brief):
        seen.append((problem.dtype, m, len(kernels)))
        return dict.fromkeys(kernels, 1.0)

    bf16, fp16 = (ops.get("gemm").problem(dtype, {"n": 5, "k": 16}) for dtype in ("bfloat16", "float16"))
    tune(made, [bf16, fp16], path, timer, rows=(1,))
    tune(made, [fp16], path, timer, rows=(1, 8))
    tiles = {(dtype, m): count for dtype, m, count in seen}
    assert tiles == {("bfloat16", 1): 3, ("float16", 1): 3, ("float16", 8): 3}
    first = next(count for dtype, m, count in seen if (dtype, m) == ("float16", 1))
    assert first == 1


def halves():
    """A fake that takes the 16-bit dtypes."""
    return replace(fake("a.gemm"), dtypes=("bfloat16", "float16"))


def test_an_interrupt_leaves_what_was_found(plan, tmp_path):
    made, path = plan(fake("a.gemm")), tmp_path / "gemm.json"
    sound = timer_of(lambda name, block, m: float(block))

    def timer(problem, m, kernels, brief):
        if problem.size("n") == 7:
            raise KeyboardInterrupt
        return sound(problem, m, kernels, brief)

    report = tune(made, [problem(), problem(n=7), problem(n=9)], path, timer, rows=ROWS)
    assert (report.interrupted, [p.size("n") for p in report.left]) == (True, [7, 9])
    assert [entry.dims["n"] for entry in read_tuned(path).entries] == [5]


def test_a_budget_begins_nothing_after_its_end(plan, tmp_path):
    timer = timer_of(lambda name, block, m: float(block))
    report = tune(plan(fake("a.gemm")), [problem()], tmp_path / "x.json", timer, rows=ROWS, budget=-1.0)
    assert (report.outcomes, len(report.left), report.interrupted) == ((), 1, False)


IMPLEMENTATION = fake("a.gemm")


@given(
    st.lists(st.tuples(st.integers(1, 4000), st.sampled_from((1, 2, 4))), unique_by=lambda step: step[0], min_size=1)
)
def test_rungs_rise_end_open_and_serve_each_m_with_its_winner(found):
    steps = [Step(m, Choice(IMPLEMENTATION, Params(), Size(block=block)), 1.0) for m, block in sorted(found)]
    rungs = merged(steps)
    bounds = [rung.max_m for rung in rungs]
    assert bounds[-1] is None
    assert bounds[:-1] == sorted(set(bounds[:-1]))
    for step in steps:
        rung = next(rung for rung in rungs if rung.max_m is None or step.m <= rung.max_m)
        assert Size(**rung.tile) == step.choice.tile
    assert all(one.tile != other.tile for one, other in pairwise(rungs))


def test_even_times_go_to_what_served_before_then_to_the_first_listed():
    times = {"a": 10.1, "b": 10.0, "c": 12.0}
    assert winner(times, ["a", "b", "c"], None) == "a"
    assert winner(times, ["a", "b", "c"], "b") == "b"
    assert winner(times, ["a", "b", "c"], "c") == "a"
    assert winner({"a": 11.0, "b": 10.0}, ["a", "b"], "a") == "b"


LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
}
MODELS = (
    (QWEN3_8B, 1, [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)]),
    (LLAMA_70B, 8, [(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584), (16032, 8192)]),
    (
        DEEPSEEK_V3,
        1,
        [
            (2112, 7168),
            (24576, 1536),
            (32768, 512),
            (7168, 16384),
            (256, 7168),
            (4096, 7168),
            (7168, 2048),
            (36864, 7168),
            (7168, 18432),
            (129280, 7168),
        ],
    ),
)


@pytest.mark.parametrize(("config", "ranks", "wanted"), MODELS, ids=lambda value: str(value)[:24])
def test_a_models_shapes_are_those_an_engine_runs(config, ranks, wanted, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = {(shape.dims["n"], shape.dims["k"]) for shape in model_shapes(tmp_path, ranks)}
    assert found == set(wanted)
    routers = [shape for shape in model_shapes(tmp_path, ranks) if shape.dims.get("role") == "router"]
    assert [shape.dims["out_dtype"] for shape in routers] == ["float32"] * ("n_routed_experts" in config)


@pytest.mark.parametrize(
    ("changes", "ranks", "says"),
    [
        ({"hidden_size": None}, 1, "hidden_size is missing"),
        ({"vocab_size": "many"}, 1, "vocab_size is 'many'"),
        ({}, 3, "not divided by a tensor-parallel size of 3"),
        ({}, 0, "at least 1"),
    ],
)
def test_a_config_that_cannot_be_read_says_what_is_missing(changes, ranks, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**QWEN3_8B, **changes}))
    with pytest.raises(UsageError, match=says):
        model_shapes(path, ranks)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("rms_norm", "--model", "x"), 2, "tune takes gemm"),
        (("gemm",), 2, "--shapes FILE"),
        (("gemm", "--shapes", "a", "--model", "b"), 2, "not both"),
        (("gemm", "--model", "nowhere"), 2, "not a readable config.json"),
        (("gemm", "--model", "CONFIG", "--m", "1,x"), 2, "--m '1,x'"),
        (("gemm", "--model", "CONFIG", "--budget", "soon"), 2, "--budget 'soon'"),
        (("gemm", "--model", "CONFIG", "--device", "cpu"), 3, "needs a GPU"),
    ],
)
def test_the_command_says_what_is_wrong(cli, tmp_path, words, code, says):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_8B))
    found, _, err = cli("tune", *(str(path) if word == "CONFIG" else word for word in words))
    assert (found, says in err) == (code, True), err


def test_the_lines_to_paste_make_a_profile_that_uses_the_file(plan, tmp_path):
    from bidispatch.cli.tune import paste

    made, path = plan(fake("a.gemm"), fake("b.gemm")), tmp_path / "gemm.json"
    timer = timer_of(lambda name, block, m: float(block) if name == "b.gemm" else 9.0)
    report = tune(made, [problem()], path, timer, rows=ROWS)
    mine = tmp_path / "mine.yaml"
    mine.write_text("\n".join(["schema_version: 1", "extends: cpu", "match: {arch: cpu}", *paste(made, report)]))
    profile = ProfileStore(made.registry, builtin=tmp_path, user=tmp_path / "none").named(str(mine), CPU)
    again = Plan(CPU, profile, made.registry, RecordStore(CPU, tmp_path), Invariance.BATCH)
    assert made.select_problem(problem()).implementations == ("a.gemm",)
    assert again.select_problem(problem()).implementations == ("b.gemm",)


def test_the_lines_to_paste_hold_in_the_users_folder_for_a_file_beside_the_built_in_profiles(
    plan, tmp_path, monkeypatch
):
    """And name a file once that the rule named already, by another path."""
    from bidispatch.cli import tune as command

    made, path = plan(fake("a.gemm"), fake("b.gemm")), tmp_path / "tiles" / "gpu" / "gemm.json"
    monkeypatch.setattr(command, "builtin_folder", lambda: tmp_path)
    timer = timer_of(lambda name, block, m: float(block) if name == "b.gemm" else 9.0)
    report = tune(made, [problem()], path, timer, rows=ROWS)
    builtin = tmp_path / "cpu.yaml"
    builtin.write_text(
        builtin.read_text().replace("candidates:", "tuned: [tiles/../tiles/gpu/gemm.json]\n      candidates:")
    )
    user = tmp_path / "user"
    user.mkdir()
    store = ProfileStore(made.registry, builtin=tmp_path, user=user)
    named = Plan(CPU, store.for_device(CPU), made.registry, RecordStore(CPU, tmp_path), Invariance.BATCH)
    lines = command.paste(named, report)
    (user / "cpu.yaml").write_text("\n".join(["schema_version: 1", "extends: cpu", *lines]))
    profile = ProfileStore(made.registry, builtin=tmp_path, user=user).for_device(CPU)
    assert [tuned.path for tuned in profile.rules["gemm"][0].tuned] == [path]
    again = Plan(CPU, profile, made.registry, RecordStore(CPU, tmp_path), Invariance.BATCH)
    assert again.select_problem(problem()).implementations == ("b.gemm",)


def test_shapes_that_differ_in_a_bias_are_tuned_once():
    from bidispatch.cli.tune import _problems

    shapes = [Shape(("a",), {"n": 5, "k": 16, "bias": True}), Shape(("b",), {"n": 5, "k": 16})]
    assert _problems("gemm", shapes, ["fp32"]) == [problem()]

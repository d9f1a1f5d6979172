"""`bidispatch vllm check` without vLLM: comparisons, counters, rounds against an engine that is made up, reports."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_engine
import numpy as np
import pytest

from bidispatch.cli import main
from bidispatch.errors import BackendError, UsageError
from bidispatch.integrations.vllm import check, check_arms, check_child, check_rounds
from bidispatch.integrations.vllm.check_compare import Round, Served, compare, totals
from bidispatch.integrations.vllm.check_steps import HAPPENINGS, Steps

WORK = check_rounds.draw(1000, prompts=16, longest=400, new_tokens=12)


def checked(engine: fake_engine.FakeEngine):
    """Everything of a check, on an engine that is made up: the rounds as one, and what did not happen."""
    rounds = check_rounds.run(engine, WORK, most=16)
    return totals(rounds), engine.steps.counters.missing()


def test_an_invariant_engine_passes_and_everything_happened() -> None:
    engine = fake_engine.FakeEngine()
    total, missing = checked(engine)
    assert total.identical
    assert total.positions > 1000
    assert total.difference.values_compared == total.positions * fake_engine.TOP
    assert not missing
    assert engine.steps.counters.prefill_steps
    assert engine.steps.counters.decode_steps


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        (lambda request, batch: batch == 7, "batches of 8"),
        (lambda request, batch: batch == 16 and len(request.tokens) == 3, "16 at once"),
        (lambda request, batch: batch == 1 and len(request.tokens) == 0 and request.new_tokens == 1, "decode against"),
    ],
)
def test_one_bit_is_found(plant, where: str) -> None:
    engine = fake_engine.FakeEngine(plant=plant)
    rounds = check_rounds.run(engine, WORK, most=16)
    differ = [each for each in rounds if not each.identical]
    assert any(each.name.startswith(where) for each in differ)
    assert 0 < totals(rounds).difference.largest < 1e-6
    assert totals(rounds).first


def test_every_size_of_a_batch_is_served_in_two_orders() -> None:
    engine = fake_engine.FakeEngine()
    rounds: dict[str, list[tuple]] = {}
    groups: list[tuple] = []
    original = engine.serve

    def serve(prompts, *given, **named):
        groups.append(tuple(prompts))
        return original(prompts, *given, **named)

    def say(text: str) -> None:
        rounds[text.split(":")[0]] = list(groups)
        groups.clear()

    engine.serve = serve
    check_rounds.run(engine, WORK, most=16, say=say)
    for size in (2, 4, 8, 16):
        first, second = rounds[f"batches of {size}"], rounds[f"batches of {size}, in another order"]
        assert sorted(sum(first, ())) == sorted(sum(second, ())) == sorted(WORK.prompts)
        assert {len(group) for group in (*first, *second)} == {size}
        assert first != second


def test_one_bit_under_a_cut_prompt_is_found() -> None:
    engine = fake_engine.FakeEngine(
        plant=lambda request, batch: len(request.prompt) > 300 and not request.tokens and engine.limit < 100
    )
    rounds = check_rounds.run(engine, WORK, most=16)
    assert [each.name for each in rounds if not each.identical]
    assert all("steps of" in each.name for each in rounds if not each.identical)


@pytest.mark.parametrize(
    ("broken", "missing"),
    [
        ({"chunking": False}, {"chunking"}),
        ({"prefix": False}, {"prefix"}),
        ({"preempts": False}, {"preemption"}),
        ({"graphs": 0}, {"graphs"}),
    ],
)
def test_what_did_not_happen_is_named(broken: dict[str, object], missing: set[str]) -> None:
    total, found = checked(fake_engine.FakeEngine(**broken))
    assert total.identical
    assert set(found) == missing
    for name, text in found.items():
        assert HAPPENINGS[name][0] in text
        assert HAPPENINGS[name][1] in text


def test_resumed_requests_of_either_runner_count_as_preempted() -> None:
    def step(tokens: dict[str, int], new=(), cached=(), resumed=()):
        return SimpleNamespace(
            num_scheduled_tokens=tokens,
            scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=at) for name, at in new],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[name for name, _ in cached],
                num_computed_tokens=[at for _, at in cached],
                resumed_req_ids=set(resumed),
            ),
        )

    steps = Steps()
    steps.add("a", 10)
    steps.add("b", 20)
    steps.saw(step({"a-1": 10}, new=[("a-1", 0)]))
    steps.saw(step({"a-1": 1, "b-2": 12}, new=[("b-2", 0)], cached=[("a-1", 10)]))
    steps.saw(step({"b-2": 8, "a-1": 1}, cached=[("b-2", 12), ("a-1", 11)]))
    assert steps.counters.mixed_steps == 2
    assert steps.counters.chunks == 2
    assert steps.chunks_of("b") == ((0, 12), (12, 20))
    steps.saw(step({"a-1": 12}, cached=[("a-1", 0)], resumed=["a-1"]))
    assert steps.counters.preemptions == 1
    steps.saw(step({"b-2": 21}, new=[("b-2", 0)]))
    assert steps.counters.preemptions == 2
    assert steps.counters.prefix_hits == 0
    steps.saw(step({}))
    assert steps.counters.steps == 5


def served(*tops: dict[int, float]) -> Served:
    return Served(tuple(max(top, key=lambda token: top[token]) for top in tops), tops)


def test_equal_values_at_the_end_may_be_of_other_tokens() -> None:
    found = Round("x")
    compare(found, "r", served({1: 3.0, 2: 2.0, 3: 1.0}), served({1: 3.0, 2: 2.0, 4: 1.0}))
    assert found.identical
    compare(found, "r", served({1: 3.0, 2: 2.0, 3: 1.0}), served({1: 3.0, 2: 2.0, 4: 1.5}))
    assert found.difference.largest == 0.5
    assert found.requests_differ == 1


@pytest.mark.parametrize(
    ("other", "largest"),
    [
        ({1: 3.0, 2: float(np.nextafter(np.float32(2.0), np.float32(3.0)))}, 2.0**-22),
        ({1: 3.0, 2: math.nan}, math.inf),
        ({1: 3.0}, math.inf),
        ({1: 3.0, 2: 2.0, 3: 1.0}, math.inf),
        ({2: 3.0, 1: 2.0}, 1.0),
    ],
)
def test_differences(other: dict[int, float], largest: float) -> None:
    found = Round("x")
    compare(found, "r", served({1: 3.0, 2: 2.0}), served(other))
    assert not found.identical
    assert found.difference.largest == pytest.approx(largest)
    assert found.first == "r, new token 0"


def test_nothing_is_compared_after_tokens_part() -> None:
    found = Round("x")
    alone = served({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.0})
    other = Served((1, 2, 1), ({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.0}, {1: 9.0, 2: 1.0}))
    compare(found, "r", alone, other)
    assert (found.positions, found.positions_differ, found.tokens_differ) == (2, 0, 1)
    assert not found.identical


def test_a_request_that_ended_early_differs() -> None:
    found = Round("x")
    compare(found, "r", served({1: 2.0}, {1: 2.0}), served({1: 2.0}))
    assert not found.identical


def test_nothing_compared_is_not_identical() -> None:
    assert not Round("x").identical


@pytest.mark.parametrize("sizes", [(1, 400, 12), (16, 9, 12), (16, 400, 1)])
def test_a_workload_that_proves_nothing(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="--prompts, --longest and --new-tokens"):
        check_rounds.draw(1000, prompts=sizes[0], longest=sizes[1], new_tokens=sizes[2])


def test_environments() -> None:
    present = {"PATH": "/bin", "VLLM_BATCH_INVARIANT": "1", "BIDISPATCH_VLLM": "strict"}
    ours, stock, theirs = (check_arms.environment_of(arm, present) for arm in ("ours", "stock", "vllm_invariant"))
    assert (ours["VLLM_BATCH_INVARIANT"], ours["BIDISPATCH_VLLM"]) == ("1", "strict")
    assert "VLLM_BATCH_INVARIANT" not in stock
    assert "BIDISPATCH_VLLM" not in stock
    assert (theirs["VLLM_BATCH_INVARIANT"], theirs["BIDISPATCH_VLLM"]) == ("1", "off")
    assert "BIDISPATCH_VLLM" not in check_arms.environment_of("ours", {"BIDISPATCH_VLLM": "off"})
    assert all(each["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" for each in (ours, stock, theirs))
    with pytest.raises(UsageError, match="did you mean 'ours'"):
        check_arms.environment_of("our", present)


def test_engine_arguments() -> None:
    words = ["enforce-eager=true", "stock:attention_backend=FLASH_ATTN", "ours:gpu_memory_utilization=0.5"]
    assert check_arms.arguments_for("ours", words) == {"enforce_eager": True, "gpu_memory_utilization": 0.5}
    assert check_arms.arguments_for("stock", words) == {"enforce_eager": True, "attention_backend": "FLASH_ATTN"}
    for word, message in (("eager", "is not NAME=VALUE"), ("stok:eager=1", "did you mean 'stock'")):
        with pytest.raises(UsageError, match=message):
            check_arms.arguments_for("ours", [word])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def result_of(engine: fake_engine.FakeEngine) -> dict[str, object]:
    total = totals(check_rounds.run(engine, WORK, most=16))
    return {
        **total.as_json(),
        "rounds": [total.as_json()],
        "counters": engine.steps.counters.as_json(),
        "seconds": 1.0,
        "start_s": 30.0,
        "vllm": "0.25.1",
        "runner": 1,
        "dtype": "bfloat16",
    }


def reported(model: Path, arms: dict[str, dict[str, object]], **options: object) -> dict[str, object]:
    chosen = check.CheckOptions(model=model, arms=tuple(arms), **options)
    return check.check(chosen, run=lambda arm, command, spec, say: dict(arms[arm]))


def test_reports(model: Path) -> None:
    good = result_of(fake_engine.FakeEngine())
    moved = result_of(fake_engine.FakeEngine(plant=lambda request, batch: batch > 4))
    unchunked = result_of(fake_engine.FakeEngine(chunking=False))
    report = reported(model, {"ours": good, "stock": moved})
    assert check.faults(report, require_control=True) == []
    assert any("Logprob difference: 0.0000000000" in line for line in check.lines(report))

    faults = check.faults(reported(model, {"ours": moved, "stock": moved}))
    assert len(faults) == 1
    assert faults[0].startswith("ours:")
    assert "comparisons differ" in faults[0]

    assert "--max-num-batched-tokens" in check.faults(reported(model, {"ours": unchunked}))[0]
    assert check.faults(reported(model, {"ours": unchunked}, excused=("chunking",))) == []

    same = reported(model, {"ours": good, "stock": good})
    assert check.faults(same) == []
    assert "no proof" in check.lines(same)[-1]
    assert "cannot tell" in check.faults(same, require_control=True)[0]

    broken = reported(model, {"ours": {"error": "ended with code 1", "log": "/x", "tail": ["CUDA is gone"]}})
    assert "ended with code 1" in check.faults(broken)[0]
    assert any("CUDA is gone" in line for line in check.lines(broken))
    json.dumps(report)


def test_options(model: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"arms": ("our",)}, "did you mean 'ours'"),
        ({"excused": ("chunk",)}, "--without 'chunk'"),
        ({"values": "logits"}, "--values"),
        ({"engine": ("eager",)}, "--engine-arg"),
        ({"model": tmp_path / "no"}, "no config.json"),
    ):
        with pytest.raises(UsageError, match=message):
            check.CheckOptions(**{"model": model, **options})
    assert check.known_arms((), stock=True) == ("ours", "stock")
    assert check.known_arms(("vllm_invariant",), stock=False) == ("vllm_invariant",)
    assert check.spec_of(check.CheckOptions(model=model), "ours")["max_model_len"] >= 3024


def test_a_process_that_dies_is_an_error_with_its_last_lines() -> None:
    said: list[str] = []
    program = "print('check: half way'); print('it broke'); raise SystemExit(7)"
    result = check_arms.run_arm("ours", [sys.executable, "-c", program], {}, say=said.append)
    assert "code 7" in result["error"]
    assert result["tail"] == ["check: half way", "it broke"]
    assert result["log"] in said[0]
    assert said[1:] == ["half way"]


def test_command_line_errors(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm", "check", "--model", str(model), "--arm", "our", "--no-stock"]) == 2
    assert "did you mean 'ours'" in capsys.readouterr().err


def test_without_vllm_or_with_sizes_that_prove_nothing_no_engine_is_started(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    words = ["vllm", "check", "--model", str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("bidispatch.integrations.vllm.check.check", lambda *given, **named: pytest.fail("started"))
    assert main(words) == 3
    assert "vllm is not installed in this environment" in capsys.readouterr().err
    assert main([*words, "--prompts", "0"]) == 2
    assert "at least 2 prompts" in capsys.readouterr().err


def test_an_engine_that_cannot_be_watched_is_not_started(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setattr("bidispatch.integrations.vllm.check.check", lambda *given, **named: pytest.fail("started"))
    assert main(["vllm", "check", "--model", str(tmp_path)]) not in (0, 1)
    assert "vllm.v1.core.block_pool is not there" in capsys.readouterr().err


def test_what_a_process_says_is_what_the_other_reads(capfd: pytest.CaptureFixture[str]) -> None:
    program = "from bidispatch.integrations.vllm.check_child import say; say('half way')"
    said: list[str] = []
    check_arms.run_arm("ours", [sys.executable, "-c", program], {}, say=said.append)
    assert said[1:] == ["half way"]


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = (
        "import time; from bidispatch.integrations.vllm.check_child import end_with_parent; end_with_parent(0.05);"
        f"open({str(alive)!r}, 'w').close(); time.sleep(60)"
    )
    parent = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        for _ in range(600):
            if alive.exists():
                break
            time.sleep(0.05)
        assert alive.exists()
        process.communicate("\n")
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("it is still there")


def test_an_engine_must_be_what_its_arm_says() -> None:
    none, some = (SimpleNamespace(kernels=lambda names=names: names) for names in ((), ("layers.*.q_proj gemm",)))
    assert check_child.require_arm(some, "ours") == ["layers.*.q_proj gemm"]
    assert check_child.require_arm(none, "stock") == []
    with pytest.raises(BackendError, match="VLLM_PLUGINS"):
        check_child.require_arm(none, "ours")
    with pytest.raises(BackendError, match="vllm_invariant has layers served"):
        check_child.require_arm(some, "vllm_invariant")

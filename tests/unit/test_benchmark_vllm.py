"""benchmarks/vllm_serving.py as far as it needs no GPU: rows from parts, the figures, what is refused; the models."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.fixture(scope="module", params=["vllm_serving"])
def serving(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module(request.param)
    sys.modules.pop(request.param)


@pytest.fixture(scope="module")
def prices():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("vllm_prices")
    sys.modules.pop("vllm_prices")


def part(arm: str, ms: float, *, differ: int = 0, model: str = "m", latent: bool = False, **more):
    prices = [
        {"phase": phase, "batch": 8, "tokens": 8192, "ms": ms * scale, "gpu_ms": ms * 0.9, "least_ms": ms, "samples": 3}
        for phase, scale in (("decode", 1), ("prefill", 100))
    ]
    check = {
        "comparisons": 1000,
        "comparisons_differ": differ,
        "max_logprob_difference": 0.01 * differ,
        "counters": {
            "most_requests": 64,
            "cut_elsewhere": 3,
            "prefix_hits": 3,
            "mixed_steps": 3,
            "preemptions": 3,
            "graph_replays": 3,
        },
    }
    result = {
        "layers": 36,
        "start_s": 40.0,
        "prices": prices,
        "faults": [],
        "check": check,
        "compiled_after_ready": 0,
        "workspace_bytes": 1 << 20,
        **more,
    }
    return {"model": model, "arm": arm, "latent": latent, "result": result}


def test_rows_hold_every_arm_and_its_difference(serving):
    rows = serving.rows_of([part("stock", 10.0, differ=5), part("vllm_invariant", 20.0), part("ours", 10.2)])
    assert [(row.phase, row.case) for row in rows] == [("decode", "8 x 8192"), ("prefill", "8 x 8192")]
    assert (rows[0].stock_ms, rows[0].vllm_invariant_ms, rows[0].ours_ms) == (10.0, 20.0, 10.2)
    assert rows[0].max_logprob_difference == {"stock": 0.05, "vllm_invariant": 0.0, "ours": 0.0}
    assert (rows[0].comparisons, rows[0].layers, rows[0].level) == (1000, 36, "sequence")
    assert rows[0].ratio == pytest.approx(1.02)


def test_an_arm_that_is_missing_is_none(serving):
    (row, _) = serving.rows_of([part("ours", 10.0)])
    assert row.stock_ms is None
    assert row.ratio is None
    assert row.max_logprob_difference["stock"] is None


@pytest.mark.parametrize(
    ("parts", "missed"),
    [
        ([part("stock", 10.0, differ=5), part("ours", 10.2)], []),
        ([part("stock", 10.0, differ=5), part("ours", 10.5)], ["decode: ours / stock, geometric mean"]),
        ([part("stock", 10.0, differ=5), part("ours", 12.0)], ["geometric mean", "at most 1.1", "prefill: ours"]),
        ([part("ours", 10.0, differ=1)], ["1 of 1000 comparisons differ"]),
        ([part("ours", 10.0, compiled_after_ready=2)], ["2 kernels of bidispatch made ready"]),
        ([part("ours", 10.0, workspace_bytes=2 << 30)], ["workspaces of 2048 MiB"]),
        ([part("ours", 10.0, error="it broke")], ["it broke"]),
        ([part("ours", 10.0, faults=["8 x 8192: too small"])], ["too small"]),
    ],
)
def test_figures(serving, parts, missed):
    _, found = serving.summary(serving.rows_of(parts), serving.engines_of(parts))
    assert bool(found) == bool(missed)
    assert all(any(text in line for line in found) for text in missed), found


def test_what_did_not_happen_misses_the_figures(serving):
    parts = [part("ours", 10.0)]
    parts[0]["result"]["check"]["counters"]["preemptions"] = 0
    _, found = serving.summary(serving.rows_of(parts), serving.engines_of(parts))
    assert any("preemption" in line for line in found)


def test_prefill_of_latent_attention_is_apart(serving):
    parts = [part("stock", 10.0, latent=True), part("ours", 10.2, latent=True)]
    for price in parts[1]["result"]["prices"]:
        price["ms"] *= 2 if price["phase"] == "prefill" else 1
    lines, missed = serving.summary(serving.rows_of(parts), serving.engines_of(parts))
    assert not missed
    assert any("prefill of models with latent attention" in line for line in lines)


def test_start_up(serving):
    parts = [part("stock", 10.0), part("ours", 10.0)]
    for each, cold in zip(parts, (60.0, 95.0), strict=True):
        each |= {"cold_s": cold, "warm_s": 40.0}
    _, missed = serving.summary(serving.rows_of(parts), serving.engines_of(parts))
    assert [line for line in missed if "start-up cold 95.0 s, stock 60.0 s" in line]


def test_parts_are_merged(serving, tmp_path, capsys):
    files = []
    for arm, ms in (("stock", 10.0), ("ours", 10.1)):
        files.append(tmp_path / f"{arm}.json")
        files[-1].write_text(json.dumps({"environment": {"device": "NVIDIA H100"}, "parts": [part(arm, ms)]}))
    to = tmp_path / "vllm.json"
    assert serving.main(["--merge", *map(str, files), "--out", str(to)]) == 0
    made = json.loads(to.read_text())
    assert made["environment"]["device"] == "NVIDIA H100"
    assert [engine["arm"] for engine in made["environment"]["engines"]] == ["stock", "ours"]
    assert made["rows"][0]["ours_ms"] == 10.1
    assert "no proof" in capsys.readouterr().out


def test_a_run_of_start_up_joins_one_of_prices(serving):
    prices, start = part("stock", 10.0), part("stock", 99.0)
    start |= {"cold_s": 60.0, "warm_s": 20.0, "result": {"start_s": 20.0, "prices": [], "check": None}}
    other = part("ours", 10.1)
    found = serving.joined([prices, other, start])
    assert [(each["arm"], each.get("cold_s")) for each in found] == [("stock", 60.0), ("ours", None)]
    assert found[0]["result"] == {**prices["result"], "start_s": 20.0}
    assert serving.joined([start, prices])[0]["result"]["prices"] == prices["result"]["prices"]


def test_a_later_run_takes_the_place_of_an_earlier_with_its_faults(serving):
    earlier = part("ours", 10.0, faults=["8 x 8192: too small"], compiled_after_ready=1)
    later = part("ours", 11.0, compiled_after_ready=0)
    (found,) = serving.joined([earlier, later])
    assert found["result"]["compiled_after_ready"] == 0
    assert not found["result"].get("faults")
    assert serving.rows_of([found])[0].ours_ms == 11.0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/vllm.json")), ids=lambda path: path.parent.name)
def test_a_whole_is_taken_apart_and_put_together_again(serving, path):
    whole = json.loads(path.read_text(encoding="utf-8"))
    parts = serving.joined(serving.parts_of(whole))
    assert json.loads(json.dumps([vars(row) for row in serving.rows_of(parts)])) == whole["rows"]
    engines = json.loads(json.dumps([vars(engine) for engine in serving.engines_of(parts)]))
    assert engines == whole["environment"]["engines"]
    model, arm = parts[0]["model"], parts[0]["arm"]
    other = part(arm, 1.0)
    merged = serving.rows_of(serving.joined([*parts, other | {"model": model}]))
    assert any(getattr(row, f"{arm}_ms") == 1.0 for row in merged if row.model == model)


def test_what_is_refused(serving):
    with pytest.raises(ValueError, match="there are deepseek"):
        serving.model_names(["qwen"])
    with pytest.raises(ValueError, match="8x8192"):
        serving.cases_of(["8 by 8192"])
    assert serving.cases_of(["1x512"]) == [(1, 512)]
    assert len(serving.model_names([])) >= 8


def test_busy_time_counts_overlaps_once(prices):
    assert prices.busy_ms([(0, 1000), (500, 1500), (3000, 4000), (3100, 3200)]) == 2.5
    assert prices.busy_ms([]) == 0


def test_compilations_are_counted_by_whose_they_are(prices, monkeypatch):
    runtime = pytest.importorskip("triton.knobs").runtime
    seen = []
    monkeypatch.setattr(runtime, "jit_post_compile_hook", lambda **named: seen.append(named["fn"].name))
    compiled = prices.Compilations()
    for module, name in (("bidispatch_backends.triton.gemm", "kernel"), ("vllm.v1.sample", "topk")):
        runtime.jit_post_compile_hook(fn=SimpleNamespace(module=module, name=name), key="", already_compiled=False)
    assert compiled.names == ["bidispatch_backends.triton.gemm.kernel", "vllm.v1.sample.topk"]
    assert seen == ["kernel", "topk"]


def test_workspaces_of_no_kernels_are_none(prices):
    assert torch.zeros(1) is not None
    assert prices.workspace_bytes() in (None, 0)


def test_models_are_whole(serving):
    for path in serving.MODELS.glob("*.json"):
        config = json.loads(path.read_text())
        assert len(config["architectures"]) == 1, path
        assert config["max_position_embeddings"] >= 32256, path
        types = config.get("layer_types")
        assert types is None or len(types) == config["num_hidden_layers"], path

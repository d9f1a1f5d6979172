"""`bidispatch vllm check` on a real engine of vLLM on the processor: what happens is seen, a planted fault found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "cpu_engine.py"
VERSION = version("vllm")
pytestmark = pytest.mark.skipif(
    VERSION.startswith("0.32."), reason=f"vLLM {VERSION} does not run on a processor (block_table.py)"
)

PAGES = {"block_size": 32}
FEW = {"prompts": 6, "longest": 100}
WINDOW = {"sliding_window": 24, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What the program wrote for these options."""
    to = folder / "result.json"
    command = [sys.executable, str(PROGRAM), str(to), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert to.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(to.read_text())


def verify(results: dict[str, Any]) -> None:
    """Nothing differs and all happened that can; with the planted fault, what shares a batch differs and no more."""
    clean, planted = results["clean"], results["planted"]
    assert clean["comparisons_differ"] == clean["tokens_differ"] == 0, clean["first"]
    assert all(times for name, times in clean["happened"].items() if name != "graphs"), clean["happened"]
    assert clean["happened"]["graphs"] == 0
    assert planted["comparisons_differ"] > 0
    assert planted["max_logprob_difference"] > 0
    moved = {each["name"] for each in planted["rounds"] if each["comparisons_differ"]}
    assert "batches of 4" in moved
    assert not moved & {"alone again", "batches of 2", "batches of 2, in another order", "decode against prefill"}


@pytest.mark.parametrize("options", [{"engine": {"async_scheduling": True}}, {"ours": True}], ids=["stock", "ours"])
def test_a_whole_engine(tmp_path: Path, options: dict[str, Any]) -> None:
    results = run(tmp_path, options | {"prices": True})
    verify(results)
    assert results["clean"]["comparisons"] > 500
    assert any("lm_head" in name for name in results["kernels"]) == ("ours" in options)
    assert [(price["phase"], price["batch"]) for price in results["prices"]] == [
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 4),
        ("decode", 4),
    ]
    assert all(price["ms"] > 0 for price in results["prices"])
    assert len(results["faults"]) == 1
    assert results["faults"][0].startswith("9 x 20: ")
    assert ("torch_cpu.paged_attention" in results["attention"]) == ("ours" in options)


@pytest.mark.parametrize(
    ("model", "engine", "problem"),
    [
        ({}, {"kv_cache_dtype": "fp8"}, "kv_dtype=float8_e4m3fn"),
        (WINDOW, {}, "page_size=(16|32) causal=true window=24"),
    ],
    ids=["fp8 cache", "sliding window"],
)
def test_attention_in_a_whole_engine(
    tmp_path: Path, model: dict[str, Any], engine: dict[str, Any], problem: str
) -> None:
    results = run(tmp_path, {"ours": True, "model": model, "engine": PAGES | engine, "check": FEW})
    verify(results)
    assert results["clean"]["comparisons"] > 300
    assert results["attention"]["torch_cpu.paged_attention"] > 300
    assert any(re.search(problem, seen) for seen in results["attention"])


def test_drafts_in_a_whole_engine(tmp_path: Path) -> None:
    """A small vocabulary, so that n-grams come again, and some drafts are right."""
    check = {"prompts": 4, "longest": 60, "new_tokens": 12}
    options = {"ours": True, "model": {"vocab_size": 64}, "engine": PAGES | {"speculative_config": NGRAM}}
    results = run(tmp_path, options | {"check": check})
    verify(results)
    assert results["clean"]["comparisons"] > 300
    assert results["attention"]["drafts"] > 100
    assert sum(right for _, right in results["drafted"]) > 20
    assert sum(right < drafts for drafts, right in results["drafted"]) > 20

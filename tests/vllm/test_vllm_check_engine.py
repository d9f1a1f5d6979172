"""`bidispatch vllm check` on a real engine of vLLM on the processor: what happens is seen, a planted fault found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "cpu_engine.py"


@pytest.mark.parametrize("options", [[], ["--async"], ["--ours"]])
def test_a_whole_engine(tmp_path: Path, options: list[str]) -> None:
    to = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(to), *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert to.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(to.read_text())
    clean, planted = results["clean"], results["planted"]
    assert any("lm_head" in name for name in results["kernels"]) == ("--ours" in options)
    assert [(price["phase"], price["batch"]) for price in results["prices"]] == [
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 4),
        ("decode", 4),
    ]
    assert all(price["ms"] > 0 for price in results["prices"])
    assert len(results["faults"]) == 1
    assert results["faults"][0].startswith("9 x 20: ")
    assert clean["comparisons"] > 500
    assert clean["comparisons_differ"] == clean["tokens_differ"] == 0, clean["first"]
    assert all(times for name, times in clean["happened"].items() if name != "graphs"), clean["happened"]
    assert clean["happened"]["graphs"] == 0
    assert planted["comparisons_differ"] > 0
    assert planted["max_logprob_difference"] > 0
    moved = {each["name"] for each in planted["rounds"] if each["comparisons_differ"]}
    assert "batches of 4" in moved
    assert not moved & {"alone again", "batches of 2", "decode against prefill"}

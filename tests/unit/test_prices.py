"""What `explain attention` says of the price of each level, from a benchmark's results."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bidispatch.cli.app import app
from bidispatch.device import Device

ASKED = ["explain", "attention", "--dtype", "bf16", "--device", "cpu"]
HEADS = ["--dim", "num_heads=32", "--dim", "num_kv_heads=8", "--dim", "head_dim=128"]


def row(level, phase, ours, *, impl="triton.paged_attention decode_warps=4", heads=32, **peers):
    shape = {"op": "attention", "dtype": "bfloat16", "heads": heads, "kv_heads": 8, "head_dim": 128, "page_size": 16}
    return {**shape, "phase": phase, "batch": 1, "ours_us": ours, "impl": impl, "level": level, "peers": peers}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes a file of results for this machine's processor."""
    monkeypatch.setenv("BIDISPATCH_RESULTS_DIR", str(tmp_path))
    file = tmp_path / Device.parse("cpu").slug / "attention.json"
    file.parent.mkdir()

    def write(rows):
        file.write_text(rows if isinstance(rows, str) else json.dumps({"environment": {}, "rows": rows}))

    return write


def said(*words):
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_each_level_and_phase_has_a_price_against_the_fastest_peer(results):
    results(
        [
            row("sequence", "decode", 40.0, fa3_auto=20.0, flashinfer_auto=30.0),
            row("sequence", "decode", 10.0, fa3_auto=20.0),
            row("sequence", "prefill", 30.0, fa3_auto=20.0),
            row("batch", "prefill", 21.0, impl="flash_attn.fa3 num_splits=1", fa3_auto=20.0),
            row("batch", "decode", 500.0, heads=64, fa3_auto=20.0),
        ]
    )
    text = said(*ASKED, *HEADS)
    assert "level sequence, decode: 1.00 of the fastest peer's time over 2 cells, triton.paged_attention" in text
    assert "level sequence, prefill: 1.50 of the fastest" in text
    assert "level batch, prefill: 1.05 of the fastest peer's time over 1 cells, flash_attn.fa3" in text
    assert "25.00" not in text, "other heads were counted"
    assert "the plan requires sequence; `invariance: {require: batch}` in a profile asks for batch" in text
    document = json.loads(CliRunner().invoke(app, [*ASKED, *HEADS, "--json"]).output)
    assert [price["ratio"] for price in document["prices"]] == [1.0, 1.5, 1.05]


def test_other_heads_are_named_as_such(results):
    results([row("sequence", "decode", 40.0, heads=64, fa3_auto=20.0)])
    assert "2.00 of the fastest peer's time over 1 cells of other heads" in said(*ASKED, *HEADS)


def test_without_results_the_command_that_makes_them_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_RESULTS_DIR", str(tmp_path))
    assert "`python benchmarks/attention.py` does" in said(*ASKED)
    assert "price" not in said("explain", "gemm", "--device", "cpu")


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"op": "attention"}]}'])
def test_a_damaged_file_is_a_note(results, text):
    results(text)
    assert "was not written by python benchmarks/attention.py" in said(*ASKED)

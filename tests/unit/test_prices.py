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
        return file

    return write


def said(*words):
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def as_json():
    return json.loads(CliRunner().invoke(app, [*ASKED, *HEADS, "--json"]).output)


def test_each_level_and_phase_has_a_price_against_the_fastest_peer(results):
    file = results(
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
    assert "level batch, prefill: 1.05 of the fastest peer's time over 1 cell, flash_attn.fa3" in text
    assert "25.00" not in text, "other heads were counted"
    assert f"from {file} " in text
    document = as_json()
    assert [price["ratio"] for price in document["prices"]] == [1.0, 1.5, 1.05]
    assert document["price_notes"][0] == f"from {file}"
    assert {price["file"] for price in document["prices"]} == {str(file)}


def test_other_heads_are_named_as_such(results):
    results([row("sequence", "decode", 40.0, heads=64, fa3_auto=20.0)])
    text = said(*ASKED, *HEADS)
    assert "2.00 of the fastest peer's time over 1 cell of other heads" in text
    assert "none of its cells has 32/8 heads of 128, so those of all other heads are taken" in text


def test_dims_that_the_benchmark_leaves_alone_are_named(results):
    results([row("sequence", "decode", 40.0, fa3_auto=20.0)])
    assert "are without" not in said(*ASKED, *HEADS, "--dim", "page_size=32")
    assert "its cells are without this problem's window=128" in said(*ASKED, *HEADS, "--dim", "window=128")


def test_latent_attention_has_one_kv_head(results):
    mla = {"op": "attention.mla", "kv_heads": 1, "head_dim": 576}
    cells = [row("batch", "mla", 60.0, heads=heads, flash_mla=20.0) | mla for heads in (16, 128)]
    results([*cells, row("batch", "decode", 20.0, heads=16, fa3_auto=20.0)])
    text = said("explain", "attention.mla", "--dtype", "bf16", "--device", "cpu", "--dim", "num_heads=16")
    assert "level batch, mla: 3.00 of the fastest peer's time over 1 cell, triton.paged_attention" in text
    assert "level batch, decode" not in text


def test_a_ladder_has_all_its_implementations(results):
    impl = "flash_attn.fa3 num_splits=1 -> triton.paged_attention decode_warps=4 -> triton.paged_attention"
    results([row("batch", "decode", 20.0, impl=impl, fa3_auto=20.0)])
    assert "over 1 cell, flash_attn.fa3 -> triton.paged_attention" in said(*ASKED, *HEADS)


def test_the_level_in_force_is_named_with_what_changes_it(results, own_profile):
    results([row("batch", "decode", 20.0, fa3_auto=20.0)])
    assert (
        "profile cpu requires level sequence; `invariance: {require: batch}` in a profile, "
        '`--require batch` or `bid.plan(require="batch")` asks for batch' in said(*ASKED)
    )
    assert as_json()["require"] == "sequence"
    text = said(*ASKED, "--require", "batch")
    assert "--require asks for level batch; `invariance: {require: sequence}` in a profile" in text
    assert "--require batch --record`" in text
    own_profile("invariance: {require: batch}")
    assert "profile cpu requires level batch; `invariance: {require: sequence}`" in said(*ASKED)
    assert as_json()["require"] == "batch"


def test_without_results_the_command_that_makes_them_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_RESULTS_DIR", str(tmp_path))
    file = tmp_path / Device.parse("cpu").slug / "attention.json"
    text = said(*ASKED)
    assert f"there is no {file}: `python benchmarks/attention.py --out {file}` in a checkout makes it" in text
    assert "requires level sequence" in text
    assert as_json()["prices"] == []
    assert "price" not in said("explain", "gemm", "--device", "cpu")
    predicted = said("explain", "attention", "--device", "gfx942")
    assert "only a device that is here has prices: `python benchmarks/attention.py` on one" in predicted


def test_a_file_without_the_op_or_without_peers_says_so(results):
    for rows in ([], [row("batch", "decode", 20.0)], [row("batch", "decode", 20.0, fa3_auto=9.0) | {"dtype": "fp8"}]):
        file = results(rows)
        assert f"{file} has no attention in bfloat16 timed beside a peer" in said(*ASKED)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"rows": [{"op": "attention"}]}',
        json.dumps({"rows": [row("batch", "decode", 20.0, fa3_auto=0.0)]}),
        json.dumps({"rows": [row("batch", "decode", float("nan"), fa3_auto=20.0)]}),
    ],
)
def test_a_damaged_file_is_a_note(results, text):
    file = results(text)
    assert f"{file} is damaged, or not from the benchmark (" in said(*ASKED)
    (note, _) = as_json()["price_notes"]
    assert "\n" not in note
    assert note.endswith(f"`python benchmarks/attention.py --out {file}` writes it anew")


def test_a_folder_in_the_place_of_the_file_is_a_note(results):
    file = results("")
    file.unlink()
    file.mkdir()
    assert f"{file} cannot be read: Is a directory" in said(*ASKED)

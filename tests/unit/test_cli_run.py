"""The commands that run kernels, through their door: verify and demo on the processor."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from cli_door import BACKEND  # noqa: E402

from bidispatch.cli import demo  # noqa: E402
from bidispatch.demo import compare  # noqa: E402
from bidispatch.demo.workload import make_workload  # noqa: E402
from bidispatch.device import Device  # noqa: E402
from bidispatch.records import RecordStore  # noqa: E402

MEAN = ("verify", "mean", "--device", "cpu", "--dtype", "fp32", "--dim", "n=40")
SMALL = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads would only wait for one another, most of all when tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_this_cpu():
    return Device.parse("cpu")


def test_verify_counts_what_it_compared_and_catches_every_control(cli, as_json):
    code, out, _ = cli(*MEAN)
    assert code == 0
    assert "passed" in out
    assert "NOT CAUGHT" not in out
    rows = [line.split("  ") for line in out.partition("\ncontrol ")[2].partition("\n\n")[0].splitlines()[1:]]
    results = {row[0]: (row[-1].strip(), [cell.strip() for cell in row[1:-1] if cell]) for row in rows}
    assert results.pop("a sound product") == ("passed", ["pass every check"])
    assert {result for result, _ in results.values()} == {"caught"}
    assert all(must[0].startswith("be caught by ") for _, must in results.values())
    code, document = as_json(*MEAN)
    assert code == 0
    assert document["passed"]
    assert document["comparisons"] > 100
    assert document["differing"] == 0
    assert document["controls"]
    assert all(control["caught"] for control in document["controls"])
    assert document["recorded"] == 0


def test_verify_says_which_control_was_not_caught_and_which_did_not_pass(cli, monkeypatch):
    from bidispatch.verify import controls, runner

    caught = list(controls.run_controls(Device.parse("cpu"), experts=False, over_sequences=()))
    monkeypatch.setattr(runner, "run_controls", lambda *_, **__: iter(replace(c, caught=False) for c in caught))
    code, out, _ = cli(*MEAN)
    assert code == 1
    shown = [line.rsplit("  ", 1)[-1].strip() for line in out.partition("\ncontrol ")[2].splitlines()[1:]]
    assert shown[: len(caught)] == ["FAILED", *["NOT CAUGHT"] * (len(caught) - 1)]


def test_verify_finds_a_variant_kernel_and_prints_the_smallest_pair(cli, as_json, extra_backend, own_profile):
    own_profile("extends: cpu\nprefer: [extra.variant]\n")
    code, out, _ = cli(*MEAN)
    assert code == 1
    assert "FAILED" in out
    assert "M=3" in out  # it adds up otherwise from three rows on
    code, document = as_json(*MEAN, "--record")
    assert code == 1
    assert document["differing"] > 0
    assert document["recorded"] == 0
    assert RecordStore(Device.parse("cpu")).load() == []


def test_verify_proves_a_third_partys_kernel(cli, extra_backend, own_profile):
    own_profile("extends: cpu\nprefer: [extra.sound]\n")
    code, out, _ = cli(*MEAN)
    assert code == 0
    assert "extra.sound" in out


def test_a_kernel_that_does_not_load_is_fatal_when_it_runs(cli, extra_backend, own_profile):
    own_profile("extends: cpu\nprefer: [extra.unloadable]\n")
    code, _, err = cli(*MEAN)
    assert code == 3
    assert "no_such_function" in err


def test_a_record_made_is_evidence_for_the_plan_and_enough_where_only_proof_counts(cli, own_profile, on_this_cpu):
    own_profile("extends: cpu\ninvariance: {trust: verified}\n")
    problem = ("explain", "mean", "--dtype", "fp32", "--dim", "n=40", "--device", "cpu")
    assert cli(*problem)[0] == 1
    code, out, _ = cli(*MEAN, "--record")
    assert code == 0
    assert "recorded 1 of 1" in out
    code, out, _ = cli(*problem)
    assert code == 0
    assert "verified here" in out
    assert "hold   1" in cli("doctor")[1] or on_this_cpu != Device.detect()


def test_doctor_counts_stale_records_and_says_what_changed(cli, as_json, on_this_cpu, monkeypatch):
    if on_this_cpu != Device.detect():
        pytest.skip("doctor looks at the GPU's records here")
    assert cli(*MEAN, "--record")[0] == 0
    assert as_json("doctor")[1]["sections"]["records"]["stale"] == "0"
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    _, document = as_json("doctor")
    assert document["sections"]["records"]["stale"] == "1"
    assert any("made with another variables" in finding for finding in document["findings"])


def test_what_less_would_select_is_proved_and_kept_beside_the_rest(
    cli, as_json, install, own_profile, on_this_cpu, monkeypatch
):
    """A kernel that claims level batch alone: verified where that is asked for, and no stale record then."""
    claim = 'cuda_graph=False, claims=__import__("bidispatch.invariance").invariance.Invariance.BATCH,'
    install(("extra", BACKEND.replace("cuda_graph=False,", claim)))
    own_profile("extends: cpu\nprefer: [extra.sound]\n")
    assert "extra.sound" not in cli(*MEAN, "--record")[1]
    asked = ("--require", "batch")
    code, out, _ = cli(*MEAN, *asked, "--record")
    assert (code, "extra.sound" in out) == (0, True)
    code, out, _ = cli("explain", "mean", "--dtype", "fp32", "--dim", "n=40", "--device", "cpu", *asked)
    assert (code, "verified here" in out) == (0, True)
    if on_this_cpu == Device.detect():  # else doctor looks at the GPU's
        section = as_json("doctor")[1]["sections"]["records"]
        assert (section["hold"], section["stale"]) == ("2", "0")
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
        stale = [finding for finding in as_json("doctor")[1]["findings"] if "stale" in finding]
        assert [finding.rpartition(";")[2] for finding in stale] == [
            " `bidispatch verify --all --record`",
            " `bidispatch verify --all --require batch --record`",
        ]


@pytest.mark.parametrize("text", ['{"format": "bidispatch-rec', '{"format": "somebody else"}', "[]"])
def test_a_truncated_or_foreign_record_file_is_left_alone_and_said_before_the_work(cli, as_json, on_this_cpu, text):
    path = RecordStore(on_this_cpu).path
    path.parent.mkdir(parents=True)
    path.write_text(text)
    code, out, err = cli(*MEAN, "--record")
    assert (code, out) == (1, "")
    assert str(path) in err
    assert as_json(*MEAN, "--record")[1]["error"]["type"] == "RecordError"
    assert path.read_text() == text
    code, _, err = cli("plan", "--device", "cpu")  # a claim is enough there, so the file is only warned of, once
    assert code == 0
    assert err.count(str(path)) == 1


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A small model's folder; the demo serves it a small workload, `--requests` of a few tokens each."""

    def small_workload(config, *, gpu, requests, seed):
        return make_workload(
            config, requests=requests, longest_prompt=40, new_tokens=(5, 6), max_tokens=16, max_seqs=4, seed=seed
        )

    monkeypatch.setattr(demo, "default_workload", small_workload)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path)


def test_demo_prints_the_plan_and_both_differences(cli, model):
    code, out, _ = cli("demo", "--model", model, "--requests", "6", "--device", "cpu")
    assert code == 0
    assert "torch_cpu.paged_attention" in out
    stock, plan = out.partition("stock torch")[2].split("bidispatch plan")
    assert "Logprob difference: 0.0000000000" in plan
    assert "differing bit patterns: 0 of" in plan
    assert "Logprob difference: 0.0000" in stock
    assert "Logprob difference: 0.0000000000" not in stock


def test_demo_as_json_has_the_keys_that_are_promised(as_json, model):
    code, document = as_json("demo", "--model", model, "--requests", "6", "--device", "cpu")
    assert code == 0
    assert document["plan"]["max_logprob_difference"] == 0.0
    assert document["plan"]["tokens_differ"] == 0
    assert document["plan"]["identical"]
    assert document["stock"]["max_logprob_difference"] > 0
    assert document["fingerprint"].startswith("cpu-")
    assert document["device"]


def test_demo_says_so_when_no_two_requests_met(cli, model):
    code, _, err = cli("demo", "--model", model, "--requests", "1", "--device", "cpu")
    assert code == 1
    assert "no two requests met" in err


@pytest.mark.parametrize("moved", [1e-3, float("nan")])
def test_demo_is_a_finding_when_the_plans_logprobs_move(cli, as_json, model, monkeypatch, moved):
    together = compare.Comparison.together

    def disturbed(self, request, index, token, logprobs):
        together(self, request, index, token, logprobs + moved if index == 1 else logprobs)

    monkeypatch.setattr(compare.Comparison, "together", disturbed)
    words = ("demo", "--model", model, "--requests", "4", "--device", "cpu")
    code, document = as_json(*words)
    assert code == 1
    assert document["plan"]["max_logprob_difference"] != 0
    assert cli(*words)[0] == 1


LADDER = """
    import os
    from bidispatch.registry import Implementation

    def register(registry):
        for name in ("low", "high"):
            registry.register(Implementation(
                "extra." + name, "gemm", "extra_backend:bind_" + name, ("cpu",), ("float32",),
                lambda params, problem: "extra", cuda_graph=False,
            ))

    def product(x, weight, parts):
        k, total = x.shape[1], 0
        for part in range(parts):
            partial = 0
            for j in range(part * k // parts, (part + 1) * k // parts):
                partial = partial + x[:, j, None] * weight[None, :, j]
            total = total + partial
        return total

    def bind_low(context):
        return lambda x, weight, bias, out: out.copy_(product(x, weight, 1))

    def bind_high(context):
        return lambda x, weight, bias, out: out.copy_(product(x, weight, 2 if "TEST_HIGH_IS_OFF" in os.environ else 1))
"""


def test_a_rung_that_differs_is_recorded_left_out_and_taken_again_when_it_holds(
    cli, as_json, install, own_profile, monkeypatch
):
    install(("extra", LADDER))
    own_profile("""
        ops:
          gemm:
            - dtypes: [fp32]
              candidates: [{impl: extra.low, max_m: 4}, {impl: extra.high}, {impl: extra.low}]
    """)
    verify = ("verify", "gemm", "--dtype", "fp32", "--dim", "n=5", "--dim", "k=32", "--record")
    monkeypatch.setenv("TEST_HIGH_IS_OFF", "1")
    code, report = as_json(*verify)
    assert (code, report["recorded"], report["refuted"]) == (1, 0, 1)
    assert [rung["implementation"] for rung in report["problems"][0]["refuted"]] == ["extra.high"]
    code, report = as_json(*verify)
    assert report["faults"] == []
    assert (code, report["recorded"], report["problems"][0]["implementations"]) == (0, 1, ["extra.low"])
    explain = ("explain", "gemm", "--dtype", "fp32", "--dim", "n=5", "--dim", "k=32")
    assert "its bits differed from the ladder's" in cli(*explain)[1]
    assert cli(*verify, "--retry")[0] == 1
    monkeypatch.delenv("TEST_HIGH_IS_OFF")
    assert cli(*verify)[0] == 0
    code, report = as_json(*verify, "--retry")
    assert (code, report["refuted"], report["problems"][0]["implementations"]) == (0, 0, ["extra.low", "extra.high"])
    assert "its bits differed" not in cli(*explain)[1]


def test_a_part_of_a_verification_is_every_nth_problem(as_json, cli):
    verify = ("verify", "mean", "--device", "cpu", "--dtype", "fp32", "--part")
    whole, *parts = (as_json(*verify, part)[1]["problems"] for part in ("1/1", "1/2", "2/2"))
    assert [[each["dims"] for each in part] for part in parts] == [
        [each["dims"] for each in whole[start::2]] for start in (0, 1)
    ]
    code, _, err = cli(*verify, "3")
    assert (code, "is not I/N" in err) == (2, True)


def test_shapes_of_a_file_are_verified_beside_the_usual_ones(as_json, tmp_path, cli):
    (tmp_path / "shapes.yaml").write_text("- {name: a, n: 9}\n- {name: b, n: 10, k: 5}\n")
    code, _, err = cli("verify", "mean", "--dtype", "fp32", "--shapes", str(tmp_path / "shapes.yaml"))
    assert (code, "mean has no dim 'k'" in err) == (2, True)
    (tmp_path / "shapes.yaml").write_text("- {name: a, n: 9}\n- {name: b, n: 4096}\n")
    code, report = as_json("verify", "mean", "--dtype", "fp32", "--shapes", str(tmp_path / "shapes.yaml"))
    assert code == 0
    assert sorted(problem["dims"]["n"] for problem in report["problems"]) == [9, 1003, 4096]
    assert cli("verify", "--all", "--shapes", str(tmp_path / "shapes.yaml"))[0] == 2

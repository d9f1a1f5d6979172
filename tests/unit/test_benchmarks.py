"""benchmarks/gemm.py and its plot, as far as they need no GPU: the bound, the limits, the summary, what is refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch.bench.timing import Timing, launches_for

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module(name)
    sys.modules.pop(name)


@pytest.fixture(scope="module")
def gemm():
    yield from script("gemm")


@pytest.fixture(scope="module")
def fp8():
    yield from script("fp8")


@pytest.fixture(scope="module")
def gemm_host():
    yield from script("gemm_host")


@pytest.fixture(scope="module")
def gpu_results():
    yield from script("gpu_results")


def test_parts_of_a_verification_are_merged_in_the_order_of_the_problems(gpu_results):
    def part(problems, passed, controls, seconds):
        counts = {"comparisons": len(problems), "differing": int(not passed)}
        found = {"problems": problems, "skipped": [], "faults": [] if passed else ["a fault"]}
        names = [{"name": name} for name in controls]
        served = {"device": "a GPU", "libraries": {controls: "1"}, "code": {f"module.{controls}": "0"}}
        told = {"made": "now", "passed": passed, "controls": names, "seconds": seconds, "records": "/home/me"}
        return {"environment": served, **told, **counts, **found}

    document = gpu_results.merged(
        [part([1, 4], True, "ab", 2.0), part([2, 5], False, "bc", 3.0), part([3], True, "a", 1.0)]
    )
    assert document["problems"] == [1, 2, 3, 4, 5]
    assert [control["name"] for control in document["controls"]] == ["a", "b", "c"]
    assert (document["passed"], document["comparisons"], document["differing"]) == (False, 5, 1)
    assert (document["faults"], document["seconds"], document["made"]) == (["a fault"], 3.0, "now")
    assert document["environment"]["libraries"] == {"a": "1", "ab": "1", "bc": "1"}
    assert list(document["environment"]["code"]) == ["module.a", "module.ab", "module.bc"]
    assert "records" not in document


def test_a_part_of_a_verification_without_a_problem_fails_nothing(gpu_results, tmp_path, monkeypatch):
    """There are fewer problems than processes; that nothing at all was compared is a fault."""
    said = (
        "import json, sys; has = sys.argv[-1] in {}; "
        "print(json.dumps(dict(passed=has, seconds=1, comparisons=2 * has, differing=0, controls=[], skipped=[], "
        "environment=dict(libraries=dict(), code=dict()), problems=[1] * has, "
        "faults=[] if has else ['nothing was compared']))); sys.exit(not has)"
    )
    monkeypatch.setattr(gpu_results, "WORKERS", 3)
    file = tmp_path / "verify.json"
    for with_problems, code in (("{'1/3', '2/3'}", 0), ("{}", 1)):
        monkeypatch.setattr(gpu_results, "BIDISPATCH", (sys.executable, "-c", said.format(with_problems)))
        assert gpu_results.verify(("attention",), file) == code
        document = json.loads(file.read_text())
        assert document["passed"] is not bool(code)
        assert document["faults"] == ["nothing was compared"] * code


def test_a_verification_whose_process_dies_fails_and_says_how_to_run_it_again(
    gpu_results, tmp_path, capsys, monkeypatch
):
    """Killed by a signal, as by an abort in the compiler: its exit code is negative, below the 0 of the others."""
    script = "import os, sys; sys.argv[-1] == '1/2' and os.abort(); print('{}')"
    monkeypatch.setattr(gpu_results, "BIDISPATCH", (sys.executable, "-c", script))
    monkeypatch.setattr(gpu_results, "WORKERS", 2)
    assert gpu_results.verify(("attention",), tmp_path / "verify.json") == -6
    assert "exit -6 and nothing said, so that verify.json is not written" in capsys.readouterr().out
    assert not (tmp_path / "verify.json").exists()


def test_a_file_of_other_code_than_todays_is_seen(gpu_results, tmp_path):
    module = "bidispatch_backends.triton.norm"
    file = tmp_path / "rows.json"
    for digest, found in ((gpu_results.code_digest(module), []), ("0" * 16, [module])):
        file.write_text(json.dumps({"environment": {"code": {module: digest}}}), encoding="utf-8")
        assert gpu_results.outdated(file) == found


def cell(gemm, ours=10.0, cublas=10.0, one_tile=30.0, dtype="bfloat16", m=16, floor=5.0):
    peers = {"cublas": cublas, "one_tile_128": one_tile}
    return gemm.Row("gemm", dtype, 64, 64, m, ("x qkv",), "linear", dtype, floor, ours, "a.gemm 16x64x128", peers)


def fp8_cell(fp8, ours=10.0, deep_gemm=10.0, bf16=12.0, quantised=False, **peers):
    timed = {"deep_gemm": deep_gemm, "cublas_bf16": bf16, **peers}
    quantiser = "vllm" if quantised else ""
    names = ("x qkv",)
    return fp8.Row(
        "gemm.fp8_block", "float8_e4m3fn", 64, 128, 16, names, quantised, quantiser, 5.0, ours, "a.fp8", "k", timed
    )


def test_fp8_is_judged_with_and_without_the_quantisation(fp8):
    lines, missed = fp8.summary([fp8_cell(fp8), fp8_cell(fp8, quantised=True, ours=10.1, triton=10.1)])
    assert missed == []
    assert any(line.startswith("alone, ours / deep_gemm") for line in lines)
    assert any(line.startswith("with the quantisation, ours / triton") for line in lines)
    for quantised in (False, True):
        (miss,) = fp8.summary([fp8_cell(fp8), fp8_cell(fp8, quantised=True), fp8_cell(fp8, 10.5, quantised=quantised)])[
            1
        ]
        assert ("with the quantisation" in miss) is quantised


def test_fp8_may_not_be_slower_than_bf16_where_deep_gemm_is_not(fp8):
    assert fp8_cell(fp8, ours=13.0).over_bf16
    assert not fp8_cell(fp8, ours=13.0, deep_gemm=12.5).over_bf16
    assert not fp8_cell(fp8, ours=13.0, quantised=True).over_bf16
    (miss,) = fp8.summary([fp8_cell(fp8, ours=13.0, deep_gemm=11.9, bf16=12.0), *[fp8_cell(fp8, ours=9.0)] * 9])[1]
    assert "slower than bf16" in miss


def test_fp8_without_deep_gemm_is_not_judged(fp8):
    row = fp8_cell(fp8)
    alone = dataclasses.replace(row, peers={"cublas_bf16": 12.0})
    assert fp8.summary([alone]) == (["alone, ours / cublas_bf16, geometric mean of 1 cells: 0.833"], [])


def test_fp8_shapes_are_problems_of_their_op(fp8):
    op = ops.get("gemm.fp8_block")
    for shape in fp8.named(fp8.SHAPES, []):
        problem = op.problem("fp8", shape.dims)
        flops, rate = fp8.peaks_of("NVIDIA H200")
        alone = fp8.floor_us(problem, 1, flops, rate)
        assert alone > problem.size("n") * problem.size("k") / rate * 1e6
        assert fp8.quantised_floor_us(problem, 1, flops, rate) > alone


def host(gemm_host, over, judged=True):
    return gemm_host.HostRow("bound(x, weight)", "a.gemm", 256, 256, 10.0 + over, over, judged)


def test_the_bound_is_that_of_bytes_or_of_products(gemm):
    flops, rate = gemm.peaks_of("NVIDIA H200")
    problem = ops.get("gemm").problem("bfloat16", {"n": 6144, "k": 4096})
    assert gemm.floor_us(problem, 1, flops, rate) == pytest.approx((4096 + 6144 * 4096 + 6144) * 2 / 4.8e12 * 1e6)
    assert gemm.floor_us(problem, 8192, flops, rate) == pytest.approx(2 * 8192 * 6144 * 4096 / 989e12 * 1e6)
    router = ops.get("gemm").problem("bfloat16", {"n": 256, "k": 7168, "role": "router", "out_dtype": "float32"})
    assert gemm.floor_us(router, 1, flops, rate) == pytest.approx((2 * (7168 + 256 * 7168) + 4 * 256) / 4.8e12 * 1e6)
    single = ops.get("gemm").problem("float32", {"n": 6144, "k": 4096})
    assert gemm.floor_us(single, 8192, flops, rate) == pytest.approx(2 * 8192 * 6144 * 4096 / 67e12 * 1e6)


def test_only_devices_whose_figures_are_known_have_them(gemm):
    assert gemm.peaks_of("NVIDIA H100 80GB HBM3")[1] == 3.35e12
    assert gemm.peaks_of("NVIDIA H100 PCIe") is None


@pytest.mark.parametrize(
    ("ours", "cublas", "dtype", "over"),
    [
        (11.0, 10.0, "bfloat16", False),
        (11.1, 10.0, "bfloat16", True),
        (8.6, 7.9, "bfloat16", False),  # short: 0.7 µs, whatever the ratio
        (2.6, 2.0, "float16", False),
        (2.8, 2.0, "float16", True),
        (20.0, 10.0, "float32", False),  # judged as a mean only
        (4.0, 2.0, "float32", False),
    ],
)
def test_a_cell_is_over_its_limit_by_ratio_or_if_short_by_time(gemm, ours, cublas, dtype, over):
    assert cell(gemm, ours, cublas, dtype=dtype).over_limit is over


def test_good_figures_miss_nothing(gemm):
    rows = [cell(gemm, 9.0), cell(gemm, 9.0, dtype="float16"), cell(gemm, 11.0, dtype="float32")]
    lines, missed = gemm.summary(rows)
    assert missed == []
    assert any(line.startswith("bf16: ours / cuBLAS, geometric mean of 1 cells: 0.900") for line in lines)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"ours": 10.5}, "bf16: ours / cuBLAS, geometric mean"),
        ({"ours": 11.6, "dtype": "float32"}, "fp32: ours / cuBLAS, geometric mean"),
        ({"ours": 9.9, "one_tile": 15.0}, "ours / one tile at M <= 64"),
    ],
)
def test_each_figure_that_is_missed_is_named(gemm, row, text):
    _, missed = gemm.summary([cell(gemm, **row)])
    assert [text in line for line in missed] == [True]


def test_a_slow_cell_and_a_slow_call_are_missed_by_themselves(gemm, gemm_host):
    _, missed = gemm.summary([cell(gemm, 5.0), cell(gemm, 11.5)])
    assert [line.partition(":")[0] for line in missed] == ["cell over the limit"]
    assert "M=16: ours 11.5, cuBLAS 10.0" in missed[0]
    _, missed = gemm_host.summary([host(gemm_host, 9.9), host(gemm_host, 50.0, judged=False), host(gemm_host, 10.5)])
    assert ["+10.5 over F.linear" in line for line in missed] == [True]


def test_one_tile_is_not_asked_to_be_halved_where_it_is_near_the_bound_or_large(gemm):
    rows = [cell(gemm, 9.0, one_tile=9.5), cell(gemm, 9.0, one_tile=11.0, m=128), cell(gemm, 9.0, one_tile=30.0)]
    lines, missed = gemm.summary(rows)
    assert missed == []
    assert any("of 1 cells where the one tile is within 2 times the bound: 0.947" in line for line in lines)
    assert any("where it can be halved: 0.300" in line for line in lines)


def test_shapes_are_chosen_by_name_and_fp32_takes_its_own(gemm):
    whole, single = gemm.chosen([], "bf16"), gemm.chosen([], "fp32")
    assert {(s.dims["n"], s.dims["k"]) for s in single} < {(s.dims["n"], s.dims["k"]) for s in whole}
    assert {"Qwen3-8B qkv", "Llama-3.1-8B qkv"} <= {n for s in gemm.chosen(["Qwen3-8B"], "bf16") for n in s.names}


def test_an_unknown_shape_or_dtype_is_a_usage_error(gemm, capsys):
    messages = []
    for words in (["--shape", "GPT-5"], ["--dtype", "int4"]):
        with pytest.raises(SystemExit) as exit_code:
            gemm.main(words)
        messages.append(" ".join(capsys.readouterr().err.split()))
        assert exit_code.value.code == 2
    assert "the names are Qwen3-1.7B qkv" in " ".join(messages)


def test_the_rung_that_serves_m_is_named_with_its_tile(gemm):
    with bid.override("gemm=triton.gemm"):
        rungs = bid.plan("sm90").select("gemm", dtype="bf16", n=4096, k=4096).rungs
    texts = [gemm.text_of(gemm.serving(rungs, m)) for m in (1, rungs[0].max_m, rungs[0].max_m + 1, 1 << 20)]
    assert texts[0] == texts[1] != texts[2]
    tile = rungs[0].tile
    assert texts[0].startswith(f"{rungs[0].implementation.name} {tile.block_m}x{tile.block_n}x{tile.block_k} ")
    assert gemm.text_of(rungs[-1]) == texts[3]


@pytest.mark.parametrize(
    ("sets", "estimate", "launches"), [(1, 0.0, 24), (41, 2.0, 41), (1, 100.0, 24), (1, 1000.0, 4), (1, 9e4, 1)]
)
def test_short_kernels_are_launched_often_and_every_operand_set_once(sets, estimate, launches):
    assert launches_for(sets, estimate) == launches


def test_a_result_is_plotted_one_line_a_model(gemm, tmp_path):
    import plot_gemm

    rows = [
        {"dtype": "bfloat16", "m": m, "names": ["A qkv", "B TP8 o"], "ours_us": 2.0, "peers": {"cublas": 1.0}}
        for m in (8, 1)
    ]
    assert plot_gemm.lines_of(rows, "bfloat16") == {"A": [(1, 2.0), (8, 2.0)], "B TP8": [(1, 2.0), (8, 2.0)]}
    path = tmp_path / "gemm.json"
    path.write_text(json.dumps({"environment": {"device": "NVIDIA H200"}, "rows": rows}))
    assert [written.suffix for written in plot_gemm.plot(path) if written.stat().st_size] == [".svg", ".png"]


@pytest.fixture
def on_the_processor(gemm, monkeypatch):
    """The script with a processor for a GPU: rivals are called instead of timed."""

    def called(rivals, *, operand_sets=1, estimate_us=0.0):
        for launch in rivals.values():
            for i in range(operand_sets + 1):
                launch(i)
        return {name: Timing(float(position + 1), 1.0, 1.0) for position, name in enumerate(rivals)}

    properties = SimpleNamespace(multi_processor_count=4, L2_cache_size=4096)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gemm, "interleaved", called)
    monkeypatch.setattr(gemm, "best_of_run", lambda device: (dict.fromkeys(gemm.MEAN_LIMIT, 1e12), 1e9))
    one_tile = SimpleNamespace(bind=lambda dtype, out_dtype, programs: lambda x, weight, out: out.copy_(x @ weight.t()))
    monkeypatch.setitem(sys.modules, "peers", SimpleNamespace(one_tile=one_tile))
    cpu = bid.plan("cpu")
    monkeypatch.setattr(bid, "plan", lambda device: cpu)
    was = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(was)


def test_a_run_writes_its_rows_and_exits_1_where_a_figure_is_missed(
    gemm, on_the_processor, monkeypatch, tmp_path, capsys
):
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text("- {name: A qkv, n: 64, k: 32}\n- {name: A router, n: 8, k: 32, role: router, out_dtype: fp32}\n")
    monkeypatch.setitem(gemm.MEASURED, "bf16", shapes)
    out = tmp_path / "gemm.json"
    code = gemm.main(["--dtype", "bf16", "--m", "1", "--m", "16", "--out", str(out)])
    content = json.loads(out.read_text())
    assert [(row["n"], row["m"], row["out_dtype"], row["names"]) for row in content["rows"]] == [
        (64, 1, "bfloat16", ["A qkv"]),
        (64, 16, "bfloat16", ["A qkv"]),
        (8, 1, "float32", ["A router"]),
        (8, 16, "float32", ["A router"]),
    ]
    row = content["rows"][0]
    assert (row["ours_us"], row["peers"], row["role"]) == (1.0, {"cublas": 2.0, "one_tile_128": 3.0}, "linear")
    assert row["impl"].startswith("torch_cpu.gemm")
    assert content["environment"]["floor"] == content["environment"]["measured"]
    printed = capsys.readouterr().out
    assert ("missed:" in printed) == (code == 1)
    assert "4 cells on" in printed


def test_the_hosts_time_is_taken_for_each_implementation(gemm_host, on_the_processor, monkeypatch, tmp_path):
    monkeypatch.setattr(gemm_host, "HOST_SHAPES", ((64, 64),))
    out = tmp_path / "gemm_host.json"
    code = gemm_host.main(["--out", str(out)])
    rows = json.loads(out.read_text())["host"]
    assert [(row["call"], row["impl"]) for row in rows] == [
        ("F.linear", "torch"),
        ("bound(x, weight)", "torch_cpu.gemm"),
        ("bound.launch", "torch_cpu.gemm"),
        ("F.linear in aten_overrides", ""),
    ]
    assert code == int(any(row["judged"] and row["over_linear_us"] > 10 for row in rows))

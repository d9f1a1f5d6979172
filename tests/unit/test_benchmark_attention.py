"""benchmarks/attention.py as far as it needs no GPU: bounds, cells, figures, operands, peers' calls, a whole run."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_flash_attn
import pytest
import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch.bench.timing import Captures, Timing, interleaved
from bidispatch.ops.reference.attention import attention as reference
from bidispatch.ops.reference.mla import attention_mla
from bidispatch.ops.shapes import read_shapes
from bidispatch.registry import Tile, default_registry

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEERS = ("peers.installed", "peers.flash_attention", "peers.flashinfer_attention")
NAMES = ("attention", "attention_calls", "attention_judge", *PEERS)
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "page_size": 4}


@pytest.fixture(scope="module")
def modules():
    """The script and its parts."""
    known = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in NAMES})
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in ("attention", "attention_calls", "attention_judge", "gemm", "peers"):
            del sys.modules[name]


@pytest.fixture
def attention(modules):
    return modules.attention


def shape_of(modules, **dims):
    problem = ops.get("attention").problem("bfloat16", {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, **dims})
    return modules.attention_calls.Shape.of(problem)


# --- bounds and cells -------------------------------------------------------------------------------------------------


def test_the_bound_of_decode_is_its_kv(modules):
    shape = shape_of(modules)
    assert shape.position_bytes == 4096
    floor = modules.attention_calls.floor_us(shape, "decode", 4, 32768, {"bfloat16": 989e12}, 4.8e12)
    assert floor == pytest.approx(4 * 32768 * 4096 / 4.8e12 * 1e6, rel=1e-3)


def test_the_bound_of_a_long_prefill_is_its_products(modules):
    floor = modules.attention_calls.floor_us(shape_of(modules), "prefill", 1, 8192, {"bfloat16": 989e12}, 4.8e12)
    assert floor == pytest.approx(4 * 32 * 128 * 8192 * 8193 / 2 / 989e12 * 1e6)
    short = modules.attention_calls.floor_us(shape_of(modules), "prefill", 1, 16, {"bfloat16": 989e12}, 4.8e12)
    assert short == pytest.approx(16 * (4096 + 2 * 32 * 128 * 2) / 4.8e12 * 1e6)


def test_the_latent_form_reads_its_keys_alone(modules):
    dims = {"num_heads": 128, "kv_lora_rank": 512, "rope_dim": 64, "page_size": 64}
    shape = modules.attention_calls.Shape.of(ops.get("attention.mla").problem("bfloat16", dims))
    assert (shape.position_bytes, shape.head_dim, shape.value_dim, shape.kv_heads) == (1152, 576, 512, 1)


def test_cells_end_where_the_kv_is_too_large(modules, attention):
    cells = attention.decode_cells(shape_of(modules), attention.BATCHES, attention.CONTEXTS)
    assert cells[1] == sorted(attention.CONTEXTS, reverse=True)
    assert cells[64][0] == 131072
    assert cells[256][0] == 32768
    assert attention.decode_cells(shape_of(modules), (4, 8), (1024, 2048), most_bytes=4 * 1024 * 4096) == {4: [1024]}


def test_filters_and_quick_runs(modules, attention):
    def cells(phase, *words):
        arguments, _ = attention._arguments(words)
        return attention.cells_of(phase, shape_of(modules), arguments)

    assert cells("decode", "--quick") == {1: [32768, 8192, 1024], 16: [32768, 8192, 1024], 64: [32768, 8192, 1024]}
    assert cells("decode", "--batch", "3", "--context", "100") == {3: [100]}
    assert cells("prefill") == {1: sorted(attention.PROMPTS, reverse=True)}
    assert cells("prefill", "--context", "65536") == {}
    assert len(attention.shapes_of("decode", [])) == 6
    assert [shape.names for shape in attention.shapes_of("mla", ["TP8"])] == [("DeepSeek-V3 TP8 MLA",)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "7/7"], "the names are 32/8 heads of 128"),
        (["--phase", "encode"], "invalid choice"),
        (["--batch", "0"], "0 is not between 1 and 131072"),
        (["--context", "200000"], "200000 is not between"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(attention, capsys, words, message):
    with pytest.raises(SystemExit) as exit_code:
        attention.main(words)
    assert exit_code.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("sets", "estimate", "launches"), [(1, 9000.0, 1), (5, 9000.0, 12), (1, 10.0, 24), (75, 3.0, 80), (1, 1e6, 1)]
)
def test_few_graphs_serve_every_cell(attention, sets, estimate, launches):
    assert attention.graph_launches(sets, estimate) == launches


# --- figures ----------------------------------------------------------------------------------------------------------


def row(modules, ours=100.0, phase="decode", level="sequence", batch=1, context=1024, heads=32, kv_heads=8, **peers):
    return modules.attention_judge.Row(
        op="attention",
        phase=phase,
        dtype="bfloat16",
        batch=batch,
        context=context,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        page_size=16,
        floor_us=50.0,
        ours_us=ours,
        impl="x.y",
        level=level,
        peers=peers,
    )


def missed(modules, *rows):
    return modules.attention_judge.summary(rows)[1]


def test_decode_is_held_against_the_faster_of_two_peers(modules):
    good = row(modules, 100.0, fa3_auto=200.0, flashinfer_auto=100.0)
    assert good.over("fa3_auto", "flashinfer_auto") == 1.0
    assert missed(modules, good) == []
    slow = row(modules, 118.0, batch=4, fa3_auto=300.0, flashinfer_auto=100.0)
    assert missed(modules, slow, *[row(modules, 95.0, fa3_auto=100.0)] * 9) == []
    assert len(missed(modules, slow)) == 1  # the mean alone
    fast = [row(modules, 90.0, level="batch", fa3_auto=100.0)] * 9
    (cell,) = missed(modules, row(modules, 118.0, level="batch", batch=4, fa3_auto=100.0), *fast)
    assert "level batch" in cell
    assert "1.180" in cell


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ours", "misses"), [(32, 8, 19.0, 0), (32, 8, 21.0, 1), (16, 16, 28.0, 0), (16, 16, 30.0, 1)]
)
def test_long_decodes_of_one_sequence_are_held_against_one_split(modules, heads, kv_heads, ours, misses):
    heads_of = {"heads": heads, "kv_heads": kv_heads, "fa3_1": 100.0}
    assert len(missed(modules, row(modules, ours, context=32768, **heads_of))) == misses
    assert missed(modules, row(modules, ours, context=16384, **heads_of)) == []
    assert missed(modules, row(modules, ours, context=32768, batch=2, **heads_of)) == []


def test_every_prefill_is_held_against_fa3_and_vllm(modules):
    def prefill(ours, level, **peers):
        return missed(modules, row(modules, ours, phase="prefill", level=level, **peers))

    assert prefill(104.0, "batch", fa3_auto=100.0, vllm_triton=50.0) == []
    assert len(prefill(106.0, "batch", fa3_auto=100.0)) == 1
    assert prefill(149.0, "sequence", fa3_auto=100.0, vllm_triton=150.0) == []
    assert len(prefill(151.0, "sequence", fa3_auto=100.0, vllm_triton=150.0)) == 2


def test_the_latent_form_is_held_against_flash_mla_at_level_batch(modules):
    def mla(ours, level):
        return missed(modules, row(modules, ours, phase="mla", level=level, flash_mla=100.0))

    assert mla(109.0, "batch") == []
    assert len(mla(111.0, "batch")) == 1
    assert mla(200.0, "sequence") == []


def test_the_price_of_an_absorbed_prefill_is_told_and_not_judged(modules):
    rows = [row(modules, ours, phase="mla_prefill", fa3_projected=100.0) for ours in (200.0, 450.0)]
    lines, misses = modules.attention_judge.summary(rows)
    assert misses == []
    assert [line for line in lines if "fa3_projected, geometric mean of 2 cells: 3.000" in line]


def test_the_bound_of_an_absorbed_prefill_is_its_products(modules):
    dims = {"num_heads": 128, "kv_lora_rank": 512, "rope_dim": 64, "page_size": 64}
    shape = modules.attention_calls.Shape.of(ops.get("attention.mla").problem("bfloat16", dims))
    floor = modules.attention_calls.floor_us(shape, "mla_prefill", 1, 8192, {"bfloat16": 989e12}, 4.8e12)
    assert floor == pytest.approx(2 * 128 * (576 + 512) * 8192 * 8193 / 2 / 989e12 * 1e6)


def test_what_has_no_peer_is_not_judged_and_said(modules):
    rows = [row(modules, phase=phase, context=65536) for phase in ("decode", "prefill", "mla")]
    lines, misses = modules.attention_judge.summary(rows)
    assert misses == []
    assert len([line for line in lines if "not judged" in line]) == 5
    lines, _ = modules.attention_judge.summary([row(modules, flashinfer_auto=100.0)])
    assert any("the fastest of flashinfer_auto, geometric mean of 1" in line for line in lines)


# --- operands ---------------------------------------------------------------------------------------------------------


def call_of(modules, monkeypatch, batch=2, query=1, sets=3, positions=64, width=64, dtype="float32", **dims):
    monkeypatch.setattr(modules.attention_calls, "MAX_CONTEXT", width)
    problem = ops.get("attention").problem(dtype, {**SMALL, **dims})
    calls = modules.attention_calls
    return calls.Call(calls.Pool(calls.Shape.of(problem), positions, torch.device("cpu")), batch, query, sets)


def test_operands_stay_where_they_are_and_change(modules, monkeypatch):
    call = call_of(modules, monkeypatch)
    addresses = [tensor.data_ptr() for i in range(3) for tensor in call.arguments(i) if hasattr(tensor, "data_ptr")]
    used = {}
    for context in (64, 9, 4):
        call.set_context(context)
        assert call.seq_lens.tolist() == [context] * 2
        used[context] = [call.table(i)[:, : call.pages_of(context)].flatten().tolist() for i in range(3)]
        assert [call.table(i).data_ptr() for i in (0, 3)] == [call.tables[0].data_ptr()] * 2
    assert [
        tensor.data_ptr() for i in range(3) for tensor in call.arguments(i) if hasattr(tensor, "data_ptr")
    ] == addresses
    pages = [page for table in used[9] for page in table]
    assert len(pages) == 18
    assert len(set(pages)) == 16  # as many as the pool has: the last two come again
    assert len({page for table in used[4] for page in table}) == 6


def test_a_bound_kernel_takes_them(modules, monkeypatch):
    call = call_of(modules, monkeypatch, batch=3, query=2, width=32)
    call.set_context(20)
    kernel = bid.plan("cpu").select_problem(call.problem).bind(max_tokens=6, max_seqs=3, max_seq_len=32)
    for i in range(3):
        kernel.launch(*call.arguments(i))
        (wanted,) = reference(call.problem, *call.arguments(i)[:-1])
        torch.testing.assert_close(call.out.double(), wanted, rtol=1e-4, atol=1e-4)
    assert call.names_by_token() == ["q"]


def test_large_caches_repeat_what_was_drawn(modules, monkeypatch):
    monkeypatch.setattr(modules.attention_calls, "_DRAWN", 100)
    call = call_of(modules, monkeypatch, positions=32)
    flat = call["k_cache"].flatten()
    assert torch.equal(flat[:100], flat[100:200])
    assert torch.equal(flat[500:], flat[: len(flat) - 500])
    assert flat[:100].unique().numel() > 90


# --- peers ------------------------------------------------------------------------------------------------------------


def test_ops_are_called_by_name_whatever_their_version_adds(modules):
    installed = modules.installed
    library = torch.library.Library("bidispatch_bench_test", "DEF")
    library.define(
        "fwd(Tensor q, Tensor? k_new, int window_size_left, float scale, bool zero, int splits, int more=3) -> Tensor"
    )
    library.impl("fwd", lambda q, k_new, left, scale, zero, splits, more=3: q * scale + left + splits, "CPU")
    op = torch.ops.bidispatch_bench_test.fwd.default
    run = installed.call_op(op, {"q": torch.ones(2), "scale": 2.0, "splits": 5, "unknown": 1})
    assert run().tolist() == [6.0, 6.0]
    with pytest.raises(installed.AbsentError, match="int splits"):
        installed.call_op(op, {"q": torch.ones(2), "scale": 2.0})
    assert installed.load_op("bidispatch_bench_test", "fwd", "none*.so", ()) is op


def test_a_library_that_is_nowhere_or_does_not_load_is_absent(modules, tmp_path):
    installed = modules.installed
    with pytest.raises(installed.AbsentError, match="no _nobody_C"):
        installed.load_op("_nobody_C", "fwd", "_nobody_C*.so", (tmp_path,))
    (tmp_path / "_nobody_C.abi3.so").write_bytes(b"not a library")
    with pytest.raises(installed.AbsentError, match="does not load"):
        installed.load_op("_nobody_C", "fwd", "_nobody_C*.so", (tmp_path,))


def test_flashinfer_is_planned_for_every_block_table_and_length(modules, monkeypatch):
    plans = []

    class Wrapper:
        def __init__(self, workspace, layout, **buffers):
            assert (layout, buffers["use_tensor_cores"], buffers["use_cuda_graph"]) == ("NHD", True, True)
            self.room = buffers["paged_kv_indices_buffer"].numel()

        def plan(self, starts, pages, last, heads, kv_heads, head_dim, page_size, **options):
            assert len(pages) == starts[-1] <= self.room
            plans.append((starts.tolist(), last.tolist(), heads, kv_heads, head_dim, page_size))

        def run(self, q, cache, out):
            return out.copy_(q)

    library = ModuleType("flashinfer")
    library.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.setattr(modules.flashinfer_attention, "_WORKSPACE", 16)
    call = call_of(modules, monkeypatch)
    peer = modules.flashinfer_attention.decode(call)
    for context in (64, 9):
        call.set_context(context)
        peer.prepare()
    assert plans == [([0, 16, 32], [4, 4], 4, 2, 8, 4)] * 3 + [([0, 3, 6], [1, 1], 4, 2, 8, 4)] * 3
    peer.launch(7)
    assert torch.equal(call.out, call["q"])


@pytest.mark.parametrize(("query", "context"), [(1, 50), (40, 40)])
def test_fa3_takes_the_latent_form_apart(modules, monkeypatch, query, context):
    """Views of the op's tensors, with q_v, as vLLM's backend hands them over; a whole prompt has FA3's own choice."""
    fake_flash_attn.register()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(modules.attention_calls, "MAX_CONTEXT", 64)
    problem = ops.get("attention.mla").problem("float16", {"num_heads": 2, "page_size": 16})
    calls = modules.attention_calls
    call = calls.Call(calls.Pool(calls.Shape.of(problem), 64, torch.device("cpu")), 1, query, 1)
    call.set_context(context)
    modules.flash_attention.fa3(call, (), num_splits=1).launch(0)
    (wanted,) = attention_mla(problem, *call.arguments(0)[:-1])
    torch.testing.assert_close(call.out.double(), wanted, rtol=1e-2, atol=1e-2)
    assert "fa3_latent_auto" in modules.attention.peers_of("mla", ())
    assert "fa3_latent_auto" in modules.attention.peers_of("mla_prefill", ())


# --- launch shapes ----------------------------------------------------------------------------------------------------


def test_launch_shapes_around_a_ladder_are_of_one_class(attention):
    plan = bid.plan("sm90")
    found = default_registry().get("triton.paged_attention")
    problem = ops.get("attention").problem("bfloat16", {**SMALL, "head_dim": 128, "page_size": 16})
    params = found.params()
    ladder = found.tiles(plan.device, problem, params)
    tiles = list(attention.candidates(ladder))
    assert tiles[0] == ladder[0][1]
    assert len(tiles) == len({str(tile) for tile in tiles}) > 5
    assert {type(tile) for tile in tiles} == {found.tile}
    assert attention.differing(tiles[0], tiles[0]) == "as it is"
    assert "=" in attention.differing(tiles[1], tiles[0])


class Width(Tile):
    width: int = 4


def test_launch_shapes_are_timed_beside_the_ladder(attention, on_the_processor, monkeypatch, tmp_path, capsys):
    def tiled(name):
        return replace(
            default_registry().get(name.replace("triton", "torch_cpu")),
            tile=Width,
            tiles=lambda device, problem, params: ((2, Width()), (None, Width(width=8))),
        )

    monkeypatch.setattr(attention, "default_registry", lambda: SimpleNamespace(get=tiled))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert attention.main(["--try", "--batch", "1", "--context", "9"]) == 0
    printed = capsys.readouterr().out
    assert "best for decode small batch 1 context 9: ladder, 1.000 of the ladder's time" in printed
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith("    ")][2:] == [
        "width=2", "width=8", "width=16"
    ]  # fmt: skip
    latent = tmp_path / "latent.yaml"
    latent.write_text("- {name: small latent, num_heads: 4, kv_lora_rank: 8, rope_dim: 4, page_size: 4}\n")
    monkeypatch.setitem(attention.SWEEPS, "mla", latent)
    assert attention.main(["--try", "--phase", "prefill", "--phase", "mla", "--batch", "1", "--context", "9"]) == 0
    printed = capsys.readouterr().out
    assert "best for prefill small batch 1 context 9: ladder" in printed
    assert "best for mla small latent batch 1 context 9: ladder" in printed


# --- a whole run ------------------------------------------------------------------------------------------------------


class CalledCaptures:
    """In the place of graphs: every rival is called, and takes as long as its place among them."""

    def __init__(self, rivals):
        self.rivals = dict(rivals)

    def capture(self, launches):
        for launch in self.rivals.values():
            launch(0)

    def timed(self, launches, *, replays=None):
        self.capture(launches)
        for launch in self.rivals.values():
            launch(launches - 1)
        return {name: Timing(float(place + 1), 1.0, 1.0) for place, name in enumerate(self.rivals)}


@pytest.fixture
def on_the_processor(modules, attention, monkeypatch, tmp_path):
    """The script with a processor for a GPU, small heads, and lengths up to 64."""
    shapes = tmp_path / "attention.yaml"
    shapes.write_text("- {name: small, num_heads: 4, num_kv_heads: 2, head_dim: 8, page_size: 4}\n")
    monkeypatch.setattr(attention, "SWEEPS", {**attention.SWEEPS, "decode": shapes, "prefill": shapes})
    for module in (attention, modules.attention_calls):
        monkeypatch.setattr(module, "MAX_CONTEXT", 64)
    monkeypatch.setattr(attention, "MOST_SETS", 3)
    monkeypatch.setattr(attention, "Captures", CalledCaptures)
    monkeypatch.setattr(attention, "best_of_run", lambda device: ({"bfloat16": 1e9}, 1e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1024))
    cpu = bid.plan("cpu")
    monkeypatch.setattr(bid, "plan", lambda device, require=None, cuda_graph=False: cpu)
    was = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(was)


def test_a_run_writes_its_rows(modules, attention, on_the_processor, monkeypatch, tmp_path, capsys):
    installed = modules.installed
    prepared = []

    def absent(call):
        raise installed.AbsentError("nobody brings it")

    def stock(call):
        def prepare():
            prepared.append((call.batch, call.context))

        return installed.Peer(lambda i: call.out.zero_(), prepare)

    monkeypatch.setattr(attention, "peers_of", lambda phase, folders: {"fa3_auto": stock, "fa2_1": absent})
    out = tmp_path / "attention.json"
    words = ["--batch", "1", "--batch", "3", "--context", "8", "--context", "33", "--out", str(out)]
    code = attention.main([*words, "--phase", "decode"])
    content = json.loads(out.read_text())
    found = [(row["batch"], row["context"], row["level"]) for row in content["rows"]]
    assert found == [(b, c, level) for b in (1, 3) for c in (33, 8) for level in ("batch", "sequence")]
    first = content["rows"][0]
    assert (first["ours_us"], first["peers"], first["phase"]) == (1.0, {"fa3_auto": 2.0}, "decode")
    assert (first["heads"], first["kv_heads"], first["head_dim"], first["page_size"]) == (4, 2, 8, 4)
    assert first["impl"].startswith("torch_cpu.paged_attention")
    assert content["environment"]["absent"] == {"decode fa2_1": "AbsentError: nobody brings it"}
    assert content["environment"]["captured_at"] == 64
    assert prepared == [(1, 64), (1, 33), (1, 8), (3, 64), (3, 33), (3, 8)]
    printed = capsys.readouterr().out
    assert printed.count("fa2_1 is left out") == 1
    assert "not there: decode fa2_1" in printed
    assert code == int("missed:" in printed) == 0


def test_phases_without_a_kernel_are_skipped_and_said(attention, on_the_processor, monkeypatch, capsys):
    monkeypatch.setattr(attention, "peers_of", lambda phase, folders: {})
    code = attention.main(["--quick", "--batch", "1", "--context", "16"])
    printed = capsys.readouterr().out
    assert code == 0
    assert "prefill 4/2x8 batch 1 context 16" in printed
    if not ops.get("attention.mla").arguments:
        assert "the op attention.mla has no kernel yet" in printed


def test_a_slow_run_exits_1(modules, attention, on_the_processor, monkeypatch, capsys):
    class Slow(CalledCaptures):
        def timed(self, launches, *, replays=None):
            return {name: Timing(1.0 if name == "fa3_auto" else 5.0, 1.0, 1.0) for name in self.rivals}

    monkeypatch.setattr(attention, "Captures", Slow)
    peer = modules.installed.Peer(lambda i: None)
    monkeypatch.setattr(attention, "peers_of", lambda phase, folders: {"fa3_auto": lambda call: peer})
    assert attention.main(["--phase", "decode", "--batch", "1", "--context", "16"]) == 1
    assert "missed: decode, level batch: ours / the fastest of fa3_auto" in capsys.readouterr().out


def test_kernels_that_cannot_be_captured_are_left_out(attention, capsys):
    plan = bid.plan("cpu", cuda_graph=True)
    bench = attention.Bench({"batch": plan}, ({"bfloat16": 1.0}, 1.0), (), print)
    problem = ops.get("attention").problem("bfloat16", SMALL)
    assert bench.kernels(problem, attention.Limits(1, 1, 64, 1)) == ({}, {})
    printed = capsys.readouterr().out
    assert "at level batch is left out" in printed
    assert "cannot be captured in a CUDA graph, which the plan requires" in printed


# --- the timing protocol ----------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """Captures that note what is launched; a replay takes as many microseconds as it has launches."""
    captured = []

    def capture(launch, launches):
        for i in range(launches):
            launch(i)
        captured.append(launches)
        return launches

    monkeypatch.setattr("bidispatch.bench.timing._captured", capture)
    monkeypatch.setattr("bidispatch.bench.timing._replay_us", lambda graph: 3.0 * graph)
    return captured


def test_a_graph_is_captured_once_for_each_number_of_launches(graphs):
    seen = []
    captures = Captures({"a": seen.append, "b": lambda i: None})
    for launches in (2, 4, 2, 4):
        timed = captures.timed(launches)
        assert {name: timing.median_us for name, timing in timed.items()} == {"a": 3.0, "b": 3.0}
    assert graphs == [2, 2, 4, 4]
    assert seen == [0, 1, 0, 1, 2, 3]


def test_rivals_timed_once_are_captured_once(graphs):
    timed = interleaved({"a": lambda i: None}, operand_sets=30, estimate_us=1.0, replays=5)
    assert (graphs, timed["a"].median_us) == ([30], 3.0)


def test_the_features_of_attention_occur_in_pairs():
    """Every value of one with every value of each other, but for a window without causality, which no layer has."""
    shapes = read_shapes(BENCHMARKS / "sweeps" / "attention_features.yaml")
    problems = [ops.get("attention").problem("bfloat16", shape.dims) for shape in shapes]
    seen = [
        {name: value for name, value in problem.dims.items() if name not in ("num_heads", "num_kv_heads")}
        | {"group": problem.size("num_heads") // problem.size("num_kv_heads"), "window": problem.size("window")}
        for problem in problems
    ]
    values = {name: {dims[name] for dims in seen} for name in seen[0]}
    assert values["head_dim"] == {64, 80, 96, 128, 192, 256}
    assert all(len(found) > 1 for found in values.values())
    for one, other in combinations(values, 2):
        pairs = {(dims[one], dims[other]) for dims in seen}
        wanted = set(product(values[one], values[other]))
        if (one, other) == ("causal", "window"):
            wanted = {(causal, window) for causal, window in wanted if causal or not window}
        assert wanted <= pairs, (one, other, wanted - pairs)

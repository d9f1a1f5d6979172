"""The audit: every op a forward runs is seen, and only what is known to be safe is called so."""

from __future__ import annotations

import json
import re

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from bidispatch.audit import models  # noqa: E402
from bidispatch.audit.models import _first_layers, audit_builtin, audit_transformers  # noqa: E402
from bidispatch.audit.trace import COVERED, ROW_LOCAL, UNCOVERED, Trace  # noqa: E402
from bidispatch.cli import main  # noqa: E402
from bidispatch.demo.config import ModelConfig  # noqa: E402
from bidispatch.device import Device  # noqa: E402
from bidispatch.planning.plan import plan  # noqa: E402
from bidispatch.rowlocal import GROUPS, REASON_OF  # noqa: E402

TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


def verdicts(run) -> dict[str, str]:
    """The verdict on each op that `run` executes, by name without overload."""
    with Trace() as trace:
        run()
    return {entry.op.split(".")[1]: entry.verdict for entry in trace.entries}


X = torch.randn(5, 8)
B = torch.randn(2, 5, 8)
COUNTS = torch.arange(6)

UNSAFE = {
    "mm": lambda: X @ X.T,
    "addmm": lambda: F.linear(X, torch.randn(3, 8), torch.randn(3)),
    "bmm": lambda: B @ B.mT,
    "sum": lambda: X.sum(-1),
    "mean": lambda: X.mean(-1),
    "cumsum": lambda: X.cumsum(-1),
    "prod": lambda: X.prod(-1),
    "_softmax": lambda: X.softmax(-1),
    "_log_softmax": lambda: X.log_softmax(-1),
    "linalg_vector_norm": lambda: torch.linalg.vector_norm(X, dim=-1),
    "native_layer_norm": lambda: F.layer_norm(X, (8,)),
    "convolution": lambda: F.conv1d(B, torch.randn(3, 5, 2)),
    "logsumexp": lambda: X.logsumexp(-1),
    "var": lambda: X.var(-1),
    "index_add": lambda: X.index_add(0, torch.tensor([0, 0]), X[:2]),
    "index_put_": lambda: X.clone().index_put_((torch.tensor([0, 0]),), X[:2], accumulate=True),
    "scatter_add": lambda: X.scatter_add(0, torch.zeros(5, 8, dtype=torch.int64), X),
    "scatter": lambda: X.scatter(0, torch.zeros(5, 8, dtype=torch.int64), 1.0, reduce="add"),
    "bernoulli_": lambda: torch.empty(5).bernoulli_(0.5),
    "rand": lambda: torch.rand(3),
    "_cdist_forward": lambda: torch.cdist(X, X),
    "silu": lambda: F.silu(X),  # on a processor; see trace.py
    "rsqrt": lambda: X.abs().rsqrt(),
    "add": lambda: torch.add(X, X, alpha=0.3),
    "addcmul": lambda: torch.addcmul(X, X, X),
}

SAFE = {
    "view": lambda: X.view(-1),
    "clone": lambda: X.clone(),
    "add": lambda: X + X,
    "mul_": lambda: X.clone().mul_(2),
    "sub": lambda: X - 1,
    "div": lambda: X / 3,
    "argmax": lambda: X.argmax(-1),
    "topk": lambda: X.topk(2),
    "max": lambda: X.max(-1),
    "index": lambda: X[torch.tensor([1, 0])],
    "index_put_": lambda: X.clone().index_put_((torch.tensor([0, 1]),), X[:2]),
    "embedding": lambda: F.embedding(COUNTS % 5, X),
    "_to_copy": lambda: X.bfloat16(),
    "where": lambda: torch.where(X > 0, X, -X),
    "sum": lambda: COUNTS.sum(),
    "cumsum": lambda: COUNTS.cumsum(0),
    "__lshift__": lambda: COUNTS << 2,
    "cat": lambda: torch.cat((X, X)),
    "zeros": lambda: torch.zeros(3),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_what_may_follow_the_batch_is_uncovered(name):
    assert verdicts(UNSAFE[name])[name] == UNCOVERED


@pytest.mark.parametrize("name", SAFE)
def test_what_is_exact_or_row_local_is_said_to_be(name):
    found = verdicts(SAFE[name])
    assert found[name] == ROW_LOCAL
    assert UNCOVERED not in found.values()


@pytest.mark.parametrize("name", ["mm", "addmm", "_softmax"])
def test_a_composite_op_is_taken_apart_under_inference_mode_too(name):
    with torch.inference_mode():
        assert verdicts(UNSAFE[name])[name] == UNCOVERED


def test_attention_of_torch_is_uncovered_under_whatever_name_it_runs():
    q = torch.randn(1, 2, 5, 16)
    with torch.inference_mode():
        found = verdicts(lambda: F.scaled_dot_product_attention(q, q, q))
    assert UNCOVERED in found.values()


def test_an_op_nobody_knows_is_uncovered():
    library = torch.library.Library("somebody", "FRAGMENT")
    library.define("mul(Tensor x) -> Tensor")
    library.impl("mul", lambda x: x + 0, "CompositeExplicitAutograd")
    assert verdicts(lambda: torch.ops.somebody.mul(X)) == {"mul": UNCOVERED}


def test_calls_are_counted_and_uncovered_ops_come_first():
    with Trace() as trace:
        for _ in range(3):
            X.clone()
        X.sum()
    assert [(entry.verdict, entry.op, entry.calls) for entry in trace.entries] == [
        (UNCOVERED, "aten.sum.default", 1),
        (ROW_LOCAL, "aten.clone.default", 3),
    ]


def test_every_listed_op_exists_and_is_listed_once():
    assert sum(len(group.names) for group in GROUPS) == len(REASON_OF)
    missing = [n for n in REASON_OF if not hasattr(torch.ops.aten, n) and not hasattr(torch.ops.aten, n + "_")]
    assert missing == []


ELEMENTWISE = ("abs", "ceil", "floor", "frac", "neg", "reciprocal", "relu", "round", "sgn", "sign", "sqrt", "square")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*ELEMENTWISE, "add", "sub", "mul", "div", "rsub", "floor_divide"])
def test_a_listed_elementwise_op_gives_a_value_its_bits_wherever_it_stands(name, dtype):
    function, operands = getattr(torch, name), 1 if name in ELEMENTWISE else 2
    x = [torch.randn(1003).exp().to(dtype) for _ in range(operands)]
    whole = function(*x)
    for i in (0, 1, 500, 1001, 1002):
        alone = function(*(tensor[i : i + 1].clone() for tensor in x))
        kind = torch.int32 if dtype is torch.float32 else torch.int16
        assert torch.equal(alone.view(kind), whole[i : i + 1].view(kind))


def test_the_built_in_model_runs_nothing_uncovered_in_prefill_chunks_and_decode():
    audit = audit_builtin(plan("cpu"), ModelConfig.parse(TINY), dtype="float32")
    assert audit.passed
    covered = {entry.op.split(".")[1] for entry in audit.entries if entry.verdict == COVERED}
    assert covered == {"gemm", "rms_norm", "fused_add_rms_norm", "silu_and_mul", "attention", "log_softmax"}
    assert "0 chunks" not in audit.steps
    assert "0 with prefill and decode mixed" not in audit.steps


def test_a_model_with_a_sum_of_its_own_does_not_pass(monkeypatch):
    from bidispatch.demo import model

    rotate = model.rotate
    monkeypatch.setattr(model, "rotate", lambda x, cos, sin: rotate(x, cos, sin) + 0 * x.mean(-1, keepdim=True))
    audit = audit_builtin(plan("cpu"), ModelConfig.parse(TINY), dtype="float32")
    assert [entry.op for entry in audit.uncovered] == ["aten.mean.dim"]
    assert not audit.passed


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_the_command_lists_every_op_and_exits_by_what_it_finds(folder, capsys):
    assert main(["audit", "--model", str(folder), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "bidispatch.attention" in out
    assert "0 of" in out
    assert main(["audit", "--model", str(folder), "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["uncovered"] == 0
    assert document["passed"]
    assert {entry["verdict"] for entry in document["ops"]} == {COVERED, ROW_LOCAL}


def test_a_stock_transformers_model_is_uncovered(folder, capsys, recwarn):
    pytest.importorskip("transformers")
    arguments = ["audit", "--model", str(folder), "--framework", "transformers", "--device", "cpu", "--json"]
    assert main(arguments) == 1
    document = json.loads(capsys.readouterr().out)
    uncovered = {entry["op"] for entry in document["ops"] if entry["verdict"] == UNCOVERED}
    assert {"aten.mm.default", "aten.mean.dim"} <= uncovered
    assert not any(entry["verdict"] == COVERED for entry in document["ops"])


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_under_the_overrides_nothing_is_uncovered(tmp_path, capsys, recwarn, kind):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": kind, "architectures": None}))
    words = ["--model", str(tmp_path), "--framework", "transformers", "--overrides", "--device", "cpu", "--json"]
    assert main(["audit", *words]) == 0
    entries = json.loads(capsys.readouterr().out)["ops"]
    assert {e["op"] for e in entries if e["verdict"] == "covered"} == {
        "bidispatch.aten_bmm.default",
        "bidispatch.aten_linear.default",
        "bidispatch.aten_reduce.default",
        "bidispatch.aten_softmax.default",
        "bidispatch.elementwise.default",
    }
    assert {e["verdict"] for e in entries} == {COVERED, ROW_LOCAL}


def test_the_built_in_decoder_takes_no_overrides():
    assert main(["audit", "--overrides", "--device", "cpu"]) == 2


def test_a_folder_transformers_cannot_read_is_a_usage_error(tmp_path, capsys, recwarn):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    assert main(["audit", "--model", str(tmp_path), "--framework", "transformers", "--device", "cpu"]) == 2
    assert "transformers cannot make a causal model" in capsys.readouterr().err


def layers_kept(config) -> tuple[int, int]:
    """Layers of a config of transformers, and how many of the first the audit keeps."""
    transformers = pytest.importorskip("transformers")

    def outline(config):
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)

    kept, model = _first_layers(config, outline)
    count = kept.get_text_config().num_hidden_layers
    assert any(isinstance(m, torch.nn.ModuleList) and len(m) == count for m in model.modules())
    return config.get_text_config().num_hidden_layers, count


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("qwen3", (32, 2)),
        ("gpt2", (12, 2)),  # calls its layers n_layer
        ("gemma3_text", (26, 6)),  # five sliding ones, then a full one
        ("deepseek_v3", (61, 4)),  # three dense ones, then experts
        ("gemma3n_text", (35, 35)),  # the last ones share keys, which no prefix shows
    ],
)
def test_the_first_layers_that_hold_every_kind_are_kept(kind, expected, recwarn):
    mapping = pytest.importorskip("transformers").CONFIG_MAPPING
    if kind not in mapping:
        pytest.skip(f"this transformers has no {kind}")
    assert layers_kept(mapping[kind]()) == expected


def test_the_first_layers_run_every_op_of_the_whole_model(tmp_path, monkeypatch, recwarn):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 5}))
    part = audit_transformers(tmp_path, Device.parse("cpu"), dtype="float32").entries
    monkeypatch.setattr(models, "_first_layers", lambda config, outline: (config, outline(config)))
    whole = audit_transformers(tmp_path, Device.parse("cpu"), dtype="float32").entries
    assert {(entry.op, entry.verdict) for entry in part} == {(entry.op, entry.verdict) for entry in whole}
    assert sum(entry.calls for entry in part) < sum(entry.calls for entry in whole)


@pytest.mark.parametrize("framework", ["builtin", "transformers"])
def test_a_model_bigger_than_memory_is_refused_before_it_is_made(tmp_path, capsys, recwarn, framework):
    if framework == "transformers":
        pytest.importorskip("transformers")
    # 2**32 * 64 fp32 weights in the embedding and as many in the head: 2 TiB
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"vocab_size": 2**32}))
    assert main(["audit", "--model", str(tmp_path), "--framework", framework, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert re.search(r"needs \d{4}\.\d GiB on cpu, \d+\.\d GiB are free there; free some, or ", err)


def test_transformers_that_is_missing_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert main(["audit", "--model", str(folder), "--framework", "transformers", "--device", "cpu"]) == 3
    assert "pip install transformers" in capsys.readouterr().err

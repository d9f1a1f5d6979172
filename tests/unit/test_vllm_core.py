"""The parts of the vLLM integration that need no vLLM: the switch, seams in sources, patches, ops, tables, reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from unpacked_vllm import unpacked

import bidispatch
from bidispatch.cli import main
from bidispatch.errors import BackendError, SelectionError, UsageError
from bidispatch.integrations.vllm import adopt, compat, from_config, mode, ops, plugin, table
from bidispatch.integrations.vllm.mode import Mode, read_mode, require_same_switch, share_variables
from bidispatch.integrations.vllm.patches import Patches

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Mode.OFF),
        ({"VLLM_BATCH_INVARIANT": "0"}, Mode.OFF),
        ({"VLLM_BATCH_INVARIANT": "1"}, Mode.ON),
        ({"VLLM_BATCH_INVARIANT": "1", "BIDISPATCH_VLLM": "off"}, Mode.OFF),
        ({"VLLM_BATCH_INVARIANT": "1", "BIDISPATCH_VLLM": "STRICT"}, Mode.STRICT),
        ({"BIDISPATCH_VLLM": "off"}, Mode.OFF),
    ],
)
def test_mode(variables: dict[str, str], expected: Mode) -> None:
    assert read_mode(variables) is expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BIDISPATCH_VLLM": "on"}, "needs VLLM_BATCH_INVARIANT=1"),
        ({"BIDISPATCH_VLLM": "strict", "VLLM_BATCH_INVARIANT": "0"}, "needs VLLM_BATCH_INVARIANT=1"),
        ({"BIDISPATCH_VLLM": "strickt", "VLLM_BATCH_INVARIANT": "1"}, "did you mean 'strict'"),
        ({"VLLM_BATCH_INVARIANT": "yes"}, "is not a number"),
    ],
)
def test_variables_that_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_mode(variables)


def test_a_switch_that_came_too_late_is_refused() -> None:
    name = next(iter(mode._FROZEN))
    require_same_switch({name: SimpleNamespace(is_batch_invariant=True)})
    require_same_switch({})
    with pytest.raises(UsageError, match="was set after"):
        require_same_switch({name: SimpleNamespace(is_batch_invariant=False)})


ALL_SEAMS = (*compat.SEAMS, *compat.UNIMPORTED, *compat.READ, *compat.LIFTED)


def line_of(seam: compat.Seam) -> str:
    name = seam.path.rpartition(".")[2]
    if seam.kind is compat.Kind.SET:
        return f"def set_{name}(self): self.{name} = 1"
    if seam.kind is compat.Kind.BOUND:
        return f"{name} = 1" if "." in seam.path else f"from elsewhere import {name}"
    arguments = ", ".join(seam.parameters.split())
    return f"def {name}({arguments}): pass" if arguments else f"class {name}: pass"


def sources(root: Path, seams=ALL_SEAMS) -> Path:
    """A vLLM of nothing but its seams."""
    texts: dict[str, dict[str, list[str]]] = {}
    for seam in seams:
        owner = seam.path.rpartition(".")[0]
        texts.setdefault(seam.module, {}).setdefault(owner, []).append(line_of(seam))
    for module, owners in texts.items():
        file = root.joinpath(*module.split(".")).with_suffix(".py")
        if any(other.startswith(f"{module}.") for other in texts):
            file = root.joinpath(*module.split("."), "__init__.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for owner, body in owners.items():
            lines += [f"class {owner}:", *(f"    {each}" for each in body)] if owner else body
        file.write_text("\n".join(lines) + "\n")
    return root / "vllm"


@pytest.mark.parametrize("version", ["0.25.0", "0.25.1", "0.29.0", "0.33.0", "0.33.2+cu130"])
def test_known_versions(tmp_path: Path, version: str) -> None:
    compat.check(version, sources(tmp_path))


@pytest.mark.parametrize("version", ["0.24.9", "0.34.0", "1.0", "dev"])
def test_unknown_versions_are_named(tmp_path: Path, version: str) -> None:
    with pytest.raises(BackendError, match=f"vLLM {version} is not one"):
        compat.check(version, sources(tmp_path))


@pytest.mark.parametrize("seam", ALL_SEAMS, ids=lambda seam: seam.name)
def test_every_missing_seam_is_named(tmp_path: Path, seam: compat.Seam) -> None:
    root = sources(tmp_path, [each for each in ALL_SEAMS if each is not seam])
    with pytest.raises(BackendError, match=rf"{seam.module}(\.{seam.path})? is not there"):
        compat.check("0.33.0", root)


@pytest.mark.parametrize("seam", compat.ENGINE, ids=lambda seam: seam.name)
def test_every_missing_seam_of_the_check_is_named(tmp_path: Path, seam: compat.Seam) -> None:
    assert compat.faults(sources(tmp_path / "whole", compat.ENGINE), "0.33.0", compat.ENGINE) == []
    root = sources(tmp_path, [each for each in compat.ENGINE if each is not seam])
    (fault,) = compat.faults(root, "0.33.0", compat.ENGINE)
    assert seam.module in fault
    assert fault.endswith("is not there")


def test_a_name_that_is_bound_by_a_condition_is_not_taken_for_granted(tmp_path: Path) -> None:
    seam = next(seam for seam in compat.SEAMS if seam.name == "fp8_kernel_linear")
    file = sources(tmp_path, [seam]).joinpath(*seam.module.split(".")[1:]).with_suffix(".py")
    file.write_text(f"if elsewhere:\n    from elsewhere import {seam.path}\n")
    assert compat.faults(tmp_path / "vllm", "0.33.0", [seam]) == [f"{seam.where} is not there"]


def test_another_signature_is_named(tmp_path: Path) -> None:
    seam = next(seam for seam in compat.SEAMS if seam.name == "linear")
    other = replace(seam, parameters="self layer x bias scale")
    root = sources(tmp_path, [other if each is seam else each for each in ALL_SEAMS])
    with pytest.raises(BackendError, match=r"apply takes \(self layer x bias scale\), known is \(self layer x bias\)"):
        compat.check("0.33.0", root)


def test_parameters_of_later_versions_are_known_behind_the_others(tmp_path: Path) -> None:
    seam = next(seam for seam in ALL_SEAMS if seam.later)
    for text, known in ((f"{seam.parameters} {seam.later}", True), (f"{seam.later} {seam.parameters}", False)):
        root = sources(tmp_path / str(known), [replace(seam, parameters=text)])
        assert len(compat.faults(root, "0.33.0", [seam])) == (0 if known else 1)


def test_what_later_versions_have_is_not_asked_of_earlier_ones(tmp_path: Path) -> None:
    root = sources(tmp_path, [each for each in ALL_SEAMS if not each.since])
    compat.check("0.30.0", root)
    with pytest.raises(BackendError, match=r"vllm\.config\.vllm is not there"):
        compat.check("0.31.0", root)


def test_seams_of_an_unpacked_wheel() -> None:
    wheels = unpacked()
    if not wheels:
        pytest.skip("BIDISPATCH_VLLM_SOURCES names no unpacked wheel")
    seams = (*ALL_SEAMS, *compat.ENGINE)
    assert {version: compat.faults(folder, version, seams) for version, folder in wheels.items()} == {
        version: [] for version in wheels
    }


def test_the_plugin_module_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, bidispatch.integrations.vllm.plugin as p; p.register();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm')))"
    )
    environment = {name: value for name, value in os.environ.items() if "VLLM" not in name}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_plugin_without_vllm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match="BIDISPATCH_VLLM=off"):
        plugin.register()
    assert not plugin.active()


def test_patches_restore_what_was_inherited() -> None:
    class Base:
        def run(self) -> str:
            return "base"

    class Derived(Base):
        own = 1

    patches = Patches()
    patches.replace(Derived, "run", lambda self: "ours")
    patches.replace(Derived, "own", 2)
    assert (Derived().run(), Derived.own, len(patches)) == ("ours", 2, 2)
    patches.undo()
    assert (Derived().run(), Derived.own, len(patches)) == ("base", 1, 0)
    assert "run" not in vars(Derived)


@pytest.fixture
def kernels():
    yield bidispatch.plan("cpu", require="sequence")
    ops.forget()


def test_layers_of_one_place_share_a_kernel_and_others_do_not(kernels) -> None:
    selection = kernels.select("gemm", dtype="bfloat16", n=8, k=16)
    first = ops.register("model.layers.0.mlp.up", selection, 16)
    assert ops.register("model.layers.11.mlp.up", selection, 16) == first
    assert ops.register("model.layers.0.mlp.shared.up", selection, 16) != first
    assert len(ops.bound_names()) == 2


def test_a_kernel_of_another_start_is_an_error(kernels) -> None:
    with pytest.raises(UsageError, match="compile cache"):
        ops.linear("gone", torch.ones(1, 2), torch.ones(3, 2), None, torch.float32)


def test_more_rows_than_bound_bind_again_with_the_same_bits(kernels) -> None:
    name = ops.register("proj", kernels.select("gemm", dtype="bfloat16", n=8, k=16), 4)
    x, weight = torch.randn(33, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    few = ops.linear(name, x[:3], weight, None, torch.bfloat16)
    assert torch.equal(ops.linear(name, x, weight, None, torch.bfloat16)[:3], few)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_scales_of_rows_lie_as_deep_gemm_reads_them(kernels, rows: int) -> None:
    quantize = ops.register("proj", kernels.select("quantize.fp8_group", dtype="bfloat16", k=256), 8)
    dims = {"n": 128, "k": 256, "out_dtype": "bfloat16"}
    product = ops.register("proj", kernels.select("gemm.fp8_block", dtype="float8_e4m3fn", **dims), 8)
    kernel = ops._kernel(product, rows)
    launch, seen = kernel.launch, []
    kernel.launch = lambda *arguments: (seen.append(arguments[1]), launch(*arguments))
    x, weight = torch.randn(rows, 256).bfloat16(), torch.randn(128, 256).to(torch.float8_e4m3fn)
    out = ops.fp8_block_linear(quantize, product, x, weight, torch.rand(1, 2), None)
    assert out.shape == (rows, 128)
    (scales,) = seen
    assert scales.stride() == (1, -(-rows // 4) * 4)


def test_compiled_graphs_are_marked_and_a_foreign_config_is_refused(kernels) -> None:
    config = SimpleNamespace(additional_config={"mine": 1})
    # A language model inside another one is compiled by a copy of the configuration.
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model[0].vllm_config = inner = SimpleNamespace(additional_config={"mine": 1})
    adopt.mark_compiled_graphs(config, model)
    before = config.additional_config
    assert before["mine"] == 1
    ops.register("proj", kernels.select("gemm", dtype="bfloat16", n=8, k=16), 4)
    adopt.mark_compiled_graphs(config, model)
    assert config.additional_config["bidispatch"] != before["bidispatch"]
    assert inner.additional_config == config.additional_config
    with pytest.raises(UsageError, match="additional_config"):
        adopt.mark_compiled_graphs(SimpleNamespace(additional_config=object()), model)


def test_workers_under_ray_get_the_variables() -> None:
    name = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    environment = {"HOME": "/"}
    share_variables(environment)
    assert name not in environment
    environment |= {"BIDISPATCH_VLLM": "strict", name: "MINE_, "}
    share_variables(environment)
    share_variables(environment)
    assert environment[name] == "MINE_,BIDISPATCH_"


def test_two_batches_at_a_time_are_refused() -> None:
    adopt.require_one_batch_at_a_time(SimpleNamespace(parallel_config=SimpleNamespace(use_ubatching=False)))
    with pytest.raises(SelectionError, match="--enable-dbo"):
        adopt.require_one_batch_at_a_time(SimpleNamespace(parallel_config=SimpleNamespace(use_ubatching=True)))


OTHERS = defaultdict(lambda: type("Other", (), {}))
"""vLLM's classes where a model has none of them."""


def test_attention_of_an_encoder_is_a_row() -> None:
    class MMEncoderAttention(torch.nn.Module):
        """As vLLM's: it holds no weights and no cache."""

    class WhisperEncoderAttention(MMEncoderAttention):
        pass

    host = SimpleNamespace(rows=[], classes=OTHERS)
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    adopt.adopt(host, WhisperEncoderAttention(), config)
    (row,) = host.rows
    assert (row.kind, row.promised, row.refused) == ("attention", False, True)
    assert "--mm-encoder-attn-backend" in row.reason


def test_what_no_layer_shows_is_named() -> None:
    parallel = SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1, data_parallel_size=2)
    model = SimpleNamespace(enable_sleep_mode=True)
    config = SimpleNamespace(
        parallel_config=parallel, lora_config=object(), speculative_config=object(), model_config=model
    )
    rows = list(adopt.around(config))
    assert [row.layer for row in rows] == ["all_reduce", "parallel", "lora", "sleep", "draft model", "sampler"]
    assert len(table.refusals(rows)) == 5  # greedy tokens need no sampler


def rows_around(speculative):
    parallel = SimpleNamespace(tensor_parallel_size=1)
    return list(
        adopt.around(SimpleNamespace(parallel_config=parallel, lora_config=None, speculative_config=speculative))
    )


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix"])
def test_drafts_without_a_model_are_no_row(method: str) -> None:
    (sampler,) = rows_around(SimpleNamespace(method=method, rejection_sample_method="standard"))
    assert (sampler.layer, sampler.refused) == ("sampler", False)
    assert "follows the drafts" in sampler.reason


def test_a_draft_model_says_what_it_changes_and_what_not() -> None:
    draft, sampler = rows_around(SimpleNamespace(method="eagle3", rejection_sample_method="standard"))
    assert (draft.layer, draft.refused, sampler.layer) == ("draft model", True, "sampler")
    assert "eagle3" in draft.reason
    assert "greedy tokens do not change" in draft.reason


def test_drafts_that_are_taken_by_chance_are_refused() -> None:
    drafts, _ = rows_around(SimpleNamespace(method="ngram", rejection_sample_method="synthetic"))
    assert (drafts.layer, drafts.refused) == ("drafts", True)


def test_norms_that_vllm_fuses_itself_are_named() -> None:
    wrapper = torch.nn.Module()
    wrapper.fuse_qkv_rmsnorm = True
    host = SimpleNamespace(rows=[], classes=OTHERS)
    adopt.adopt(host, torch.nn.ModuleDict({"mla": wrapper}), SimpleNamespace(model_config=SimpleNamespace(dtype="")))
    (row,) = host.rows
    assert (row.layer, row.kind, row.promised) == ("mla (norms of q and KV)", "norm", False)
    assert "fuse_qkv_rmsnorm" in row.reason


@pytest.mark.parametrize(
    ("endpoints", "sizes", "named"),
    [([8192], [], False), (None, None, False), ([512, 8192], [], True), ([64], [1], True)],
)
def test_graphs_compiled_for_several_ranges_are_named(endpoints, sizes, named: bool) -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        lora_config=None,
        speculative_config=None,
        compilation_config=SimpleNamespace(compile_ranges_endpoints=endpoints, compile_sizes=sizes),
    )
    rows = list(adopt.around(config))
    assert ("compiled graphs" in [row.layer for row in rows]) is named
    assert len(table.refusals(rows)) == named


def test_rows_merge_by_place_and_keep_their_reasons() -> None:
    rows = [table.Row.uncovered(f"layers.{index}.ssm", "layer", "nobody serves it") for index in range(3)]
    (row,) = table.merged(rows)
    assert (row.layer, row.count) == ("layers.*.ssm", 3)
    text = "\n".join(table.lines([row], "f"))
    assert "NOT PROMISED: layer layers.*.ssm: nobody serves it" in text
    assert text.endswith("fingerprint f")


def report(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict, *options: str):
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = main(["vllm", "report", "--model", str(tmp_path), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("device", ["sm90", "sm103"])
def test_report_of_a_predicted_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str) -> None:
    code, document = report(tmp_path, capsys, QWEN3_MOE, "--device", device)
    assert code == 0
    assert document["fingerprint"].startswith(f"predicted-{device}-sequence-")
    promised = [row for row in document["layers"] if row["promised"]]
    assert {row["kind"] for row in promised} == {"linear", "router", "lm_head", "norm", "attention", "experts"}
    assert {row["level"] for row in promised} == {"sequence"}
    assert all(row["source"] for row in promised)
    assert [row["layer"] for row in document["layers"] if not row["promised"]] == ["sampler"]


def test_report_names_the_profiles_files_and_what_they_change(tmp_path, capsys, monkeypatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "schema_version: 1\nname: mine\nextends: sm90\nmatch: {arch: sm90}\ndisable:\n  cublaslt.pinned: not on mine\n"
    )
    monkeypatch.setenv("BIDISPATCH_IMPL", "rms_norm=triton.rms_norm")
    _, document = report(tmp_path, capsys, QWEN3_MOE, "--device", "sm90", "--profile", str(file))
    found = document["profile"]
    assert (found["name"], found["files"][-1]) == ("mine", str(file))
    assert found["disable"] == [{"implementation": "cublaslt.pinned", "reason": "not on mine", "source": f"{file}:6"}]
    main(["vllm", "report", "--model", str(tmp_path), "--device", "sm90", "--profile", str(file)])
    text = capsys.readouterr().out
    assert f"disable cublaslt.pinned: not on mine ({file}:6)" in text
    assert "BIDISPATCH_IMPL=rms_norm=triton.rms_norm" in text


def test_report_of_a_gpu_whose_workers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = report(tmp_path, capsys, QWEN3_MOE, "--device", "gfx942")
    assert code == 1
    assert "refuses" in document["layers"][0]["reason"]


def compressed(weights, inputs=None, *others):
    """A `quantization_config` of compressed-tensors."""
    groups = [{"weights": weights, "input_activations": inputs}, *others]
    return {"quant_method": "compressed-tensors", "config_groups": {str(i): group for i, group in enumerate(groups)}}


@pytest.mark.parametrize(
    ("changes", "layer", "reason"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "qkv", "weights of bitsandbytes"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "experts", "weights of mxfp4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "desc_act": True}}, "qkv", "desc_act=true"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "qkv", "with 8 bits"),
        ({"quantization_config": {"quant_method": "gptq", "sym": False}}, "qkv", "with zero points"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "experts", "weights of awq"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "qkv", "blocks of [64, 64]"),
        ({"quantization_config": compressed({}, None, {})}, "qkv", "2 groups"),
        ({"quantization_config": {"quant_method": "awq", "group_size": 128}, "hidden_size": 2000}, "qkv", "k=2000"),
        ({"quantization_config": compressed({"type": "int", "num_bits": 4, "actorder": "group"})}, "qkv", "order"),
        ({"quantization_config": compressed({"type": "int", "num_bits": 8}, {"type": "int"})}, "qkv", "int8"),
        ({"mamba_d_state": 16}, "Mamba", "leave VLLM_BATCH_INVARIANT out"),
        ({"linear_num_value_heads": 32}, "linear attention (GDN)", "leave VLLM_BATCH_INVARIANT out"),
        ({"index_topk": 2048}, "sparse attention", "no backend of vLLM's claims it"),
        ({"layer_norm_eps": 1e-5}, "norms", "LayerNorm"),
        ({"vision_config": {"depth": 32}}, "vision encoder", "--mm-encoder-attn-backend"),
        ({"model_type": "gemma3"}, "full_attention layers", '{"is_mm_prefix_lm": false}'),
        (
            {"model_type": "gemma4", "use_bidirectional_attention": "vision"},
            "full_attention layers",
            "--limit-mm-per-prompt",
        ),
        ({"model_type": "glm4_moe"}, "router (vLLM up to 0.30)", "torch's own Linear"),
    ],
)
def test_report_names_what_is_not_covered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, layer: str, reason: str
) -> None:
    code, document = report(tmp_path, capsys, QWEN3_MOE | changes, "--device", "sm90")
    assert code == 1
    rows = [row for row in document["layers"] if row["layer"] == layer and not row["promised"]]
    assert reason in rows[0]["reason"]


@pytest.mark.parametrize(
    ("changes", "layer", "rows"),
    [
        ({}, "router (vLLM up to 0.30)", 1),
        ({}, "router (vLLM 0.31 and later)", 1),
        ({"model_type": "deepseek_v3"}, "router", 1),
        ({"tie_word_embeddings": True}, "lm_head (the embedding)", 1),
        ({"model_type": "gemma2", "sliding_window": 4096}, "full_attention layers", 1),
        ({"model_type": "gemma2", "sliding_window": 4096}, "sliding_attention layers", 1),
        ({"model_type": "mistral", "sliding_window": 4096}, "full_attention layers", 0),
        ({"layer_norm_eps": 1e-5, "rms_norm_eps": 1e-6}, "norms", 2),
        ({"model_type": "gemma3", "is_mm_prefix_lm": False}, "full_attention layers", 1),
    ],
)
def test_report_promises_what_a_server_serves(tmp_path, capsys, changes: dict, layer: str, rows: int) -> None:
    _, document = report(tmp_path, capsys, QWEN3_MOE | changes, "--device", "sm90")
    assert [row["promised"] for row in document["layers"] if row["layer"] == layer and row["op"] != "moe.router"] == [
        True
    ] * rows


@pytest.mark.parametrize(
    ("changes", "products"),
    [
        ({}, set()),
        ({"model_type": "qwen2_moe"}, {"qkv"}),
        ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, {"qkv", "o", "gate_up", "down"}),
        ({"model_type": "qwen3", "attention_bias": True}, {"qkv"}),
        ({"model_type": "gpt_oss", "attention_bias": True}, {"qkv", "o", "router"}),
    ],
)
def test_report_asks_for_products_with_their_biases(changes: dict, products: set[str], tmp_path) -> None:
    config = QWEN3_MOE | changes
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"mlp_only_layers": [0]}))
    asked = from_config._layers(config, file, 1, "bfloat16", from_config.Format())
    biased = {layer.partition(" (")[0] for layer, _, _, _, dims in asked if dims.get("bias")}
    assert biased == products


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
GPT_OSS = {"model_type": "gpt_oss", "swiglu_limit": 7.0}


@pytest.mark.parametrize(
    ("changes", "implementation"), [(FP8, "triton.moe_fp8_block"), (GPT_OSS, "triton.moe")], ids=["fp8", "biased"]
)
def test_report_of_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, implementation: str
) -> None:
    code, document = report(tmp_path, capsys, QWEN3_MOE | changes, "--device", "sm90")
    assert code == 0
    (row,) = [row for row in document["layers"] if row["kind"] == "experts"]
    assert (row["op"], row["implementation"], row["promised"]) == ("moe.experts", implementation, True)


TOKENS = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}
STATIC = {**TOKENS, "strategy": "tensor", "dynamic": False}
CHANNELS = {"type": "float", "num_bits": 8, "strategy": "channel"}


@pytest.mark.parametrize(
    ("quantized", "problems"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ["quantize.fp8_group", "gemm.fp8_block"]),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, ["quantize.fp8_token", "gemm.fp8"]),
        ({"quant_method": "fp8", "activation_scheme": "static"}, ["quantize.fp8_tensor", "gemm.fp8"]),
        (compressed(CHANNELS, TOKENS), ["quantize.fp8_token", "gemm.fp8"]),
        (
            compressed({**CHANNELS, "strategy": "tensor"}, {**TOKENS, "dynamic": False}),
            ["quantize.fp8_tensor", "gemm.fp8"],
        ),
        (
            compressed({**CHANNELS, "strategy": "block", "block_structure": [128, 128]}, TOKENS),
            ["quantize.fp8_group", "gemm.fp8_block"],
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, ["gemm.int4"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, ["gemm.int4"]),
        (compressed({"type": "int", "num_bits": 4, "group_size": 128, "strategy": "group"}), ["gemm.int4"]),
    ],
)
def test_report_of_quantised_linear_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quantized: dict, problems: list[str]
) -> None:
    _, document = report(tmp_path, capsys, QWEN3_MOE | {"quantization_config": quantized}, "--device", "sm90")
    rows = [row for row in document["layers"] if row["kind"] == "linear"]
    assert [row["op"] for row in rows if row["layer"] == "qkv"] == problems
    assert all(row["promised"] and row["level"] == "sequence" for row in rows)
    assert [row["op"] for row in document["layers"] if row["kind"] == "lm_head"] == ["gemm"]


def test_report_of_a_latent_model_has_its_products(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dims = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    code, document = report(tmp_path, capsys, QWEN3_MOE | dims, "--device", "sm90")
    assert code == 0
    rows = [row for row in document["layers"] if row["kind"] == "attention"]
    assert [(row["layer"], row["op"], row["promised"]) for row in rows] == [
        ("attention", "attention.mla", True),
        ("W_UK", "bmm", True),
        ("W_UV", "bmm", True),
    ]


def test_report_of_tensor_parallelism_names_collectives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = report(tmp_path, capsys, QWEN3_MOE, "--device", "sm90", "--tp", "2")
    assert code == 1
    assert "all_reduce" in [row["layer"] for row in document["layers"]]


def test_report_without_a_config_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm", "report", "--model", str(tmp_path), "--device", "sm90"]) == 2


def test_a_report_for_a_machine_without_a_gpu_asks_for_a_device(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_MOE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["vllm", "report", "--model", str(tmp_path)]) == 3
    assert "--device sm90" in capsys.readouterr().err

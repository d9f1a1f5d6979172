"""vLLM's own layers with their methods replaced: what they give, that bits of a row stand alone, what is refused."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention import selector
from vllm.v1.worker.gpu_worker import Worker
from vllm_layers import BF16, Block, classes, config_of, experts_layer, rows_alone

from bidispatch.errors import BackendError, DeviceError, SelectionError
from bidispatch.integrations.vllm import adopt as adopting
from bidispatch.integrations.vllm import compat, host, plugin, table
from bidispatch.integrations.vllm.kernels import serving_plan
from bidispatch.integrations.vllm.mode import Mode


@pytest.fixture
def served(patched):
    model = Block()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    return SimpleNamespace(model=model, host=made)


def test_every_layer_is_served_and_named(served) -> None:
    rows = table.merged(served.host.rows)
    assert [row.reason for row in rows] == [""] * len(rows)
    assert {(row.kind, row.op) for row in rows} == {
        ("norm", "rms_norm"),
        ("norm", "fused_add_rms_norm"),
        ("linear", "gemm"),
        ("router", "gemm"),
    }
    assert {row.level for row in rows} == {"sequence"}
    assert all(row.source and row.evidence == "claimed" for row in rows)


def test_linear_gives_the_product_and_rows_stand_alone(served) -> None:
    layer, x = served.model.proj, torch.randn(33, 64).to(BF16)
    out, _ = layer(x)
    wanted = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(out.float(), wanted, atol=0.2, rtol=0.02)
    (alone,) = rows_alone(lambda row: layer(row)[0], x)
    assert torch.equal(out, alone)


def test_gate_gives_its_own_dtype(served) -> None:
    x = torch.randn(20, 64).to(BF16)
    out, bias = served.model.gate(x)
    assert (out.dtype, bias) == (torch.float32, None)
    (alone,) = rows_alone(lambda row: served.model.gate(row)[0], x)
    assert torch.equal(out, alone)


@pytest.mark.parametrize("name", ["norm", "gemma"])
@pytest.mark.parametrize("path", ["forward_native", "forward_cuda"])
def test_norms_on_both_of_vllms_paths(served, name: str, path: str) -> None:
    layer = getattr(served.model, name)
    forward = getattr(layer, path)
    x, residual = torch.randn(2, 19, 64).to(BF16)
    out, total = forward(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, forward(total))
    scale = layer.weight.float() + (1.0 if name == "gemma" else 0.0)
    wanted = total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + layer.variance_epsilon) * scale
    torch.testing.assert_close(out.float(), wanted, atol=0.05, rtol=0.02)
    assert all(map(torch.equal, (out, total), rows_alone(forward, x, residual)))


def test_heads_are_rows(served) -> None:
    x = torch.randn(5, 4, 64).to(BF16)
    assert torch.equal(served.model.norm(x), served.model.norm(x.reshape(20, 64)).view(5, 4, 64))


@pytest.mark.parametrize("kind", [RMSNorm, GemmaRMSNorm])
def test_norms_of_heads_read_the_projection_where_it_lies(patched, kind) -> None:
    attention = torch.nn.Module()
    attention.q_norm, attention.k_norm = kind(64).to(BF16), kind(64).to(BF16)
    attention.num_heads, attention.num_kv_heads, attention.head_dim = 4, 1, 64
    model = torch.nn.Module()
    model.attn = attention
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data)
        parameter.requires_grad_(False)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [row.op for row in made.rows if row.layer == "attn.q_norm"] == ["rms_norm", "fused_add_rms_norm", "qk_norm"]
    assert [row.op for row in made.rows if row.layer == "attn.k_norm"] == ["rms_norm", "fused_add_rms_norm"]
    assert len({row.numerics for row in made.rows if row.op != "fused_add_rms_norm"}) == 1
    heads = torch.randn(19, 6 * 64).to(BF16)[:, : 4 * 64].view(19, 4, 64)
    out = attention.q_norm(heads)
    assert out.is_contiguous()
    rows = attention.q_norm(heads.reshape(-1, 64))
    assert torch.equal(out, rows.view(19, 4, 64))
    assert torch.equal(out, rows_alone(attention.q_norm, heads)[0])
    few = attention.k_norm(heads[:, :1])
    assert torch.equal(few, attention.k_norm(heads[:, 0]).view(19, 1, 64))
    attention.head_dim = 16  # a norm of all heads together
    whole = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(whole, model, config_of())
    assert "qk_norm" not in {row.op for row in whole.rows}


def test_a_compiled_graph_holds_the_op_and_not_a_rung(served) -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = served.model.proj
    compiled = torch.compile(lambda x: layer(x)[0], backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 3, 50):
        x = torch.randn(rows, 64).to(BF16)
        assert torch.equal(compiled(x), layer(x)[0])
    assert len(graphs) == 1
    assert any("vllm_linear" in str(node.target) for node in graphs[0].graph.nodes)
    torch._dynamo.reset()


class Weighted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.ones(4))


def rows_of_a_model_with(mixer: torch.nn.Module) -> list[table.Row]:
    model = torch.nn.Module()
    model.mixer = mixer
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    return made.rows


def test_weights_that_nothing_knows_are_named(patched) -> None:
    class Mixer(Weighted):
        pass

    assert "Mixer with weights" in rows_of_a_model_with(Mixer())[0].reason


def test_a_layer_that_keeps_a_state_says_what_to_do(patched) -> None:
    class Mixer(Weighted, MambaBase):
        get_state_shape = get_state_dtype = mamba_type = None

    (row,) = rows_of_a_model_with(Mixer())
    assert row.reason.startswith("Mixer: ")
    assert "leave VLLM_BATCH_INVARIANT out" in row.reason
    # What it quotes is what vLLM says.
    assert "batch_invariant mode is not supported for" in inspect.getsource(selector)


def test_strict_runs_no_layer_that_was_given_nothing(patched) -> None:
    layer = ReplicatedLinear(8, 8, params_dtype=BF16, disable_tp=True)
    host.refuse_unserved(True)
    try:
        with pytest.raises(SelectionError, match="BIDISPATCH_VLLM=strict"):
            layer(torch.ones(1, 8, dtype=BF16))
    finally:
        host.refuse_unserved(False)


def test_a_layer_with_a_forward_of_its_own_is_not_promised(patched) -> None:
    class Fused(ReplicatedLinear):
        def forward(self, x):
            return x @ self.weight.T if len(x) < 16 else super().forward(x)

    model = torch.nn.Module()
    model.fused = Fused(8, 8, params_dtype=BF16, disable_tp=True)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert "Fused has a forward of its own" in made.rows[0].reason
    assert not hasattr(model.fused, host.SERVED)


def heads_of(model, **processor):
    """The rows of a model that makes logits, which are its head's."""
    model.logits_processor = LogitsProcessor(128)
    for name, value in processor.items():
        setattr(model.logits_processor, name, value)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    return made.rows


def need_a_served_head(rows, name, head) -> None:
    assert [(row.layer, row.kind, row.op, row.reason) for row in rows] == [(name, "lm_head", "gemm", "")]
    x = torch.randn(18, 16).to(BF16)
    out = head.quant_method.apply(head, x)
    torch.testing.assert_close(out.float(), x.float() @ head.weight.float().T, atol=0.1, rtol=0.02)
    assert torch.equal(out, rows_alone(lambda row: head.quant_method.apply(head, row), x)[0])


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "output", "output_layer", "proj_out", "of_its_own"])
def test_a_head_is_served_whatever_it_is_called(patched, name: str) -> None:
    model = torch.nn.Module()
    model.embed_tokens = VocabParallelEmbedding(128, 16, params_dtype=BF16)
    head = ParallelLMHead(128, 16, params_dtype=BF16)
    setattr(model, name, head)
    need_a_served_head(heads_of(model), name, head)
    assert not hasattr(model.embed_tokens, host.SERVED)


def test_an_embedding_is_the_head_under_its_second_name(patched) -> None:
    model = torch.nn.Module()
    model.embed_tokens = VocabParallelEmbedding(128, 16, params_dtype=BF16)
    model.lm_head = model.embed_tokens
    need_a_served_head(heads_of(model), "embed_tokens", model.lm_head)


def test_an_embedding_is_the_head_where_a_model_has_no_other(patched) -> None:
    """Gemma, Command-R: `self.logits_processor(self.model.embed_tokens, hidden_states)`."""
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.embed_tokens = VocabParallelEmbedding(128, 16, params_dtype=BF16)
    model.model.embed_tokens_per_layer = VocabParallelEmbedding(128, 16, params_dtype=BF16)  # Gemma-3n
    need_a_served_head(heads_of(model), "model.embed_tokens", model.model.embed_tokens)
    assert not hasattr(model.model.embed_tokens_per_layer, host.SERVED)


def test_a_model_that_makes_no_logits_has_no_head(patched) -> None:
    model = torch.nn.Module()
    model.embed_tokens = VocabParallelEmbedding(128, 16, params_dtype=BF16)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert made.rows == []


def test_a_head_that_vllm_goes_past_is_not_promised(patched) -> None:
    model = torch.nn.Module()
    model.lm_head = ParallelLMHead(128, 16, params_dtype=BF16)
    (row,) = heads_of(model, head_dtype=torch.float32)  # 0.29 and later, by --hf-overrides
    assert (row.kind, row.promised) == ("lm_head", False)
    assert "head_dtype" in row.reason


def test_a_head_with_a_method_of_another_kind_is_a_row(patched) -> None:
    model = torch.nn.Module()
    model.embed_out = ParallelLMHead(128, 16, params_dtype=BF16)
    model.embed_out.quant_method = type("GGUFEmbeddingMethod", (), {})()
    (row,) = heads_of(model)
    assert (row.layer, row.kind, row.promised) == ("embed_out", "lm_head", False)
    assert "GGUFEmbeddingMethod" in row.reason


@pytest.fixture
def logged(caplog):
    """What was logged, each record once: vLLM's logger hands its own on in some versions (0.33) and not in others."""
    logger = logging.getLogger("vllm.bidispatch")
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", logger=logger.name)
    yield lambda: [record.getMessage() for record in {id(record): record for record in caplog.records}.values()]
    logger.removeHandler(caplog.handler)


def test_a_head_that_was_not_found_says_so(patched, logged) -> None:
    head = ParallelLMHead(128, 16, params_dtype=BF16)
    for _ in range(2):
        head.quant_method.apply(head, torch.ones(1, 16, dtype=BF16))
    assert [message.count("NOT PROMISED") for message in logged()] == [1]


def worker_of(model):
    config = config_of()
    config.scheduler_config = SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4)
    config.compilation_config = SimpleNamespace(max_cudagraph_capture_size=8)
    config.model_config = SimpleNamespace(dtype=BF16, max_model_len=64)
    worker = object.__new__(Worker)
    worker.vllm_config, worker.device, worker.rank = config, torch.device("cpu"), 0
    worker.model_runner = SimpleNamespace(get_model=lambda: model, load_model=lambda **_: None)
    return worker


def test_a_worker_takes_over_its_model_and_logs_one_table(patched, logged) -> None:
    model = Block()
    worker = worker_of(model)
    plugin._take_over(Mode.STRICT, worker, classes())
    (text,) = [message for message in logged() if "kernels of this model" in message]
    assert "torch_cpu.gemm" in text
    assert "fingerprint cpu-sequence-" in text
    assert "bidispatch" in worker.vllm_config.additional_config
    assert hasattr(model.proj, host.SERVED)


def test_what_kernels_hold_counts_as_the_models_memory(patched, monkeypatch) -> None:
    worker = worker_of(Block())
    worker.model_runner.model_memory_usage = 1000
    held = iter([300, 350])
    monkeypatch.setattr(plugin, "_allocated", lambda device: next(held))
    with plugin._counted(worker):
        pass
    assert worker.model_runner.model_memory_usage == 1050


def test_a_worker_with_a_way_of_its_own_is_refused(patched) -> None:
    class Own(Worker):
        def load_model(self, *, load_dummy_weights: bool = False) -> None:
            pass

    plugin.require_patched_worker(object.__new__(Worker))
    with pytest.raises(DeviceError, match="--worker-cls"):
        plugin.require_patched_worker(object.__new__(Own))


def worker_that_takes_a_device(monkeypatch, arch):
    """A worker whose device is another arch's GPU, as `WorkerWrapperBase.init_device` sees it."""

    def detected(name):
        raise DeviceError(f"this machine's GPU is {arch}, which no profile knows")

    monkeypatch.setattr(plugin, "_named", detected)
    worker = object.__new__(Worker)
    worker.device = torch.device("cuda:0")
    return SimpleNamespace(worker=worker)


def test_a_gpu_that_nothing_is_planned_for_stops_before_a_model_is_built(cuda_platform, monkeypatch) -> None:
    seam = next(seam for seam in compat.SEAMS if seam.name == "init_device")
    holder, name = compat.resolve(seam)
    monkeypatch.setattr(holder, name, lambda self: None)
    before = originals()
    plugin.register()
    try:
        with pytest.raises(DeviceError, match=r"on cuda:0: .*sm75.*BIDISPATCH_VLLM=off"):
            getattr(holder, name)(worker_that_takes_a_device(monkeypatch, "sm75"))
        assert originals() == before
    finally:
        plugin.undo()


def test_the_log_names_the_profiles_files_and_what_they_change(patched, logged, monkeypatch, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "schema_version: 1\nname: mine\nextends: cpu\nmatch: {arch: cpu}\nprefer: [torch_cpu.gemm]\n"
        "disable:\n  torch_cpu.moe: slow here\n"
    )
    monkeypatch.setenv("BIDISPATCH_PROFILE", str(file))
    serving_plan.cache_clear()
    plugin._take_over(Mode.ON, worker_of(Block()), classes())
    (text,) = [message for message in logged() if "kernels of this model" in message]
    assert f"profile mine: hw_profiles/_base.yaml, hw_profiles/cpu.yaml, {file}" in text
    assert f"prefer torch_cpu.gemm ({file}:5)" in text
    assert f"disable torch_cpu.moe: slow here ({file}:7)" in text


def test_strict_names_layer_op_and_reason(patched) -> None:
    model, _, _ = experts_layer(activation=MoEActivation.RELU2)
    with pytest.raises(SelectionError, match=r"experts experts \(moe\.experts\): activation relu2") as error:
        plugin._take_over(Mode.STRICT, worker_of(model), classes())
    assert "BIDISPATCH_VLLM=on" in str(error.value)
    plugin._take_over(Mode.ON, worker_of(model), classes())


def originals():
    found = {}
    for seam in compat.SEAMS:
        holder, name = compat.resolve(seam)
        found[seam.name] = inspect.getattr_static(holder, name)
    return found


def test_patches_apply_once_and_undo(cuda_platform, monkeypatch) -> None:
    before = originals()
    plugin.patch_layers(Mode.ON)
    plugin.patch_layers(Mode.ON)
    changed = {name for name, value in originals().items() if value is not before[name]}
    # Some classes are only looked at, and two functions patched where other modules bound them.
    looked_at = {"fp8_kernel", "fp8_plain_kernel", "fp8_whole_kernel", "compressed", "mixed_kernel", "mixed_base"}
    looked_at |= {"embedding", "parallel_head", "logits", "attention"}
    assert changed == set(before) - looked_at - {"init_device"}
    plugin.undo()
    assert originals() == before


def test_nothing_stays_patched_where_one_seam_fails(cuda_platform, monkeypatch) -> None:
    from bidispatch.integrations.vllm import backends

    def broken(*_: object, **__: object) -> None:
        raise BackendError("no such thing")

    before = originals()
    monkeypatch.setattr(backends, "install", broken)
    with pytest.raises(BackendError):
        plugin.patch_layers(Mode.ON)
    assert originals() == before


def test_register_is_idempotent_and_only_the_worker_hook_is_touched(cuda_platform) -> None:
    before = originals()
    try:
        plugin.register()
        plugin.register()
        assert plugin.active()
        assert {n for n, value in originals().items() if value is not before[n]} == {"init_device"}
        assert not torch.cuda.is_initialized()
    finally:
        plugin.undo()
    assert originals() == before


def test_graphs_without_a_compiler_are_not_asked_for(cuda_platform) -> None:
    """Breakable graphs, 0.31 and later: what vLLM's own mode wants them for are products that choose when traced."""
    (seam,) = compat.LIFTED
    version = plugin.installed("vllm")
    if not seam.is_in(version):
        pytest.skip(f"vLLM {version} asks for none")
    holder, name = compat.resolve(seam)
    cuda_platform.get_device_capability = lambda device_id=0: DeviceCapability(9, 0)
    passes = SimpleNamespace(enable_sp=False, fuse_gemm_comms=False)
    tables = importlib.import_module("vllm.model_executor.determinism.batch_invariant_configs")
    rows, hidden = next(shape for shape in tables._BATCH_INVARIANT_MATMUL_TUNED_CONFIGS["hopper"] if not shape[0] % 2)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            enforce_eager=False,
            dtype=torch.bfloat16,
            quantization=None,
            hf_text_config=SimpleNamespace(intermediate_size=rows // 2),
            get_hidden_size=lambda: hidden,
            get_head_size=lambda: 128,
            get_num_attention_heads=lambda parallel: 32,
            get_num_kv_heads=lambda parallel: 8,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        compilation_config=SimpleNamespace(pass_config=passes),
    )
    original = getattr(holder, name)
    assert original(config)  # negative control: the model has a shape of the table that it goes by
    try:
        plugin.register()
        assert not getattr(holder, name)(config)
    finally:
        plugin.undo()
    assert getattr(holder, name) is original


def test_another_version_is_refused_by_name(cuda_platform, monkeypatch) -> None:
    monkeypatch.setattr(plugin, "installed", lambda _: "0.40.0")
    with pytest.raises(BackendError, match=r"vLLM 0\.40\.0"):
        plugin.register()
    assert not plugin.active()


def test_a_platform_that_is_not_cuda_is_refused() -> None:
    with pytest.raises(DeviceError, match="on CUDA"):
        plugin.register()


def test_vllm_calls_the_entry_point_and_what_it_raises_stops_the_process() -> None:
    """On the processor, which is not served: so an installed plugin is seen to be called, with CUDA untouched."""
    code = "from vllm.plugins import load_general_plugins; load_general_plugins()"
    environment = {**os.environ, "VLLM_BATCH_INVARIANT": "1"}
    environment.pop("VLLM_PLUGINS", None)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "bidispatch serves vLLM's layers on CUDA" in run.stderr
    assert run.returncode == 1
    off = subprocess.run(command, env=environment | {"BIDISPATCH_VLLM": "off"}, timeout=300, check=False)
    assert off.returncode == 0


def test_the_linear_method_is_the_one_of_vllm() -> None:
    assert UnquantizedLinearMethod.apply.__module__ == "vllm.model_executor.layers.linear"

"""vLLM's own attention layers, built where the plan serves them and where it does not: then they are left to vLLM."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention.encoder_only_attention import EncoderOnlyAttention
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_layers import BF16, classes, config_of

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import adopt as adopting
from bidispatch.integrations.vllm import host, left, plugin, table
from bidispatch.integrations.vllm.kernels import serving_plan
from bidispatch.integrations.vllm.mode import Mode

LAYER = "model.layers.0.self_attn.attn"


class OwnImpl(AttentionImpl):
    """What vLLM would run."""

    def __init__(self, num_heads, head_size, scale, num_kv_heads, *arguments, **named):
        self.num_heads, self.kv_cache_dtype = num_heads, "auto"

    def forward(self, *arguments, **named):
        raise NotImplementedError


class Own(AttentionBackend):
    """What vLLM takes by itself."""

    @staticmethod
    def get_name():
        return "FLASH_ATTN"

    @staticmethod
    def get_impl_cls():
        return OwnImpl

    @staticmethod
    def get_builder_cls():
        return AttentionMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(*arguments, **named):
        raise NotImplementedError


def vllms_choice():
    return f"{__name__}.Own"


@pytest.fixture
def server(cuda_platform, monkeypatch, request):
    """A configuration that attention can be built with, on a platform whose own choice is `Own`."""
    kind = type(cuda_platform)
    own = classmethod(lambda cls, selected_backend, attn_selector_config, num_heads=None: vllms_choice())
    monkeypatch.setattr(kind, "get_attn_backend_cls", own)
    monkeypatch.setattr(kind, "get_device_capability", classmethod(lambda cls, device_id=0: (9, 0)))
    request.getfixturevalue("patched")
    config = get_current_vllm_config()
    config.model_config = SimpleNamespace(dtype=BF16, max_model_len=64, is_mm_prefix_lm=False, rswa_window=None)
    config.device_config = SimpleNamespace(device="cpu", device_type="cpu")
    config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs = 64, 4
    config.compilation_config.max_cudagraph_capture_size, config.cache_config.block_size = 8, 16
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    yield config
    torch.set_default_dtype(before)


@pytest.fixture
def unserved(tmp_path, monkeypatch):
    """A profile of the user's in which nothing serves attention."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "schema_version: 1\nname: mine\nextends: cpu\nmatch: {arch: cpu}\n"
        "disable: {torch_cpu.paged_attention: not wanted}\n"
    )
    monkeypatch.setenv("BIDISPATCH_PROFILE", str(file))
    serving_plan.cache_clear()


def built(kind=Attention, prefix=LAYER, **named):
    model = torch.nn.Module()
    model.attn = kind(num_heads=4, head_size=32, scale=0.25, num_kv_heads=2, prefix=prefix, **named)
    return model


def rows_of(model):
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    return made.rows


def row_of(model):
    (row,) = rows_of(model)
    return row


def test_a_layer_that_the_plan_serves_is_the_plans(server) -> None:
    row = row_of(built())
    assert (row.implementation, row.reason) == ("torch_cpu.paged_attention", "")


def test_a_layer_that_the_plan_does_not_serve_is_left_to_vllm_with_the_plans_reasons(server, unserved) -> None:
    model = built()
    assert type(model.attn.impl) is OwnImpl
    assert server.compilation_config.static_forward_context[LAYER] is model.attn
    row = row_of(model)
    assert (row.implementation, row.promised) == ("FLASH_ATTN", False)
    assert "not wanted" in row.reason
    assert "mine.yaml" in row.reason
    (line,) = table.refusals([row])  # what `strict` stops with, once all layers are known
    assert line.startswith("attention attn (attention): ")
    # A layer built after it is asked for anew.
    assert type(built(prefix="model.layers.1.self_attn.attn").attn.impl) is OwnImpl


def test_a_backend_that_was_named_is_an_error_with_the_layers_name(server, unserved) -> None:
    server.attention_config.backend = AttentionBackendEnum.CUSTOM
    with pytest.raises(SelectionError, match=rf"^attention {LAYER}: .*not wanted.*BIDISPATCH_VLLM=off"):
        built()


def test_where_vllm_has_nothing_either_both_reasons_stand(server, unserved, monkeypatch) -> None:
    def nothing():
        raise ValueError("No valid attention backend found")

    monkeypatch.setattr(sys.modules[__name__], "vllms_choice", nothing)
    with pytest.raises(SelectionError, match=rf"^attention {LAYER}: .*not wanted.*No valid attention backend found"):
        built()


def test_the_selectors_reason_stands_in_the_row(server) -> None:
    row = row_of(built(EncoderOnlyAttention))
    assert (row.implementation, row.promised) == ("FLASH_ATTN", False)
    assert "attention type AttentionType.ENCODER_ONLY not supported" in row.reason


@pytest.mark.parametrize("outer", [False, True], ids=["its own configuration says so", "the whole model's does"])
def test_images_that_see_later_positions_say_what_helps(server, outer: bool) -> None:
    if outer:
        left.begin(SimpleNamespace(model_config=SimpleNamespace(is_mm_prefix_lm=True)))
    else:
        server.model_config.is_mm_prefix_lm = True
    row = row_of(built())
    assert (row.implementation, row.promised) == ("FLASH_ATTN", False)
    assert "--limit-mm-per-prompt" in row.reason
    assert '{"is_mm_prefix_lm": false}' in row.reason


def test_the_override_that_the_row_names_is_read_by_vllm() -> None:
    convertor = object.__new__(ModelArchConfigConvertorBase)
    convertor.hf_config = SimpleNamespace(model_type="gemma3")
    assert convertor.is_mm_prefix_lm()
    convertor.hf_config.is_mm_prefix_lm = False
    assert not convertor.is_mm_prefix_lm()


def test_a_layer_with_a_backend_of_its_own_says_that_nobody_asked(server) -> None:
    row = row_of(built(attn_backend=Own))
    assert "its own code names the backend" in row.reason


@pytest.mark.parametrize("kind", [Attention, MLAAttention])
def test_layers_of_both_kinds_are_built_by_names_that_are_read(server, kind) -> None:
    parameters = inspect.signature(kind.__init__).parameters
    assert {"prefix", "attn_backend"} <= set(parameters)
    assert kind.__init__.__wrapped__ is not kind.__init__


def test_they_are_put_back(cuda_platform) -> None:
    before = Attention.__init__, MLAAttention.__init__
    plugin.patch_layers(Mode.ON)
    assert Attention.__init__ is not before[0]
    plugin.undo()
    assert (Attention.__init__, MLAAttention.__init__) == before

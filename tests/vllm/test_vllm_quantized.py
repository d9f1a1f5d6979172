"""vLLM's fp8 and 4-bit linear layers with their methods replaced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.triton import TritonFp8BlockScaledMMKernel
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.model_executor.layers.quantization.online.fp8 import (
    Fp8PerBlockOnlineLinearMethod,
    Fp8PerTensorOnlineLinearMethod,
    Fp8PtpcOnlineLinearMethod,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTensorSym,
)
from vllm.scalar_type import scalar_types
from vllm_layers import BF16, classes, config_of, fp8_layer, int4_layer, rows_alone, whole_fp8_layer

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import adopt as adopting
from bidispatch.integrations.vllm import fp8_linear, host, int4_kernel
from bidispatch.integrations.vllm.kernels import serving_plan


@pytest.mark.parametrize("kind", [Fp8LinearMethod, Fp8PerBlockOnlineLinearMethod])
def test_fp8_blocks(patched, kind: type) -> None:
    torch.manual_seed(0)
    model, layer = fp8_layer(kind)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("quantize.fp8_group", ""), ("gemm.fp8_block", "")]
    x, bias = torch.randn(21, 256).to(BF16), torch.randn(192).to(BF16)
    out = layer.quant_method.apply(layer, x, bias)
    scales = layer.weight_scale_inv.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    wanted = x.float() @ (layer.weight.float() * scales).T + bias.float()
    assert (out.float() - wanted).norm() / wanted.norm() < 0.05
    assert torch.equal(out, rows_alone(lambda row: layer.quant_method.apply(layer, row, bias), x)[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m, layer: setattr(m, "weight_block_size", [64, 64]), "its blocks are"),
        (lambda m, layer: setattr(m, "fp8_linear", object()), "may hold the weight in another order"),
        (lambda m, layer: setattr(layer, "weight_scale_inv", torch.rand(2, 3)), "its scales are"),
    ],
)
def test_fp8_that_is_not_served(patched, change, reason: str) -> None:
    model, layer = fp8_layer()
    del layer.weight_scale_inv
    layer.weight_scale_inv = torch.rand(2, 2)
    change(layer.quant_method, layer)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert reason in made.rows[0].reason
    assert len(made.rows) == 1


WHOLE = [Fp8LinearMethod, CompressedTensorsW8A8Fp8, Fp8PerTensorOnlineLinearMethod, Fp8PtpcOnlineLinearMethod]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("kind", WHOLE)
def test_fp8_without_blocks(patched, kind: type, channel: bool, static: bool) -> None:
    torch.manual_seed(0)
    model, layer = whole_fp8_layer(kind, channel, static)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    quantize = "quantize.fp8_tensor" if static else "quantize.fp8_token"
    assert [(row.op, row.reason) for row in made.rows] == [(quantize, ""), ("gemm.fp8", "")]
    assert not hasattr(layer, "input_quant_key")
    x = torch.randn(21, 256).to(BF16)
    for bias in (None, layer.bias):
        out = layer.quant_method.apply(layer, x, bias)
        wanted = x.float() @ (layer.weight.float().t() * layer.weight_scale).T + (0 if bias is None else bias.float())
        assert out.dtype is BF16
        assert (out.float() - wanted).norm() / wanted.norm() < 0.05
        assert torch.equal(out, rows_alone(lambda row, b=bias: layer.quant_method.apply(layer, row, b), x)[0])
    with pytest.raises(SelectionError, match="vLLM's fused quantisation"):
        layer.quant_method.apply(layer, SimpleNamespace(quant_key="fp8"))


def test_fp8_blocks_of_compressed_tensors(patched) -> None:
    plain = object.__new__(TritonFp8BlockScaledMMKernel)
    changes = {"bias": None, "weight_block_size": [128, 128], "fp8_linear": plain}
    model, layer = whole_fp8_layer(CompressedTensorsW8A8Fp8, True, False, **changes)
    layer.weight = torch.nn.Parameter(layer.weight.t(), requires_grad=False)
    layer.weight_scale = torch.rand(2, 2)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("quantize.fp8_group", ""), ("gemm.fp8_block", "")]
    x = torch.randn(5, 256).to(BF16)
    out = layer.quant_method.apply(layer, x)
    scales = layer.weight_scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    wanted = x.float() @ (layer.weight.float() * scales).T
    assert (out.float() - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fp8_linear": object()}, "may hold the weight in another order"),
        ({"input_size": 250}, "its weight was padded from [192, 250] to [192, 256]"),
        ({"weight_scale": torch.rand(3)}, "its weight scale is [3]"),
        ({"input_scale": torch.rand(2)}, "its input scale is [2]"),
        ({"input_scale": torch.rand(1)}, "that is missing"),
        ({"activation_quant_key": kFp8DynamicTensorSym}, "share a scale that follows the batch"),
        ({"bias": torch.zeros(192)}, "its bias is torch.float32"),
    ],
)
@pytest.mark.parametrize("kind", WHOLE)
def test_fp8_without_blocks_that_is_not_served(patched, kind: type, changes, reason: str) -> None:
    model, layer = whole_fp8_layer(kind, True, False, **changes)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [reason in row.reason for row in made.rows] == [True]
    assert not hasattr(layer, host.SERVED)


def test_schemes_of_compressed_tensors_that_are_not_served_are_named(patched) -> None:
    model, layer = whole_fp8_layer(CompressedTensorsW8A8Fp8, True, False)
    layer.scheme = object()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [row.reason for row in made.rows] == ["weights of object are not served"]


def test_fp8_block_kernels_are_the_ones_that_leave_the_weight(patched) -> None:
    seen = []
    kinds = (TritonFp8BlockScaledMMKernel, CutlassFP8ScaledMMLinearKernel)
    chosen = fp8_linear.kernel(lambda *a, **named: seen.append(named), *kinds)
    for grouped in (True, False):
        shape = SimpleNamespace(is_per_group=lambda grouped=grouped: grouped)
        chosen(SimpleNamespace(scale=SimpleNamespace(group_shape=shape)), None, module_name="x")
    assert seen == [{"module_name": "x", "force_kernel": kind} for kind in kinds]


@pytest.mark.parametrize(
    ("kind", "zero_points"),
    [("awq", True), ("awq", False), ("gptq", False), ("compressed", True), ("compressed", False)],
)
def test_int4(patched, kind: str, zero_points: bool) -> None:
    model, layer, wide = int4_layer(kind, zero_points=zero_points)
    x = torch.randn(21, 256).to(BF16)
    if kind != "awq":  # before it is served, as MLA's kv_b_proj is asked
        early = layer.quant_method.apply(layer, x)
        torch.testing.assert_close(early.float(), x.float() @ wide.T, atol=0.1, rtol=0.02)
    layer.bias = torch.randn(32).to(BF16)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("gemm.int4", "")]
    assert not layer._parameters
    adopting.adopt(made, model, config_of())  # as when a worker loads its model again
    assert [(row.op, row.reason) for row in made.rows] == [("gemm.int4", "")]
    for bias in (None, layer.bias):
        out = layer.quant_method.apply(layer, x, bias)
        wanted = x.float() @ wide.T + (0 if bias is None else bias.float())
        torch.testing.assert_close(out.float(), wanted, atol=0.1, rtol=0.02)
        assert torch.equal(out, rows_alone(lambda row, b=bias: layer.quant_method.apply(layer, row, b), x)[0])


def test_compressed_weights_that_vllm_left_alone_are_served_without_a_kernel(patched) -> None:
    """As 0.33 has it in its mode."""
    model, layer, wide = int4_layer("compressed", kept=False)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    x = torch.randn(3, 256).to(BF16)
    torch.testing.assert_close(layer.quant_method.apply(layer, x).float(), x.float() @ wide.T, atol=0.1, rtol=0.02)


def spoil(kind, **attributes):
    model, layer, _ = int4_layer(kind)
    scheme = getattr(layer, "scheme", layer.quant_method)
    for name, value in attributes.items():
        setattr(scheme, name, value)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: spoil("awq", quant_config=SimpleNamespace(weight_bits=8)), "have 8 bits"),
        (lambda: spoil("gptq", kernel=object()), "object was chosen, and holds the weight in a layout of its own"),
        (lambda: spoil("compressed", kernel=object()), "object was chosen"),
        (lambda: spoil("compressed", num_bits=8), "have 8 bits"),
        (lambda: int4_layer("awq", k=64, group=64)[0], "k a multiple of 128"),
    ],
)
def test_int4_that_is_not_served(patched, make, reason: str) -> None:
    model = make()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [reason in row.reason for row in made.rows] == [True]
    assert model.proj._parameters
    assert not hasattr(model.proj, host.SERVED)


def mixed_config(**changes):
    config = {
        "full_weight_shape": (256, 32),
        "partition_weight_shape": (256, 32),
        "weight_type": scalar_types.uint4b8,
        "act_type": BF16,
        "group_size": 128,
        "zero_points": False,
        "has_g_idx": False,
    }
    if "has_g_idx" not in MPLinearLayerConfig.__dataclass_fields__ and not changes.get("has_g_idx"):
        del config["has_g_idx"]  # gone in 0.33
    return SimpleNamespace(**config | changes) if "has_g_idx" in changes else MPLinearLayerConfig(**config | changes)


def test_4_bit_weights_are_kept_where_the_plan_serves_them(patched, monkeypatch) -> None:
    monkeypatch.setattr(int4_kernel, "plan_of", lambda config: serving_plan("cpu"))
    chosen = int4_kernel.kernel(lambda config: "vLLM's")
    assert chosen(mixed_config()) is int4_kernel.KeptWeights
    assert (
        chosen(mixed_config(group_size=-1, zero_points=True, weight_type=scalar_types.uint4)) is int4_kernel.KeptWeights
    )
    made = int4_kernel.KeptWeights(mixed_config(), "qweight", "scales", "qzeros")
    assert made.process_weights_after_loading(torch.nn.Module()) is None
    for changes in (
        {"weight_type": scalar_types.uint8b128},
        {"has_g_idx": True},
        {"partition_weight_shape": (250, 32)},
        {"act_type": torch.float8_e4m3fn},
    ):
        assert chosen(mixed_config(**changes)) == "vLLM's"

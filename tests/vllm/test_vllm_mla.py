"""What surrounds attention in vLLM's MLA models: the products with W_UK and W_UV, the fused projection."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm_layers import BF16, HEADS, NOPE, RANK, ROPE, classes, config_of, mla_layer, rows_alone, run_mla

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import adopt as adopting
from bidispatch.integrations.vllm import compat, host, mla_products
from bidispatch.integrations.vllm.kernels import serving_plan


def test_deepseeks_fused_projection_is_served_with_its_switch_off(patched) -> None:
    from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear

    layer = object.__new__(DeepSeekV2FusedQkvAProjLinear)
    torch.nn.Module.__init__(layer)
    layer.quant_method, layer._use_min_latency_gemm = UnquantizedLinearMethod(), True
    layer.skip_bias_add, layer.return_bias, layer.gather_output, layer.tp_size = False, True, False, 1
    layer.weight = torch.nn.Parameter(torch.randn(48, 64).to(BF16), requires_grad=False)
    layer.bias = None
    model = torch.nn.Module()
    model.fused_qkv_a_proj = layer
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("gemm", "")]
    assert layer._use_min_latency_gemm is False
    x = torch.randn(20, 64).to(BF16)
    out, _ = layer(x)
    torch.testing.assert_close(out.float(), x.float() @ layer.weight.float().T, atol=0.2, rtol=0.02)
    assert torch.equal(out, rows_alone(lambda row: layer(row)[0], x)[0])
    assert [seam.where for seam in compat.UNIMPORTED] == [
        f"{DeepSeekV2FusedQkvAProjLinear.__module__}.{DeepSeekV2FusedQkvAProjLinear.__qualname__}.forward"
    ]


def test_the_products_of_mla(patched) -> None:
    torch.manual_seed(0)
    model, layer = mla_layer()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("attention.mla", ""), ("bmm", ""), ("bmm", "")]
    q = torch.randn(19, HEADS, NOPE + ROPE).to(BF16)
    out = run_mla(layer, q)
    up = torch.einsum("bnp,npl->bnl", q[..., :NOPE].float(), layer.W_UK_T.float()).to(BF16)
    latent, _ = layer.impl.forward_mqa(torch.cat([up, q[..., NOPE:]], -1), None, None, layer)
    wanted = torch.einsum("bnl,nlv->bnv", latent.float(), layer.W_UV.float()).reshape(19, -1)
    assert (out.float() - wanted).norm() / wanted.norm() < 0.01
    assert torch.equal(out, rows_alone(lambda row: run_mla(layer, row), q)[0])
    padded = run_mla(layer, q, padding=5)
    assert torch.equal(padded[:19], out)
    assert not padded[19:].any()
    for scale in ("output_scale", "q_dcp_replicated"):
        with pytest.raises(SelectionError, match="quantised after attention"):
            run_mla(layer, q, **{scale: torch.ones(1)})


def test_memory_is_measured_with_what_a_step_holds(patched) -> None:
    class Allocated(TorchFunctionMode):
        shapes: ClassVar[list[tuple[int, ...]]] = []

        def __torch_function__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            if getattr(function, "__name__", "") == "new_empty":
                self.shapes.append(tuple(result.shape))
            return result

    model, layer = mla_layer()
    adopting.adopt(host.Host(serving_plan("cpu"), 64, classes()), model, config_of())
    forward = mla_products.forward_impl(lambda *_: "vLLM's")
    with Allocated() as allocated:
        assert forward(layer, torch.zeros(19, HEADS, NOPE + ROPE), None, None, None, None, None) == "vLLM's"
    assert allocated.shapes == [(19, HEADS, 2 * RANK + ROPE)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"W_UK_T": None}, "its W_UK_T is NoneType"),
        ({"W_UV": torch.zeros(HEADS, RANK, 1)}, "its W_UV is [4, 64, 1]"),
        ({"impl": SimpleNamespace()}, "its attention is not the registry's"),
        ({"num_heads": 8}, "its attention has 4 heads and its products 8"),
    ],
)
def test_products_of_mla_that_are_not_served(patched, changes, reason: str) -> None:
    model, layer = mla_layer(**changes)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert reason in made.rows[-1].reason
    assert made.rows[-1].op == "bmm"
    assert not hasattr(layer, host.SERVED)

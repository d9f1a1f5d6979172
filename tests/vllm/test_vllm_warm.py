"""While a server starts, kernels run on the weights of the layers that they serve, and on no second set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm_layers import (
    Block,
    classes,
    config_of,
    experts_layer,
    fp8_experts,
    fp8_layer,
    gpt_oss_experts,
    int4_layer,
    whole_fp8_layer,
)

from bidispatch.integrations.vllm import adopt as adopting
from bidispatch.integrations.vllm import host, ops, warm
from bidispatch.integrations.vllm.kernels import serving_plan

LAYERS = {
    "bf16": Block,
    "fp8 in blocks": lambda: fp8_layer()[0],
    "fp8 a channel": lambda: whole_fp8_layer(Fp8LinearMethod, channel=True, static=False)[0],
    "fp8 a tensor": lambda: whole_fp8_layer(Fp8LinearMethod, channel=False, static=True)[0],
    "int4": lambda: int4_layer("awq")[0],
    "experts": lambda: experts_layer()[0],
    "experts with biases": lambda: gpt_oss_experts()[0],
    "experts in fp8": lambda: fp8_experts()[0],
}


class OnGpu:
    """A bound kernel that seems to be a GPU's."""

    def __init__(self, bound):
        self.bound = bound
        self.device = SimpleNamespace(arch=SimpleNamespace(vendor="nvidia"), torch_device="cpu")
        self.problem, self.limits, self.rungs, self.edges = bound.problem, bound.limits, bound.rungs, bound.edges

    def __call__(self, *arguments):
        return self.bound(*arguments)


def places(model):
    found = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, torch.Tensor):
                found[value.data_ptr()] = value
    return found


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_no_second_set_of_weights_is_made(patched, monkeypatch, make) -> None:
    made = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    real = warm._zeros
    monkeypatch.setattr(
        warm, "_zeros", lambda spec, sizes, place: made.append((spec, sizes)) or real(spec, sizes, place)
    )
    model = make()
    adopting.adopt(host.Host(serving_plan("cpu"), 8, classes()), model, config_of())
    entries = [entry for entry in ops._entries.values() if entry.selection.problem.op not in ("rms_norm", "moe.router")]
    for entry in entries:
        entry.kernels = [OnGpu(kernel) for kernel in entry.kernels]
    before = {place: tensor.clone() for place, tensor in places(model).items()}
    ops.warm_all()
    matrices = [spec.name for spec, sizes in made if not sizes and len(spec.known) > 1]
    assert matrices == []
    assert all(entry.weights == {} for entry in entries)
    after = places(model)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(tensor.view(torch.uint8), after[place].view(torch.uint8))
        for place, tensor in before.items()
        if tensor.dim() and tensor.is_contiguous()
    )


def test_a_layer_that_gives_none_is_seen(patched, monkeypatch) -> None:
    """Negative control: without a layer's weights, matrices are made."""
    made = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    real = warm._zeros
    monkeypatch.setattr(warm, "_zeros", lambda spec, sizes, place: made.append(spec.name) or real(spec, sizes, place))
    model = experts_layer()[0]
    adopting.adopt(host.Host(serving_plan("cpu"), 8, classes()), model, config_of())
    for entry in ops._entries.values():
        entry.kernels, entry.weights = [OnGpu(kernel) for kernel in entry.kernels], {}
    ops.warm_all()
    assert {"w13", "w2"} <= set(made)

"""What kernels hold for each model that is measured in vLLM: at most 1 GiB, by the sizes that they are bound for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bidispatch as bid
from bidispatch.device import ARCHS, Device
from bidispatch.integrations.vllm.from_config import rows_of
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import BindContext, Limits
from bidispatch.runtime.scratch import Scratch, empties

pytest.importorskip("triton")

MODELS = sorted((Path(__file__).parents[2] / "benchmarks" / "models").glob("*.json"))
H200 = Device(ARCHS["sm90"], "NVIDIA H200", compute_units=132, predicted=True)
MOST = 1 << 30
STEPS = (Limits(8192, 256, 131072, 8192), Limits(256, 256, 131072, 1))
"""Of attention's two kernels: 8192 tokens a step, 256 sequences, 131072 positions."""


@pytest.fixture
def allocated(monkeypatch):
    """The bytes of all tensors made, none of which has memory."""
    sizes = []

    def counted(make):
        def made(*shape, **options):
            tensor = make(*shape, **{**options, "device": "meta"})
            sizes.append(tensor.numel() * tensor.itemsize)
            return tensor

        return made

    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    return sizes


def of_cublaslt(selection, rung):
    """Elements of a product in chunks of K at once: its partial results. The library itself is given no memory."""
    chunk, k = rung.params.k_chunk, selection.problem.size("k")
    return -(-k // chunk) * rung.tile.batch_max_m * selection.problem.size("n") if 0 < chunk < k else 0


def held(plan, allocated):
    """Bytes for every kind of layer of a model, as vLLM's workers bind them."""
    shared = Scratch()
    for selection in plan.selections:
        attends = selection.problem.op.startswith("attention")
        for limits in STEPS if attends else (Limits(8192),):
            own = Scratch(step=1)
            for rung in reversed(selection.rungs):
                rows = min(rung.max_m or limits.max_tokens, limits.max_tokens)
                context = BindContext(
                    *(H200, selection.problem, rung.params, rung.tile, replace(limits, max_tokens=rows)),
                    scratch=shared if attends else own,
                )
                if rung.implementation.load.startswith("bidispatch_backends.triton"):
                    load_attribute(rung.implementation.load)(context)
                elif rung.implementation.name == "cublaslt.pinned":
                    empties(context, (of_cublaslt(selection, rung), torch.float32))
                else:
                    assert rung.implementation.name in ("deep_gemm.bf16", "deep_gemm.fp8")  # which hold nothing
    return sum(allocated)


def planned(model, ranks):
    plan = bid.plan(device=H200, require="sequence", cuda_graph=True)
    rows_of(plan, model, tensor_parallel=ranks)
    return plan


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_kernels_hold_at_most_a_gibibyte(model, ranks, allocated):
    plan = planned(model, ranks)
    assert 256 << 20 <= held(plan, allocated) <= MOST


def test_experts_without_pieces_are_seen_to_hold_more(allocated, monkeypatch):
    """Negative control: the count sees what pieces save."""
    monkeypatch.setattr("bidispatch_backends.triton.moe.most_tokens", lambda problem, tile, tokens: tokens)
    model = next(path for path in MODELS if path.stem.startswith("deepseek-v3"))
    assert held(planned(model, 1), allocated) > MOST

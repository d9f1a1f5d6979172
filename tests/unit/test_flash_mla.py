"""flash_mla.decode against a stand-in for the library that walks the schedule it is given, as the library does."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.errors import ArgumentError, BackendError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.reference.mla import attention_mla, latent_batch
from bidispatch.registry import Params, Registry
from bidispatch.runtime.context import BindContext, Limits
from bidispatch_backends.flash_mla import decode, register

PROBLEM = ops.get("attention.mla").problem("float16", {"num_heads": 16})
PREDICTED = Device(ARCHS["sm90"], "sm90", predicted=True)
SCALE = 192**-0.5
TYPES = ["Tensor", "Tensor", "int", "Tensor", "Tensor", "float", "bool", *["Optional[Tensor]"] * 3]


def implementation():
    registry = Registry()
    register(registry)
    return registry.get("flash_mla.decode")


class Forward:
    """`dense_decode_fwd` in words: each part walks its requests, the last one up to its last block."""

    def __init__(self, types=TYPES):
        self._schema = SimpleNamespace(arguments=[SimpleNamespace(type=kind) for kind in types])
        self.parts = []

    def __call__(self, q, kcache, head_size_v, seqlens, table, scale, is_causal, metadata, num_splits, out):
        assert not is_causal
        assert out is None
        assert seqlens.dtype == table.dtype == metadata.dtype == num_splits.dtype == torch.int32
        assert num_splits.diff().tolist() == [1] * len(q)
        out = torch.full((*q.shape[:3], head_size_v), float("nan"), dtype=q.dtype)
        visited = []
        self.parts.append(metadata.tolist())
        for first, last, begin_block, end_block, *rest in metadata.tolist():
            assert begin_block == 0
            assert rest == [0, 0, 0, 0]
            if first >= len(q):
                continue
            for request in range(first, last + 1):
                visited.append(request)
                stop = min(int(seqlens[request]), end_block * 64) if request == last else int(seqlens[request])
                pages = table[request, : -(-stop // 64)].long()
                latent = kcache[pages].flatten(0, 1)[:stop, 0].double()
                weights = torch.softmax(q[request, 0].double() @ latent.T * scale, dim=-1)
                out[request, 0] = (weights @ latent[:, :head_size_v]).to(q.dtype)
        assert sorted(visited) == list(range(len(q)))
        return out, None


def bind(monkeypatch, forward=None, units=4, max_seq_len=512):
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm._flashmla_C", ModuleType("vllm._flashmla_C"))
    library = SimpleNamespace(dense_decode_fwd=SimpleNamespace(default=forward or Forward()))
    monkeypatch.setattr(torch.ops, "_flashmla_C", library, raising=False)
    device = replace(Device(ARCHS["cpu"], "a processor that plays the GPU"), compute_units=units)
    return decode.bind_decode(BindContext(device, PROBLEM, Params(), None, Limits(64, 8, max_seq_len)))


def run(kernel, batch):
    out = batch[0].new_full((*batch[0].shape[:2], 512), 7.0)
    kernel(*batch, SCALE, out)
    return out


@pytest.mark.parametrize("units", [1, 3, 4, 132])
def test_decodes_chunks_and_prefills_are_near_the_reference(monkeypatch, units):
    batch = latent_batch(PROBLEM, [1, 0, 3, 5, 1], [100, 0, 3, 70, 1], padding_rows=2)
    out = run(bind(monkeypatch, units=units), batch)
    (wanted,) = attention_mla(PROBLEM, *batch, SCALE)
    assert float((out[:10].double() - wanted[:10]).norm() / wanted[:10].norm()) < 8e-4
    assert (out[10:] == 7.0).all(), "rows that no sequence owns were written"


def test_a_request_is_never_split_and_parts_without_one_begin_behind_the_last():
    metadata, splits = decode.schedule(torch.tensor([64, 65, 1], dtype=torch.int32), 4)
    assert metadata[:, :4].tolist() == [[0, 0, 0, 1], [1, 1, 0, 2], [2, 2, 0, 1], [3, 2, 0, 1]]
    assert not metadata[:, 4:].any()
    assert splits.tolist() == [0, 1, 2, 3]
    metadata, _ = decode.schedule(torch.full((5,), 640, dtype=torch.int32), 2)
    assert metadata[:, :4].tolist() == [[0, 2, 0, 10], [3, 4, 0, 10]]


def test_a_sequence_past_the_limits_gives_nan_and_leaves_the_others(monkeypatch):
    batch = latent_batch(PROBLEM, [2, 2], [40, 120])
    expected = run(bind(monkeypatch), batch)
    out = run(bind(monkeypatch, max_seq_len=100), batch)
    assert torch.equal(out[:2], expected[:2])
    assert out[2:].isnan().all()
    batch[2] = batch[2][:, :1].contiguous()
    assert run(bind(monkeypatch), batch)[2:].isnan().all()


def test_another_versions_arguments_are_refused(monkeypatch):
    with pytest.raises(BackendError, match=r"takes Tensor, .* not Tensor"):
        bind(monkeypatch, Forward(TYPES[:-1]))


def test_bad_limits_and_scales_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="max_seq_len"):
        bind(monkeypatch, max_seq_len=0)
    batch = latent_batch(PROBLEM, [1], [3])
    with pytest.raises(ArgumentError, match="scale"):
        bind(monkeypatch)(*batch, 0.0, batch[0])


def test_it_claims_the_level_batch_and_says_what_it_needs():
    found = implementation()
    assert found.claims is Invariance.BATCH
    assert found.unmet(PREDICTED, PROBLEM) == ()
    for dims, why in (
        ({"page_size": 16}, "needs page_size in 64"),
        ({"num_heads": 20}, "needs num_heads in 16"),
        ({"kv_lora_rank": 256}, "needs kv_lora_rank in 512"),
        ({"rope_dim": 32}, "needs rope_dim in 64"),
    ):
        problem = ops.get("attention.mla").problem("bfloat16", {"num_heads": 16, **dims})
        assert any(why in reason for reason in found.unmet(PREDICTED, problem))
    assert any("needs sm90" in reason for reason in found.unmet(Device.parse("sm100"), PROBLEM))


def test_a_machine_without_the_library_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    here = Device(ARCHS["sm90"], "a Hopper here")
    assert any("vllm._flashmla_C" in reason for reason in implementation().unmet(here, PROBLEM))

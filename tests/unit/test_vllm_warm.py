"""What runs each kernel once while a server starts: at which rows, and with what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch.integrations.vllm.warm import rows_to_run, warm

EXPERTS = {"experts": 4, "top_k": 2, "hidden": 128, "intermediate": 128}
CASES = (
    ("gemm", "bfloat16", {"n": 32, "k": 64}, {}),
    ("bmm", "bfloat16", {"n": 32, "k": 16}, {}),
    ("rms_norm", "bfloat16", {"n": 64}, {}),
    ("moe.router", "float32", {"experts": 16, "top_k": 2}, {}),
    ("moe.experts", "bfloat16", EXPERTS, {}),
    (
        "moe.experts",
        "bfloat16",
        {**EXPERTS, "weight_dtype": "float8_e4m3fn", "expert_map": True, "global_experts": 8},
        {},
    ),
    ("gemm.int4", "bfloat16", {"n": 32, "k": 128, "zero_points": True}, {}),
    ("gemm.fp8_block", "float8_e4m3fn", {"n": 128, "k": 128}, {}),
    ("quantize.fp8_group", "bfloat16", {"k": 128}, {}),
    ("fused_add_rms_norm", "bfloat16", {"n": 64}, {}),
    ("attention", "bfloat16", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}, {"max_query_len": 1}),
    ("attention", "bfloat16", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}, {"max_query_len": 70}),
    ("attention.mla", "bfloat16", {"num_heads": 4}, {"max_query_len": 70}),
)


class Recorded:
    """A bound kernel that seems to be a GPU's, and tells of its calls."""

    def __init__(self, bound, rungs=(), edges=()):
        self.bound, self.calls = bound, []
        arch = SimpleNamespace(vendor="nvidia")
        self.device = SimpleNamespace(arch=arch, torch_device=bound.device.torch_device)
        self.problem, self.limits = bound.problem, bound.limits
        self.rungs, self.edges = rungs or bound.rungs, edges or bound.edges

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return self.bound(*arguments)


def bound_of(op, dtype, dims, limits):
    named = {"max_tokens": 70, **limits}
    if limits:
        named |= {"max_seqs": 2, "max_seq_len": 512}
    return bid.plan("cpu").select_problem(ops.get(op).problem(dtype, dims)).bind(**named)


@pytest.mark.parametrize(("op", "dtype", "dims", "limits"), CASES, ids=lambda value: str(value)[:30])
def test_a_kernel_of_each_op_runs_within_its_limits(op, dtype, dims, limits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    kernel = Recorded(bound_of(op, dtype, dims, limits))
    warm(kernel)
    assert kernel.calls


@pytest.mark.parametrize(
    ("op", "dims"),
    [("attention", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}), ("attention.mla", {"num_heads": 4})],
)
@pytest.mark.parametrize(("most", "seqs"), [(8, [2, 6, 7]), (3, [2, 3]), (2, [2]), (1, [1])])
def test_attention_runs_with_ever_more_sequences_up_to_as_many_as_there_may_be(op, dims, most, seqs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    limits = {"max_query_len": 70, "max_seqs": most, "max_seq_len": 512, "max_tokens": 70}
    bound = bid.plan("cpu").select_problem(ops.get(op).problem("bfloat16", dims)).bind(**limits)
    kernel = Recorded(bound)
    warm(kernel)
    tables = 2 if op == "attention.mla" else 3
    assert [call[tables].shape[0] for call in kernel.calls] == seqs


def test_a_layers_own_weights_are_what_its_kernel_runs_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    kernel = Recorded(bound_of("moe.experts", "bfloat16", EXPERTS, {}))
    w13, w2 = torch.randn(4, 256, 128).bfloat16(), torch.full((4, 128, 128), float("nan")).bfloat16()
    before = w13.clone(), w2.clone()
    warm(kernel, {"w13": w13, "w2": w2, "w13_scales": None})
    assert all(call[1] is w13 and call[2] is w2 for call in kernel.calls)
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip((w13, w2), before, strict=True))
    assert all((call[4] == 0).all() for call in kernel.calls)


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(32, 64),
        torch.ones(64, 32).bfloat16(),
        torch.ones(32, 64, dtype=torch.bfloat16, device="meta"),
        None,
    ],
    ids=["dtype", "shape", "device", "none"],
)
def test_weights_that_a_kernel_does_not_take_are_zeros(given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    kernel = Recorded(bound_of("gemm", "bfloat16", {"n": 32, "k": 64}, {}))
    warm(kernel, {"weight": given})
    assert all(call[1].shape == (32, 64) and (call[1] == 0).all() for call in kernel.calls)


def test_a_product_for_each_head_runs_on_some_of_a_layers_matrices_as_they_lie(monkeypatch):
    """A binary is made for a stride of one: MLA's matrices are views of a projection's weight, transposed."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    kernel = Recorded(bound_of("bmm", "bfloat16", {"n": 64, "k": 32}, {}))
    given = torch.randn(5, 64, 40).bfloat16().transpose(1, 2)[:, :32]
    warm(kernel, {"b": given})
    assert {(tuple(call[1].shape), call[1].stride(), call[1].data_ptr()) for call in kernel.calls} == {
        ((2, 32, 64), given.stride(), given.data_ptr())
    }


def test_without_room_a_server_starts_all_the_same(monkeypatch, caplog):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    kernel = Recorded(bound_of("gemm", "bfloat16", {"n": 32, "k": 64}, {}))
    kernel.bound = full
    warm(kernel)
    assert "has not run yet" in caplog.text


def test_every_rung_runs_and_every_choice_inside_one():
    rungs = tuple(SimpleNamespace(max_m=most) for most in (4, 16, None))
    kernel = Recorded(bound_of("gemm", "bfloat16", {"n": 32, "k": 64}, {}), rungs, ((), (9,), (33, 500)))
    assert rows_to_run(kernel) == (1, 4, 9, 16, 33, 70)


def test_of_very_many_choices_those_of_powers_of_two_run():
    bound = bound_of("gemm", "bfloat16", {"n": 32, "k": 64}, {})
    kernel = Recorded(bound, (SimpleNamespace(max_m=None),), (tuple(range(1, 70, 2)),))
    assert rows_to_run(kernel) == (1, 3, 5, 9, 17, 33, 65, 70)


def test_on_a_processor_nothing_runs():
    bound = bound_of("gemm", "bfloat16", {"n": 32, "k": 64}, {})
    kernel = Recorded(bound)
    kernel.device = bound.device
    warm(kernel)
    assert kernel.calls == []

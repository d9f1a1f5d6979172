"""flashinfer.paged on bits: no row follows its neighbours, and what one plan for a whole batch does to it."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from bidispatch import ops
from bidispatch.errors import UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.reference.attention import attention as reference
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.compare import bits
from bidispatch.verify.sequences import check_sequences, sequence_limits
from bidispatch.verify.subject import Subject
from bidispatch_backends.flashinfer.parts import Part

CASES = (
    {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    {"num_heads": 64, "num_kv_heads": 8, "head_dim": 64},
    {"num_heads": 16, "num_kv_heads": 16, "head_dim": 128, "page_size": 64},
    {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "softcap": 30.0},
    {"num_heads": 16, "num_kv_heads": 8, "head_dim": 256, "causal": False},
)
LIMITS = Limits(8192, 64, 40_000)
SIZES = Sizes(
    rows=(1, 2, 3, 7, 16, 17, 33, 64, 200, 1000, 2049),
    pool=64,
    graph_rows=(1,),
    lengths=(1, 17, 100, 512, 777, 2049, 5000),
    chunks=(1, 7, 64, 512),
    decodes=50,
    singles=12,
    max_seqs=64,
)
SPLIT_SIZES = replace(SIZES, lengths=(1, 17, 100, 512, 777, 2049))
SPLIT_WORKSPACE_MB = 5120
"""What splits of 512 need for one such prompt over the 8196 positions that a kernel of these sizes is bound for:
4455 MiB with 64 heads of 64. At most two such kernels are there at once."""


def bound(plan, problem, limits=LIMITS, workspace_mb=512, **params):
    implementation = default_registry().get("flashinfer.paged")
    if reasons := implementation.unmet(plan.device, problem):
        pytest.skip(f"flashinfer.paged: {'; '.join(reasons)}")
    chosen = implementation.params(**params)
    rungs = (Rung(implementation, chosen, implementation.tile(workspace_mb=workspace_mb)),)
    return bind(problem, plan.device, rungs, limits)


def problem_of(dtype="bfloat16", **dims):
    return ops.get("attention").problem(dtype, {**CASES[0], **dims})


@pytest.mark.parametrize("dims", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("params", [{}, {"decode_split": 256, "prefill_split": 512}], ids=str)
def test_no_row_depends_on_its_neighbours(plan, dims, dtype, params, record_property):
    problem = problem_of(dtype, **dims)
    sizes, workspace_mb = (SPLIT_SIZES, SPLIT_WORKSPACE_MB) if params else (SIZES, 512)

    def rebind(limits):
        kernel = bound(plan, problem, limits, workspace_mb=workspace_mb, **params)
        return Subject(problem, torch.device(plan.device.torch_device), kernel.launch)

    subject = rebind(sequence_limits(problem, sizes))
    checks = list(check_sequences(subject, Invariance.BATCH, sizes, rebind))
    record_property("rows", sum(check.rows for check in checks))
    assert [str(check) for check in checks if not check.passed] == []


@pytest.mark.parametrize("dims", CASES, ids=str)
def test_it_is_attention(plan, dims, record_property):
    problem = problem_of(**dims)
    arguments = paged_batch(problem, [1, 300, 1, 20, 1], [5000, 300, 17, 2500, 700], device=plan.device.torch_device)
    out = bound(plan, problem)(*arguments).double()
    (wanted,) = reference(problem, *arguments, problem.size("head_dim") ** -0.5)
    error = float((out - wanted).norm() / wanted.norm())
    record_property("error", error)
    assert error < 0.01


def test_one_plan_for_a_whole_batch_changes_bits(plan, monkeypatch):
    """Negative control: FlashInfer's tile follows the mean query length, even with splits of a fixed size."""
    problem = problem_of()
    device = plan.device.torch_device
    kernel = bound(plan, problem)
    alone = paged_batch(problem, [1], [5000], sequence_seeds=[5], device=device)
    together = paged_batch(problem, [1, 1000], [5000, 1000], sequence_seeds=[5, 6], device=device)
    assert torch.equal(bits(kernel(*alone)[0]), bits(kernel(*together)[0]))

    def at_once(layout, requests, workspace):
        return [(Part(0, 2048), [request for request in requests if request.query])]

    monkeypatch.setattr("bidispatch_backends.flashinfer.attention.groups", at_once)
    assert not torch.equal(bits(kernel(*alone)[0]), bits(kernel(*together)[0]))


class ServersDecode:
    """FlashInfer's tensor-core decode of one sequence, planned as SGLang plans it in its deterministic mode.

    Eager steps have splits of one size; those in a CUDA graph have none (sglang, flashinfer_backend.py:
    `fixed_split_size` of `decode_split_tile_size`, against `disable_split_kv`).
    """

    def __init__(self, plan, problem, arguments, *, split=0, graph=False):
        library = importlib.import_module("flashinfer")
        self._q, *self._cache, table, lengths, _ = arguments[:6]
        device, size = plan.device.torch_device, problem.size("page_size")
        length = int(lengths[0])
        pages = -(-length // size)
        starts = torch.tensor([0, pages], dtype=torch.int32)
        last = torch.tensor([length - (pages - 1) * size], dtype=torch.int32)
        options = {}
        if graph:
            buffers = [torch.zeros(count, dtype=torch.int32, device=device) for count in (2, pages, 1)]
            names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
            options = {"use_cuda_graph": True, **dict(zip(names, buffers, strict=True))}
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
        self._planned = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True, backend="fa2", **options
        )
        if graph:
            # Without splits its graphs launch more work items than a plan writes (flashinfer issue 4002): the others
            # are what the pinned buffer held before, another plan's perhaps. Of zeros they repeat the first item.
            self._planned._pin_memory_int_workspace_buffer.zero_()
        dtype = self._q.dtype
        self._planned.plan(
            *(starts, table[0, :pages].contiguous(), last),
            *(problem.size(dim) for dim in ("num_heads", "num_kv_heads", "head_dim", "page_size")),
            sm_scale=problem.size("head_dim") ** -0.5,
            q_data_type=dtype,
            kv_data_type=dtype,
            fixed_split_size=split // size or None,
            disable_split_kv=not split,
        )

    def __call__(self):
        return self._planned.run(self._q, tuple(self._cache), out=torch.empty_like(self._q))

    def replayed(self):
        """Its result from a CUDA graph."""
        out = torch.empty_like(self._q)
        self()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._planned.run(self._q, tuple(self._cache), out=out)
        out.fill_(float("nan"))
        graph.replay()
        return out


def test_a_graph_without_splits_beside_eager_steps_with_them_changes_bits(plan, record_property):
    """Negative control: a step that moves from eager calls into a graph, as one does whose batch grows smaller.

    Up to one split both are the same; that is no help beyond it. Ours takes no part in graphs, and has its splits
    whatever else a call holds.
    """
    problem = problem_of()
    ours = bound(plan, problem)  # skips where the library is not installed
    split = default_registry().get("flashinfer.paged").params().decode_split
    device = plan.device.torch_device
    differing = {}
    for length in (300, split, 2 * split + 1, 5000, 20_000):
        arguments = paged_batch(problem, [1], [length], sequence_seeds=[length], device=device)
        eager = ServersDecode(plan, problem, arguments, split=split)()
        graphed = ServersDecode(plan, problem, arguments, graph=True)
        assert torch.equal(bits(graphed.replayed()), bits(graphed())), "the graph itself changed bits"
        differing[length] = not torch.equal(bits(graphed.replayed()), bits(eager))
        many = paged_batch(problem, [1] * 9, [length] * 9, sequence_seeds=range(length, length + 9), device=device)
        assert torch.equal(bits(ours(*many)[:1]), bits(ours(*arguments)))
    record_property("differing", differing)
    assert any(differing.values())
    assert not any(differs for length, differs in differing.items() if length <= split)


def test_small_splits_of_many_long_sequences_fit(plan):
    """16 sequences of 32768 positions in splits of 256 overflow FlashInfer's usual workspace in one plan."""
    problem = problem_of()
    kernel = bound(plan, problem, decode_split=256)
    device = plan.device.torch_device
    many = paged_batch(problem, [1] * 16, [32768] * 16, sequence_seeds=range(16), device=device)
    out = bits(kernel(*many))
    for sequence in (3, 15):  # of 512 MiB, all but the last go into one plan
        alone = paged_batch(problem, [1], [32768], sequence_seeds=[sequence], device=device)
        assert torch.equal(out[sequence], bits(kernel(*alone)[0]))


def test_it_cannot_be_captured_and_says_so(plan):
    problem = problem_of()
    kernel = bound(plan, problem)
    arguments = paged_batch(problem, [1], [50], device=plan.device.torch_device)
    wanted = kernel(*arguments)
    out = torch.empty_like(wanted)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()

    def capture():
        with torch.cuda.graph(graph):
            out.zero_()  # torch warns of a graph of nothing
            kernel(*arguments, out=out)

    with pytest.raises(UsageError, match="cannot be captured"):
        capture()
    assert torch.equal(bits(kernel(*arguments)), bits(wanted))

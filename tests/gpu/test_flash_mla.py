"""flash_mla.decode on bits: no row follows its neighbours, in graphs neither, and what the library's schedule does.

Skips where vLLM's `_flashmla_C` is not installed, or the GPU is no Hopper.
"""

from __future__ import annotations

import pytest
import torch
from bound_kernels import bound, same_bits

from bidispatch import ops
from bidispatch.ops.reference.mla import attention_mla, latent_batch
from bidispatch.registry import default_registry
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.graphs import check_graphs
from bidispatch.verify.sequences import check_sequences, graph_groups, sequence_limits
from bidispatch.verify.subject import Subject

pytestmark = pytest.mark.filterwarnings("default")  # of vLLM's import

NAME = "flash_mla.decode"
DTYPES = ("bfloat16", "float16")
HEADS = (16, 64, 128)
CONTEXTS = (300, 1000, 2049, 5000)
SCALE = 192**-0.5
SIZES = Sizes(
    rows=(1, 2, 7, 16, 33, 64, 200),
    pool=64,
    graph_rows=(1, 16, 64),
    lengths=(1, 17, 63, 64, 65, 512, 777, 2049),
    chunks=(1, 7, 64),
    decodes=40,
    singles=8,
    max_seqs=64,
)


def problem_of(num_heads, dtype="bfloat16"):
    return ops.get("attention.mla").problem(dtype, {"num_heads": num_heads})


def steps(plan, problem, seeds):
    """Decode steps of the sequences of these numbers, whose lengths are `CONTEXTS` in turn."""
    lengths = [CONTEXTS[seed % len(CONTEXTS)] for seed in seeds]
    return latent_batch(problem, [1] * len(seeds), lengths, sequence_seeds=seeds, device=plan.device.torch_device)


def by_the_library(problem, arguments):
    """The same operator with the schedule that it makes by itself, as servers call it: one query row a sequence."""
    from bidispatch_backends.flash_mla.decode import _forward

    q, kv_cache, table, lengths, _ = arguments
    rank = problem.size("kv_lora_rank")
    result = _forward()(q[:, None], kv_cache[:, :, None], rank, lengths, table, SCALE, True, None, None, None)[0]
    return result.view(len(q), problem.size("num_heads"), rank)


def rows_that_differ(kernel, plan, problem, count=32):
    """How many steps have other bits alone than among so many."""
    together = kernel(steps(plan, problem, range(count)))
    return sum(not same_bits(together[i : i + 1], kernel(steps(plan, problem, [i]))) for i in range(count))


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_check_of_sequences_holds(plan, dtype, num_heads, record_property):
    """At the level it claims: alone, in batches, in chunks, padded, beside NaN, bound for prompts and for decode."""
    problem = problem_of(num_heads, dtype)
    claim = default_registry().get(NAME).claims

    def rebind(limits):
        return Subject(problem, torch.device(plan.device.torch_device), bound(plan, NAME, problem, limits).launch)

    checks = list(check_sequences(rebind(sequence_limits(problem, SIZES)), claim, SIZES, rebind))
    record_property("rows", sum(check.rows for check in checks))
    assert [str(check) for check in checks if not check.passed] == []


@pytest.mark.parametrize("num_heads", HEADS)
def test_a_graph_serves_other_lengths_with_the_bits_of_rows_alone(plan, num_heads, record_property):
    problem = problem_of(num_heads)
    claim = default_registry().get(NAME).claims

    def rebind(limits):
        return Subject(problem, torch.device(plan.device.torch_device), bound(plan, NAME, problem, limits).launch)

    groups = graph_groups(rebind(sequence_limits(problem, SIZES)), SIZES, claim, rebind)
    checks = [check_graphs(subject, calls, binding) for binding, subject, calls in groups]
    record_property("rows", sum(check.rows for check in checks))
    assert [str(check) for check in checks if not check.passed] == []
    assert all(check.rows for check in checks)


@pytest.mark.parametrize("num_heads", HEADS)
def test_the_librarys_own_schedule_follows_the_batch(plan, num_heads, record_property):
    """Negative control: it cuts a request wherever a multiprocessor's share of the batch ends. Ours never does."""
    problem = problem_of(num_heads)
    ours = bound(plan, NAME, problem, Limits(64, 64, max(CONTEXTS), 1))
    differing = rows_that_differ(lambda arguments: by_the_library(problem, arguments), plan, problem)
    record_property("differing", differing)
    assert differing
    assert rows_that_differ(lambda arguments: ours(*arguments), plan, problem) == 0


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize(("name", "most"), [(NAME, 1.5), ("triton.mla", 1.05)])
def test_errors_are_those_of_the_library(plan, name, most, num_heads, record_property):
    """Against fp64, beside FlashMLA with its own schedule: what FA3 is to other attention in test_errors.py."""
    problem = problem_of(num_heads)
    arguments = steps(plan, problem, range(16))
    mine = bound(plan, name, problem, Limits(64, 64, max(CONTEXTS), 1))
    bound(plan, NAME, problem, Limits(64, 64, max(CONTEXTS), 1))  # skips where the library is not there
    (exact,) = attention_mla(problem, *arguments, SCALE)
    errors = [
        float((out.double() - exact).norm() / exact.norm())
        for out in (mine(*arguments), by_the_library(problem, arguments))
    ]
    record_property("error", errors[0])
    record_property("of FlashMLA's", errors[0] / errors[1])
    assert errors[0] <= most * errors[1], errors

"""`triton.mla` on a GPU: many sequences in segments, with the bits of splits, of the walks and of one prefill.

Shown against the same rows of one prefill, which is near the fp64 reference.
"""

from __future__ import annotations

import pytest
import torch

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.ops.reference.mla import latent_batch
from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.context import Limits
from bidispatch.runtime.scratch import Scratch
from bidispatch.verify.compare import bits
from bidispatch_backends.triton.mla import Runs

NAME = "triton.mla"
EDGES = [1, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 1536, 8191, 8192, 8193, 9216]
LENGTH = 9300
STEPS = Limits(256, 256, 131072, 1)
PROMPTS = Limits(8192, 16, 131072)


def speculative(tokens):
    """For calls of several query tokens a sequence. One bound for all, as far as kernels are compiled for it."""
    return Limits(tokens, 256, 131072, 16)


def bound(problem, device, limits, scratch=None, **sizes):
    implementation = default_registry().get(NAME)
    if why := implementation.unmet(device, problem):
        pytest.skip(why[0])
    params = implementation.params()
    ((_, tile),) = implementation.tiles(device, problem, params)
    rung = Rung(implementation, params, tile.model_copy(update=sizes))
    return bind(problem, device, (rung,), limits, scratch) if scratch else bind(problem, device, (rung,), limits)


def same_bits(one, other):
    return torch.equal(bits(one), bits(other))


def problem_of(heads, dtype="bfloat16", **dims):
    return ops.get("attention.mla").problem(dtype, {"num_heads": heads, **dims})


def prefill(problem, device, length=LENGTH, **paging):
    """The tensors of one sequence, and its whole prefill."""
    arguments = latent_batch(problem, [length], [length], device="cuda", **paging)
    return arguments, bound(problem, device, Limits(length, 1, 131072, length), decode_query_len=0)(*arguments)


def steps(arguments, ends, queries):
    """The last `queries[i]` positions before `ends[i]` of the one sequence in `arguments`, as a batch of its own."""
    q, cache, table, *_ = arguments
    rows = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, queries, strict=True)]).to(q.device)
    starts = torch.tensor([0, *queries]).cumsum(0)
    batch = [
        q[rows],
        cache,
        table.expand(len(ends), -1).contiguous(),
        torch.tensor(ends, dtype=torch.int32, device=q.device),
        starts.to(torch.int32).to(q.device),
    ]
    return rows, batch


@pytest.fixture
def in_segments(monkeypatch):
    """Segments for every call of a kernel whose tile has them, however few sequences it has."""
    monkeypatch.setattr(Runs, "in_segments", lambda runs, seqs: runs.segment_grid(seqs)[0] > 0)


WAYS = [
    {"segment_programs": 1},
    {"segment_programs": 3},
    {"segment_programs": 1, "decode_overlap": False},  # the Triton kernel
    {"segment_programs": 1, "workspace_mb": 64},  # some sequences are left to the walk
    {"segment_programs": 0},
    {"decode_query_len": 0},  # Triton's walk
]


@pytest.mark.usefixtures("in_segments")
@pytest.mark.parametrize("heads", [16, 128, 20])
def test_segments_have_the_bits_of_prefill(heads):
    """Wherever a program's part begins and ends, from one sequence to more than there are programs."""
    device = Device.detect()
    problem = problem_of(heads)
    arguments, whole = prefill(problem, device)
    random = torch.Generator().manual_seed(1)
    for count in (1, 2, 17, 64, 131, 132, 133, 256):
        lengths = torch.randint(1, 3000, (count,), generator=random).tolist()
        ends = (EDGES + lengths)[:count] if count < 64 else EDGES + lengths[len(EDGES) :]
        ends = [ends[i] for i in torch.randperm(count, generator=random)]
        rows, batch = steps(arguments, ends, [1] * count)
        for sizes in WAYS:
            out = bound(problem, device, STEPS, **sizes)(*batch)
            assert same_bits(out, whole[rows]), (count, sizes)
    (reference,) = load_attribute(ops.get("attention.mla").reference)(problem, *batch, 192**-0.5)
    assert float((whole[rows].double() - reference).norm() / reference.norm()) < 1e-2


@pytest.mark.usefixtures("in_segments")
@pytest.mark.parametrize("context", [256, 1024, 8192])
@pytest.mark.parametrize("heads", [16, 128])
def test_alike_sequences_have_the_bits_of_prefill(heads, context):
    """As many pairs as programs, nearly: none is cut."""
    device = Device.detect()
    problem = problem_of(heads)
    arguments, whole = prefill(problem, device)
    for count in (16, 64, 66, 128, 132, 200, 256):
        rows, batch = steps(arguments, [context] * count, [1] * count)
        for sizes in WAYS[:3]:
            out = bound(problem, device, STEPS, **sizes)(*batch)
            assert same_bits(out, whole[rows]), (count, sizes)


WALKS = [{"prefill_overlap": True}, {"prefill_overlap": False}, {"decode_query_len": 0}]


@pytest.mark.parametrize(("dtype", "page_size"), [("bfloat16", 64), ("float16", 16), ("bfloat16", 32)])
@pytest.mark.parametrize("heads", [16, 128, 20])
def test_prompts_have_the_bits_of_the_triton_walk_and_of_decode(heads, dtype, page_size, record_property):
    """Whole prompts and chunks behind a prefix, of lengths around tiles and splits, beside decode steps and none."""
    device = Device.detect()
    problem = problem_of(heads, dtype, page_size=page_size)
    arguments, whole = prefill(problem, device)
    ends = [1, 3, 64, 65, 255, 257, 1024, 1025, 2000, LENGTH, 0, LENGTH, 5000, 8200, 4097, 700]
    queries = [1, 3, 64, 65, 255, 256, 1024, 1, 1999, 700, 0, 1, 17, 90, 16, 700]
    compared = 0
    for order in ([*range(len(ends))], [*reversed(range(len(ends)))], [9], [6, 7]):
        rows, batch = steps(arguments, [ends[i] for i in order], [queries[i] for i in order])
        for sizes in WALKS:
            out = torch.full((len(rows), heads, 512), float("nan"), dtype=whole.dtype, device="cuda")
            bound(problem, device, PROMPTS, **sizes)(*batch, out=out)
            assert same_bits(out, whole[rows]), (order, sizes)
            compared += len(rows)
    record_property("rows", compared)
    decode = bound(problem, device, PROMPTS)
    for few in torch.arange(0, LENGTH, 31).split(16):
        rows, batch = steps(arguments, (few + 1).tolist(), [1] * len(few))
        assert same_bits(decode(*batch), whole[rows])


@pytest.mark.parametrize("sizes", WALKS, ids=str)
def test_a_walk_writes_nan_and_zeros_where_it_must_and_nothing_else(sizes):
    """Prompts past the limits, ones without a position to see, rows behind the last sequence, operands out of line."""
    device = Device.detect()
    for heads in (16, 128):
        problem = problem_of(heads)
        arguments, whole = prefill(problem, device)
        attend = bound(problem, device, Limits(8192, 16, 4096), **sizes)
        ends, queries = [4096, 5000, 300, 4097, 60], [40, 100, 300, 30, 50]
        rows, batch = steps(arguments, ends, queries)
        batch[3][4] = 0
        out = torch.full((len(rows) + 9, heads, 512), 7.0, dtype=whole.dtype, device="cuda")
        q = torch.cat([batch[0], batch[0][:9]])
        attend(q, *batch[1:], out=out)
        past = torch.tensor([end > 4096 for end, count in zip(ends, queries, strict=True) for _ in range(count)])
        assert out[: len(rows)][past].isnan().all()
        assert (out[len(rows) - 50 : len(rows)] == 0.0).all()
        assert (out[len(rows) :] == 7.0).all()
        served = ~past
        served[-50:] = False
        assert same_bits(out[: len(rows)][served], whole[rows][served])
        moved = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view(q.shape).copy_(q)
        other = torch.full_like(out, 7.0)
        attend(moved, *batch[1:], out=other)
        assert torch.equal(bits(out), bits(other))


@pytest.mark.parametrize("heads", [16, 128])
def test_what_one_prompt_leaves_in_the_running_state_reaches_no_other(heads):
    """Infinities and NaN, in programs that walk others' tiles next; and whatever the memory held before."""
    device = Device.detect()
    problem = problem_of(heads)
    lengths = [900, 3000, 40, 1500] * 3
    batch = latent_batch(problem, lengths, lengths, device="cuda", sequence_seeds=list(range(12)))
    scratch = Scratch()
    attend = bound(problem, device, Limits(sum(lengths), 12, 4096), scratch)
    clean = attend(*batch)
    for value in (float("inf"), float("nan"), float("-inf")):
        for block in scratch._blocks.values():
            block[: block.numel() // 4 * 4].view(torch.float32).fill_(value)
        assert same_bits(attend(*batch), clean)
    batch[1][batch[2][1, 2].long(), 5, :7] = float("nan")
    spoilt = attend(*batch)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[900:3900] = False
    assert same_bits(spoilt[others], clean[others])
    assert spoilt[3000:3900].isnan().any()


@pytest.mark.parametrize("heads", [16, 128])
def test_a_graph_of_prompts_serves_other_prompts(heads):
    device = Device.detect()
    problem = problem_of(heads)
    arguments, whole = prefill(problem, device, max_pages=131072 // problem.size("page_size"))
    attend = bound(problem, device, Limits(2048, 16, 131072))
    _, static = steps(arguments, [LENGTH] * 8, [256] * 8)
    out = torch.empty(2048, heads, 512, dtype=torch.bfloat16, device="cuda")
    attend(*static, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(*static, out=out)
    for ends, queries in (
        ([LENGTH, 300, 20, 5000, 700, 1, 8192, 2000], [500, 300, 20, 1000, 1, 1, 190, 36]),
        ([2048, 0, 0, 0, 0, 0, 0, 0], [2048, 0, 0, 0, 0, 0, 0, 0]),
    ):
        rows, moved = steps(arguments, ends, queries)
        assert len(rows) == 2048
        for tensor, value in zip(static, moved, strict=True):
            tensor.copy_(value)
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            assert same_bits(out, whole[rows])


@pytest.mark.usefixtures("in_segments")
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize(("dtype", "page_size"), [("bfloat16", 64), ("float16", 16)])
def test_speculative_decode_in_segments_has_the_bits_of_prefill(heads, page_size, dtype):
    """One to four queries, all alike or mixed; five and more take another tile. Empty sequences stand behind them."""
    device = Device.detect()
    problem = problem_of(heads, dtype, page_size=page_size)
    arguments, whole = prefill(problem, device)
    random = torch.Generator().manual_seed(2)
    for most in (2, 3, 4, 9):
        for alike in (True, False):
            count = 140
            queries = [most] * count if alike else torch.randint(1, most + 1, (count,), generator=random).tolist()
            lengths = EDGES + torch.randint(1, 2000, (count - len(EDGES),), generator=random).tolist()
            ends = [max(end, query) for end, query in zip(lengths, queries, strict=True)]
            rows, batch = steps(arguments, ends, queries)
            batch[2] = torch.cat([batch[2], batch[2][:3]])
            batch[3] = torch.cat([batch[3], batch[3].new_zeros(3)])
            batch[4] = torch.cat([batch[4], batch[4][-1:].expand(3)])
            for sizes in WAYS:
                out = bound(problem, device, speculative(len(rows)), **sizes)(*batch)
                assert same_bits(out, whole[rows]), (most, alike, sizes)


@pytest.mark.usefixtures("in_segments")
def test_long_sequences_among_short_ones_and_prompts_have_the_bits_of_prefill():
    """A pair that takes many programs, and prompts that are walked in the same call."""
    device = Device.detect()
    problem = problem_of(128)
    arguments, whole = prefill(problem, device, 20000)
    ends, queries = [20000, 5, 17500, 700, 2000, 300] * 12, [1, 1, 1, 1, 300, 1] * 12
    ends = [max(end, query) for end, query in zip(ends, queries, strict=True)]
    rows, batch = steps(arguments, ends, queries)
    for sizes in WAYS:
        out = bound(problem, device, Limits(8192, 256, 131072), **sizes)(*batch)
        assert same_bits(out, whole[rows]), sizes


@pytest.mark.parametrize("heads", [16, 128])
def test_a_call_below_and_one_above_the_threshold_agree(heads, monkeypatch):
    device = Device.detect()
    problem = problem_of(heads)
    arguments, whole = prefill(problem, device)
    asked = []
    original = Runs.in_segments
    monkeypatch.setattr(Runs, "in_segments", lambda runs, seqs: asked.append(original(runs, seqs)) or asked[-1])
    kernel = bound(problem, device, STEPS, segment_programs=1)
    for count in (1, 32, 48, 64, 112, 128, 256):
        rows, batch = steps(arguments, [1 + 37 * i % LENGTH for i in range(count)], [1] * count)
        assert same_bits(kernel(*batch), whole[rows]), count
    assert asked[0] is False
    assert asked[-1] is True


@pytest.mark.usefixtures("in_segments")
def test_sequences_past_the_limits_give_nan_and_leave_the_others():
    device = Device.detect()
    problem = problem_of(128)
    arguments, whole = prefill(problem, device)
    ends = [LENGTH, 500, 3000, 4097] * 20
    rows, batch = steps(arguments, ends, [1] * len(ends))
    out = bound(problem, device, Limits(256, 256, 4096, 1), segment_programs=1)(*batch)
    past = torch.tensor(ends, device=out.device) > 4096
    assert out[past].isnan().all()
    assert same_bits(out[~past], whole[rows][~past])


@pytest.mark.usefixtures("in_segments")
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1.0])
def test_what_the_workspace_held_changes_nothing(heads, poison):
    device = Device.detect()
    problem = problem_of(heads)
    arguments, whole = prefill(problem, device)
    scratch = Scratch()
    rows, batch = steps(arguments, [1 + 97 * i % LENGTH for i in range(150)], [1] * 150)
    kernel = bound(problem, device, STEPS, scratch, segment_programs=1)
    for _ in range(2):
        for block in scratch._blocks.values():
            block[: block.numel() // 4 * 4].view(torch.float32).fill_(poison)
        assert same_bits(kernel(*batch), whole[rows])


@pytest.mark.usefixtures("in_segments")
def test_infinities_and_nan_of_one_sequence_do_not_reach_another():
    """Behind it in the same programs, which fold into the state that it left."""
    device = Device.detect()
    problem = problem_of(128)
    batch = latent_batch(problem, [1] * 140, [900] * 140, device="cuda", sequence_seeds=list(range(140)))
    clean = {n: bound(problem, device, Limits(256, 256, 4096, 1), segment_programs=n)(*batch) for n in (0, 1)}
    assert same_bits(clean[0], clean[1])
    for seq, value in ((3, float("inf")), (70, float("nan")), (71, float("-inf"))):
        batch[1][batch[2][seq, 2].long(), 5, :7] = value
    out = {n: bound(problem, device, Limits(256, 256, 4096, 1), segment_programs=n)(*batch) for n in (0, 1)}
    others = [i for i in range(140) if i not in (3, 70, 71)]
    assert same_bits(out[1][others], clean[0][others])
    assert torch.equal(out[0].isnan(), out[1].isnan())
    assert torch.equal(out[0].nan_to_num(), out[1].nan_to_num())


@pytest.mark.usefixtures("in_segments")
@pytest.mark.parametrize("heads", [16, 128])
def test_a_graph_captured_at_the_longest_context_serves_short_ones(heads):
    device = Device.detect()
    problem = problem_of(heads)
    arguments, whole = prefill(problem, device, max_pages=131072 // problem.size("page_size"))
    count = 200
    attend = bound(problem, device, STEPS, segment_programs=1)
    _, static = steps(arguments, [LENGTH] * count, [1] * count)
    out = torch.empty(count, heads, 512, dtype=torch.bfloat16, device="cuda")
    attend(*static, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(*static, out=out)
    random = torch.Generator().manual_seed(3)
    for ends in ([1] * count, [LENGTH] * count, torch.randint(1, LENGTH, (count,), generator=random).tolist()):
        rows, moved = steps(arguments, ends, [1] * count)
        for tensor, value in zip(static, moved, strict=True):
            tensor.copy_(value)
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            assert same_bits(out, whole[rows])


@pytest.mark.usefixtures("in_segments")
def test_a_run_that_is_not_folded_is_caught():
    """Negative control: one split of all positions in segments, against the class's splits."""
    device = Device.detect()
    problem = problem_of(128)
    arguments, whole = prefill(problem, device)
    rows, batch = steps(arguments, [3000] * 140, [1] * 140)
    implementation = default_registry().get(NAME)
    params = implementation.params(kv_split=4096)
    ((_, tile),) = implementation.tiles(device, problem, params)
    rung = Rung(implementation, params, tile.model_copy(update={"segment_programs": 1}))
    assert not same_bits(bind(problem, device, (rung,), STEPS)(*batch), whole[rows])

"""verify_plan on this machine's processor: sound kernels pass, one planted ULP is found in every op."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch.device import Device
from bidispatch.errors import BackendError, DeviceError, SelectionError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.records import RecordStore
from bidispatch.registry import Implementation, Registry, default_registry
from bidispatch.runtime.bind import load_attribute
from bidispatch.verify import Check, verify_plan, verify_selection
from bidispatch.verify.cases import Sizes, problems_for, sizes_for
from bidispatch.verify.compare import bits
from bidispatch.verify.rungs import check_ladder
from bidispatch.verify.sequence_pool import Piece, SequencePool
from bidispatch.verify.sequences import stock_check
from bidispatch.verify.stock import stock_subject
from bidispatch.verify.subject import Subject

SMALL_ATTENTION = {"head_dim": 16, "num_heads": 4, "num_kv_heads": 2, "page_size": 16}
SMALL = {
    "gemm": {"n": 11, "k": 70, "bias": True},
    "bmm": {"n": 11, "k": 70},
    "rms_norm": {"n": 70},
    "fused_add_rms_norm": {"n": 70},
    "qk_norm": {"head_dim": 20, "num_heads": 4, "num_kv_heads": 2},
    "silu_and_mul": {"n": 70},
    "gelu_tanh_and_mul": {"n": 70},
    "softmax": {"n": 70},
    "log_softmax": {"n": 70},
    "token_logprob": {"n": 70},
    "mean": {"n": 70},
    "sum": {"n": 70},
    "attention": SMALL_ATTENTION,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Test workers share the cores: more threads than cores would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sound_kernel(context):
    """The built-in kernel of the context's problem."""
    implementation = default_registry().find("cpu", context.problem.op, context.problem.dtype)[0]
    return load_attribute(implementation.load)(replace(context, params=implementation.params()))


def bind_one_ulp_off(context):
    """Right but for the last bit of one element, in the last row of calls of five rows and more."""
    kernel, op = sound_kernel(context), ops.get(context.problem.op)

    def launch(*everything):
        kernel(*everything)
        rows, axis = everything[0].shape[op.row_axis], op.row_axis
        if rows >= 5:
            out = everything[-len(op.outputs)]
            last = out.select(axis, rows - 1)
            changed = last.reshape(-1).clone()
            bits(changed)[-1] ^= 1
            last.copy_(changed.reshape(last.shape))

    return launch


def bind_sound(context):
    return sound_kernel(context)


def bind_off_in_proportion(context):
    kernel = sound_kernel(context)

    def launch(x, weight, bias, out):
        kernel(x, weight, bias, out)
        out.mul_(1 + 2**-8 * 0.75)

    return launch


def bind_follows_matrices(context):
    kernel = sound_kernel(context)

    def launch(a, b, out):
        kernel(a, b, out)
        if len(a) > 3:
            out.mul_(1 + 2**-20)

    return launch


def bind_strict(context):
    """Raises where a call exceeds what it was bound for."""
    kernel, limits = sound_kernel(context), context.limits

    def launch(*everything):
        tokens = everything[0].shape[ops.get(context.problem.op).row_axis]
        if tokens > limits.max_tokens:
            raise RuntimeError(f"{tokens} tokens, bound for {limits.max_tokens}")
        if context.problem.op == "attention":
            _, _, _, _, seq_lens, starts, *_ = everything
            longest, most = int(seq_lens.max()), int(starts.diff().max())
            if len(seq_lens) > limits.max_seqs or longest > limits.max_seq_len or most > limits.max_query_len:
                raise RuntimeError(f"{len(seq_lens)} sequences to {longest}, {most} rows: bound for {limits}")
        kernel(*everything)

    return launch


def bind_raises(context):
    raise RuntimeError("no such instruction")


def bind_leaves_outputs(context):
    return lambda *everything: None


def planted_plan(bind, op):
    """A plan of the processor that takes `planted.<op>`, bound by a function of this module."""
    registry = Registry()
    registry.load_entry_points()
    load = bind if ":" in bind else f"{__name__}:{bind}"
    registry.register(
        Implementation(
            name=f"planted.{op}",
            op=op,
            load=load,
            archs=("cpu",),
            dtypes=("float32", "bfloat16", "float16"),
            numerics=lambda params, problem: "planted",
            libraries=("torch",),
        )
    )
    return bid.plan("cpu", registry=registry)


def verify_planted(bind, op):
    problem = ops.get(op).problem("float32", SMALL[op])
    with bid.override(f"{op}=planted.{op}"):
        return verify_plan(planted_plan(bind, op), problems=[problem])


@pytest.mark.parametrize("op", SMALL)
def test_the_built_in_kernels_hold_their_bits(op):
    problems = [ops.get(op).problem(dtype, SMALL[op]) for dtype in ("float32", "bfloat16")]
    report = verify_plan(bid.plan("cpu"), problems=problems)
    assert report.faults == ()
    assert report.passed
    assert all(result.comparisons > 1000 for result in report.results)
    assert all(result.stock.rows for result in report.results)
    json.dumps(report.as_json(), allow_nan=False)


@pytest.mark.parametrize("op", SMALL)
def test_one_ulp_in_one_row_of_a_batch_is_found_in_every_op(op):
    report = verify_planted("bind_one_ulp_off", op)
    assert not report.passed
    assert report.records() == []
    (result,) = report.results
    assert not result.error
    found = result.smallest
    # A sequence alone is its whole prefill, which is off already: there the smallest call is a decode step.
    assert found.size == (1 if op == "attention" else 5)
    assert found.ulps == 1


def test_a_product_that_follows_the_number_of_matrices_is_found():
    (result,) = verify_planted("bind_follows_matrices", "bmm").results
    assert [check.name for check in result.checks if not check.passed] == ["batches of matrices"]


@pytest.mark.parametrize("op", ["gemm", "bmm", "fused_add_rms_norm", "attention"])
def test_no_call_exceeds_what_the_kernel_was_bound_for(op):
    report = verify_planted("bind_strict", op)
    assert report.faults == ()


def test_a_kernel_that_writes_nothing_fails_everything():
    (result,) = verify_planted("bind_leaves_outputs", "rms_norm").results
    assert not result.passed
    assert all(check.differing == check.rows for check in result.checks if check.name.startswith("batch sizes"))


def test_a_kernel_that_raises_fails_its_problem_and_the_rest_still_runs():
    plan = planted_plan("bind_raises", "mean")
    with bid.override("mean=planted.mean"):
        report = verify_plan(plan, problems=[ops.get(op).problem("float32", SMALL[op]) for op in ("mean", "softmax")])
    assert not report.passed
    assert [result.passed for result in report.results] == [False, True]
    assert report.results[0].error == "RuntimeError: no such instruction"


def test_a_kernel_that_does_not_load_is_an_error_and_no_finding():
    with pytest.raises(BackendError, match=r"planted\.mean was chosen"):
        verify_planted("no_such_module:bind", "mean")


def test_records_of_a_run_are_evidence_for_the_next_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_RECORDS_DIR", str(tmp_path))
    problem = ops.get("gemm").problem("float32", SMALL["gemm"])
    plan = bid.plan("cpu")
    assert plan.select_problem(problem).evidence is None
    RecordStore(plan.device).add(verify_plan(plan, problems=[problem]).records())
    evidence = bid.plan("cpu").select_problem(problem).evidence
    assert evidence is not None
    assert evidence.comparisons > 1000
    assert evidence.level == "sequence"


def test_records_of_a_lower_level_are_no_evidence_for_a_higher(tmp_path, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_RECORDS_DIR", str(tmp_path))
    problem = ops.get("attention").problem("float32", SMALL_ATTENTION)
    plan = bid.plan("cpu")
    report = verify_plan(plan, problems=[problem], level="batch")
    assert report.passed
    assert not any("prefill" in check.name for check in report.results[0].checks)
    RecordStore(plan.device).add(report.records())
    assert bid.plan("cpu").select_problem(problem).evidence is None


def test_one_rung_is_reported_as_nothing_compared():
    (result,) = verify_plan(bid.plan("cpu"), problems=[ops.get("mean").problem("float32", {"n": 70})]).results
    assert result.classes == (Check("rungs of the ladder", note="one rung"),)


def two_rungs(op, second):
    """A ladder of the built-in kernel under two names, the second bound by a function of this module."""
    problem = ops.get(op).problem("bfloat16", SMALL[op])
    whole = bid.plan("cpu").select_problem(problem)
    built_in = whole.rungs[0]
    names = (("planted.one", "bind_sound", 4), ("planted.two", second, None))
    rungs = tuple(
        replace(
            built_in, implementation=replace(built_in.implementation, name=name, load=f"{__name__}:{bind}"), max_m=max_m
        )
        for name, bind, max_m in names
    )
    return replace(whole, rungs=rungs), sizes_for(whole, "quick")


@pytest.mark.parametrize("op", SMALL)
def test_rungs_of_every_op_are_compared_with_one_another(op):
    checks = [check for _, check in check_ladder(*two_rungs(op, "bind_sound"))]
    assert [check.name for check in checks] == ["rung 1: planted.one 1 <= M <= 4", "rung 2: planted.two M >= 5"]
    assert all(check.rows and check.passed for check in checks)
    one, two = [check for _, check in check_ladder(*two_rungs(op, "bind_one_ulp_off"))]
    assert one.passed
    assert two.smallest.ulps == 1
    assert two.smallest.size == 5


def test_a_product_further_off_than_stock_is_a_fault_though_within_the_limit_of_its_dtype():
    problem = ops.get("gemm").problem("bfloat16", {"n": 90, "k": 70})
    with bid.override("gemm=planted.gemm"):
        (result,) = verify_plan(planted_plan("bind_off_in_proportion", "gemm"), problems=[problem]).results
    normal, *others = result.accuracy
    assert normal.error <= normal.limit
    assert normal.ratio > normal.most_of_stock == 1.05
    assert [other.most_of_stock for other in others] == [None, None]
    assert [fault.partition(";")[0].partition(":")[0] for fault in result.faults] == ["accuracy of out (normal)"]
    assert "stock torch" in result.faults[0]


def test_a_class_is_allowed_what_it_rounds_of_its_own():
    whole = bid.plan("cpu").select_problem(ops.get("gemm").problem("bfloat16", {"n": 5, "k": 32}))
    (rung,) = whole.rungs
    rounding = replace(rung.implementation, own_rounding=lambda problem: 1.2e-2)
    limits = [
        verify_selection(replace(whole, rungs=(replace(rung, implementation=known),)), stock=False).accuracy[0].limit
        for known in (rung.implementation, rounding)
    ]
    assert limits == [5e-3, pytest.approx(1.3e-2)]


def test_merged_weights_of_another_class_are_not_compared():
    plan = bid.plan("cpu")
    problem = ops.get("gemm").problem("float32", {"n": 5, "k": 32})
    whole = plan.select_problem(problem)

    def select(part):
        other = plan.select_problem(part)
        return replace(other, numerics="another")

    merged = verify_selection(whole, select=select, stock=False).classes[-1]
    assert merged.rows == 0
    assert "in class another" in merged.note


def test_progress_is_told_each_step():
    told = []
    problems = [ops.get("mean").problem("float32", {"n": n}) for n in (5, 6)]
    verify_plan(bid.plan("cpu"), problems=problems, progress=lambda *step: told.append(step))
    assert [(done, total) for done, total, _ in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [what for _, _, what in told] == [*map(str, problems), "controls", ""]


def test_parts_of_a_run_share_its_problems():
    problems = [ops.get("mean").problem("float32", {"n": n}) for n in (5, 6, 7)]
    parts = [verify_plan(bid.plan("cpu"), problems=problems, part=(number, 2)) for number in (1, 2)]
    assert [[result.problem for result in part.results] for part in parts] == [problems[::2], problems[1::2]]
    assert all(part.passed and part.controls for part in parts)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ops": ["gemn"]}, UsageError, "did you mean 'gemm'"),
        ({"ops": ["lora"]}, UsageError, "lora is unsupported"),
        ({"dtypes": ["int4"]}, UsageError, "unknown dtype"),
        ({"level": "topology"}, UsageError, "level topology cannot be verified"),
        ({"level": "bach"}, UsageError, "did you mean 'batch'"),
        ({"effort": "quik", "ops": ["mean"]}, UsageError, "did you mean 'quick'"),
        ({"part": (3, 2)}, UsageError, "no part 3 of 2"),
        ({"cuda_graph": True}, DeviceError, "the plan is for the processor"),
    ],
)
def test_what_cannot_be_verified_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        verify_plan(bid.plan("cpu"), **options)


def test_a_plan_of_another_machine_is_refused():
    with pytest.raises(DeviceError, match="run verify there"):
        verify_plan(bid.plan("gfx942"), ops=["gemm"])


def test_an_op_asked_for_that_nothing_serves_raises():
    plan = bid.plan("cpu", registry=registry_where("mean", archs=("sm90",)))
    with pytest.raises(SelectionError, match="needs sm90, the device is cpu"):
        verify_plan(plan, ops=["softmax", "mean"])


def test_a_dtype_that_nothing_serves_is_skipped_with_the_reason():
    plan = bid.plan("cpu", registry=registry_where("mean", dtypes=("float32",)))
    report = verify_plan(plan, ops=["mean"])
    assert report.passed
    assert {result.problem.dtype for result in report.results} == {"float32"}
    assert {skip.problem.dtype for skip in report.skipped} == {"bfloat16", "float16"}
    assert all("takes float32, asked for" in str(skip.error) for skip in report.skipped)


def registry_where(op, **changes):
    """The installed backends, with the implementations of one op changed."""
    registry = Registry()
    for implementation in default_registry():
        registry.register(replace(implementation, **changes) if implementation.op == op else implementation)
    return registry


def test_default_problems_cover_every_available_op_and_dtype_with_typical_dims_first():
    problems = list(problems_for(Device.parse("cpu")))
    assert len(set(problems)) == len(problems)
    for op in ops.CATALOGUE.values():
        for dtype in op.dtypes if op.available else ():
            mine = [problem for problem in problems if (problem.op, problem.dtype) == (op.name, dtype)]
            assert mine[0] == op.typical(dtype)
            assert len(mine) > 1


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_sizes_hold_both_sides_of_every_edge_of_a_ladder(effort):
    plan = bid.plan("sm90")
    for op in ("gemm", "attention"):
        selection = plan.select_problem(ops.get(op).typical("bfloat16"))
        sizes = sizes_for(selection, effort)
        for rung in selection.rungs:
            if rung.max_m:
                assert {rung.max_m - 1, rung.max_m, rung.max_m + 1} <= set(sizes.rows)
        if op == "attention":
            for start, split in selection.rungs[0].params.ranges[:2]:
                assert {split - 1, split, split + 1} <= set(sizes.lengths)
                assert not start or {start - 1, start, start + 1} <= set(sizes.lengths)
    if effort == "full":
        assert set(range(1, 513)) <= set(sizes.rows)


def test_plain_attention_is_spared_sequences_whose_scores_would_not_fit():
    problem = ops.get("attention").problem("float32", SMALL_ATTENTION)
    stock = stock_subject(problem, torch.device("cpu"))
    longest = []

    def launch(*everything):
        longest.append(max(everything[4].tolist()))
        stock.launch(*everything)

    found = Sizes(
        rows=(64,), pool=4, graph_rows=(1,), lengths=(1, 40, 40_000), chunks=(7,), decodes=8, singles=3, max_seqs=8
    )
    check = stock_check(Subject(problem, stock.device, launch), found)
    assert check.rows
    assert max(longest) == 40


def test_the_attention_pool_hides_every_slot_that_no_piece_owns():
    problem = ops.get("attention").problem("float32", SMALL_ATTENTION)
    pool = SequencePool(stock_subject(problem, torch.device("cpu")), (5, 40), Invariance.SEQUENCE)
    q, k, v, table, seq_lens, starts, *_ = pool.arguments([Piece(1, 2, 20), Piece(1, 1, 33)], tokens=5, seqs=3)
    assert q.shape[0] == 5
    assert q[3:].isnan().all()
    assert seq_lens.tolist() == [20, 33, 0]
    assert starts.tolist() == [0, 2, 3, 3]
    for cache in (k, v):
        written = cache.flatten(0, 1)[:, 0, 0].isfinite()
        assert int(written.sum()) == 33
    assert table.shape == (3, 3)

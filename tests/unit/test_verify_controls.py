"""The negative controls: the check that should catches each planted fault; if one does not, the run proves nothing."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.invariance import Invariance
from bidispatch.planning.plan import plan
from bidispatch.runtime.bind import bind
from bidispatch.verify import controls, verify_plan, verify_selection
from bidispatch.verify.broken import ControlParams
from bidispatch.verify.decode_steps import named
from bidispatch.verify.rungs import check_ladder
from bidispatch.verify.sequences import graph_groups, sequence_limits
from bidispatch.verify.subject import Subject, measure

CPU = Device.parse("cpu")
TINY = ops.get("gemm").problem("float32", {"n": 5, "k": 32})


@pytest.fixture(autouse=True)
def one_thread():
    """Test workers share the cores: more threads than cores would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def verify_control(problem, fault="", **options):
    selection = controls.control_selection(CPU, problem, [ControlParams(fault=fault)])
    return verify_selection(selection, stock=False, sizes=controls._SIZES, **options)


def test_every_fault_is_caught_and_a_sound_kernel_passes():
    results = list(controls.run_controls(CPU))
    assert [control for control in results if not control.caught] == []
    of_products = len(controls.PRODUCT_FAULTS) + len(controls.LADDER_FAULTS) + 1  # and a sound one
    of_products += len(controls.EXPERTS_FAULTS) + 1
    expected = of_products + len(controls.SEQUENCE_PROBLEMS) * (len(controls.ATTENTION_FAULTS) + 1)
    assert len({control.name for control in results}) == len(results) == expected


def test_only_the_controls_of_what_is_verified_run():
    found = controls.run_controls(CPU, rows=False, experts=False, over_sequences=["attention"])
    names = {control.name.split(":")[0] for control in found}
    assert names == {"a sound attention", "attention"}


def test_every_op_over_sequences_has_controls():
    assert set(controls.SEQUENCE_PROBLEMS) == {op.name for op in ops.CATALOGUE.values() if op.sequences}


def test_a_control_that_is_not_caught_fails_the_run_and_withholds_its_records(monkeypatch):
    monkeypatch.setattr(controls, "PRODUCT_FAULTS", {"no such fault": "batch sizes, normal"})
    report = verify_plan(plan("cpu"), problems=[TINY])
    assert all(result.passed for result in report.results)
    assert not report.passed
    assert report.records() == []
    assert any("control not caught: product: no such fault" in fault for fault in report.faults)


def test_a_fault_in_a_sound_kernel_fails_the_run(monkeypatch):
    sound = controls.control_selection
    monkeypatch.setattr(
        controls,
        "control_selection",
        lambda device, problem, rungs: sound(device, problem, [ControlParams(fault="neighbours leak")]),
    )
    assert not next(controls.run_controls(CPU)).caught


def test_the_smallest_pair_of_a_split_that_follows_m_is_in_the_smallest_batch():
    found = verify_control(TINY, "splits follow M").smallest
    assert (found.size, found.row) == (2, 0)
    assert found.ulps > 0


def test_a_kernel_that_follows_chunks_holds_level_batch_and_fails_level_sequence():
    assert verify_control(
        controls.SEQUENCE_PROBLEMS["attention"], "splits follow the chunk", level=Invariance.BATCH
    ).passed
    result = verify_control(
        controls.SEQUENCE_PROBLEMS["attention"], "splits follow the chunk", level=Invariance.SEQUENCE
    )
    assert {check.name for check in result.checks if not check.passed} >= {"decode against prefill"}


def test_a_kernel_that_follows_the_longest_sequence_fails_level_batch():
    result = verify_control(
        controls.SEQUENCE_PROBLEMS["attention"], "splits follow the longest", level=Invariance.BATCH
    )
    assert not result.passed


BINDINGS = {"splits of a decode binding": 1, "splits of a binding for drafts": 8}


@pytest.mark.parametrize("op", sorted(controls.SEQUENCE_PROBLEMS))
@pytest.mark.parametrize("fault", BINDINGS)
def test_a_decode_binding_of_other_bits_fails_its_own_check_alone(op, fault):
    """No call of the kernel that is bound for prompts shows it, whatever the call holds."""
    for level in (Invariance.SEQUENCE, Invariance.BATCH):
        result = verify_control(controls.SEQUENCE_PROBLEMS[op], fault, level=level)
        assert [check.name for check in result.checks if not check.passed] == [named(BINDINGS[fault])]


@pytest.mark.parametrize("op", sorted(controls.SEQUENCE_PROBLEMS))
@pytest.mark.parametrize("fault", ["", *BINDINGS])
def test_graphs_are_replayed_as_decode_steps_are_bound(op, fault):
    """The calls that `check_graphs` captures, without a graph: each list with the kernel as it is bound for it."""
    problem = controls.SEQUENCE_PROBLEMS[op]
    (rung,) = controls.control_selection(CPU, problem, [ControlParams(fault=fault)]).rungs

    def rebind(limits):
        return Subject(problem, torch.device("cpu"), bind(problem, CPU, (rung,), limits).launch)

    sizes = controls._SIZES
    lengths = [argument.name for argument in ops.get(op).arguments].index("seq_lens")
    found = {}
    most = sequence_limits(problem, sizes)
    for binding, bound, groups in graph_groups(rebind(most), sizes, Invariance.SEQUENCE, rebind):
        calls = list(groups)
        for group in calls:
            assert len({tuple(t.shape for t in trial.arguments if t is not None) for trial in group}) == 1
            assert len({str(trial.arguments[lengths]) for trial in group}) > 1
        check = measure("graphs", bound, itertools.chain.from_iterable(calls))
        found[binding] = check.passed
        assert check.rows > len(calls)
    wrong = named(BINDINGS[fault]) if fault else None
    assert found == {binding: binding != wrong for binding in ("", named(1), named(8))}


def test_level_run_only_asks_for_the_same_bits_twice():
    assert verify_control(TINY, "splits follow M", level=Invariance.RUN).passed
    assert not verify_control(TINY, "splits change by the call", level=Invariance.RUN).passed


@pytest.mark.parametrize("fault", sorted({*controls.PRODUCT_FAULTS} - {"splits change by the call"}))
def test_a_fault_fails_only_the_checks_it_touches(fault):
    result = verify_control(TINY, fault, select=lambda part: controls.control_selection(CPU, part, [ControlParams()]))
    assert any(check.passed and check.rows for check in result.checks)
    assert not result.passed


def verify_ladder(*rungs):
    return verify_selection(
        controls.control_selection(CPU, TINY, rungs),
        select=lambda part: controls.control_selection(CPU, part, rungs),
        stock=False,
        sizes=controls._SIZES,
    )


@pytest.mark.parametrize(
    ("fault", "m"), [("of another class", 1), ("another split at one M", 37), ("another split above an edge", 601)]
)
def test_a_rung_that_differs_is_named_with_the_smallest_call_that_shows_it(fault, m):
    result = verify_ladder(ControlParams(), controls.LADDER_FAULTS[fault])
    first, second = result.classes[:2]
    assert (first.name, second.name) == ("rung 1: control.product 1 <= M <= 4", "rung 2: control.product M >= 5")
    assert first.passed
    assert "against rung 1: control.product" in second.note
    assert second.smallest.size == m
    assert [rung for rung, _ in result.refuted] == [result.selection.rungs[1]]
    assert result.held == (result.selection.rungs[0],)
    assert not result.passed


@pytest.mark.parametrize("fault", ["another split at one M", "another split above an edge"])
def test_one_rung_that_chooses_inside_is_compared_with_itself(fault):
    (check, _) = verify_ladder(ControlParams(fault=fault)).classes
    assert check.name == "rung 1: control.product every M"
    assert check.rows >= sum(range(1, 41))
    assert not check.passed


def test_a_reference_whose_own_rows_differ_is_not_what_the_others_are_compared_with():
    result = verify_ladder(ControlParams(fault="splits follow M"), ControlParams(splits=2), ControlParams(splits=4))
    assert [check.passed for check in result.classes[:3]] == [False, True, False]
    assert [rung.params.splits for rung, _ in result.refuted] == [1, 4]


def test_rungs_that_run_one_kernel_are_compared_once():
    result = verify_ladder(ControlParams(), ControlParams(splits=2), ControlParams())
    names = [check.name for check in result.classes[:-1]]
    assert names == ["rung 1, 3: control.product 1 <= M <= 4, M >= 9", "rung 2: control.product 5 <= M <= 8"]
    assert [rung.params.splits for rung, _ in result.refuted] == [2]


def test_outputs_are_compared_in_fp32_and_as_the_problem_has_them():
    """What bf16 hides: two orders of one sum, equal in every bit after rounding but for a few elements."""
    problem = ops.get("gemm").problem("bfloat16", {"n": 5, "k": 32})
    selection = controls.control_selection(CPU, problem, [ControlParams(), ControlParams(splits=2)])
    rungs = tuple(
        dataclasses.replace(rung, implementation=dataclasses.replace(rung.implementation, dtypes=("bfloat16",)))
        for rung in selection.rungs
    )
    (_, first), (_, second) = check_ladder(dataclasses.replace(selection, rungs=rungs), controls._SIZES)
    assert first.passed
    assert second.note.endswith("bfloat16 and float32 outputs")
    assert second.differing
    assert len(second.smallest.value_bits) == len("0x00000000")

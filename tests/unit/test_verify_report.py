"""Reports: what passes, what does not, what becomes a record, and what goes to JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.errors import InvarianceError, SelectionError
from bidispatch.invariance import Invariance
from bidispatch.verify import Accuracy, Check, ControlResult, Mismatch, ProblemResult, Report, Skipped
from bidispatch.verify.broken import ControlParams
from bidispatch.verify.controls import control_selection

CPU = Device.parse("cpu")
PROBLEM = ops.get("gemm").problem("float32", {"n": 5, "k": 32})
MISMATCH = Mismatch(7, 3, "out", 2, math.nan, 1.0, "0x7fc00000", "0x3f800000", None)
GOOD = ProblemResult(
    selection=control_selection(CPU, PROBLEM, [ControlParams()]),
    level=Invariance.SEQUENCE,
    checks=(Check("batch sizes, normal", rows=10, elements=50),),
    classes=(Check("rungs of the ladder", note="one rung"),),
    accuracy=(Accuracy("out", "normal", 1e-7, 1e-5),),
    stock=Check("stock torch, batch sizes", rows=10, elements=50, differing=4, smallest=MISMATCH),
)
BAD_CHECK = Check("batch sizes, normal", rows=10, elements=50, differing=1, smallest=MISMATCH)
CAUGHT = ControlResult("product: splits follow M", "batch sizes, normal", True)


def report(*results, controls=(CAUGHT,)):
    return Report(CPU, results, tuple(controls), (), "2026-01-01T00:00:00+00:00", 1.0)


def test_equal_bits_right_numbers_and_caught_controls_pass_whatever_stock_does():
    good = report(GOOD)
    assert good.passed
    assert good.faults == ()
    good.raise_if_failed()
    assert (good.comparisons, good.differing) == (10, 0)
    (record,) = good.records()
    assert (record.problem, record.comparisons, record.level) == (PROBLEM.key, 10, "sequence")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"checks": (BAD_CHECK,)}, "1 of 10 rows differ"),
        ({"classes": (BAD_CHECK,)}, "1 of 10 rows differ"),
        ({"checks": (Check("batch sizes, normal"),)}, "nothing compared"),
        ({"checks": ()}, "nothing compared"),
        ({"accuracy": (Accuracy("out", "normal", 0.1, 1e-5),)}, "accuracy of out"),
        ({"accuracy": (Accuracy("out", "normal", math.inf, 1e-5),)}, "accuracy of out"),
        ({"accuracy": (Accuracy("out", "normal", math.nan, 1e-5),)}, "accuracy of out"),
        ({"accuracy": (Accuracy("out", "normal", 3e-6, 1e-5, 1e-6, 1.05),)}, "at most 1.05 times that"),
        ({"accuracy": ()}, "accuracy was not measured"),
        ({"error": "RuntimeError: no"}, "RuntimeError: no"),
    ],
)
def test_anything_wrong_with_a_problem_fails_the_run_and_makes_no_record(change, fault):
    bad = report(GOOD, replace(GOOD, **change))
    assert not bad.passed
    assert len(bad.faults) == 1
    assert fault in bad.faults[0]
    assert len(bad.records()) == 1
    with pytest.raises(InvarianceError, match="gemm float32"):
        bad.raise_if_failed()


def test_a_run_that_compared_nothing_does_not_pass():
    empty = report()
    assert not empty.passed
    assert "nothing was compared" in empty.faults


@pytest.mark.parametrize("controls", [(), (CAUGHT, ControlResult("another", "a check", False))])
def test_a_run_without_controls_or_with_one_not_caught_proves_nothing(controls):
    unproved = report(GOOD, controls=controls)
    assert not unproved.passed
    assert unproved.records() == []


def test_the_smallest_mismatch_is_taken_over_all_checks():
    smaller = replace(MISMATCH, size=2)
    result = replace(GOOD, checks=(BAD_CHECK,), classes=(replace(BAD_CHECK, smallest=smaller),))
    assert result.smallest == smaller


def test_a_ladder_of_one_rung_says_that_nothing_was_compared():
    assert str(GOOD.classes[0]) == "rungs of the ladder: nothing compared (one rung)"


def test_json_holds_everything_and_no_nan():
    bad = replace(GOOD, checks=(BAD_CHECK,), accuracy=(Accuracy("out", "normal", math.inf, 1e-5),))
    skipped = Skipped(PROBLEM, SelectionError("nothing fits"))
    content = json.loads(json.dumps(replace(report(GOOD, bad), skipped=(skipped,)).as_json(), allow_nan=False))
    assert content["passed"] is False
    assert content["comparisons"] == 20
    assert content["problems"][0]["stock"]["differing"] == 4
    assert content["problems"][1]["checks"][0]["smallest"]["value"] == "nan"
    assert content["problems"][1]["accuracy"][0]["error"] is None
    assert content["skipped"][0]["reason"] == "nothing fits"
    assert content["controls"][0]["caught"] is True


@pytest.mark.parametrize(
    ("stock", "most", "ratio"), [(1e-7, None, 10.0), (0.0, 1.05, None), (math.inf, 1.05, None), (1e-6, 1.05, 1.0)]
)
def test_stock_is_a_measure_only_where_it_has_an_error_and_the_ratio_is_judged(stock, most, ratio):
    accuracy = Accuracy("out", "normal", 1e-6, 1e-5, stock, most)
    assert accuracy.passed
    assert accuracy.ratio == (None if ratio is None else pytest.approx(ratio))


def test_refutations_name_the_rungs_that_differ_and_clear_those_that_hold():
    selection = control_selection(CPU, PROBLEM, [ControlParams(), ControlParams(splits=2)])
    one, two = selection.rungs
    bad = replace(GOOD, selection=selection, classes=(BAD_CHECK,), refuted=((two, BAD_CHECK),), held=(one,))
    refuted, held = report(bad).refutations()
    assert [(each.problem, each.rung) for each in refuted] == [(PROBLEM.key, two.key)]
    assert "1 of 10 rows differ" in refuted[0].found
    assert [each.rung for each in held] == [one.key]
    assert [each.rung for each in report(replace(GOOD, selection=selection)).refutations()[1]] == [one.key, two.key]
    assert report(bad, controls=(ControlResult("another", "a check", False),)).refutations() == ([], [])
    assert report(bad).as_json()["problems"][0]["refuted"][0]["params"]["splits"] == 2

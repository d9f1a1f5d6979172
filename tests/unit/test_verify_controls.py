"""The negative controls: the check that should catches each planted fault; if one does not, the run proves nothing."""

from __future__ import annotations

import pytest
import torch

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.invariance import Invariance
from bidispatch.planning.plan import plan
from bidispatch.verify import controls, verify_plan, verify_selection
from bidispatch.verify.broken import ControlParams

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
    faults = [*controls.PRODUCT_FAULTS, *controls.ATTENTION_FAULTS, *controls.LADDER_FAULTS]
    expected = len(faults) + len(["a sound product", "a sound attention"])
    assert len({control.name for control in results}) == len(results) == expected


def test_only_the_controls_of_what_is_verified_run():
    names = {control.name.split(":")[0] for control in controls.run_controls(CPU, rows=False)}
    assert names == {"a sound attention", "attention"}


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
    assert verify_control(controls._ATTENTION, "splits follow the chunk", level=Invariance.BATCH).passed
    result = verify_control(controls._ATTENTION, "splits follow the chunk", level=Invariance.SEQUENCE)
    assert {check.name for check in result.checks if not check.passed} >= {"decode against prefill"}


def test_a_kernel_that_follows_the_longest_sequence_fails_level_batch():
    result = verify_control(controls._ATTENTION, "splits follow the longest", level=Invariance.BATCH)
    assert not result.passed


def test_level_run_only_asks_for_the_same_bits_twice():
    assert verify_control(TINY, "splits follow M", level=Invariance.RUN).passed
    assert not verify_control(TINY, "splits change by the call", level=Invariance.RUN).passed


@pytest.mark.parametrize("fault", sorted({*controls.PRODUCT_FAULTS} - {"splits change by the call"}))
def test_a_fault_fails_only_the_checks_it_touches(fault):
    result = verify_control(TINY, fault, select=lambda part: controls.control_selection(CPU, part, [ControlParams()]))
    assert any(check.passed and check.rows for check in result.checks)
    assert not result.passed

"""Bitwise comparison: what counts as equal, what is counted, and which mismatch is shown."""

from __future__ import annotations

import math

import pytest
import torch

from bidispatch.verify.compare import Tally, bits, poison

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def compare(actual, expected, size=4):
    tally = Tally("check", ["out"])
    tally.add(size, [actual], [expected])
    return tally.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_are_equal_whatever_the_strides(dtype):
    wide = torch.randn(5, 12).to(dtype)
    check = compare(wide[:, 2:9], wide[:, 2:9].contiguous())
    assert (check.rows, check.elements, check.differing, check.smallest) == (5, 35, 0, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_in_one_element_is_found_and_described(dtype):
    expected = torch.rand(6, 7).to(dtype) + 1
    actual = expected.clone()
    bits(actual)[4, 3] += 1
    check = compare(actual, expected, size=6)
    assert check.differing == 1
    assert not check.passed
    found = check.smallest
    assert (found.size, found.row, found.output, found.element, found.ulps) == (6, 4, "out", 3, 1)
    assert (found.value, found.expected) == (actual[4, 3].item(), expected[4, 3].item())
    assert "M=6 row 4 out[3]" in str(check)
    assert "1 ULP apart" in str(check)


def test_zeros_of_both_signs_differ_by_one_ulp():
    assert compare(torch.tensor([[0.0]]), torch.tensor([[-0.0]])).smallest.ulps == 1


def test_ulps_count_across_zero():
    tiny = torch.tensor([[1e-45]])
    assert compare(tiny, -tiny).smallest.ulps == 3


def test_nan_equals_nan_only_bit_for_bit():
    nan = torch.tensor([[math.nan]])
    other = nan.clone()
    bits(other)[0, 0] |= 1
    assert compare(nan, nan.clone()).passed
    found = compare(nan, other)
    assert found.differing == 1
    assert found.smallest.ulps is None


def test_the_smallest_mismatch_is_that_of_the_smallest_call_then_of_the_first_row():
    expected = torch.zeros(8, 2)
    late, early = expected.clone(), expected.clone()
    late[1, 0] = 1.0
    early[5, 1] = 1.0
    tally = Tally("check", ["out"])
    tally.add(100, [late], [expected])
    tally.add(8, [early], [expected])
    found = tally.check()
    assert found.differing == 2
    assert (found.smallest.size, found.smallest.row, found.smallest.element) == (8, 5, 1)


def test_row_numbers_name_the_rows_of_the_call():
    tally = Tally("check", ["out"])
    tally.add(9, [torch.ones(2, 1)], [torch.tensor([[1.0], [2.0]])], torch.tensor([3, 7]))
    assert tally.check().smallest.row == 7


def test_a_row_that_differs_in_two_outputs_counts_once():
    tally = Tally("check", ["out", "residual_out"])
    ones, zeros = torch.ones(3, 2), torch.zeros(3, 2)
    tally.add(3, [ones, ones], [zeros, zeros])
    check = tally.check()
    assert (check.rows, check.elements, check.differing) == (3, 12, 3)


@pytest.mark.parametrize("other", [torch.zeros(3, 3), torch.zeros(3, 2, dtype=torch.float16)])
def test_tensors_that_cannot_be_compared_are_refused(other):
    with pytest.raises(ValueError, match="compared with"):
        compare(torch.zeros(3, 2), other)


def test_comparing_no_output_is_refused():
    with pytest.raises(ValueError, match="no output"):
        Tally("check", []).add(1, [], [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_poisons_of_two_salts_are_nan_and_differ(dtype):
    one, other = torch.empty(3, 4, dtype=dtype), torch.empty(3, 4, dtype=dtype)
    poison(one, 0)
    poison(other, 1)
    assert one.isnan().all()
    assert other.isnan().all()
    assert compare(one, other).differing == 3


def test_what_is_counted_without_waiting_is_the_same_as_what_is_added():
    expected = torch.zeros(8, 2)
    actual = expected.clone()
    actual[5, 1] = 1.0
    calls = {m: ([actual[:m]], [expected[:m]]) for m in range(1, 9)}
    one, other = Tally("check", ["out"]), Tally("check", ["out"])
    for m, call in calls.items():
        one.add(m, *call)
        other.count(m, *call)
    other.settle(calls.__getitem__)
    assert one.check() == other.check()
    assert (one.check().differing, one.check().smallest.size, one.check().smallest.row) == (3, 6, 5)


def test_a_difference_that_does_not_come_again_still_counts():
    tally = Tally("check", ["out"])
    tally.count(1, [torch.ones(1, 1)], [torch.zeros(1, 1)])
    tally.settle(lambda m: ([torch.zeros(1, 1)], [torch.zeros(1, 1)]))
    tally.settle(lambda m: pytest.fail("nothing was counted since"))
    check = tally.check()
    assert (check.differing, check.smallest) == (1, None)
    assert str(check) == "check: 1 of 1 rows differ"

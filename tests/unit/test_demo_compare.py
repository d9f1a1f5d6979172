"""The metric on cases made by hand, and its refusal to call nothing a success."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bidispatch.demo.compare import Comparison, Difference, Result
from bidispatch.demo.engine import Activity
from bidispatch.demo.scheduler import Request
from bidispatch.errors import UsageError

NAN, INF = math.nan, math.inf


def compared(left: list[float], right: list[float]) -> tuple[float, int, int]:
    difference = Difference()
    difference.add(torch.tensor(left), torch.tensor(right))
    return difference.largest, difference.values_differ, difference.values_compared


@pytest.mark.parametrize(
    ("left", "right", "largest", "differ"),
    [
        ([-1.0, -2.0], [-1.0, -2.0], 0.0, 0),
        ([-1.0, -2.0], [-1.0, -2.5], 0.5, 1),
        ([0.0, -2.0], [-0.0, -2.0], 0.0, 1),
        ([-INF, -2.0], [-INF, -2.0], 0.0, 0),
        ([-INF, -2.0], [-9.0, -2.0], INF, 1),
        ([-INF, -2.0], [INF, -2.0], INF, 1),
        ([NAN, -2.0], [-1.0, -2.0], INF, 1),
        ([-1.0, -2.0], [-1.0, NAN], INF, 1),
        ([NAN, -2.0], [NAN, -2.0], INF, 1),
        ([NAN, -2.0], [-1.0, -3.0], INF, 2),
        ([], [], 0.0, 0),
    ],
)
def test_every_bit_counts_and_nan_is_always_a_difference(left, right, largest, differ):
    assert compared(left, right) == (largest, differ, len(left))


def test_a_difference_below_what_printing_shows_is_counted():
    one = torch.tensor([-1e-30])
    largest, differ, _ = compared(one.tolist(), torch.nextafter(one, torch.zeros(1)).tolist())
    assert differ == 1
    assert 0 < largest < 1e-35


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2).double()),
        (torch.zeros(2).half(), torch.zeros(2)),
    ],
)
def test_what_cannot_be_compared_bit_by_bit_is_refused(left, right):
    with pytest.raises(UsageError, match="compares fp32 tensors of one shape"):
        Difference().add(left, right)


def fed(together: list[int], moved: dict[int, float]) -> Comparison:
    """One request whose tokens alone are 1, 2, 3, 4 and whose logprobs move at the given positions."""
    comparison = Comparison()
    base = torch.tensor([-1.0, -2.0, -3.0])
    for index, token in enumerate([1, 2, 3, 4]):
        comparison.alone(7, index, token, base)
    for index, token in enumerate(together):
        comparison.together(7, index, token, base + moved.get(index, 0.0))
    return comparison


def test_positions_up_to_the_first_token_that_differs_are_compared_freely():
    comparison = fed([1, 9, 3, 8], {1: 0.25, 2: 100.0, 3: 100.0})
    assert comparison.difference.largest == 0.25
    assert comparison.difference.values_compared == 2 * 3
    assert comparison.difference.values_differ == 3
    assert (comparison.tokens_differ, comparison.tokens_compared) == (2, 4)


def test_positions_after_it_are_compared_teacher_forced_and_no_other_twice():
    comparison = fed([1, 9, 3, 8], {1: 0.25})
    base = torch.tensor([-1.0, -2.0, -3.0])
    for index in range(4):
        comparison.teacher_forced(7, index, 0, base + (0.5 if index == 2 else 64.0 if index < 2 else 0.0))
    assert comparison.difference.largest == 0.5
    assert comparison.difference.values_compared == 4 * 3
    assert (comparison.tokens_differ, comparison.tokens_compared) == (2, 4), "free-running tokens only"


def test_teacher_forcing_uses_the_tokens_from_alone_and_is_skipped_where_none_differs():
    requests = [Request(7, (5, 6), 4, arrival_step=3)]
    assert fed([1, 2, 3, 4], {0: 0.5}).forced(requests) == ()
    assert fed([1, 2, 3, 9], {}).forced(requests) == (replace(requests[0], forced_tokens=(1, 2, 3, 4)),)


def test_requests_whose_tokens_agree_are_not_compared_again():
    comparison = fed([1, 2, 3, 4], {})
    comparison.teacher_forced(7, 3, 4, torch.full((3,), 50.0))
    assert comparison.difference.values_compared == 4 * 3
    assert comparison.difference.largest == 0.0


GOOD = Result("plan", 1, 0.0, 0, 12, 0, 4, 0.1, Activity(), Activity())


@pytest.mark.parametrize(
    "change",
    [
        {"max_logprob_difference": 1e-30},
        {"max_logprob_difference": INF},
        {"values_differ": 1},
        {"tokens_differ": 1},
        {"values_compared": 0},
        {"tokens_compared": 0},
    ],
)
def test_identical_means_something_was_compared_and_nothing_differed(change):
    assert GOOD.identical
    assert not replace(GOOD, **change).identical


def test_activities_add_up():
    assert Activity(2, 1, 3, 4, 1) + Activity(5, 0, 1, 2, 2) == Activity(7, 1, 4, 4, 3)

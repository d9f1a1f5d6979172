"""Tests on a real GPU: `make test-gpu`. Skipped, with the reason, where torch sees none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bidispatch as bid
from bidispatch.environment import describe

_HERE = Path(__file__).parent
_outcomes: list[dict] = []


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, metavar="FILE", help="write outcomes and what tests measured, as JSON")


def pytest_runtest_logreport(report):
    """Keep each test's outcome: that of its call, or of the set-up that failed or skipped it."""
    if report.when == "call" or report.outcome != "passed":
        _outcomes.append(
            {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 2),
                **dict(report.user_properties),
            }
        )


def pytest_sessionfinish(session):
    file = session.config.getoption("--results")
    if file and not hasattr(session.config, "workerinput"):  # xdist's workers report to the session that writes
        plan = bid.plan()
        # All that may run here: tests bind more than the plan selects.
        arch = plan.device.arch.name
        there = [made for made in plan.registry if any(made.covers(arch, dtype) for dtype in made.dtypes)]
        content = {"environment": describe(plan.device, there), "tests": _outcomes}
        file.write_text(json.dumps(content, indent=1) + "\n")


def pytest_collection_modifyitems(items):
    """Mark everything here `gpu`, and skip it where it cannot run."""
    seen = torch.cuda.is_available()
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not seen:
                item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} sees no GPU"))


@pytest.fixture(scope="session")
def plan():
    """The plan of this machine's first GPU."""
    return bid.plan("cuda")


@pytest.fixture(autouse=True)
def free_memory():
    """Give a test's memory back, so that the next large one finds it."""
    yield
    torch.cuda.empty_cache()

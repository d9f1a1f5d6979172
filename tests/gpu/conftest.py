"""Tests on a real GPU: `make test-gpu`. Skipped, with the reason, where torch sees none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bidispatch as bid

_HERE = Path(__file__).parent


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

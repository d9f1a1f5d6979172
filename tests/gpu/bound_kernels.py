"""What tests on a GPU share: a kernel bound by its name, and results compared bit by bit."""

from __future__ import annotations

import pytest
import torch

from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind
from bidispatch.verify.compare import bits

__all__ = ["bound", "same_bits"]


def same_bits(one, other):
    return torch.equal(bits(one), bits(other))


def bound(plan, name, problem, limits):
    """An implementation with its default params and its own ladder; skipped with its reasons where it cannot serve."""
    found = default_registry().get(name)
    if reasons := found.unmet(plan.device, problem):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    params = found.params()
    rungs = tuple(Rung(found, params, tile, top) for top, tile in found.tiles(plan.device, problem, params))
    return bind(problem, plan.device, rungs, limits)

"""Tests against an installed vLLM, on the processor: an environment of its own, see `make test-vllm`."""

from __future__ import annotations

import os

# vLLM reads it when it is imported.
os.environ["VLLM_BATCH_INVARIANT"] = "1"
os.environ.pop("BIDISPATCH_VLLM", None)
os.environ["VLLM_PLUGINS"] = ""

from types import SimpleNamespace

import pytest
import vllm.platforms
from fake_platforms import CudaPlatform
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from bidispatch.integrations.vllm import compat, plugin
from bidispatch.integrations.vllm.kernels import serving_plan
from bidispatch.integrations.vllm.mode import Mode

# While the platform is still the processor's: some of these load CUDA's libraries on a GPU's.
for seam in compat.SEAMS:
    compat.resolve(seam)


@pytest.fixture
def cuda_platform(monkeypatch):
    """vLLM's platform as on a GPU."""
    platform = CudaPlatform()
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform, raising=False)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
    return platform


@pytest.fixture
def patched(cuda_platform, monkeypatch):
    """A worker of one rank whose layers are patched, and a configuration to build some."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
    serving_plan.cache_clear()
    plugin.patch_layers(Mode.ON)
    try:
        with set_current_vllm_config(VllmConfig()) as config:
            yield config
    finally:
        plugin.undo()
        serving_plan.cache_clear()

"""Where the plugin is active: spawned workers, Ray's variables, and the platforms and switches that it refuses."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import spawned
import vllm
import vllm.platforms
from unpacked_vllm import unpacked
from vllm.platforms.interface import Platform, PlatformEnum

from bidispatch.errors import DeviceError, UsageError
from bidispatch.integrations.vllm import mode, plugin

OURS = "bidispatch.integrations.vllm.linear"
THEIRS = "vllm.model_executor.layers.linear"
FOLDERS = [Path(vllm.__file__).parent, *unpacked().values()]


@pytest.mark.parametrize(("word", "on"), [("strict", True), ("off", False)])
def test_a_spawned_worker_has_the_plugin(monkeypatch: pytest.MonkeyPatch, word: str, on: bool) -> None:
    """Through the entry point, by vLLM's own calls, from nothing but the environment."""
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setenv("BIDISPATCH_VLLM", word)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seen = pool.apply(spawned.start)
    assert seen == {
        "before": (False, THEIRS),
        "worker made": (on, THEIRS),
        "device taken": (on, OURS if on else THEIRS),
        "cuda": False,
    }


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a user, and what the plugin adds is taken away again."""
    monkeypatch.setenv("BIDISPATCH_VLLM", "strict")
    monkeypatch.setenv("BIDISPATCH_PROFILE", "/profiles/mine.yaml")
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "MINE_")
    return ["VLLM_BATCH_INVARIANT", "BIDISPATCH_VLLM", "BIDISPATCH_PROFILE"]


def module_at(file: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"read_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_ray_copies_our_variables(monkeypatch, variables: list[str], folder: Path) -> None:
    """By the functions that vLLM's executors under Ray choose variables with."""
    chooses = module_at(folder / "ray" / "ray_env.py").get_env_vars_to_copy
    assert not {"BIDISPATCH_VLLM", "BIDISPATCH_PROFILE"} & chooses()
    mode.share_variables(os.environ)
    assert set(variables) <= chooses(exclude_vars={"VLLM_HOST_IP"}, destination="workers")
    given = module_at(folder / "v1" / "executor" / "ray_env_utils.py").get_driver_env_vars({"VLLM_HOST_IP"})
    assert {name: given[name] for name in variables} == {name: os.environ[name] for name in variables}


def platform_of(kind: PlatformEnum, module: str) -> Platform:
    """A platform, as one that a class of this module would be."""
    return type("OtherPlatform", (Platform,), {"_enum": kind, "__module__": module, "device_type": "cuda"})()


@pytest.mark.parametrize(
    ("kind", "module", "message"),
    [
        (PlatformEnum.CUDA, "a_plugin.platform", r"platform plugin a_plugin\.platform\.OtherPlatform .* VLLM_PLUGINS"),
        (PlatformEnum.OOT, "a_plugin.platform", r"platform plugin a_plugin\.platform\.OtherPlatform .* VLLM_PLUGINS"),
        (PlatformEnum.ROCM, "vllm.platforms.rocm", "on CUDA, and this is OtherPlatform; set BIDISPATCH_VLLM=off"),
        (PlatformEnum.CPU, "vllm.platforms.cpu", "on CUDA, and this is OtherPlatform; set BIDISPATCH_VLLM=off"),
    ],
)
def test_other_platforms_are_refused(monkeypatch, kind: PlatformEnum, module: str, message: str) -> None:
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform_of(kind, module), raising=False)
    monkeypatch.setattr(vllm.platforms, "current_platform", vllm.platforms._current_platform, raising=False)
    with pytest.raises(DeviceError, match=message):
        plugin.register()
    assert not plugin.active()


@pytest.mark.parametrize(("first", "then"), [("off", "on"), ("on", "strict"), ("on", "off")])
def test_a_mode_that_changed_is_refused(cuda_platform, monkeypatch, first: str, then: str) -> None:
    monkeypatch.setenv("BIDISPATCH_VLLM", first)
    try:
        plugin.register()
        active = plugin.active()
        monkeypatch.setenv("BIDISPATCH_VLLM", then)
        with pytest.raises(UsageError, match=f"meant {first} when .* mean {then} now"):
            plugin.register()
        assert plugin.active() is active is (first != "off")
    finally:
        plugin.undo()
    plugin.register()
    plugin.undo()


def test_a_mode_that_changed_before_the_worker_is_refused(cuda_platform, monkeypatch) -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    try:
        plugin.register()
        monkeypatch.setenv("BIDISPATCH_VLLM", "off")
        with pytest.raises(UsageError, match="meant on when"):
            WorkerWrapperBase.init_device(SimpleNamespace())
    finally:
        plugin.undo()


@pytest.mark.parametrize("name", mode._FROZEN)
def test_vllm_keeps_the_switch_where_it_is_said_to(name: str) -> None:
    module = importlib.import_module(name)
    assert getattr(module, mode._FROZEN[name]) is True
    with pytest.raises(UsageError, match=name):
        mode.require_same_switch({**sys.modules, name: SimpleNamespace(**{mode._FROZEN[name]: False})})

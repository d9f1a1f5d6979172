"""Arch names, and which device a text leads to, with NVML and the GPU replaced by fakes."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from bidispatch import device as device_module
from bidispatch.device import ARCHS, Arch, Device
from bidispatch.errors import DeviceError, UsageError


class FakeNvml:
    """As much of pynvml as is used: GPUs as (name, major, minor, cores)."""

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: tuple[str, int, int, int]) -> None:
        self.gpus = gpus

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.gpus:
            raise self.NVMLError("no driver")

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def __getattr__(self, name: str):
        return {
            "nvmlDeviceGetCount": lambda: len(self.gpus),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}-uuid",
            "nvmlDeviceGetName": lambda handle: self.gpus[handle][0],
            "nvmlDeviceGetCudaComputeCapability": lambda handle: self.gpus[handle][1:3],
            "nvmlDeviceGetNumGpuCores": lambda handle: self.gpus[handle][3],
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=1 << 30),
            "nvmlSystemGetDriverVersion": lambda: "575.1",
        }[name]


H200 = ("NVIDIA H200", 9, 0, 16896)
A100 = ("NVIDIA A100", 8, 0, 6912)
T4 = ("Tesla T4", 7, 5, 2560)


@pytest.fixture
def machine(monkeypatch):
    """Make this machine one with the given GPUs."""

    def make(*gpus, visible: str | None = None, order: str | None = None) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*gpus))
        # As in a process that has not imported torch: then NVML alone answers.
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        monkeypatch.setattr(device_module, "_from_torch", lambda index: None)
        for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        device_module._detect_gpu.cache_clear()

    yield make
    device_module._detect_gpu.cache_clear()


@pytest.mark.parametrize("text", ["sm90", "sm_90", "sm90a", "SM90", "sm_90a"])
def test_spellings_of_one_arch_are_one_arch(text):
    assert Arch.parse(text) is ARCHS["sm90"]


@pytest.mark.parametrize(
    ("name", "family"), [("sm103", "sm100"), ("sm87", "sm80"), ("sm121", "sm120"), ("sm90", "sm90")]
)
def test_the_family_is_the_arch_whose_profile_serves(name, family):
    assert ARCHS[name].family == family
    assert ARCHS[family].family == family


@pytest.mark.parametrize("text", ["", "sm", "sm91", "sm9", "h200", "gfx90", "90", "sm90x", "cuda"])
def test_an_unknown_arch_is_refused_with_the_known_ones(text):
    with pytest.raises(UsageError, match=r"unknown arch .*sm103"):
        Arch.parse(text)


def test_a_typing_error_gets_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'gfx942'"):
        Arch.parse("gfx924")


def test_auto_is_the_cpu_where_no_gpu_is(machine):
    machine()
    device = Device.parse("auto")
    assert (device.arch.name, device.predicted, device.torch_device) == ("cpu", False, "cpu")
    assert device.name


def test_auto_is_the_first_gpu_with_what_nvml_says(machine):
    machine(H200)
    device = Device.parse("auto")
    assert (device.name, device.arch.name, device.compute_units, device.driver) == ("NVIDIA H200", "sm90", 132, "575.1")
    assert not device.predicted


def test_sm80_has_64_cores_a_multiprocessor(machine):
    machine(A100)
    assert Device.detect().compute_units == 108


def test_an_arch_that_is_here_is_real_and_any_other_is_predicted(machine):
    machine(H200)
    assert not Device.parse("sm90").predicted
    assert Device.parse("sm103") == Device(ARCHS["sm103"], "sm103", predicted=True)
    assert Device.parse("gfx942").predicted


def test_an_arch_can_be_planned_for_on_a_machine_whose_gpu_nobody_knows(machine):
    machine(T4)
    assert Device.parse("sm103").predicted
    with pytest.raises(DeviceError, match="sm75, which no profile knows"):
        Device.parse("auto")


def test_a_gpu_that_is_not_there_is_a_device_error(machine):
    machine(H200)
    assert Device.parse("cuda").index == 0
    with pytest.raises(DeviceError, match="sees no GPU 1"):
        Device.parse("cuda:1")


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "NVIDIA H200"),
        ("1", "NVIDIA A100"),
        ("1,0", "NVIDIA A100"),
        ("GPU-1", "NVIDIA A100"),
        (" 0 ", "NVIDIA H200"),
        ("", None),
        ("-1", None),
        ("7,0", None),  # CUDA stops at the first entry it does not know
    ],
)
def test_cuda_visible_devices_is_obeyed(machine, visible, name):
    machine(H200, A100, visible=visible, order="PCI_BUS_ID")
    assert getattr(device_module._from_nvml(0), "name", None) == name


def test_nvml_does_not_guess_where_only_cuda_knows_the_order(machine):
    machine(H200, A100)
    assert device_module._from_nvml(0) is None
    machine(H200, visible="MIG-12")
    assert device_module._from_nvml(0) is None


def test_the_second_visible_gpu_keeps_its_torch_index(machine):
    machine(H200, H200)
    assert Device.parse("cuda:1").torch_device == "cuda:1"

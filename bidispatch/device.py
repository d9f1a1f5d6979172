"""The GPU architectures bidispatch knows, and the device a plan is made for. Imports no torch unless it must."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from bidispatch.errors import DeviceError, UsageError, did_you_mean

__all__ = ["ARCHS", "Arch", "Device"]

_KB = 1024


@dataclass(frozen=True, slots=True)
class Arch:
    """A GPU architecture, or `cpu`."""

    name: str
    vendor: str
    """`nvidia`, `amd` or `cpu`."""
    family: str
    """The arch whose profile serves when this one has none of its own."""
    order: int
    """Rises with capability inside one vendor: 90 for sm90, 0x942 for gfx942."""
    shared_memory: int
    """Bytes of shared memory (LDS) one block may use."""
    products: str

    @classmethod
    def parse(cls, text: str) -> Arch:
        """Return the arch called `sm90`, `sm_90`, `sm90a`, `gfx942` or `cpu`; raise `UsageError` otherwise."""
        name = re.sub(r"^(sm)_?(\d+)[af]?$", r"\1\2", text.lower())
        if name not in ARCHS:
            raise UsageError(f"unknown arch {text!r}; known: {', '.join(ARCHS)}{did_you_mean(name, ARCHS)}")
        return ARCHS[name]


def _nvidia(capability: int, shared_kb: int, products: str, family: int | None = None) -> Arch:
    return Arch(f"sm{capability}", "nvidia", f"sm{family or capability}", capability, shared_kb * _KB, products)


# Shared memory a block may opt in to: CUDA C++ Programming Guide 13.0, table "Technical Specifications per
# Compute Capability". LDS: AMD CDNA3 ISA reference, 64 KB a workgroup; gfx950 has 160 KB.
ARCHS: Mapping[str, Arch] = {
    arch.name: arch
    for arch in (
        _nvidia(80, 163, "A100, A30"),
        _nvidia(86, 99, "A10, A40, RTX 30"),
        _nvidia(87, 163, "Orin", family=80),
        _nvidia(89, 99, "L4, L40S, RTX 40"),
        _nvidia(90, 227, "H100, H200, GH200"),
        _nvidia(100, 227, "B200, GB200"),
        _nvidia(103, 227, "B300, GB300", family=100),
        _nvidia(120, 99, "RTX 50, RTX PRO 6000 Blackwell"),
        _nvidia(121, 99, "DGX Spark (GB10)", family=120),
        Arch("gfx942", "amd", "gfx942", 0x942, 64 * _KB, "MI300X, MI300A, MI325X"),
        Arch("cpu", "cpu", "cpu", 0, 0, "any processor torch runs on"),
    )
}


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan is made for: a device of this machine, or, when `predicted`, an arch named from elsewhere."""

    arch: Arch
    name: str
    predicted: bool = False
    index: int = 0
    compute_units: int | None = None
    """Streaming multiprocessors or compute units; None when not known."""
    memory_bytes: int | None = None
    driver: str | None = None

    @property
    def slug(self) -> str:
        """Its name as a part of a file's: `nvidia-h200`."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def torch_device(self) -> str:
        """The device string torch takes: `cpu` or `cuda:0` (which is also how torch names AMD GPUs)."""
        return "cpu" if self.arch.vendor == "cpu" else f"cuda:{self.index}"

    @classmethod
    def detect(cls) -> Device:
        """Return the first GPU this process may use, else the CPU."""
        return _detect_gpu(0) or _cpu()

    @classmethod
    def parse(cls, text: str) -> Device:
        """Return the device for `auto`, `cpu`, `cuda`, `cuda:1` or an arch such as `sm103`.

        An arch this machine's first GPU has gives that GPU; any other is a prediction. Raises `UsageError` for
        a name nobody knows and `DeviceError` for a GPU that is not there.
        """
        if text == "auto":
            return cls.detect()
        if match := re.fullmatch(r"cuda(?::(\d+))?", text):
            index = int(match[1] or 0)
            gpu = _detect_gpu(index)
            if gpu is None:
                raise DeviceError(
                    f"{text!r} asked for, but this process sees no GPU {index}; "
                    "`bidispatch doctor` says what is missing, `--device sm90` plans for one that is elsewhere"
                )
            return gpu
        arch = Arch.parse(text)
        if arch.vendor == "cpu":
            return _cpu()
        try:
            gpu = _detect_gpu(0)
        except DeviceError:  # a GPU nobody knows, so not the one asked for
            gpu = None
        return gpu if gpu and gpu.arch == arch else cls(arch, arch.name, predicted=True)


def _cpu() -> Device:
    return Device(ARCHS["cpu"], _cpu_name())


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@lru_cache(maxsize=8)
def _detect_gpu(index: int) -> Device | None:
    """Ask NVML, which costs milliseconds; ask torch where NVML cannot answer (AMD, mixed GPUs, no NVML)."""
    if "torch" not in sys.modules:
        found = _from_nvml(index)
        if found is not None:
            return found
        if not _may_have_gpu():
            return None
    return _from_torch(index)


def _may_have_gpu() -> bool:
    return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def _from_nvml(index: int) -> Device | None:
    try:
        import pynvml
    except ImportError:  # a dependency, but a predicted plan must work without it
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        visible = _visible(handles, [pynvml.nvmlDeviceGetUUID(h) for h in handles])
        names = {pynvml.nvmlDeviceGetName(h) for h in handles}
        # CUDA numbers GPUs fastest first unless told otherwise, NVML by PCI bus: with two models, only CUDA knows.
        ambiguous = len(names) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
        if visible is None or ambiguous or index >= len(visible):
            return None
        handle = visible[index]
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Device(
            arch=_known_arch(f"sm{major}{minor}"),
            name=pynvml.nvmlDeviceGetName(handle),
            index=index,
            compute_units=_sm_count(pynvml, handle),
            memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            driver=pynvml.nvmlSystemGetDriverVersion(),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _sm_count(pynvml: object, handle: object) -> int | None:
    """SMs: NVML counts cores; every arch here has 128 a multiprocessor, sm80 and sm100 have 64 and 128."""
    try:
        cores = pynvml.nvmlDeviceGetNumGpuCores(handle)  # type: ignore[attr-defined]
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - an older driver lacks the call; the count is only informative here
        return None
    return int(cores) // (64 if (major, minor) == (8, 0) else 128)


def _visible(handles: list[object], uuids: list[str]) -> list[object] | None:
    """The GPUs CUDA_VISIBLE_DEVICES leaves, in its order; None when its form (MIG) is for CUDA alone to read."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return handles
    chosen = []
    for word in filter(None, (part.strip() for part in value.split(","))):
        if word.isdigit() and int(word) < len(handles):
            chosen.append(handles[int(word)])
        elif word.startswith("GPU-") and any(uuid.startswith(word) for uuid in uuids):
            chosen.append(handles[next(i for i, uuid in enumerate(uuids) if uuid.startswith(word))])
        elif word.startswith("MIG-"):
            return None
        else:
            break  # CUDA stops at the first entry it does not know
    return chosen


def _from_torch(index: int) -> Device | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(index)
    nvidia = torch.version.hip is None
    arch = f"sm{properties.major}{properties.minor}" if nvidia else properties.gcnArchName.partition(":")[0]
    device = Device(
        arch=_known_arch(arch),
        name=properties.name,
        index=index,
        compute_units=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
    )
    nvml = _from_nvml_driver()
    return replace(device, driver=nvml)


def _from_nvml_driver() -> str | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return driver


def _known_arch(name: str) -> Arch:
    if name not in ARCHS:
        raise DeviceError(
            f"this machine's GPU is {name}, which no profile knows; known: {', '.join(ARCHS)}. "
            "bidispatch's own commands take `--device cpu`"
        )
    return ARCHS[name]

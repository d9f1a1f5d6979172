"""The environment that bits depend on: device, library versions, the code of the kernels. Imports no GPU library."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import bidispatch
from bidispatch.device import Device
from bidispatch.registry import Implementation
from bidispatch.requirements import installed_version

__all__ = ["BIT_VARIABLES", "code_digest", "describe", "hard_part"]

_log = logging.getLogger(__name__)

# Environment variables that change bits, or which kernel a library runs, behind a plan's back.
BIT_VARIABLES: dict[str, str] = {
    "TRITON_DEFAULT_FP_FUSION": "contraction of multiply and add in Triton kernels that do not set it",
    "TRITON_F32_DEFAULT": "how a Triton dot multiplies fp32 operands when the kernel does not say",
    "TRITON_INTERPRET": "runs Triton kernels in Python instead of compiling them",
    "NVIDIA_TF32_OVERRIDE": "forces TF32 on or off in NVIDIA's libraries",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "lets torch multiply fp32 in TF32",
    "CUBLAS_WORKSPACE_CONFIG": "which algorithms cuBLAS may choose",
    "CUBLASLT_WORKSPACE_SIZE": "which algorithms cuBLASLt may choose",
    "ATEN_CPU_CAPABILITY": "which vector instructions torch uses on the CPU",
    "MKL_CBWR": "which code path MKL takes",
    "MKL_ENABLE_INSTRUCTIONS": "which vector instructions MKL uses",
    "ONEDNN_MAX_CPU_ISA": "which vector instructions oneDNN uses",
    "OMP_NUM_THREADS": "how torch's CPU kernels divide a sum",
    "MKL_NUM_THREADS": "how MKL divides a sum",
}


def describe(device: Device, implementations: Iterable[Implementation]) -> dict[str, Any]:
    """Describe what a result on this device depends on; only the `soft` part may change without changing bits."""
    used = list(implementations)
    libraries = sorted({name for implementation in used for name in implementation.libraries})
    return {
        "device": device.name,
        "arch": device.arch.name,
        "bidispatch": bidispatch.__version__,
        "libraries": {name: installed_version(name) for name in libraries},
        "code": {package: code_digest(package) for package in sorted({_package(i) for i in used})},
        "variables": {name: os.environ[name] for name in BIT_VARIABLES if name in os.environ},
        **(_processor() if device.arch.vendor == "cpu" else {}),
        "soft": {
            "driver": device.driver,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "compute_units": device.compute_units,
        },
    }


def hard_part(environment: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a record to hold."""
    return {name: value for name, value in environment.items() if name != "soft"}


def _package(implementation: Implementation) -> str:
    """The outermost package of a kernel: a backend may use code of those beside it, as ours do for labels and folds."""
    return implementation.load.partition(":")[0].partition(".")[0]


@lru_cache(maxsize=64)
def code_digest(package: str) -> str:
    """A hash of the Python files of a backend, so that a record does not outlive the kernel it was made with."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "unknown"
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> dict[str, Any]:
    """What torch's kernels on the CPU depend on: the vector instructions, and the threads that may divide a sum.

    Imports torch where it is installed. A torch that does not import runs no kernel: planning goes on without it.
    """
    if "torch" not in sys.modules and installed_version("torch") is None:
        return {}
    try:
        import torch
    except (ImportError, OSError) as error:
        _log.warning("torch is installed but does not import: %s", error)
        return {}
    return {"threads": torch.get_num_threads(), "vector_instructions": torch.backends.cpu.get_cpu_capability()}

"""The environment that bits depend on: device, library versions, the code of the kernels. Imports no GPU library."""

from __future__ import annotations

import ast
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
_COMPUTED_IMPORTS = {"import_module", "__import__"}


def describe(device: Device, implementations: Iterable[Implementation]) -> dict[str, Any]:
    """Describe what a result on this device depends on; only the `soft` part may change without changing bits."""
    used = list(implementations)
    libraries = sorted({name for implementation in used for name in implementation.libraries})
    return {
        "device": device.name,
        "arch": device.arch.name,
        "bidispatch": bidispatch.__version__,
        "libraries": {name: installed_version(name) for name in libraries},
        "code": {module: code_digest(module) for module in sorted({i.load.partition(":")[0] for i in used})},
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


@lru_cache(maxsize=256)
def code_digest(module: str) -> str:
    """A hash of a kernel's module and of what it imports from its own package, so that no record outlives its kernel.

    A file that imports by computed names counts as importing all that is in its folder.
    """
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return "unknown"
    origin = Path(spec.origin)
    files = _imported(origin.parent, module) if origin.name == "__init__.py" else {origin}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(str(file.relative_to(origin.parent)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16] if files else "unknown"


def _imported(package: Path, module: str) -> set[Path]:
    """The files of a package that a module of it comes to, by its imports and theirs."""
    found: set[Path] = set()
    left = [_file_of(package, module)]
    while left:
        file = left.pop()
        if file is not None and file not in found:
            found.add(file)
            left += _imports(file, package)
    return found


def _file_of(package: Path, module: str) -> Path | None:
    """A module's file; for a package its first one. None where the name is not a module of it: an object in one."""
    path = package.parent.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@lru_cache(maxsize=1024)
def _imports(file: Path, package: Path) -> tuple[Path | None, ...]:
    """What a file may import of its own package, in functions too. Kept: kernels share most of what they import."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except SyntaxError:
        return ()  # it does not import either
    place = file.parent.relative_to(package.parent).parts
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = place[: len(place) - node.level + 1] if node.level else ()
            source = ".".join((*above, *([node.module] if node.module else ())))
            names += [source, *(f"{source}.{alias.name}" for alias in node.names)]
        elif {getattr(node, "id", None), getattr(node, "attr", None)} & _COMPUTED_IMPORTS:
            return tuple(sorted(file.parent.rglob("*.py")))
    # Importing a.b.c runs a and a.b too: registration, which is in a record as the kernel's name and params.
    return tuple(_file_of(package, name) for name in names if name.partition(".")[0] == package.name)


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

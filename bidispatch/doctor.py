"""What is in this machine: GPUs, packages, backends, profiles, records, and what changes bits behind a plan's back."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.environment import BIT_VARIABLES, describe, hard_part
from bidispatch.errors import BidispatchError, ProfileError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.planning.overrides import IMPL_VARIABLE, parse_choices
from bidispatch.planning.plan import Plan, plan
from bidispatch.profiles.load import PROFILE_VARIABLE, builtin_folder, user_folder
from bidispatch.records import Record, RecordStore
from bidispatch.registry import Registry, default_registry
from bidispatch.requirements import AnyOf, Package, Requirement, installed_version

__all__ = ["Diagnosis", "diagnose"]


@dataclass(slots=True)
class Diagnosis:
    """Facts by section, what deserves a look, what is wrong, and what is missing."""

    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    """Section -> name -> what is there."""
    findings: list[str] = field(default_factory=list)
    """Worth knowing; nothing stops because of it."""
    faults: list[str] = field(default_factory=list)
    """Profiles and variables that are wrong: commands that use them stop, until they are corrected."""
    lacks: list[str] = field(default_factory=list)
    """Without these, kernels do not run here."""

    @property
    def ready(self) -> bool:
        """Whether kernels can run on what is in this machine, as it is set up."""
        return not self.lacks and not self.faults


def diagnose() -> Diagnosis:
    """Look at everything. Never raises for what it finds; reads, and writes nothing."""
    found = Diagnosis()
    _gpus(found)  # asks the driver, so before torch is imported and answers for it
    device = _device(found)
    _torch(found)
    registry = _registry(found)
    if registry is not None:
        _packages(found, registry)
    _variables(found)
    if registry is not None:
        _forced(found, registry)
    made = _profiles(found, device, registry) if device and registry is not None else None
    if made is not None:
        _records(found, made)
    return found


def _gpus(found: Diagnosis) -> None:
    """What the driver sees, whether this process may use it or not."""
    entries = found.sections.setdefault("GPUs the driver sees", {})
    try:
        import pynvml
    except ImportError:
        found.findings.append("nvidia-ml-py is not installed, so NVIDIA GPUs are found through torch alone")
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if Path("/dev/nvidiactl").exists():
            found.findings.append(f"an NVIDIA driver is there, but does not answer: {error}")
        return
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
            entries[str(index)] = f"{pynvml.nvmlDeviceGetName(handle)}, {memory:.0f} GiB, driver {driver}"
    except pynvml.NVMLError as error:
        found.findings.append(f"NVML, which lists GPUs, failed: {error}")
    finally:
        pynvml.nvmlShutdown()


def _device(found: Diagnosis) -> Device | None:
    entries = found.sections.setdefault("device of a plan", {})
    try:
        device = Device.detect()
    except BidispatchError as error:
        found.findings.append(str(error))
        return None
    entries["name"] = device.name
    entries["arch"] = device.arch.name
    return device


def _torch(found: Diagnosis) -> None:
    entries = found.sections.setdefault("torch", {"python": platform.python_version()})
    gpus = len(found.sections["GPUs the driver sees"])
    try:
        import torch
    except (ImportError, OSError) as error:  # a torch without its CUDA libraries raises OSError
        found.lacks.append(f"torch does not import ({error}); `pip install torch`")
        return
    built_for = next((f"{n} {v}" for n, v in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)) if v), "CPU")
    entries["torch"] = f"{torch.__version__}, built for {built_for}"
    entries["threads"] = str(torch.get_num_threads())
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    entries["GPUs it can use"] = str(usable)
    if gpus and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        found.findings.append("CUDA_VISIBLE_DEVICES hides every GPU from this process")
    elif gpus and not usable:
        found.lacks.append(
            f"the driver sees {gpus} GPUs, torch {torch.__version__}, built for {built_for}, can use none; "
            "install a torch built for this driver"
        )
    elif Path("/dev/kfd").exists() and not usable:
        found.lacks.append(
            f"an AMD GPU is there (/dev/kfd), torch {torch.__version__}, built for {built_for}, cannot use it"
        )


def _registry(found: Diagnosis) -> Registry | None:
    entries = found.sections.setdefault("backends", {})
    try:
        registry = default_registry()
    except BidispatchError as error:  # two of one name: nobody can say which is meant, so every plan is refused
        found.lacks.append(str(error))
        return None
    for name, distribution in registry.backends.items():
        if failure := registry.failures.get(name):
            entries[name] = f"FAILED, from {distribution}"
            found.findings.append(f"{failure}; its kernels are left out")
        else:
            mine = sorted(i.name.partition(".")[2] for i in registry if i.backend == name)
            entries[name] = f"{', '.join(mine)} (from {distribution})"
    if not entries:
        found.findings.append("no backend is installed; is bidispatch itself installed, or only on the path?")
    return registry


def _packages(found: Diagnosis, registry: Registry) -> None:
    """What the backends ask for, and in which versions."""
    entries = found.sections.setdefault("packages", {})
    wanted: dict[Package, list[str]] = {}
    for implementation in registry:
        for package in _packages_of(implementation.requires):
            users = wanted.setdefault(package, [])
            if implementation.backend not in users:
                users.append(implementation.backend)
    for package, backends in wanted.items():
        there = [f"{name} {v}" for name in (package.name, *package.alternatives) if (v := installed_version(name))]
        asked = f"{', '.join(backends)} {'asks' if len(backends) == 1 else 'ask'} for {package.name}{package.versions}"
        entries[package.name] = f"{there[0] if there else 'not installed'} ({asked})"
    _cublaslt(entries)


def _packages_of(requirements: Iterable[Requirement]) -> Iterable[Package]:
    for requirement in requirements:
        if isinstance(requirement, Package):
            yield requirement
        elif isinstance(requirement, AnyOf):
            yield from _packages_of(requirement.options)


def _cublaslt(entries: dict[str, str]) -> None:
    """The cuBLASLt that nvmath-python loads: tuned algorithms are for one version of it."""
    if installed_version("nvmath-python") is None:
        return
    try:
        from nvmath.bindings import cublasLt

        entries["cuBLASLt"] = str(cublasLt.get_version())
    except Exception as error:  # noqa: BLE001 - another package's loader; it says that there is no driver, say
        entries["cuBLASLt"] = f"not loaded: {error}"


def _variables(found: Diagnosis) -> None:
    entries = found.sections.setdefault("environment variables that change bits", {})
    for name, meaning in BIT_VARIABLES.items():
        if name in os.environ:
            entries[name] = f"{os.environ[name]!r}: {meaning}"
            found.findings.append(f"{name} is set: {meaning}; records and fingerprints hold for this value only")
    for name in (PROFILE_VARIABLE, IMPL_VARIABLE):
        if os.environ.get(name):
            entries[name] = os.environ[name]


def _forced(found: Diagnosis, registry: Registry) -> None:
    """Whether what `BIDISPATCH_IMPL` forces is there."""
    text = os.environ.get(IMPL_VARIABLE, "")
    try:
        choices = parse_choices(text)
    except UsageError as error:
        found.faults.append(f"{IMPL_VARIABLE}={text}: {error}")
        return
    for op, name in choices.items():
        if why := _why_not_forced(op, name, registry):
            found.faults.append(f"{IMPL_VARIABLE}={text}: {why}")


def _why_not_forced(op: str, name: str, registry: Registry) -> str:
    """What keeps an implementation from being forced for an op; empty when nothing does."""
    if name not in registry and (failure := registry.failures.get(name.partition(".")[0])):
        return str(failure)
    try:
        implements = registry.get(name).op
    except UsageError as error:
        return str(error)
    return "" if implements == op else f"{name} implements {implements}, not {op}"


def _profiles(found: Diagnosis, device: Device, registry: Registry) -> Plan | None:
    entries = found.sections.setdefault("profiles", {})
    entries["built in"] = str(builtin_folder())
    own = user_folder()
    files = sorted(path.name for path in own.glob("*.yaml")) if own.is_dir() else []
    entries["yours"] = f"{own} ({', '.join(files) or 'empty'})"
    try:
        made = plan(device, registry=registry)
    except BidispatchError as error:
        chosen = os.environ.get(PROFILE_VARIABLE)
        prefix = f"{PROFILE_VARIABLE}={chosen}: " if chosen else ""
        faults = error.faults if isinstance(error, ProfileError) else (error,)
        found.faults += [f"{prefix}{fault}" for fault in faults]
        entries["in use"] = "none, see the errors"
        return None
    entries["in use"] = " <- ".join(made.profile.chain)
    if made.profile.note:
        found.findings.append(made.profile.note)
    return made


def _records(found: Diagnosis, made: Plan) -> None:
    """Which records prove something about today's plan on this machine, and what has changed where they do not."""
    store = RecordStore(made.device)
    entries = found.sections.setdefault("records", {"file": str(store.path)})
    try:
        records = store.load()
    except BidispatchError as error:
        found.findings.append(str(error))
        return
    stale, plans = [], {made.require: made}
    for record in records:
        # One of a lower level is about what a plan that asks for no more selects.
        level = min(Invariance.parse(record.level), made.require)
        if level not in plans:
            plans[level] = Plan(made.device, made.profile, made.registry, store, level)
        if why := _why_stale(record, plans[level]):
            asking = f" --require {level.label}" if level != made.require else ""
            stale.append(f"records are stale: {why}; `bidispatch verify --all{asking} --record`")
    entries["hold"] = str(len(records) - len(stale))
    entries["stale"] = str(len(stale))
    for finding in dict.fromkeys(stale):
        found.findings.append(f"{stale.count(finding)} {finding}")


def _why_stale(record: Record, made: Plan) -> str:
    """What keeps a record from proving what a plan selects today; empty when it holds."""
    try:
        asked = json.loads(record.problem)
        selection = made.select_problem(ops.get(asked["op"]).problem(asked["dtype"], asked["dims"]))
    except (BidispatchError, ValueError, KeyError, TypeError) as error:
        return f"nothing serves what it is about ({str(error).partition(chr(10))[0]})"
    environment = describe(made.device, {rung.implementation for rung in selection.rungs})
    if record.proves(selection, environment):
        return ""
    changed = _changed(hard_part(dict(record.environment)), hard_part(environment))
    return f"made with another {', '.join(changed)}" if changed else "the ladder has changed since"


def _changed(before: dict[str, object], after: dict[str, object]) -> Iterable[str]:
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))

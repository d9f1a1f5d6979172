"""Fake implementations for tests of the core: kernels in plain torch that note how they were called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bidispatch.device import ARCHS, Device
from bidispatch.ops.schema import Op
from bidispatch.planning.plan import Plan
from bidispatch.profiles.load import ProfileStore
from bidispatch.records import RecordStore
from bidispatch.registry import Implementation, Params, Registry, Tile
from bidispatch.runtime.context import BindContext

H200 = Device(ARCHS["sm90"], "NVIDIA H200", compute_units=132, driver="575.1")
CPU = Device(ARCHS["cpu"], "Some CPU")
FLOATS = ("bfloat16", "float16", "float32")
WITHOUT_E4M3 = ("sm80", "sm86", "sm87", "gfx942")
"""GPUs that have no fp8 of this format."""


def uses_e4m3(op: Op) -> bool:
    """Whether an op takes or gives fp8 at every problem it has."""
    return "float8_e4m3fn" in (*op.dtypes, *(output.dtype for output in op.outputs))


class SplitParams(Params):
    splits: int = 1


class BlockTile(Tile):
    block_m: int


launches: list[tuple[str, int | None]] = []
"""(implementation's load attribute, its tile's block_m) of every launch of a fake kernel, in order."""


def fake(name: str, op: str = "gemm", **fields: Any) -> Implementation:
    """An implementation that fits everywhere and is in class `k`, but for the fields given."""
    defaults = {
        "load": "fakes:bind",
        "archs": ("*",),
        "dtypes": FLOATS,
        "numerics": lambda params, problem: "k",
        "params": SplitParams,
        "tile": BlockTile,
    }
    return Implementation(name, op, **{**defaults, **fields})


def registry_of(*implementations: Implementation) -> Registry:
    registry = Registry()
    for implementation in implementations:
        registry.register(implementation)
    return registry


def plan_of(folder: Path, registry: Registry, ops: str, *, head: str = "", device: Device = H200) -> Plan:
    """A plan by a built-in profile, the only one, that says `ops` (YAML of its `ops` section) and `head`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"schema_version: 1\n{head}\nops:\n{ops}\n"
    (folder / f"{device.arch.name}.yaml").write_text(text)
    profile = ProfileStore(registry, builtin=folder).for_device(device)
    return Plan(device, profile, registry, RecordStore(device), profile.require)


def gemm_rule(*candidates: str, **fields: str) -> str:
    """YAML of a rule for gemm in every dtype; each candidate is the inside of a flow mapping."""
    extra = "".join(f"      {name}: {value}\n" for name, value in fields.items())
    listed = ", ".join(f"{{{candidate}}}" for candidate in candidates)
    return f"  gemm:\n    - dtypes: [bf16, fp16, fp32]\n{extra}      candidates: [{listed}]\n"


def bind(context: BindContext) -> Any:
    """Bind a kernel that computes with stock torch in the problem's own output dtype."""
    return _bind("bind", context)


def bind_other(context: BindContext) -> Any:
    return _bind("bind_other", context)


def _bind(label: str, context: BindContext) -> Any:
    from bidispatch import ops
    from bidispatch.runtime.bind import load_attribute

    op = ops.get(context.problem.op)
    stock, given = load_attribute(op.stock), len(op.arguments) + len(op.scalars)

    def launch(*everything: Any) -> None:
        launches.append((label, context.tile.block_m if context.tile else None))
        results = stock(context.problem, *everything[:given])
        results = results if isinstance(results, tuple) else (results,)
        for output, result in zip(everything[given:], results, strict=True):
            output.copy_(result)

    return launch


def bind_needs_library(context: BindContext) -> Any:
    import a_library_that_is_not_installed  # type: ignore[import-not-found]

    return a_library_that_is_not_installed

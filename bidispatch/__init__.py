"""bidispatch: batch-invariant kernels for whatever GPU is in the machine.

::

    import bidispatch as bid

    plan = bid.plan(device="auto")                      # or "sm103", from a laptop
    selection = plan.select("gemm", dtype="bfloat16", n=6144, k=4096)
    linear = selection.bind(max_tokens=8192)            # in a layer's __init__
    y = linear(x, weight)                               # same bits for a row, whatever else is in x

Importing this package imports no torch and reads no file: each name below loads what it needs at its first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from bidispatch.device import ARCHS, Arch, Device
    from bidispatch.errors import (
        ArgumentError,
        BackendError,
        BidispatchError,
        DeviceError,
        InvarianceError,
        PlanFrozenError,
        ProfileError,
        RecordError,
        SelectionError,
        UsageError,
    )
    from bidispatch.integrations.aten.mode import aten_overrides
    from bidispatch.invariance import Invariance
    from bidispatch.ops.schema import Op, Problem
    from bidispatch.planning.overrides import override
    from bidispatch.planning.plan import Plan, plan
    from bidispatch.planning.selection import Selection
    from bidispatch.registry import Implementation, Params, Registry, Tile
    from bidispatch.runtime.bound import BoundKernel
    from bidispatch.runtime.context import BindContext, Limits

__version__ = "0.1.0"

_HOMES = {
    "bidispatch.device": ("ARCHS", "Arch", "Device"),
    "bidispatch.errors": (
        "ArgumentError",
        "BackendError",
        "BidispatchError",
        "DeviceError",
        "InvarianceError",
        "PlanFrozenError",
        "ProfileError",
        "RecordError",
        "SelectionError",
        "UsageError",
    ),
    "bidispatch.integrations.aten.mode": ("aten_overrides",),
    "bidispatch.invariance": ("Invariance",),
    "bidispatch.ops.schema": ("Op", "Problem"),
    "bidispatch.planning.overrides": ("override",),
    "bidispatch.planning.plan": ("Plan", "plan"),
    "bidispatch.planning.selection": ("Selection",),
    "bidispatch.registry": ("Implementation", "Params", "Registry", "Tile"),
    "bidispatch.runtime.bound": ("BoundKernel",),
    "bidispatch.runtime.context": ("BindContext", "Limits"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ARCHS",
    "Arch",
    "ArgumentError",
    "BackendError",
    "BidispatchError",
    "BindContext",
    "BoundKernel",
    "Device",
    "DeviceError",
    "Implementation",
    "Invariance",
    "InvarianceError",
    "Limits",
    "Op",
    "Params",
    "Plan",
    "PlanFrozenError",
    "Problem",
    "ProfileError",
    "RecordError",
    "Registry",
    "Selection",
    "SelectionError",
    "Tile",
    "UsageError",
    "__version__",
    "aten_overrides",
    "override",
    "plan",
]


def __getattr__(name: str) -> object:
    """Load a public name at its first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bidispatch' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""Verification: bit-by-bit comparison of what a plan selects, class proofs, negative controls, a report.

`verify_plan(plan)` is the whole of it; the names here load torch at their first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from bidispatch.verify.ladder import verify_selection
    from bidispatch.verify.report import Accuracy, Check, ControlResult, Mismatch, ProblemResult, Report, Skipped
    from bidispatch.verify.runner import Progress, verify_plan

__all__ = [
    "Accuracy",
    "Check",
    "ControlResult",
    "Mismatch",
    "ProblemResult",
    "Progress",
    "Report",
    "Skipped",
    "verify_plan",
    "verify_selection",
]

_HOMES = {"Progress": "runner", "verify_plan": "runner", "verify_selection": "ladder"}


def __getattr__(name: str) -> object:
    """Load a public name at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'bidispatch.verify' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"bidispatch.verify.{_HOMES.get(name, 'report')}"), name)

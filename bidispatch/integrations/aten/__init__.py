"""Plain PyTorch: `with aten_overrides(plan):` gives any module the plan's kernels.

mode: the context, and which way each torch function goes. functions: torch's functions by their signatures, and what
is ours of them. composites: functions taken apart into products, softmaxes and sums. torch_ops: the opaque torch ops,
with gradients, that a compiled graph holds. compute: one call, on tensors, by bound kernels. kernels: binding at first
use. net: what torch's own C++ code calls. pointwise: elementwise functions on a processor.
"""

from bidispatch.integrations.aten.mode import aten_overrides

__all__ = ["aten_overrides"]

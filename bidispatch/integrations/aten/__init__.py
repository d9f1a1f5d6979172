"""Plain PyTorch: `with aten_overrides(plan):` makes torch's products, softmaxes and sums the plan's kernels.

mode: the context, and the one table of what is overridden. functions: torch's functions by their signatures, and what
is ours of them. attention: scaled_dot_product_attention taken apart. elementwise: functions on a processor. torch_ops:
the opaque torch ops, with gradients, that a compiled graph holds. compute: one call, on tensors, by bound kernels.
kernels: binding at first use.
"""

from bidispatch.integrations.aten.mode import aten_overrides

__all__ = ["aten_overrides"]

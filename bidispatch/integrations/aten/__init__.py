"""Plain PyTorch: under `with aten_overrides(plan):` no row of torch's functions follows the batch, or they raise.

mode: the context, and the one table of what it serves. direct: which functions run as they are. guard: all others, cut
into aten ops, which aten_table serves, blocks runs in pieces on a processor, and refusal refuses.
functions, contractions, norms, losses, attention, multihead, elementwise: torch's functions by their signatures.
autocast: its casts. torch_ops: the opaque torch ops, with gradients, that a compiled graph holds. compute: one call, on
tensors, by bound kernels. kernels: binding at first use.
"""

from bidispatch.integrations.aten.mode import aten_overrides

__all__ = ["aten_overrides"]

"""What each op means: fp64 references, plain and slow, and generators of random arguments. Imports torch.

A reference is `f(problem, *arguments, *scalars) -> tuple of float64 tensors`, in the order of the op's outputs, on the
device of its arguments. A generator is `f(problem, rows, *, device="cpu", seed=0, distribution="normal") -> list of
arguments`, in the op's order, None where one is absent; see `draw` for the distributions.
"""

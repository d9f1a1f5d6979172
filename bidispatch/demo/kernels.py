"""What does the decoder's sums: stock torch, or the kernels of a plan. Same loop, same model, other arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from bidispatch import ops
from bidispatch.errors import SelectionError
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import Limits

if TYPE_CHECKING:
    from bidispatch.planning.plan import Plan
    from bidispatch.planning.selection import Selection

__all__ = ["BoundOp", "Kernels", "PlanKernels", "StockKernels"]

BoundOp = Callable[..., Any]
"""``bound(*arguments, **scalars)``: the op's arguments in the catalogue's order (None where an optional one is absent),
its scalars by name; returns the output, or a tuple of them."""


class Kernels(Protocol):
    """Where the decoder gets a callable for each problem, once, when it is built."""

    name: str
    """`stock` or `plan`, for reports."""

    @property
    def cuda_graphs(self) -> bool:
        """Whether decode steps on a GPU may be captured in CUDA graphs."""

    def bind(self, problem: Problem, limits: Limits) -> BoundOp:
        """Return the callable for a problem, for calls up to `limits`."""


class StockKernels:
    """What plain torch does: F.linear, F.scaled_dot_product_attention, F.rms_norm, ..., called eagerly."""

    name = "stock"
    cuda_graphs = False  # its attention walks the sequences on the host

    def bind(self, problem: Problem, limits: Limits) -> BoundOp:
        op = ops.get(problem.op)
        stock = load_attribute(op.stock)
        defaults = {scalar.name: scalar.default_for(problem) for scalar in op.scalars}

        def call(*arguments: Any, **scalars: float) -> Any:
            absent = (None,) * (len(op.arguments) - len(arguments))  # optional ones may be left out at the end
            outputs = stock(problem, *arguments, *absent, *(defaults | scalars).values())
            return outputs[0] if len(outputs) == 1 else outputs

        return call


class PlanKernels:
    """The kernels a plan selects, bound through the public API. `selections` holds what was chosen, by problem."""

    name = "plan"

    def __init__(self, plan: Plan, *, torch_ops: bool = False) -> None:
        """torch_ops: call through `torch.ops.bidispatch`, as a compiled model does, instead of directly."""
        self.plan = plan
        self.selections: dict[Problem, Selection] = {}
        self._torch_ops = torch_ops
        self._bound: dict[tuple[Problem, Limits], BoundOp] = {}

    @property
    def cuda_graphs(self) -> bool:
        """Whether every kernel selected so far may be captured."""
        return all(rung.implementation.cuda_graph for chosen in self.selections.values() for rung in chosen.rungs)

    def bind(self, problem: Problem, limits: Limits) -> BoundOp:
        """Select and bind, once for each problem and limits. Raises `SelectionError` below level `sequence`."""
        if (problem, limits) not in self._bound:
            selection = self.plan.select_problem(problem)
            if selection.level < Invariance.SEQUENCE:
                raise SelectionError(
                    f"{problem}: the plan's choice is invariant at level {selection.level.label}; under continuous "
                    "batching neighbours decide how a prompt is chunked, which needs level sequence: "
                    "plan with require='sequence'",
                    selection.decisions,
                )
            self.selections[problem] = selection
            kernel = selection.bind(
                max_tokens=limits.max_tokens,
                max_seqs=limits.max_seqs,
                max_seq_len=limits.max_seq_len,
                max_query_len=limits.max_query_len,
            )
            self._bound[problem, limits] = kernel.torch_op if self._torch_ops else kernel
        return self._bound[problem, limits]

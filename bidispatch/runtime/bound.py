"""The bound kernel: what a layer calls. Everything that can be decided once is decided when it is made."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch

from bidispatch.device import Device
from bidispatch.errors import ArgumentError
from bidispatch.ops.schema import Op, Problem
from bidispatch.registry import Rung
from bidispatch.runtime.arguments import TensorSpec, check_tensors, output_shape, tensor_specs
from bidispatch.runtime.context import Kernel, Limits

__all__ = ["BoundKernel"]

# Which limit bounds which run-time size of the catalogue.
_LIMIT_OF_SIZE = {"m": "max_tokens", "tokens": "max_tokens", "seqs": "max_seqs"}


class BoundKernel:
    """A selection made callable: checks the arguments, allocates what is missing, chooses the rung, launches.

    ``bound(*arguments, out=None, **scalars)`` takes the op's tensors in the catalogue's order (by name too) and
    returns its output, or a tuple of them. Raises `ArgumentError` for tensors it was not bound for.

    ``bound.launch(*everything)`` skips the checks: every argument, scalar and output, positionally, outputs
    allocated, no run-time size 0 (a call with such a size launches nothing). Neither reads anything from the device.
    A bound kernel owns workspaces, so two threads or streams need one each.

    ``bound.edges`` holds, for each rung, the largest M of each choice its kernel makes inside, but for the last.
    """

    __slots__ = (
        "__weakref__",
        "_argument_names",
        "_arguments",
        "_default_scalars",
        "_limits",
        "_outputs",
        "_scalar_names",
        "_torch_device",
        "device",
        "edges",
        "handle",
        "launch",
        "limits",
        "op",
        "problem",
        "rungs",
    )

    def __init__(
        self, op: Op, problem: Problem, device: Device, rungs: Sequence[Rung], kernels: Sequence[Kernel], limits: Limits
    ) -> None:
        self.op, self.problem, self.device = op, problem, device
        self.rungs, self.limits = tuple(rungs), limits
        self.launch = _ladder(rungs, kernels, op.row_axis)
        self.edges = tuple(tuple(getattr(kernel, "edges", ())) for kernel in kernels)
        self.handle = -1
        self._torch_device = torch.device(device.torch_device)
        self._arguments = tensor_specs(op.arguments, problem)
        self._outputs = tensor_specs(op.outputs, problem)
        self._argument_names = tuple(spec.name for spec in self._arguments)
        self._scalar_names = tuple(scalar.name for scalar in op.scalars)
        self._default_scalars = tuple(scalar.default_for(problem) for scalar in op.scalars)
        sizes = {size for spec in self._arguments for _, size, _ in spec.sizes}
        self._limits = tuple((size, getattr(limits, name)) for size, name in _LIMIT_OF_SIZE.items() if size in sizes)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        everything, outputs, wanted = self._prepare(arguments, named)
        if wanted:
            self.launch(*everything)
        return outputs[0] if len(outputs) == 1 else outputs

    def torch_op(self, *arguments: Any, **named: Any) -> Any:
        """The same call through `torch.ops.bidispatch`: opaque to Dynamo and to dispatch modes, 2-3 µs slower."""
        from bidispatch.runtime.torch_ops import call

        everything, outputs, wanted = self._prepare(arguments, named)
        if wanted:
            call(self, everything)
        return outputs[0] if len(outputs) == 1 else outputs

    def _prepare(
        self, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...], bool]:
        """Return everything `launch` takes, the outputs, and whether there is anything to launch for."""
        if len(arguments) != len(self._arguments):
            arguments = self._fill(arguments, named)
        sizes = check_tensors(self.problem, self._arguments, arguments, self._torch_device)
        for size, limit in self._limits:
            if sizes[size] > limit:
                raise ArgumentError(
                    f"{self.problem}: {sizes[size]} {size}, but it was bound for at most {limit}; "
                    f"bind with a larger {_LIMIT_OF_SIZE[size]}"
                )
        scalars = self._scalars(named) if named else self._default_scalars
        outputs = tuple([self._output(spec, named.pop(spec.name, None), sizes) for spec in self._outputs])
        if named:
            self._fail_names(named)
        return (*arguments, *scalars, *outputs), outputs, 0 not in sizes.values()

    def _fill(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """Take arguments given by name; an absent optional one is None."""
        if len(arguments) > len(self._arguments):
            raise ArgumentError(
                f"{self.op.name} takes {len(self._arguments)} tensors ({', '.join(self._argument_names)}), "
                f"{len(arguments)} given; outputs and scalars go by name"
            )
        return arguments + tuple(named.pop(name, None) for name in self._argument_names[len(arguments) :])

    def _scalars(self, named: dict[str, Any]) -> tuple[float, ...]:
        scalars = []
        for name, default in zip(self._scalar_names, self._default_scalars, strict=True):
            value = named.pop(name, default)
            if type(value) not in (float, int):
                raise ArgumentError(f"{self.problem}: {name} is a float, not {value!r}")
            scalars.append(value)
        return tuple(scalars)

    def _fail_names(self, names: Iterable[str]) -> NoReturn:
        outputs = [spec.name for spec in self._outputs]
        known = ", ".join([*self._argument_names, *self._scalar_names, *outputs])
        twice = [name for name in names if name in self._argument_names]
        if twice:
            raise ArgumentError(f"{self.op.name} got {', '.join(twice)} twice, by place and by name; it takes {known}")
        raise ArgumentError(f"{self.op.name} takes no {', '.join(names)}; it takes {known}")

    def _output(self, spec: TensorSpec, given: torch.Tensor | None, sizes: dict[str, int]) -> torch.Tensor:
        if given is None:
            return torch.empty(output_shape(spec, sizes), dtype=spec.dtype, device=self._torch_device)
        check_tensors(self.problem, (spec,), (given,), self._torch_device, sizes)
        return given

    def __repr__(self) -> str:
        names = " -> ".join(dict.fromkeys(rung.implementation.name for rung in self.rungs))
        return f"<BoundKernel {self.problem}: {names}>"


def _ladder(rungs: Sequence[Rung], kernels: Sequence[Kernel], row_axis: int) -> Kernel:
    """One callable for the whole ladder. A lone rung is called directly: choosing must cost nothing there."""
    if len(kernels) == 1:
        return kernels[0]
    bounds = [sys.maxsize if rung.max_m is None else rung.max_m for rung in rungs]
    steps = tuple(kernels)

    def launch(*arguments: Any) -> None:
        steps[bisect_left(bounds, arguments[0].shape[row_axis])](*arguments)

    return launch

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
from bidispatch.runtime.arguments import check_tensors, output_shape, tensor_specs
from bidispatch.runtime.context import Kernel, Limits

__all__ = ["BoundKernel"]

# Which limit bounds which run-time size of the catalogue.
_LIMIT_OF_SIZE = {"m": "max_tokens", "tokens": "max_tokens", "seqs": "max_seqs"}

_MOST_SEEN = 4096
"""Shapes whose check is remembered."""

_Key = tuple[Any, ...] | None
_Shape = tuple[int, ...]
_Seen = tuple[tuple[tuple[_Shape, _Shape, torch.dtype], ...], bool]
"""The shape, strides and dtype of each output, and whether there is anything to launch for."""


class BoundKernel:
    """A selection made callable: checks the arguments, allocates what is missing, chooses the rung, launches.

    ``bound(*arguments, out=None, **scalars)`` takes the op's tensors in the catalogue's order (by name too) and
    returns its output, or a tuple of them. Raises `ArgumentError` for tensors it was not bound for.

    ``bound.launch(*everything)`` skips the checks: every argument, scalar and output, positionally, outputs
    allocated, no run-time size 0 (a call with such a size launches nothing). Neither reads anything from the device.
    A bound kernel owns workspaces, so two threads or streams need one each. A CUDA graph that captured a call does not
    hold them: keep the kernel for as long as the graph is replayed.

    ``bound.edges`` holds, for each rung, the largest M of each choice its kernel makes inside, but for the last.
    """

    __slots__ = (
        "__weakref__",
        "_argument_names",
        "_arguments",
        "_default_scalars",
        "_limits",
        "_no_outputs",
        "_outputs",
        "_plain",
        "_scalar_names",
        "_seen",
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
        self._no_outputs: tuple[Any, ...] = (None,) * len(self._outputs)
        self._seen: dict[_Key, _Seen] = {}
        self._plain: dict[_Key, tuple[_Shape, _Shape, torch.dtype, tuple[None, ...]]] = {}
        self._argument_names = tuple(spec.name for spec in self._arguments)
        self._scalar_names = tuple(scalar.name for scalar in op.scalars)
        self._default_scalars = tuple(scalar.default_for(problem) for scalar in op.scalars)
        sizes = {size for spec in self._arguments for _, size, _ in spec.sizes}
        self._limits = tuple((size, getattr(limits, name)) for size, name in _LIMIT_OF_SIZE.items() if size in sizes)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not named and not torch.is_grad_enabled():
            # The call a layer makes at every step, without what the general way pays for names and several outputs.
            made = self._plain.get(_signature(arguments))
            if made is not None:
                shape, strides, dtype, absent = made
                out = torch.empty_strided(shape, strides, dtype=dtype, device=self._torch_device)
                self.launch(*arguments, *absent, *self._default_scalars, out)
                return out
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
        scalars, given = self._default_scalars, self._no_outputs
        if named:
            scalars = self._scalars(named)
            given = tuple([named.pop(spec.name, None) for spec in self._outputs])
            if named:
                self._fail_names(named)
        key = _signature(arguments + given)
        seen = self._seen.get(key)
        if seen is None or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)):
            seen = self._check(arguments, given)
            self._remember(key, seen, arguments)
        made, wanted = seen
        outputs = tuple(
            [
                torch.empty_strided(shape, strides, dtype=dtype, device=self._torch_device) if out is None else out
                for out, (shape, strides, dtype) in zip(given, made)  # noqa: B905 - one each, by construction
            ]
        )
        return (*arguments, *scalars, *outputs), outputs, wanted

    def _check(self, arguments: tuple[Any, ...], given: tuple[Any, ...]) -> _Seen:
        """What the outputs are, and whether there is anything to launch for. Raises `ArgumentError`."""
        sizes = check_tensors(self.problem, self._arguments, arguments, self._torch_device)
        for size, limit in self._limits:
            if sizes[size] > limit:
                raise ArgumentError(
                    f"{self.problem}: {sizes[size]} {size}, but it was bound for at most {limit}; "
                    f"bind with a larger {_LIMIT_OF_SIZE[size]}"
                )
        for spec, out in zip(self._outputs, given, strict=True):
            if out is not None:
                check_tensors(self.problem, (spec,), (out,), self._torch_device, sizes)
        shapes = [output_shape(spec, sizes) for spec in self._outputs]
        made = [(shape, _contiguous(shape), spec.dtype) for shape, spec in zip(shapes, self._outputs, strict=True)]
        return tuple(made), 0 not in sizes.values()

    def _remember(self, key: _Key, seen: _Seen, arguments: tuple[Any, ...]) -> None:
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
            self._plain.clear()
        self._seen[key] = seen
        made, wanted = seen
        if wanted and len(made) == 1:
            # A caller may leave optional tensors out at the end.
            present = len(arguments)
            self._plain[_signature(arguments)] = (*made[0], ())
            while arguments[present - 1] is None:
                present -= 1
                self._plain[_signature(arguments[:present])] = (*made[0], arguments[present:])

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

    def __repr__(self) -> str:
        names = " -> ".join(dict.fromkeys(rung.implementation.name for rung in self.rungs))
        return f"<BoundKernel {self.problem}: {names}>"


def _signature(tensors: tuple[Any, ...]) -> _Key:
    """All that a check looks at, but gradients: reading it costs a third of checking. None where one is no tensor."""
    try:
        return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])
    except AttributeError:
        return None


def _contiguous(shape: _Shape) -> _Shape:
    """The strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(1, size))
    return tuple(strides[: len(shape)])


def _ladder(rungs: Sequence[Rung], kernels: Sequence[Kernel], row_axis: int) -> Kernel:
    """One callable for the whole ladder. A lone rung is called directly: choosing must cost nothing there."""
    if len(kernels) == 1:
        return kernels[0]
    bounds = [sys.maxsize if rung.max_m is None else rung.max_m for rung in rungs]
    steps = tuple(kernels)

    def launch(*arguments: Any) -> None:
        steps[bisect_left(bounds, arguments[0].shape[row_axis])](*arguments)

    return launch

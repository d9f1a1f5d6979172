"""Each bound kernel run once while a server starts, at every rung, so that nothing is compiled once it serves.

vLLM's own warm-up runs the sizes that it captures and the largest; rungs between them would be compiled by requests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch

from bidispatch import ops
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.ops.reference.mla import latent_batch
from bidispatch.runtime.arguments import TensorSpec, output_shape, tensor_specs
from bidispatch.runtime.bound import BoundKernel

__all__ = ["Weights", "rows_to_run", "warm"]

_log = logging.getLogger("vllm.bidispatch")

Weights = Mapping[str, torch.Tensor | None]
"""A layer's own, by the names of the op's arguments."""

_CACHED, _PROMPT, _OTHERS = 300, 64, 4
_MOST_INSIDE = 32
"""Choices inside a rung that are all run. DeepGEMM has more than a hundred, of which each may be a kernel that nvcc
takes seconds for: of those, the ones that serve powers of two."""
_OTHER_SIZE = 2
"""Of what is no number of rows, such as the matrices of a bmm."""


def warm(kernel: BoundKernel, weights: Weights | None = None) -> None:
    """Run a kernel on weights of a layer that it serves, which it only reads, and on rows of its own, zeros but for
    attention's. On a processor, where nothing is compiled, it does nothing. Where the GPU has no room for the rows, it
    says so, and the first requests compile.

    weights: those that are not given, or not as the kernel takes them, are zeros too. What they hold does not matter:
    no kernel is chosen by a value, and ids of zeros find the experts of the first.
    """
    if kernel.device.arch.vendor == "cpu":
        return
    try:
        with torch.no_grad():
            if kernel.limits.max_seq_len:
                for step in _steps(kernel):
                    kernel(*step)
            else:
                _run_rungs(kernel, weights or {})
    except torch.cuda.OutOfMemoryError:
        _log.warning("%s has not run yet: there is no room to; its first requests may wait for it", kernel.problem)
    torch.cuda.synchronize(kernel.device.torch_device)


def rows_to_run(kernel: BoundKernel) -> tuple[int, ...]:
    """The largest rows of each rung, and of each choice that its kernel makes inside, as far as it was bound."""
    most = kernel.limits.max_tokens
    tops = {min(rung.max_m or most, most) for rung in kernel.rungs}
    inside = sorted({edge for edges in kernel.edges for edge in edges if edge <= most})
    if len(inside) > _MOST_INSIDE:
        inside = [next(edge for edge in inside if edge >= rows) for rows in _powers_of_two(inside[-1])]
    return tuple(sorted({1, *tops, *inside}))


def _powers_of_two(most: int) -> list[int]:
    return [1 << bits for bits in range(most.bit_length())]


def _run_rungs(kernel: BoundKernel, given: Weights) -> None:
    op = ops.get(kernel.problem.op)
    specs = [spec for spec in tensor_specs(op.arguments, kernel.problem) if spec.present]
    place = kernel.device.torch_device
    row_size = op.arguments[0].shape[op.row_axis]
    names = {size for spec in specs for _, size, _ in spec.sizes}
    rows = [spec for spec in specs if row_size in {size for _, size, _ in spec.sizes}]
    others = dict.fromkeys(names, _OTHER_SIZE)
    weights = {spec.name: _weight(spec, given.get(spec.name), others, place) for spec in specs if spec not in rows}
    for count in rows_to_run(kernel):
        made = {spec.name: _zeros(spec, {**others, str(row_size): count}, place) for spec in rows}
        kernel(*({**weights, **made}.get(argument.name) for argument in op.arguments))


def _weight(spec: TensorSpec, given: torch.Tensor | None, sizes: dict[str, int], place: str) -> torch.Tensor:
    """A layer's own where it is one of the kernel's: it may lie on the host, and be fetched when its layer runs.

    Of a matrix for each head as many as there are rows for: what a kernel is compiled for is the strides.
    """
    if given is None or given.dtype is not spec.dtype or given.device != torch.device(place) or not given.data_ptr():
        return _zeros(spec, sizes, place)
    some = given[: sizes[spec.sizes[0][1]]] if spec.sizes else given
    return some if tuple(some.shape) == output_shape(spec, sizes) else _zeros(spec, sizes, place)


def _zeros(spec: TensorSpec, sizes: dict[str, int], place: str) -> torch.Tensor:
    return torch.zeros(output_shape(spec, sizes), dtype=spec.dtype, device=place)


def _steps(kernel: BoundKernel) -> Iterator[list[torch.Tensor | None]]:
    """A sequence that decodes, and where there is room a prompt; then those among others, from few to as many as there
    may be, twice as many each time: for some numbers kernels launch what they do not for others.
    """
    limits = kernel.limits
    prompt = min(_PROMPT, limits.max_query_len, limits.max_tokens - 1, limits.max_seq_len)
    lengths = [(1, min(_CACHED, limits.max_seq_len))]
    if limits.max_seqs > 1 and prompt > 0:
        lengths.append((prompt, prompt))
    batch = latent_batch if kernel.problem.op == "attention.mla" else paged_batch
    room = max(0, min(limits.max_seqs - len(lengths), limits.max_tokens - sum(queries for queries, _ in lengths)))
    for others in sorted({0, room, *(few for few in _powers_of_two(room) if few >= _OTHERS)}):
        queries, cached = ([each[i] for each in [*lengths, *[(1, 1)] * others]] for i in (0, 1))
        yield batch(kernel.problem, queries, cached, device=kernel.device.torch_device)

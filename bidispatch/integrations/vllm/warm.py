"""Each bound kernel run once while a server starts, at every rung, so that nothing is compiled once it serves.

vLLM's own warm-up runs the sizes that it captures and the largest; rungs between them would be compiled by requests.
"""

from __future__ import annotations

from typing import Any

import torch

from bidispatch import ops
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.ops.reference.mla import latent_batch
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.bound import BoundKernel

__all__ = ["rows_to_run", "warm"]

_CACHED, _PROMPT = 300, 64


def warm(kernel: BoundKernel) -> None:
    """Run a kernel on arguments of its own. On a processor, where nothing is compiled, it does nothing."""
    if kernel.device.arch.vendor == "cpu":
        return
    with torch.no_grad():
        if kernel.limits.max_seq_len:
            kernel(*_steps(kernel))
        else:
            _run_rungs(kernel)
    torch.cuda.synchronize(kernel.device.torch_device)


def rows_to_run(kernel: BoundKernel) -> tuple[int, ...]:
    """The largest rows of each rung, and of each choice that its kernel makes inside, as far as it was bound."""
    most = kernel.limits.max_tokens
    tops = {min(rung.max_m or most, most) for rung in kernel.rungs}
    inside = {edge for edges in kernel.edges for edge in edges if edge <= most}
    return tuple(sorted({1, *tops, *inside}))


def _run_rungs(kernel: BoundKernel) -> None:
    op, rows = ops.get(kernel.problem.op), rows_to_run(kernel)
    arguments = load_attribute(op.inputs)(kernel.problem, max(rows), device=kernel.device.torch_device)
    axes = [spec.shape.index("m") if "m" in spec.shape else None for spec in op.arguments]
    for count in rows:
        kernel(*(_first(argument, axis, count) for argument, axis in zip(arguments, axes, strict=True)))


def _first(argument: Any, axis: int | None, count: int) -> Any:
    return argument if argument is None or axis is None else argument.narrow(axis, 0, count)


def _steps(kernel: BoundKernel) -> list[torch.Tensor | None]:
    """A sequence that decodes, and where there is room a prompt."""
    limits = kernel.limits
    prompt = min(_PROMPT, limits.max_query_len, limits.max_tokens - 1, limits.max_seq_len)
    lengths = [(1, min(_CACHED, limits.max_seq_len))]
    if limits.max_seqs > 1 and prompt > 0:
        lengths.append((prompt, prompt))
    batch = latent_batch if kernel.problem.op == "attention.mla" else paged_batch
    queries, cached = ([each[i] for each in lengths] for i in (0, 1))
    return batch(kernel.problem, queries, cached, device=kernel.device.torch_device)

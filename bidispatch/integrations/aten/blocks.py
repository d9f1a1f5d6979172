"""Any elementwise aten op on a processor, in blocks of one length: see `elementwise`, which knows the common ones.

Operands are broadcast, copied and padded; every element then goes through the same code, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["BLOCK", "pointwise", "to_blocks"]

BLOCK = 4096


def to_blocks(x: torch.Tensor) -> torch.Tensor:
    """x, flat and padded with ones: [blocks, BLOCK], a copy unless it fills them."""
    flat = x.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % BLOCK), value=1).view(-1, BLOCK)


def pointwise(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call an op that torch tags as pointwise; in-place ones and those with `out=` too.

    `NotImplemented` for lists of tensors, for other layouts than strided, and for tensors that hold no values.
    """
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    only_written = [a.name for a in func._schema.arguments if a.is_out]
    operands = {name: x for name, x in named.items() if isinstance(x, torch.Tensor) and name not in only_written}
    if any(isinstance(x, (list, tuple)) and any(isinstance(y, torch.Tensor) for y in x) for x in named.values()):
        return NotImplemented
    tensors = [x for x in named.values() if isinstance(x, torch.Tensor)]
    if any(x.layout is not torch.strided or type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors):
        return NotImplemented
    shape = torch.broadcast_shapes(*(x.shape for x in operands.values()))  # type: ignore[no-untyped-call]
    count = shape.numel()
    if not count:
        return func(*args, **kwargs)
    with _disable_current_modes(), torch.no_grad():
        # A tensor without axes counts less where dtypes differ, and stays one unless all are.
        cut = {k: to_blocks(x.expand(shape)) if x.dim() or not shape else x for k, x in operands.items()}
        if any(name in cut and cut[name].data_ptr() == named[name].data_ptr() for name in written):
            cut = {k: x.clone() if k in written else x for k, x in cut.items()}
        for name in only_written:
            cut[name] = torch.empty((-(-count // BLOCK), BLOCK), dtype=named[name].dtype)
        parts = []
        for index in range(-(-count // BLOCK)):
            now = {name: x[index] if x.dim() == 2 else x for name, x in cut.items()}
            parts.append(func(**(named | now)))
        for name in written:
            target = named[name]
            if name in only_written and target.shape != shape:
                target.resize_(shape)
            target.copy_(cut[name].view(-1)[:count].view(shape))
        if written:
            return named[written[0]] if len(written) == 1 else tuple(named[name] for name in written)
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts)[:count].view(shape)
        return tuple(torch.cat(pieces)[:count].view(shape) for pieces in zip(*parts, strict=True))

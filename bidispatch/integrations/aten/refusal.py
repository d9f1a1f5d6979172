"""What is said of a call that nothing serves, and torch's own complaint about it first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves, tree_map

from bidispatch.errors import SelectionError
from bidispatch.rowlocal import name_of

__all__ = ["is_empty", "refuse"]

_DO_NEXT = (
    "use a function of docs/pytorch.md instead, or enter aten_overrides(plan, uncovered='torch') to leave such "
    "ops to torch; `bidispatch audit --framework transformers --model DIR --overrides` lists all that a model runs"
)
_WIDE = "float64 and complex products and sums have no kernels: cast to float32 first"
_FAST_PATH = "torch.backends.mha.set_fastpath_enabled(False) makes the module call functions that are served"
_INSTEAD = {
    "_transformer_encoder_layer_fwd": _FAST_PATH,
    "_native_multi_head_attention": _FAST_PATH,
    "convolution": "F.unfold and matmul make a convolution of served ops",
    "index_add": "an accumulating scatter adds in no fixed order: sort, or index_put without accumulate",
    "scatter_add": "an accumulating scatter adds in no fixed order: sort, or index_put without accumulate",
    "mkldnn_rnn_layer": "torch.backends.mkldnn.flags(enabled=False) takes nn.LSTM apart into served ops",
    "_cudnn_rnn": "torch.backends.cudnn.flags(enabled=False) may take it apart into served ops",
}


def refuse(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], function: Any) -> NoReturn:
    """Raise `SelectionError` for an aten op that `function` came to."""
    asked = _name(function)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    given = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors)
    hint = _INSTEAD.get(name_of(op), "")
    if not hint and any(x.dtype is torch.float64 or x.is_complex() for x in tensors):
        hint = _WIDE
    raise SelectionError(
        f"aten_overrides: {op}({given}), which {asked} runs, may make a row follow the batch, and the plan has nothing "
        f"for it; {hint + '; ' if hint else ''}{_DO_NEXT}"
    )


def is_empty(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an op's results have no elements. Raises what torch has to say about its arguments."""

    def outline(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf

    try:
        with torch.no_grad():
            result = op(*tree_map(outline, args), **tree_map(outline, dict(kwargs)))
    except NotImplementedError:
        return False
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and all(x.numel() == 0 for x in tensors)


def _name(function: Any) -> str:
    try:
        name = torch.overrides.resolve_name(function)
    except (AttributeError, TypeError):
        name = None
    return name or getattr(function, "__name__", None) or str(function)

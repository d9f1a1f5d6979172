"""Attention that is left to vLLM, and why: for the table, where the layers of a model are shown.

vLLM's selector knows little of a layer. Whether the plan serves it, with its heads, its window and its soft cap, shows
when it is built, and one that is refused then is built once more, with the backend that vLLM takes by itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bidispatch.errors import SelectionError, UsageError
from bidispatch.integrations.vllm.reasons import SEES_LATER

__all__ = ["ADVICE", "begin", "built", "forget", "reason_of", "refused", "sees_later_positions", "vllms_own"]

ADVICE = "BIDISPATCH_VLLM=off runs vLLM's own attention"

_MM_PREFIX = "partial multimodal token full attention not supported"
"""What vLLM's `validate_configuration` says (v1/attention/backend.py, 0.25.1 to 0.33.0)."""


@dataclass
class _State:
    """Of a worker: one model is built after the other, by one thread."""

    why: str = ""
    """Why vLLM's choice is wanted of its selector now, or nothing."""
    mm_prefix: bool = False
    by_layer: dict[str, str] = field(default_factory=dict)
    by_kind: dict[tuple[int, bool, str], dict[str, None]] = field(default_factory=dict)
    """By head size, MLA and attention type, for what the selector refused: it is told no layer's name."""


_state = _State()


def forget() -> None:
    """Forget every layer."""
    global _state
    _state = _State()


def begin(vllm_config: Any) -> None:
    """Before a model is built. What the whole of it is counts for all of its layers.

    A language model inside another is built with a configuration of its own, which in 0.25.1 does not say any more
    that tokens of images see later ones; the steps of the whole model do.
    """
    forget()
    _forget_choices()
    _state.mm_prefix = bool(getattr(vllm_config.model_config, "is_mm_prefix_lm", False))


def _forget_choices() -> None:
    """vLLM's selector keeps what it chose for a configuration, and would not ask again."""
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()


def sees_later_positions(attn_type: str) -> bool:
    """Whether a layer of this type is in a model whose tokens of images see later ones."""
    return _state.mm_prefix and attn_type == "decoder"


def vllms_own() -> str:
    """Why vLLM's choice is wanted of its selector now, whatever is installed; empty where it is not."""
    return _state.why


def refused(config: Any, reason: str) -> None:
    """Keep why a layer that vLLM's selector knew by `config` (`AttentionSelectorConfig`) is left to vLLM."""
    _state.by_kind.setdefault(_kind(config, bool(config.use_mla)), {})[reason] = None


def reason_of(layer: Any) -> str:
    """Why an attention layer is left to vLLM, with what helps; empty where nothing was said of it."""
    reason = _state.by_layer.get(getattr(layer, "layer_name", ""), "")
    if not reason:
        reason = "; or ".join(_state.by_kind.get(_kind(layer, hasattr(layer, "kv_lora_rank")), ()))
    return _helped(reason)


def _kind(of: Any, latent: bool) -> tuple[int, bool, str]:
    """What a layer and what the selector knew of it have in common."""
    attn_type = getattr(of, "attn_type", "decoder")  # a member of an enum, or its value
    return getattr(of, "head_size", 0), latent, str(getattr(attn_type, "value", attn_type))


def _helped(reason: str) -> str:
    return f"{reason}: {SEES_LATER}" if _MM_PREFIX in reason else reason


def built(original: Callable[..., None], config_of: Callable[[], Any]) -> Callable[..., None]:
    """In the place of `__init__` of vLLM's attention layers.

    config_of: gives the `VllmConfig` that a layer is built with. Raises `SelectionError` with the layer's name where
    its backend was named, by the user or by the layer's own code: then there is no other to build it with.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build(self: Any, *arguments: Any, **named: Any) -> None:
        given = signature.bind(self, *arguments, **named).arguments
        layer = str(given.get("prefix", ""))
        try:
            original(self, *arguments, **named)
        except (SelectionError, UsageError) as error:
            why = "; ".join(str(error).splitlines())
            attention = config_of().attention_config
            chosen = given.get("attn_backend") is not None or attention.backend is not None
            if chosen or getattr(attention, "backend_per_kind", None):
                raise _of(layer, why) from error
        else:
            return
        _state.by_layer[layer] = why
        try:
            with _left(why):
                original(self, *arguments, **named)
        except SelectionError as error:
            raise _of(layer, str(error)) from error

    return build


def _of(layer: str, why: str) -> SelectionError:
    return SelectionError(f"attention {layer}: {_helped(why)}; {ADVICE}")


@contextmanager
def _left(why: str) -> Iterator[None]:
    """Have vLLM's selector choose by itself."""
    _forget_choices()
    _state.why = why
    try:
        yield
    finally:
        _state.why = ""
        _forget_choices()

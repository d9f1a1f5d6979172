"""Whether layers are taken over: `VLLM_BATCH_INVARIANT`, which is vLLM's, and `BIDISPATCH_VLLM`. Imports no vLLM."""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping, MutableMapping

from bidispatch.errors import UsageError, did_you_mean

__all__ = [
    "MODE_VARIABLE",
    "SWITCH",
    "Mode",
    "read_mode",
    "require_same_mode",
    "require_same_switch",
    "share_variables",
]

SWITCH = "VLLM_BATCH_INVARIANT"
MODE_VARIABLE = "BIDISPATCH_VLLM"

_OURS = "BIDISPATCH_"
_CARRIED = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"

# Modules that keep the switch as it was when they were imported, in every version from 0.25.1 to 0.33.0.
_FROZEN = {
    "vllm.lora.ops.triton_ops.utils": "is_batch_invariant",
    "vllm.v1.attention.ops.triton_unified_attention": "is_batch_invariant",
    "vllm.v1.attention.ops.triton_unified_attention_diffkv": "is_batch_invariant",
}


class Mode(enum.Enum):
    """What is done with a model's layers."""

    OFF = "off"
    """vLLM is left alone."""
    ON = "on"
    """Layers are served by the plan; what it does not cover is shown as not promised."""
    STRICT = "strict"
    """The same; what it does not cover stops the start."""


def read_mode(environment: Mapping[str, str]) -> Mode:
    """The mode that an environment asks for.

    On where vLLM's own switch is, unless `BIDISPATCH_VLLM` says otherwise. Raises `UsageError` for another word there,
    for `on` and `strict` without vLLM's switch, and for a value of that which vLLM cannot read.
    """
    switch = environment.get(SWITCH, "0")
    try:
        invariant = bool(int(switch))
    except ValueError:
        raise UsageError(f"{SWITCH}={switch!r} is not a number; vLLM takes 0 or 1") from None
    word = environment.get(MODE_VARIABLE, "").lower()
    words = [mode.value for mode in Mode]
    if not word:
        return Mode.ON if invariant else Mode.OFF
    if word not in words:
        raise UsageError(f"{MODE_VARIABLE}={word!r} is none of {', '.join(words)}{did_you_mean(word, words)}")
    mode = Mode(word)
    if mode is not Mode.OFF and not invariant:
        raise UsageError(
            f"{MODE_VARIABLE}={word} needs {SWITCH}=1, which is not set: without it vLLM pins neither its collectives "
            f"nor what no plan covers; set {SWITCH}=1 before vLLM starts, or leave {MODE_VARIABLE} out"
        )
    return mode


def require_same_switch(modules: Mapping[str, object] = sys.modules) -> None:
    """Raise `UsageError` where vLLM was imported before its switch was set, so that half of it runs without."""
    early = [name for name, flag in _FROZEN.items() if getattr(modules.get(name), flag, True) is False]
    if early:
        raise UsageError(
            f"{SWITCH} was set after {', '.join(early)} had been imported, and that keeps the value it saw; "
            "set it in the environment before Python starts"
        )


def require_same_mode(before: Mode, environment: Mapping[str, str]) -> None:
    """Raise `UsageError` where an environment asks for another mode than when vLLM loaded its plugins."""
    now = read_mode(environment)
    if now is not before:
        raise UsageError(
            f"{SWITCH} and {MODE_VARIABLE} meant {before.value} when vLLM loaded its plugins in this process, and mean "
            f"{now.value} now; that is done once, so set them before Python starts"
        )


def share_variables(environment: MutableMapping[str, str]) -> None:
    """Have vLLM hand our variables to workers under Ray, which get `VLLM_*` and few others (ray/ray_env.py)."""
    given = [prefix.strip() for prefix in environment.get(_CARRIED, "").split(",") if prefix.strip()]
    if _OURS not in given and any(name.startswith(_OURS) for name in environment):
        environment[_CARRIED] = ",".join([*given, _OURS])

"""Which attention backend a vLLM layer gets: `CUSTOM` unless another is named, and what another would have to show.

The seams: `register_backend` (v1/attention/backends/registry.py) for the name, and the platform's
`get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)` (platforms/cuda.py, rocm.py) for the choice,
alike in 0.25.1, 0.29.0 and 0.33.0. An MLA model needs a class of its own, and the name can hold one only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from bidispatch.errors import BackendError, SelectionError, UsageError
from bidispatch.integrations.vllm import left

__all__ = ["choose", "install"]

_HERE = "bidispatch.integrations.vllm"
_ATTENTION = f"{_HERE}.attention.BidispatchBackend"
_LATENT = f"{_HERE}.mla.BidispatchMLABackend"
_ADAPTED = {
    ("FLASH_ATTN", False): f"{_HERE}.attention.FlashAttnBackend",
    ("FLASHINFER", False): f"{_HERE}.attention.FlashInferBackend",
    ("FLASHMLA", True): f"{_HERE}.mla.FlashMLABackend",
}
_NOT_HERE = {
    "TRITON_ATTN": "vLLM's own Triton attention takes another KV tile for a batch with a prompt at head size 256 on "
    "sm10x (v1/attention/ops/triton_unified_attention.py, 0.33.0), and the registry has no implementation that pins it",
    "TRITON_MLA": "vLLM's own prefill of MLA models projects keys up, whose bits are not its decode's, and splits a "
    "cached context by what other requests leave of a buffer (plan_mla_context_chunks, 0.33.0)",
}
_PARAMETERS = ["selected_backend", "attn_selector_config", "num_heads"]


def choose(name: str | None, *, use_mla: bool) -> str:
    """The path of the backend class for a backend's name in vLLM; None: nobody named one.

    A named backend is asked for when a layer is built, with its exact dims. Raises `SelectionError` for one that the
    registry does not have.
    """
    if name in (None, "CUSTOM"):
        return _LATENT if use_mla else _ATTENTION
    path = _ADAPTED.get((str(name), use_mla))
    if path is not None:
        return path
    kind = "an MLA model" if use_mla else "a model without MLA"
    why = _NOT_HERE.get(str(name), f"the registry has no implementation of it for {kind}")
    usable = ", ".join(["CUSTOM", *(known for known, latent in _ADAPTED if latent is use_mla)])
    raise SelectionError(
        f"--attention-backend {name} is not invariant: {why}; for {kind} there are {usable}. Without the option it is "
        "CUSTOM, unless vLLM names a backend itself, as for Gemma-4: then name CUSTOM"
    )


def install(platform: Any, *, uncovered: Callable[[Any, str], None] | None = None) -> Callable[[], None]:
    """Make a platform class, vLLM's CUDA or ROCm one, give layers bidispatch's backends; return what undoes it.

    uncovered: told of each layer with no named backend that is not served, by its `AttentionSelectorConfig` and the
    reason; it then keeps vLLM's own choice, and the caller shows it as not promised. Without it that is an error.
    Raises `BackendError`, having changed nothing, where vLLM is not as it was read; `UsageError` when installed twice.
    """
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    forget = getattr(getattr(selector, "_cached_get_attn_backend", None), "cache_clear", None)
    if forget is None:
        raise BackendError("vllm.v1.attention.selector of this vLLM has no cached _cached_get_attn_backend")
    kind = getattr(getattr(platform, "_enum", None), "name", "of no kind")
    if kind not in ("CUDA", "ROCM"):
        raise BackendError(f"vLLM's platform is {platform.__name__} ({kind}); attention is served on CUDA and ROCM")
    original = inspect.getattr_static(platform, "get_attn_backend_cls", None)
    if not isinstance(original, classmethod):
        raise BackendError(f"{platform.__name__} of this vLLM has no class method get_attn_backend_cls")
    if getattr(original.__func__, "of_bidispatch", False):
        raise UsageError("bidispatch's attention backends are installed already; undo that first")
    found = list(inspect.signature(original.__func__).parameters)[1:]
    if found != _PARAMETERS:
        raise BackendError(
            f"get_attn_backend_cls of this vLLM takes {', '.join(found)}, known is {', '.join(_PARAMETERS)}"
        )
    if not hasattr(AttentionBackendEnum, "CUSTOM"):
        raise BackendError("AttentionBackendEnum of this vLLM has no CUSTOM")
    if AttentionBackendEnum.CUSTOM.is_overridden():
        raise BackendError(
            f"another plugin has the attention backend CUSTOM: {AttentionBackendEnum.CUSTOM.get_path()}; "
            "leave it out with VLLM_PLUGINS"
        )
    own = "get_attn_backend_cls" in vars(platform)

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        named = None if selected_backend is None else str(selected_backend.name)
        if why := left.vllms_own():
            return _vllms(original, cls, attn_selector_config, num_heads, why)
        path = choose(named, use_mla=attn_selector_config.use_mla)
        asked = attn_selector_config._asdict()
        if "use_mm_prefix" in asked and left.sees_later_positions(attn_selector_config.attn_type):
            asked["use_mm_prefix"] = True
        against = _load(path).validate_configuration(device_capability=cls.get_device_capability(), **asked)
        if not against:
            return path
        reason = f"attention backend {named or 'CUSTOM'}: {'; '.join(against)}"
        if named is not None or uncovered is None:
            raise SelectionError(f"nothing invariant serves a layer: {reason} ({attn_selector_config!r})")
        uncovered(attn_selector_config, reason)
        return _vllms(original, cls, attn_selector_config, num_heads, reason)

    get_attn_backend_cls.of_bidispatch = True  # type: ignore[attr-defined]
    register_backend(AttentionBackendEnum.CUSTOM, _ATTENTION)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    forget()

    def undo() -> None:
        AttentionBackendEnum.CUSTOM.clear_override()
        if own:
            platform.get_attn_backend_cls = original
        else:
            del platform.get_attn_backend_cls
        forget()

    return undo


def _vllms(original: Any, platform: Any, config: Any, num_heads: int | None, reason: str) -> str:
    """What vLLM takes by itself where nobody named a backend. Raises `SelectionError` where that is nothing."""
    try:
        return str(original.__func__(platform, None, config, num_heads))
    except ValueError as error:
        raise SelectionError(
            f"attention that is not served here ({reason}), and for which vLLM has nothing in its own batch-invariant "
            f"mode: {error}"
        ) from error


def _load(path: str) -> Any:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(path)

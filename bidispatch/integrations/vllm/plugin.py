"""The entry point `vllm.general_plugins`: called in every process of vLLM, also where CUDA must stay untouched.

In each process the mode, the version and all seams are checked, in sources and without importing them. Only a worker,
when it takes its device, imports layers and patches them; when its model is loaded, layers get their kernels.
Importing this module imports neither torch nor vLLM: vLLM swallows what an import raises, but not what a call does.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidispatch.errors import BackendError, BidispatchError, DeviceError, SelectionError, UsageError
from bidispatch.integrations.vllm import compat
from bidispatch.integrations.vllm.mode import (
    Mode,
    read_mode,
    require_same_mode,
    require_same_switch,
    share_variables,
)
from bidispatch.integrations.vllm.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bidispatch.integrations.vllm.host import Host

__all__ = ["active", "patch_layers", "register", "require_patched_worker", "require_plan", "undo"]

_log = logging.getLogger("vllm.bidispatch")
"""Below vLLM's own logger, whose level and handlers are what the user sees."""

_at_start = Patches()
_in_worker = Patches()
_prepared_for: list[Mode] = []
"""The mode that this process was prepared for, once it is."""


def active() -> bool:
    """Whether this process has been prepared."""
    return len(_at_start) > 0


def register() -> None:
    """Prepare this process, as the environment asks; a second call does nothing.

    Raises `UsageError` for variables that contradict each other or what they were at the first call, `BackendError` for
    a vLLM that is not known here, `DeviceError` for a platform that is not served.
    """
    mode = read_mode(os.environ)
    if _prepared_for:
        require_same_mode(_prepared_for[0], os.environ)
    share_variables(os.environ)
    _register_loader()
    if mode is not Mode.OFF and not active():
        _hook_worker(mode)
    _prepared_for[:] = [mode]


def _hook_worker(mode: Mode) -> None:
    require_same_switch()
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise BackendError("vllm is not installed here, and its plugin was called; set BIDISPATCH_VLLM=off")
    try:
        version = installed("vllm")
    except PackageNotFoundError as error:
        raise BackendError(f"vllm at {found.origin} has no version; install its wheel") from error
    compat.check(version, Path(found.origin).parent)
    _require_platform()
    seam = next(seam for seam in compat.SEAMS if seam.name == "init_device")
    holder, name = compat.resolve(seam)
    lifted = [compat.resolve(each) for each in compat.LIFTED if each.is_in(version)]
    original = getattr(holder, name)

    def init_device(self: Any) -> Any:
        require_same_mode(mode, os.environ)
        patch_layers(mode)
        result = original(self)
        try:
            require_patched_worker(self.worker)
            require_plan(self.worker.device)
        except BidispatchError:
            undo()
            raise
        return result

    _at_start.replace(holder, name, init_device)
    for place in lifted:
        _at_start.replace(*place, _unwanted)


def _unwanted(self: Any) -> bool:
    """In the place of a method that says whether vLLM's own mode needs a restriction."""
    return False


def _register_loader() -> None:
    """Where vLLM called. A load format changes nothing until it is asked for: a vLLM without the seam is left alone."""
    if "vllm" not in sys.modules:
        return
    from bidispatch.integrations.vllm import loader

    try:
        loader.register_loader()
    except (ImportError, AttributeError) as error:
        _log.warning(
            "--load-format %s is not there: vLLM's loaders are not as they were read: %s", loader.LOAD_FORMAT, error
        )


def undo() -> None:
    """Put back all that was patched in this process. Layers of a model that is loaded keep their kernels."""
    _in_worker.undo()
    _at_start.undo()
    _prepared_for.clear()
    if "bidispatch.integrations.vllm.ops" in sys.modules:
        from bidispatch.integrations.vllm import host, left, ops

        left.forget()
        host.refuse_unserved(False)
        ops.forget()


def _require_platform() -> None:
    from vllm.platforms import current_platform

    kind = type(current_platform)
    if not kind.__module__.startswith("vllm.platforms"):
        raise DeviceError(
            f"the platform plugin {kind.__module__}.{kind.__name__} is active, and may choose kernels itself; "
            "leave it out with VLLM_PLUGINS, or set BIDISPATCH_VLLM=off"
        )
    if not current_platform.is_cuda():
        raise DeviceError(
            f"bidispatch serves vLLM's layers on CUDA, and this is {kind.__name__}; "
            "set BIDISPATCH_VLLM=off to run vLLM as it is"
        )


def require_patched_worker(worker: Any) -> None:
    """Raise `DeviceError` for a worker that loads its model in a way of its own: no layer of it would be served."""
    from vllm.v1.worker.gpu_worker import Worker

    kind = type(worker)
    if getattr(kind, "load_model", None) is not Worker.load_model:
        raise DeviceError(
            f"the worker {kind.__module__}.{kind.__name__} loads models in a way of its own, so its layers cannot be "
            "taken over; leave out --worker-cls and --worker-extension-cls, or set BIDISPATCH_VLLM=off"
        )


def require_plan(device: Any) -> None:
    """Raise `DeviceError` for a device that nothing can be planned for: before a model is built, not inside of it."""
    from bidispatch.integrations.vllm.kernels import serving_plan

    try:
        serving_plan(_named(device))
    except (DeviceError, SelectionError, UsageError) as error:
        raise DeviceError(
            f"no layer can be served on {device}: {error}; in vLLM, BIDISPATCH_VLLM=off runs its own batch-invariant "
            "mode there, and BIDISPATCH_PROFILE names a profile of yours"
        ) from error


def _named(device: Any) -> str:
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


def patch_layers(mode: Mode) -> None:
    """Import vLLM's layers and replace their methods, all or none; a second call does nothing."""
    if len(_in_worker):
        return
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    from bidispatch.integrations.vllm import (
        adopt,
        backends,
        fp8_linear,
        int4_kernel,
        int4_linear,
        left,
        linear,
        mla_products,
        moe,
        norms,
    )

    seams = {seam.name: seam for seam in compat.SEAMS}
    places = {name: compat.resolve(seam) for name, seam in seams.items() if name != "init_device"}
    kernels = {name: getattr(*places[name]) for name in ("fp8_plain_kernel", "fp8_whole_kernel")}
    wrappers: dict[str, Callable[[Any], Any]] = {
        "linear": linear.apply,
        "head": linear.head_apply,
        "gate": linear.gate_forward,
        "rms_norm": norms.forward,
        "rms_norm_native": norms.forward,
        "gemma_norm": norms.forward,
        "gemma_norm_native": norms.forward,
        **dict.fromkeys(fp8_linear.METHODS, fp8_linear.apply),
        "compressed_fp8": fp8_linear.apply,
        "awq": int4_linear.apply,
        "gptq": int4_linear.apply,
        "compressed_int4": int4_linear.apply,
        "router": moe.routing,
        "grouped_router": moe.routing,
        "bias_router": moe.routing,
        "experts": moe.experts_apply,
        "experts_inputs": moe.unquantized_inputs,
        "experts_workspaces": moe.no_workspaces,
        "fp8_experts_backends": moe.fp8_backends,
        "mla": mla_products.forward_impl,
    }
    kinds = ("embedding", "parallel_head", "logits", "attention")
    looked_at = {"compressed": places["compressed"][0], **kernels, **{name: getattr(*places[name]) for name in kinds}}
    classes = {name: holder for name, (holder, _) in places.items() if name in wrappers} | looked_at
    for name in ("fp8_kernel_linear", "fp8_kernel_compressed", "fp8_kernel_online"):
        wrappers[name] = lambda original: fp8_linear.kernel(original, *kernels.values())
    wrappers |= dict.fromkeys(("mixed_kernel_gptq", "mixed_kernel_compressed"), int4_kernel.kernel)

    def load_model(self: Any, *, load_dummy_weights: bool = False) -> None:
        adopt.require_one_batch_at_a_time(self.vllm_config)
        left.begin(self.vllm_config)
        originals["load_model"](self, load_dummy_weights=load_dummy_weights)
        with _counted(self):
            _take_over(mode, self, classes)

    originals = {name: getattr(holder, attribute) for name, (holder, attribute) in places.items()}
    try:
        for name, wrapper in wrappers.items():
            _in_worker.replace(*places[name], wrapper(originals[name]))
        _in_worker.replace(*places["load_model"], load_model)
        for kind in (classes["attention"], classes["mla"]):
            _in_worker.replace(kind, "__init__", left.built(kind.__init__, get_current_vllm_config))
        _in_worker.on_undo(backends.install(type(current_platform), uncovered=left.refused))
    except BaseException:
        _in_worker.undo()
        raise


@contextmanager
def _counted(worker: Any) -> Iterator[None]:
    """Add what stays allocated to the memory of the model: vLLM leaves room beside its cache for that, and for what a
    run of the largest step adds, not for what is there before that run (v1/worker/gpu_worker.py).
    """
    before = _allocated(worker.device)
    yield
    if grown := _allocated(worker.device) - before:  # a runner on the processor counts none
        worker.model_runner.model_memory_usage += grown


def _allocated(device: Any) -> int:
    import torch

    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def _take_over(mode: Mode, worker: Any, classes: dict[str, Any]) -> None:
    from bidispatch.integrations.vllm import adopt, host, kernels, ops, table
    from bidispatch.integrations.vllm.limits import StepLimits

    config = worker.vllm_config
    plan = kernels.serving_plan(_named(worker.device))
    made: Host = host.Host(plan, StepLimits.of(config).max_tokens, classes)
    adopt.adopt(made, worker.get_model(), config)
    made.rows += adopt.around(config)
    adopt.mark_compiled_graphs(config, worker.get_model())
    rows = table.merged(made.rows)
    if worker.rank == 0:
        fingerprint = made.plan.fingerprint() if made.plan.selections else "of nothing"
        text = "\n".join([*table.profile_lines(made.plan.profile), *table.lines(rows, fingerprint)])
        _log.info("kernels of this model (bidispatch, %s):\n%s", mode.value, text)
    refused = table.refusals(rows)
    if refused and mode is Mode.STRICT:
        raise SelectionError(
            "BIDISPATCH_VLLM=strict refuses to start: "
            + "; ".join(refused)
            + "; BIDISPATCH_VLLM=on starts, and shows these as not promised"
        )
    if refused and worker.rank == 0:
        _log.warning("%d kinds of layers are NOT PROMISED to be batch-invariant; the table says why", len(refused))
    host.refuse_unserved(mode is Mode.STRICT)
    began = time.perf_counter()
    ops.warm_all()
    kernels.warm_all()
    _log.info("every kernel has run once: %.1f s", time.perf_counter() - began)

"""A worker of vLLM in a process that was spawned, as far as it comes without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

__all__ = ["start"]


def start() -> dict[str, object]:
    """Go vLLM's way: make a worker, which loads the plugins, and give it its device. What is patched after each step.

    vLLM's layers are imported before the platform looks like a GPU's, whose libraries some of them would load.
    """
    import torch
    import vllm.platforms
    from fake_platforms import CudaPlatform
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from bidispatch.integrations.vllm import compat, plugin

    for seam in compat.SEAMS:
        compat.resolve(seam)
    vllm.platforms._current_platform = vllm.platforms.current_platform = CudaPlatform()

    def served() -> str:
        return UnquantizedLinearMethod.apply.__module__

    seen: dict[str, object] = {"before": (plugin.active(), served())}
    config = VllmConfig()
    config.model_config = SimpleNamespace(multimodal_config=None, supports_multimodal_inputs=False)
    config.parallel_config.worker_cls = f"{__name__}.Worker"
    wrapper = WorkerWrapperBase(rpc_rank=0)
    wrapper.init_worker([{"vllm_config": config}])
    seen["worker made"] = (plugin.active(), served())
    wrapper.init_device()
    seen["device taken"] = (plugin.active(), served())
    seen["cuda"] = torch.cuda.is_initialized()
    return seen


def __getattr__(name: str) -> type:
    """The worker's class: vLLM's own, which is imported late, on the processor."""
    if name != "Worker":
        raise AttributeError(name)
    import torch
    from vllm.v1.worker.gpu_worker import Worker

    def take(self: Worker) -> None:
        self.device = torch.device("cpu")

    return type("Worker", (Worker,), {"__init__": lambda self, **_: None, "init_device": take})

"""A platform that looks like a GPU's, where there is none."""

from __future__ import annotations

from vllm.platforms.interface import Platform, PlatformEnum

__all__ = ["CudaPlatform"]


class CudaPlatform(Platform):
    """What vLLM's CUDA platform shows of itself; its own module needs the driver's library to be imported."""

    _enum = PlatformEnum.CUDA
    device_name = device_type = "cuda"

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        return "vllm.own.Backend"


CudaPlatform.__module__ = "vllm.platforms.cuda"

"""What commands that run kernels ask of this machine first."""

from __future__ import annotations

from bidispatch.device import Device
from bidispatch.errors import DeviceError

__all__ = ["require_device", "require_torch"]


def require_torch(command: str) -> None:
    """Raise `DeviceError` where torch does not import."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # a torch without its CUDA libraries raises OSError
        raise DeviceError(
            f"`bidispatch {command}` runs kernels and needs torch, which does not import ({error}); "
            "`pip install torch`. plan, explain and profile work without it"
        ) from error


def require_device(device: Device) -> None:
    """Raise `DeviceError` for a device that was planned for but cannot run anything here."""
    import torch

    if device.predicted:
        raise DeviceError(
            f"{device.arch.name} is not in this machine; `bidispatch plan --device {device.arch.name}` shows its plan, "
            "--device auto runs on what is here"
        )
    if device.arch.vendor != "cpu" and not torch.cuda.is_available():
        raise DeviceError(
            f"{device.name} is here, but this torch ({torch.__version__}) cannot use it; "
            "`bidispatch doctor` says more, --device cpu runs on the processor"
        )

"""Seeded random weights for the parameters of a model that vLLM has built. Imports no vLLM.

Matrices are normal / sqrt(fan-in), so that logits spread as a trained model's do: all that vLLM's dummy weights
(uniform to ±0.001) leave is noise around 0. fp8 weights are such a matrix quantised, with the scales that belong to it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from bidispatch.errors import UsageError

__all__ = ["fill", "fp8_matrix"]

_SLICE = 1 << 26
"""Elements generated at once in fp32, so that memory does not peak."""
_NORM_SPREAD, _BIAS_SPREAD = 0.1, 0.02
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")
"""vLLM makes them with values that mean that a checkpoint had none (v0.25.1, quantization/kv_cache.py)."""
_SIGMAS = 6.0
"""Where scales are one a tensor or a channel: what an fp8 weight's largest value stands for, in spreads."""
_INPUT_SCALE = 0.02
"""A static activation scale: activations of up to 9."""
_SHARDED = ("ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding", "FusedMoE", "RoutedExperts")
_EMBEDDINGS = ("VocabParallelEmbedding", "Embedding")
_HEADS = ("ParallelLMHead",)
_EXPERTS = ("FusedMoE", "RoutedExperts")


def fill(model: nn.Module, *, seed: int = 0, rank: int = 0, tied: bool = False) -> int:
    """Fill all parameters in place; how many elements those have.

    Same values on a device of the same kind for the same seed, name and shape. rank: of tensor parallelism; layers that
    are shared out differ by it, others do not. tied: whether the embedding is the output head too, which has then
    normal / sqrt(hidden) rows and not normal ones. Buffers keep what they were built with.

    Raises `UsageError`, before anything is filled, that names every parameter of a kind that is not known.
    """
    found = list(_parameters(model))
    if faults := [text for text in (_fault(*each) for each in found) if text]:
        raise UsageError(
            "random weights are not known for "
            + "; ".join(faults[:20])
            + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
            + "; use --load-format dummy, or a checkpoint"
        )
    total = 0
    with torch.no_grad():
        for path, module, name, parameter in found:
            total += parameter.numel()
            shared_out = _is(module, _SHARDED)
            _fill_one(module, name, parameter.data, f"{seed}/{rank if shared_out else 0}/{path}", tied=tied)
    return total


def fp8_matrix(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], key: str) -> None:
    """Fill an fp8 [rows, fan-in] weight and its fp32 scales [rows / block, fan-in / block], rounded up.

    A block's scale is its largest value over fp8's.
    """
    rows, columns = weight.shape
    high, wide = block
    if tuple(scale.shape) != (-(-rows // high), -(-columns // wide)):
        raise UsageError(
            f"{key}: scales of shape {list(scale.shape)} do not fit a weight of {list(weight.shape)} in blocks of "
            f"{high}x{wide}"
        )
    largest = torch.finfo(weight.dtype).max
    padded = -(-columns // wide) * wide
    step = max(1, _SLICE // (padded * high)) * high
    for start in range(0, rows, step):
        end = min(rows, start + step)
        values = torch.zeros(-(-(end - start) // high) * high, padded, device=weight.device, dtype=torch.float32)
        drawn = torch.empty(end - start, columns, device=weight.device, dtype=torch.float32)
        values[: end - start, :columns] = drawn.normal_(generator=_generator(weight, f"{key}/{start}"))
        values *= columns**-0.5
        blocks = values.view(-1, high, padded // wide, wide)
        # Not rounded to a power of two: products with such scales are exact, which would hide their order.
        scales = blocks.abs().amax(dim=(1, 3)) / largest
        scale[start // high : -(-end // high)] = scales
        blocks /= scales[:, None, :, None]
        weight[start:end] = values[: end - start, :columns].to(weight.dtype)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, module, name, parameter


def _fault(path: str, module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    kind = type(module).__name__
    if parameter.device.type == "meta":
        return f"{path} ({kind}): it has no memory yet, as with online quantisation"
    if name in _CACHE_SCALES or parameter.dtype in _PLAIN:
        return ""
    if parameter.dtype in _FP8:
        return "" if _scale_of(module, name) is not None else f"{path} ({kind}): fp8 with no scale beside it"
    return f"{path} ({kind}): {str(parameter.dtype).removeprefix('torch.')} of {list(parameter.shape)}"


def _fill_one(module: nn.Module, name: str, data: torch.Tensor, key: str, *, tied: bool) -> None:
    if name in _CACHE_SCALES:
        return
    if data.dtype in _FP8:
        _fill_fp8(module, name, data, key)
    elif name.endswith("input_scale"):
        data.fill_(_INPUT_SCALE)
    elif "scale" in name and _weight_of(module, name) is not None:
        return  # with its weight
    elif name.endswith("bias"):
        _normal(data, _BIAS_SPREAD, key)
    elif data.dim() < 2:
        if "Norm" in type(module).__name__:
            # Gemma's multiply by 1 + weight.
            _normal(data, _NORM_SPREAD, key, around=0.0 if "Gemma" in type(module).__name__ else 1.0)
        else:
            _normal(data, 1.0, key)
    elif _is(module, _EMBEDDINGS) and not _is(module, _HEADS) and not tied:
        _normal(data, 1.0, key)
    else:
        fan_in = data.shape[-1] if data.dim() == 2 or _is(module, _EXPERTS) else math.prod(data.shape[1:])
        _normal(data, fan_in**-0.5, key)


def _fill_fp8(module: nn.Module, name: str, weight: torch.Tensor, key: str) -> None:
    scale_name = _scale_of(module, name)
    scale = getattr(module, str(scale_name)).data
    if str(scale_name).endswith("_inv") and scale.dim() == weight.dim():
        block = _block(module)
        if weight.dim() == 2:
            fp8_matrix(weight, scale, block, key)
            return
        for expert in range(weight.shape[0]):
            fp8_matrix(weight[expert], scale[expert], block, f"{key}/{expert}")
        return
    spread = weight.shape[-1] ** -0.5
    one = _SIGMAS * spread / torch.finfo(weight.dtype).max
    scale.fill_(one)
    flat = weight.view(-1, weight.shape[-1])
    step = max(1, _SLICE // flat.shape[1])
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step]
        drawn = torch.empty(part.shape, device=part.device, dtype=torch.float32)
        drawn.normal_(0.0, spread, generator=_generator(part, f"{key}/{start}"))
        part.copy_((drawn.clamp_(-_SIGMAS * spread, _SIGMAS * spread) / one).to(part.dtype))


def _normal(data: torch.Tensor, spread: float, key: str, *, around: float = 0.0) -> None:
    data.normal_(around, spread, generator=_generator(data, key))


def _generator(data: torch.Tensor, key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device=data.device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _block(module: nn.Module) -> tuple[int, int]:
    for holder in (module, getattr(module, "quant_method", None)):
        size = getattr(holder, "weight_block_size", None)
        if size is not None:
            return int(size[0]), int(size[1])
    return 128, 128


def _scale_of(module: nn.Module, weight: str) -> str | None:
    for end in ("_scale_inv", "_scale"):
        if isinstance(getattr(module, weight + end, None), torch.Tensor):
            return weight + end
    return None


def _weight_of(module: nn.Module, scale: str) -> str | None:
    for end in ("_scale_inv", "_scale"):
        if scale.endswith(end):
            weight = scale.removesuffix(end)
            held = getattr(module, weight, None)
            return weight if isinstance(held, torch.Tensor) and held.dtype in _FP8 else None
    return None


def _is(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(module).__mro__)

"""Random tensors for checks: seeded, drawn in fp32 on the device they are for, then rounded to their dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

__all__ = ["DISTRIBUTIONS", "draw", "draw_indices"]

DISTRIBUTIONS = ("normal", "positive", "scaled")
"""`normal`: N(0, 1). `positive`: its absolute value, so that sums grow and round at every step. `scaled`: normal times
a random power of two for each element, so that terms of very different sizes meet in one sum."""

_EXPONENT = 12
# In fp16 a product of two operands scaled by 2^12 each is already infinite, and infinities hide differences. In fp8
# nothing above 448 is a number.
_EXPONENT_NARROW = 4
_NARROW = ("float16", "float8_e4m3fn")


def draw(
    shape: Sequence[int],
    key: object,
    *,
    dtype: str,
    device: str | torch.device = "cpu",
    distribution: str = "normal",
    scale: float = 1.0,
) -> torch.Tensor:
    """Return a random tensor that follows from its arguments alone.

    key: anything whose `repr` names the tensor, such as `(seed, "weight")`; other keys give independent values.
    dtype: a torch dtype's name. distribution: one of `DISTRIBUTIONS`; `scaled` spans 2^±12, in float16 and fp8 2^±4.
    scale: multiplies every value before it is rounded to the dtype.
    Raises ValueError for another distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {distribution!r}; known: {', '.join(DISTRIBUTIONS)}")
    generator = _generator(key, device)
    values = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)
    if distribution == "positive":
        values = values.abs()
    elif distribution == "scaled":
        limit = _EXPONENT_NARROW if dtype in _NARROW else _EXPONENT
        exponents = torch.randint(-limit, limit + 1, tuple(shape), generator=generator, device=device)
        values = torch.ldexp(values, exponents)
    return (values * scale).to(getattr(torch, dtype))


def draw_indices(shape: Sequence[int], key: object, below: int, *, device: str | torch.device = "cpu") -> torch.Tensor:
    """Return random int64 from 0 to `below` - 1 that follow from the arguments alone; `key` as in `draw`."""
    return torch.randint(below, tuple(shape), generator=_generator(key, device), device=device)


def _generator(key: object, device: str | torch.device) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little"))

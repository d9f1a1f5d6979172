"""Weights of 4 bits: the layout that `gemm.int4` reads, and how AWQ's, GPTQ's and compressed-tensors' tensors come into
it. Imports torch.

A weight [n, k] of integers 0 to 15 is packed as int32 [n, k/8]. Rows are those of the layer, so merging weights (qkv)
or sharding them by rows is concatenating or slicing axis 0. Within a row each 128 elements of K are 16 words: a thread
of the matrix unit finds its operands of eight instructions in the four words (16 bytes) that it loads at once.

    element 128 b + 32 j + 16 s + 8 h + 2 c + p   lies in   word 16 b + 4 c + j, at bit 16 p + 8 s + 4 h

(j, c < 4; s, h, p < 2). One `and` gives two neighbours in K, in the two halves of a register. Shards along K begin at
multiples of 128 elements, which are 16 words; they must hold whole groups too.

Scales are [k/group_size, n] in the activations' dtype. Zero points are int8 of the same shape; without them the zero is
8. A weight is (q - zero) * scale, rounded to that dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from bidispatch.errors import UsageError
from bidispatch.ops.int4 import K_BLOCK, SYMMETRIC_ZERO

__all__ = ["Int4Weight", "dequantize", "from_awq", "from_compressed", "from_gptq", "pack", "unpack"]

_NIBBLES = 8
"""Integers of a 32-bit word."""
_MASK = 15

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of an AWQ word holds its j-th column (AutoAWQ 0.2.9, awq/utils/packing_utils.py, AWQ_REVERSE_ORDER)."""

_GPTQ_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point, by the checkpoint's `checkpoint_format`."""


class Int4Weight(NamedTuple):
    """What a layer keeps: the arguments `weight`, `scales` and `zeros` of `gemm.int4`."""

    weight: torch.Tensor
    """int32 [n, k/8], packed as this module says."""
    scales: torch.Tensor
    """[k/group_size, n]."""
    zeros: torch.Tensor | None
    """int8 [k/group_size, n]; None where all are 8: select with zero_points=false."""

    @property
    def group_size(self) -> int:
        """Elements of K that share a scale."""
        return self.weight.shape[1] * _NIBBLES // self.scales.shape[0]


def pack(q: torch.Tensor) -> torch.Tensor:
    """Pack integers 0 to 15, [n, k] of any integer dtype: int32 [n, k/8].

    Raises `UsageError` for a k that is no multiple of 128 and for integers out of range (reads them: once, at load).
    """
    if q.ndim != 2 or q.shape[1] % K_BLOCK or q.is_floating_point():
        raise UsageError(f"pack takes integers [n, k], k a multiple of {K_BLOCK}, not {q.dtype} {list(q.shape)}")
    if q.numel() and (int(q.min()) < 0 or int(q.max()) > _MASK):
        raise UsageError(f"pack takes integers from 0 to {_MASK}, not {int(q.min())} to {int(q.max())}")
    n, k = q.shape
    # [n, b, j, s, h, c, p] -> [n, b, c, j | p, s, h]
    nibbles = q.to(torch.int32).reshape(n, -1, 4, 2, 2, 4, 2).permute(0, 1, 5, 2, 6, 3, 4).reshape(n, -1, _NIBBLES)
    words = (nibbles << _shifts(q.device)).sum(-1, dtype=torch.int32)
    return words.reshape(n, k // _NIBBLES)


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """Undo `pack`: int32 [n, k/8] to int8 [n, k]."""
    n, words = weight.shape
    nibbles = (weight[..., None] >> _shifts(weight.device)) & _MASK
    q = nibbles.to(torch.int8).reshape(n, -1, 4, 4, 2, 2, 2).permute(0, 1, 3, 5, 6, 2, 4)
    return q.reshape(n, words * _NIBBLES)


def dequantize(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight [n, k] that the arguments of `gemm.int4` stand for, in the dtype of the scales, rounded once.

    out: where to write it.
    """
    q = unpack(weight)
    groups, n = scales.shape
    centred = q.reshape(n, groups, -1).to(scales.dtype) - (
        SYMMETRIC_ZERO if zeros is None else zeros.T[..., None].to(scales.dtype)
    )
    return torch.mul(centred, scales.T[..., None], out=None if out is None else out.view(n, groups, -1)).reshape(n, -1)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Int4Weight:
    """Repack the tensors of an AWQ layer ("gemm" format). Exact; once, at load.

    qweight: int32 [k, n/8], whose word c holds columns 8 c to 8 c + 7 in AWQ's interleaved order. qzeros: int32
    [k/group_size, n/8], likewise. scales: [k/group_size, n], in the dtype of the activations.
    Raises `UsageError` for shapes or dtypes that do not fit together.
    """
    _check("qweight", qweight, torch.int32, (qweight.shape[0], scales.shape[-1] // _NIBBLES))
    q, zeros = _columns(qweight, _AWQ_PLACES), _columns(qzeros, _AWQ_PLACES)
    return _weight(q, zeros, scales)


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor | None,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    checkpoint_format: str = "gptq",
) -> Int4Weight:
    """Repack the tensors of a GPTQ layer. Exact; once, at load.

    qweight: int32 [k/8, n], whose word r holds rows 8 r to 8 r + 7, the first in the lowest bits. qzeros: int32
    [k/group_size, n/8], the first column in the lowest bits; in the format "gptq" each is stored as itself minus one
    (15 stands for 0), in "gptq_v2" as it is. None: all are 8, whatever a symmetric checkpoint has there. scales:
    [k/group_size, n], in the dtype of the activations. g_idx: int32 [k], the group of each row.
    Raises `UsageError` for shapes or dtypes that do not fit together, an unknown format, and for activation order
    (`desc_act`): the kernels read a group's scale once for consecutive elements of K.
    """
    if checkpoint_format not in _GPTQ_OFFSETS:
        raise UsageError(f"unknown checkpoint_format {checkpoint_format!r}; known: {', '.join(_GPTQ_OFFSETS)}")
    words, n = qweight.shape
    _check("qweight", qweight, torch.int32, (words, scales.shape[-1]))
    q = _nibbles(qweight.T, range(_NIBBLES)).reshape(n, words * _NIBBLES).T
    zeros = None
    if qzeros is not None:
        zeros = (_columns(qzeros, range(_NIBBLES)) + _GPTQ_OFFSETS[checkpoint_format]) & _MASK
    if g_idx is not None:
        _check("g_idx", g_idx, g_idx.dtype, (q.shape[0],))
        group_size = -(-q.shape[0] // scales.shape[0])
        if not torch.equal(g_idx.long(), torch.arange(q.shape[0], device=g_idx.device) // group_size):
            raise UsageError(
                "g_idx is not in ascending groups: the checkpoint was made with desc_act=true, which gemm.int4 "
                "does not take: a group's rows lie apart in K. Quantise with desc_act=false, or serve it dequantised"
            )
    return _weight(q, zeros, scales)


def from_compressed(
    weight_packed: torch.Tensor, weight_scale: torch.Tensor, weight_zero_point: torch.Tensor | None = None
) -> Int4Weight:
    """Repack the tensors of a layer of compressed-tensors ("pack-quantized", 4 bits). Exact; once, at load.

    weight_packed: int32 [n, k/8], the first element in the lowest bits, -8 stored as 0. weight_scale: [n,
    k/group_size], in the dtype of the activations. weight_zero_point: int32 [n/8, k/group_size], the first row in the
    lowest bits and -8 as 0 too (compressed-tensors 0.12, compressors/quantized_compressors/pack_quantized.py); None:
    symmetric. Raises `UsageError` for shapes or dtypes that do not fit together.
    """
    n, words = weight_packed.shape
    _check("weight_packed", weight_packed, torch.int32, (weight_scale.shape[0], words))
    q = _nibbles(weight_packed, range(_NIBBLES)).reshape(n, words * _NIBBLES).T
    zeros = None if weight_zero_point is None else _columns(weight_zero_point.T, range(_NIBBLES))
    return _weight(q, zeros, weight_scale.T)


def _weight(q: torch.Tensor, zeros: torch.Tensor | None, scales: torch.Tensor) -> Int4Weight:
    """q [k, n] and zeros [k/group_size, n] as integers. Zeros that are all 8 are left out."""
    k, n = q.shape
    groups = scales.shape[0]
    if not scales.is_floating_point() or k % groups:
        raise UsageError(
            f"scales must be floating point [k/group_size, n] for k={k}, not {scales.dtype} {list(scales.shape)}"
        )
    kept = None
    if zeros is not None:
        _check("zero points (unpacked)", zeros, zeros.dtype, (groups, n))
        kept = None if bool((zeros == SYMMETRIC_ZERO).all()) else zeros.to(torch.int8).contiguous()
    return Int4Weight(pack(q.T), scales.contiguous(), kept)


def _columns(words: torch.Tensor, places: tuple[int, ...] | range) -> torch.Tensor:
    """[rows, n/8] words to [rows, n] integers."""
    return _nibbles(words, places).reshape(words.shape[0], -1)


def _nibbles(words: torch.Tensor, places: tuple[int, ...] | range) -> torch.Tensor:
    """The nibbles of each word at these places, on a new last axis, as int32."""
    shifts = torch.tensor([4 * place for place in places], dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts) & _MASK


def _shifts(device: torch.device) -> torch.Tensor:
    """The bit of each nibble of a packed word, in the order [p, s, h]."""
    return torch.tensor(
        [16 * p + 8 * s + 4 * h for p in (0, 1) for s in (0, 1) for h in (0, 1)], dtype=torch.int32, device=device
    )


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape:
        raise UsageError(f"{name} must be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")

"""vLLM's Marlin kernel for 4-bit weights, called as its linear layers call it.

What its arguments are: vLLM 0.25.1, vllm/model_executor/layers/quantization/utils/marlin_utils.py
(`apply_gptq_marlin_linear`, `marlin_permute_scales`, `marlin_zero_points`, `marlin_make_workspace_new`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bidispatch.int4 import unpack
from peers.installed import AbsentError, call_op, load_op

__all__ = ["Marlin"]

_NAMES = ("marlin_gemm", "gptq_marlin_gemm")  # the newer one first
_LIBRARIES = ("_C.abi3.so", "_C.*.so", "_C_stable_libtorch*.so")
_NIBBLES = 8
_TILE = 64
_INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


def _op(names: tuple[str, ...], folders: tuple[Path, ...]) -> Any:
    """The first of these ops in any of vLLM's libraries. Raises `AbsentError` with every reason."""
    reasons: list[str] = []
    tried = (_try(name, pattern, folders, reasons) for pattern in _LIBRARIES for name in names)
    if op := next(filter(None, tried), None):
        return op
    raise AbsentError("; ".join(dict.fromkeys(reasons)))


def _try(name: str, pattern: str, folders: tuple[Path, ...], reasons: list[str]) -> Any:
    """The op, or None and a reason more."""
    try:
        return load_op("_C", name, pattern, folders)
    except AbsentError as error:
        reasons.append(str(error))
        return None


class Marlin:
    """A layer: its weight repacked from the arguments of `gemm.int4`, its launches made for an x.

    Raises `AbsentError` where vLLM or the op is not there.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        folders: tuple[Path, ...] = (),
    ) -> None:
        try:
            from vllm.scalar_type import scalar_types
        except ImportError as error:
            raise AbsentError(f"vllm does not import: {error}") from error
        if scales.shape[0] == 1:
            raise AbsentError("one scale a column has another order in Marlin, which is not written here")
        self._op = _op(_NAMES, folders)
        repack = _op(("gptq_marlin_repack",), folders)
        q = unpack(weight).T.contiguous()  # [k, n]
        k, n = q.shape
        self._type = scalar_types.uint4b8 if zeros is None else scalar_types.uint4
        empty = torch.empty(0, dtype=torch.int32, device=weight.device)
        packed = _pack(q.reshape(-1, _NIBBLES, n).transpose(1, 2))
        call = {"b_q_weight": packed, "perm": empty, "size_k": k, "size_n": n, "num_bits": 4, "is_a_8bit": False}
        self._weight = call_op(repack, {name: call[name] for name in _known(repack) if name in call})()
        self._scales = _permuted(scales)
        self._zeros = None
        if zeros is not None:
            columns = _permuted(zeros.int()).reshape(-1, _NIBBLES)[:, list(_INTERLEAVED)]
            self._zeros = _pack(columns.reshape(-1, n // _NIBBLES, _NIBBLES))
        units = torch.cuda.get_device_properties(weight.device).multi_processor_count
        self._workspace = torch.zeros(units, dtype=torch.int32, device=weight.device)
        self._n, self._k = n, k

    def launch(self, x: torch.Tensor, *, use_atomic_add: bool = False) -> Callable[[], torch.Tensor]:
        """A call with this x, which returns its result: [m, n]. `use_atomic_add` is VLLM_MARLIN_USE_ATOMIC_ADD's."""
        values = {
            "a": x,
            "b_q_weight": self._weight,
            "b_scales": self._scales,
            "b_zeros_or_none": self._zeros,
            "b_zeros": self._zeros,
            "workspace": self._workspace,
            "b_type_id": self._type.id,
            "b_q_type": self._type.id,
            "size_m": len(x),
            "size_n": self._n,
            "size_k": self._k,
            "is_k_full": True,
            "use_atomic_add": use_atomic_add,
            "use_fp32_reduce": True,
            "is_zp_float": False,
        }
        return call_op(self._op, {name: values[name] for name in _known(self._op) if name in values})


def _known(op: Any) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


def _pack(q: torch.Tensor) -> torch.Tensor:
    """Integers [..., 8] to int32 [...], the first in the lowest bits."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=q.device)
    return (q.int() << shifts).sum(-1, dtype=torch.int32).contiguous()


def _permuted(values: torch.Tensor) -> torch.Tensor:
    """[groups, n] with each 64 columns in the order of the kernel's threads: the transpose of 8 by 8."""
    groups, n = values.shape
    return values.reshape(groups, n // _TILE, 8, 8).transpose(2, 3).reshape(groups, n).contiguous()

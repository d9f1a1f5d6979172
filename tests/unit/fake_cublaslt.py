"""A stand-in for `nvmath.bindings.cublasLt`: it keeps descriptors, notes calls, and computes with torch on the CPU.

Its products add along K one element after another in fp32, but for algorithms with custom option 9: these add two
halves of K apart. It is strict where cuBLASLt would be wrong or slow: addresses and rows must lie on 16 bytes.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import torch

BROKEN = 9
"""The custom option of an algorithm that adds in another order."""

_DTYPES = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16}
_VERSION = 130200


class cuBLASLtError(Exception):  # noqa: N801 - its name there
    pass


class MatmulDescAttribute(IntEnum):
    TRANSA = 3
    EPILOGUE = 7
    BIAS_POINTER = 8
    BIAS_DATA_TYPE = 26


class MatmulPreferenceAttribute(IntEnum):
    SEARCH_MODE = 0
    MAX_WORKSPACE_BYTES = 1
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class MatrixLayoutAttribute(IntEnum):
    BATCH_COUNT = 5
    STRIDED_BATCH_OFFSET = 6


class MatmulAlgoConfigAttribute(IntEnum):
    ID = 0
    TILE_ID = 1
    SPLITK_NUM = 2
    REDUCTION_SCHEME = 3
    CTA_SWIZZLING = 4
    CUSTOM_OPTION = 5
    STAGES_ID = 6
    INNER_SHAPE_ID = 7
    CLUSTER_SHAPE_ID = 8


class MatmulSearch(IntEnum):
    BEST_FIT = 0
    LIMITED_BY_ALGO_ID = 1


class Epilogue(IntEnum):
    DEFAULT = 1
    BIAS = 4


_WIDTHS = {
    MatmulDescAttribute: {3: np.int32, 7: np.uint32, 8: np.int64, 26: np.int32},
    MatmulPreferenceAttribute: {0: np.uint32, 1: np.uint64, **dict.fromkeys((3, 5, 6, 7, 8), np.uint32)},
    MatrixLayoutAttribute: {5: np.int32, 6: np.int64},
    MatmulAlgoConfigAttribute: {
        **dict.fromkeys((0, 2), np.int32),
        **dict.fromkeys((1, 3, 4, 5, 6), np.uint32),
        **dict.fromkeys((7, 8), np.uint16),
    },
}
_ORDER = (0, 1, 6, 4, 5, 8, 7)
"""Attributes in the order a configuration is written in."""


def sequential(x: torch.Tensor, weight: torch.Tensor, halves: bool = False) -> torch.Tensor:
    """x [m, k] @ weight [n, k].T in fp32, one element of K after another."""
    x, weight = x.float(), weight.float()
    if halves:
        middle = x.shape[1] // 2
        return sequential(x[:, :middle], weight[:, :middle]) + sequential(x[:, middle:], weight[:, middle:])
    total = torch.zeros(len(x), len(weight))
    for column in range(x.shape[1]):
        total = total + x[:, column, None] * weight[None, :, column]
    return total


class FakeCublasLt(ModuleType):
    """Set `table` to say what the heuristic offers, `refuses` to say what a check refuses."""

    cuBLASLtError = cuBLASLtError  # noqa: N815
    MatmulDescAttribute = MatmulDescAttribute
    MatmulPreferenceAttribute = MatmulPreferenceAttribute
    MatrixLayoutAttribute = MatrixLayoutAttribute
    MatmulAlgoConfigAttribute = MatmulAlgoConfigAttribute
    MatmulSearch = MatmulSearch
    Epilogue = Epilogue
    matmul_algo_dtype = np.dtype([("data_", "<u8", (8,))])
    matmul_heuristic_result_dtype = np.dtype(
        [
            ("algo", matmul_algo_dtype),
            ("workspace_size", "<u8"),
            ("state", "<i4"),
            ("waves_count", "<f4"),
            ("reserved", "<i4", (4,)),
        ]
    )

    def __init__(self) -> None:
        super().__init__("nvmath.bindings.cublasLt")
        self.version = _VERSION
        self.table: Callable[[str, int], list[str]] = lambda dtype, m: ["66.10.35.0.1.4.0"]
        """(dtype of the operands, m) to configurations, the best first."""
        self.limited: Callable[[int, int], list[str]] = lambda number, m: [f"{number}.5.0.1.0.0.0"]
        """(algorithm id, m) to the configurations of that id alone."""
        self.known_ids = {11, 13, 55, 66}
        self.refuses: Callable[[str, int], bool] = lambda config, m: False
        self.launches: list[dict[str, Any]] = []
        self.questions = 0
        """Calls of the heuristic and of checks."""
        self.live: dict[int, dict[str, Any]] = {}
        self._numbers = itertools.count(1)

    def _new(self, **content: Any) -> int:
        number = next(self._numbers)
        self.live[number] = content
        return number

    def _destroy(self, number: int) -> None:
        del self.live[number]

    def get_version(self) -> int:
        return self.version

    def create(self) -> int:
        return 7

    def matmul_desc_create(self, compute: int, scale: int) -> int:
        return self._new(compute=compute, scale=scale)

    def matrix_layout_create(self, kind: int, rows: int, columns: int, leading: int) -> int:
        assert leading >= rows
        return self._new(kind=kind, rows=rows, columns=columns, leading=leading, batch=1, apart=0)

    def matmul_preference_create(self) -> int:
        return self._new()

    matmul_desc_destroy = matrix_layout_destroy = matmul_preference_destroy = _destroy

    def _set(self, owner: int, attribute: IntEnum, pointer: int, size: int) -> None:
        dtype = np.dtype(_WIDTHS[type(attribute)][int(attribute)])
        assert size == dtype.itemsize
        value = np.frombuffer(ctypes.string_at(pointer, size), dtype)[0]
        self.live[owner][attribute.name] = int(value)

    def matmul_desc_set_attribute(self, owner: int, attribute: int, pointer: int, size: int) -> None:
        self._set(owner, MatmulDescAttribute(attribute), pointer, size)

    def matrix_layout_set_attribute(self, owner: int, attribute: int, pointer: int, size: int) -> None:
        self._set(owner, MatrixLayoutAttribute(attribute), pointer, size)

    def matmul_preference_set_attribute(self, owner: int, attribute: int, pointer: int, size: int) -> None:
        self._set(owner, MatmulPreferenceAttribute(attribute), pointer, size)

    def get_matmul_desc_attribute_dtype(self, attribute: int) -> Any:
        return _WIDTHS[MatmulDescAttribute][attribute]

    def get_matrix_layout_attribute_dtype(self, attribute: int) -> Any:
        return _WIDTHS[MatrixLayoutAttribute][attribute]

    def get_matmul_preference_attribute_dtype(self, attribute: int) -> Any:
        return _WIDTHS[MatmulPreferenceAttribute][attribute]

    def get_matmul_algo_config_attribute_dtype(self, attribute: int) -> Any:
        return _WIDTHS[MatmulAlgoConfigAttribute][attribute]

    # An algorithm is eight words; the ninth attribute shares the last one.
    def _algorithm(self, pointer: int) -> Any:
        return np.ctypeslib.as_array((ctypes.c_uint64 * 8).from_address(pointer))

    def _get(self, words: Any, attribute: int) -> int:
        if attribute == 8:
            return int(words[7]) >> 32
        return int(words[attribute]) & 0xFFFFFFFF

    def _put(self, words: Any, attribute: int, value: int) -> None:
        if attribute == 8:
            words[7] = int(words[7]) & 0xFFFFFFFF | value << 32
        elif attribute == 7:
            words[7] = int(words[7]) & ~0xFFFFFFFF | value
        else:
            words[attribute] = value

    def _written(self, words: Any) -> str:
        return ".".join(str(self._get(words, attribute)) for attribute in _ORDER)

    def matmul_algo_config_get_attribute(
        self, pointer: int, attribute: int, value: int, size: int, written: int
    ) -> None:
        dtype = np.dtype(_WIDTHS[MatmulAlgoConfigAttribute][attribute])
        assert size == dtype.itemsize
        content = np.array([self._get(self._algorithm(pointer), attribute)], dtype)
        ctypes.memmove(value, content.ctypes.data, size)

    def matmul_algo_config_set_attribute(self, pointer: int, attribute: int, value: int, size: int) -> None:
        dtype = np.dtype(_WIDTHS[MatmulAlgoConfigAttribute][attribute])
        assert size == dtype.itemsize
        self._put(self._algorithm(pointer), attribute, int(np.frombuffer(ctypes.string_at(value, size), dtype)[0]))

    def matmul_algo_init(self, handle: int, *types: int) -> None:
        *_, number, pointer = types
        if number not in self.known_ids:
            raise cuBLASLtError("INVALID_VALUE (7)")
        words = self._algorithm(pointer)
        words[:] = 0
        words[0], words[2] = number, 1

    def matmul_algo_get_heuristic(
        self, handle: int, op: int, a: int, b: int, c: int, d: int, preference: int, most: int, results: int, count: int
    ) -> None:
        self.questions += 1
        asked = self.live[preference]
        assert asked["MAX_WORKSPACE_BYTES"] == asked["REDUCTION_SCHEME_MASK"] == 0
        assert {asked[f"MIN_ALIGNMENT_{operand}_BYTES"] for operand in "ABCD"} == {16}
        buffer = (ctypes.c_byte * (most * self.matmul_heuristic_result_dtype.itemsize)).from_address(results)
        rows = np.frombuffer(buffer, self.matmul_heuristic_result_dtype)
        m = self.live[b]["columns"]
        if asked.get("SEARCH_MODE"):
            configs = self.limited(int(rows[0]["algo"]["data_"][0]), m)
        else:
            dtype = str(_DTYPES[self.live[a]["kind"]]).removeprefix("torch.")
            configs = self.table(dtype, m)
        if not configs:
            raise cuBLASLtError("NOT_SUPPORTED (15)")
        for row, text in zip(rows, configs, strict=False):
            config, _, options = text.partition(" ")
            words = np.zeros(8, np.uint64)
            for attribute, value in zip(_ORDER, config.split("."), strict=True):
                self._put(words, attribute, int(value))
            self._put(words, 2, 4 if "split" in options else 1)
            row["algo"]["data_"] = words
            row["workspace_size"] = 4096 if "workspace" in options else 0
            row["state"] = 15 if "unsupported" in options else 0
        ctypes.memmove(count, np.array([len(configs)], np.int32).ctypes.data, 4)

    def matmul_algo_check(self, handle: int, op: int, a: int, b: int, c: int, d: int, algo: int, result: int) -> None:
        self.questions += 1
        if self.refuses(self._written(self._algorithm(algo)), self.live[b]["columns"]):
            raise cuBLASLtError("NOT_SUPPORTED (15)")

    def matmul(
        self,
        *arguments: int,
    ) -> None:
        handle, op, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, algo, space, bytes_, stream = (
            arguments
        )
        assert (handle, space, bytes_, stream, c, c_layout) == (7, 0, 0, 0, d, d_layout)
        operation, scale = self.live[op], [ctypes.c_float.from_address(p).value for p in (alpha, beta)]
        assert operation["TRANSA"] == 1
        weights, xs, outs = (
            self._matrices(pointer, layout) for pointer, layout in ((a, a_layout), (b, b_layout), (d, d_layout))
        )
        words = self._algorithm(algo)
        halves = self._get(words, 5) == BROKEN
        for weight, x, out in zip(weights, xs, outs, strict=True):
            total = sequential(x, weight, halves)
            if operation.get("EPILOGUE") == Epilogue.BIAS:
                kind = operation["BIAS_DATA_TYPE"]
                assert kind == self.live[d_layout]["kind"]
                pointer = operation["BIAS_POINTER"]
                total = total + _view(pointer, _DTYPES[kind], (out.shape[1],), (1,)).float()
            if scale[1]:
                total = total * scale[0] + scale[1] * out.float()
            out.copy_(total)
        self.launches.append(
            {
                "config": self._written(words),
                "m": self.live[b_layout]["columns"],
                "k": self.live[b_layout]["rows"],
                "n": self.live[a_layout]["columns"],
                "batch": self.live[a_layout].get("BATCH_COUNT", 1),
                "beta": scale[1],
                "compute": operation["compute"],
                "out": d,
                "algorithm": words.tobytes(),
            }
        )

    def _matrices(self, pointer: int, number: int) -> list[torch.Tensor]:
        layout, dtype = self.live[number], _DTYPES[self.live[number]["kind"]]
        size = torch.empty((), dtype=dtype).element_size()
        assert pointer % 16 == 0
        assert layout["leading"] * size % 16 == 0
        shape, strides = (layout["columns"], layout["rows"]), (layout["leading"], 1)
        apart = layout.get("STRIDED_BATCH_OFFSET", 0) * size
        return [_view(pointer + i * apart, dtype, shape, strides) for i in range(layout.get("BATCH_COUNT", 1))]


def _view(pointer: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    assert pointer % 16 == 0
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    size = torch.empty((), dtype=dtype).element_size()
    memory = (ctypes.c_byte * (count * size)).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)

"""Comparing tensors bit by bit, through integer views, and adding the comparisons up. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from bidispatch.verify.report import Check, Mismatch

__all__ = ["Tally", "bits", "fill", "poison", "take"]

_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits as integers, contiguous."""
    return tensor.contiguous().view(_INTEGER_OF_WIDTH[tensor.element_size()])


def take(tensor: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    """`index_select`, by bytes where torch may lack it for a dtype of one byte."""
    if tensor.element_size() > 1 or not tensor.is_floating_point():
        return tensor.index_select(axis, index)
    return tensor.view(torch.uint8).index_select(axis, index).view(tensor.dtype)


def fill(tensor: torch.Tensor, axis: int, index: torch.Tensor, value: float) -> torch.Tensor:
    """`index_fill`, likewise."""
    if tensor.element_size() > 1 or not tensor.is_floating_point():
        return tensor.index_fill(axis, index, value)
    byte = int(bits(torch.tensor([value]).to(tensor.dtype)).item())
    return tensor.view(torch.uint8).index_fill(axis, index, byte).view(tensor.dtype)


def poison(tensor: torch.Tensor, salt: int = 0) -> None:
    """Fill a contiguous tensor with a NaN whose payload is `salt` (0 to 7), one of integers with its least and a few.

    Outputs are poisoned before every run, and those compared with different salts: an element that a kernel never
    writes then differs from itself. e4m3 has but two NaNs, and there an odd salt gives the negative one.
    """
    if not tensor.is_floating_point():
        tensor.fill_(torch.iinfo(tensor.dtype).min + salt)
        return
    integers = tensor.view(_INTEGER_OF_WIDTH[tensor.element_size()])
    quiet_nan = int(bits(torch.full((1,), float("nan"), dtype=tensor.dtype)).item())
    if tensor.element_size() == 1:
        integers.fill_(quiet_nan & 0x7F | salt % 2 << 7)
    else:
        integers.fill_(quiet_nan | (salt + 1))


class Tally:
    """Adds comparisons of rows up into one `Check`."""

    def __init__(self, name: str, outputs: Sequence[str]) -> None:
        self._name = name
        self._outputs = tuple(outputs)
        self._rows = self._elements = self._differing = 0
        self._smallest: Mismatch | None = None
        self._counted: list[tuple[int, torch.Tensor]] = []

    def add(
        self,
        size: int,
        actual: Sequence[torch.Tensor],
        expected: Sequence[torch.Tensor],
        row_numbers: torch.Tensor | None = None,
    ) -> None:
        """Compare, for each output, the rows [r, ...] of two tensors of one shape and dtype. NaN equals NaN only bit
        for bit. A row that differs in several outputs counts once.

        size: the rows of the call, for the message. row_numbers: where these rows were in the call; in order if None.
        Raises ValueError for tensors that cannot be compared.
        """
        differing = self._compare(actual, expected)
        count = int(differing.sum())
        if count:
            self._differing += count
            self._note_first(size, actual, expected, int(differing.nonzero()[0]), row_numbers)

    def count(self, size: int, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
        """`add`, without waiting for the device: `settle` notes what differed. For thousands of small calls."""
        self._counted.append((size, self._compare(actual, expected).sum()))

    def settle(self, again: Callable[[int], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]) -> None:
        """Note what was counted since the last time. `again` makes the call of a size once more, since the tensors
        are gone, and returns what it gave and what was expected. Where the bits differ no more, no pair is noted.
        """
        if not self._counted:
            return
        counts = torch.stack([count for _, count in self._counted]).tolist()
        failed = [size for (size, _), count in zip(self._counted, counts, strict=True) if count]
        self._counted.clear()
        self._differing += sum(counts)
        if failed:
            actual, expected = again(min(failed))
            differing = self._unequal(actual, expected)
            if differing.any():
                self._note_first(min(failed), actual, expected, int(differing.nonzero()[0]), None)

    def _compare(self, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> torch.Tensor:
        """Which rows differ, as booleans; they count as compared."""
        differing = self._unequal(actual, expected)
        self._rows += len(differing)
        self._elements += sum(one.numel() for one in actual)
        return differing

    def _unequal(self, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> torch.Tensor:
        differing: torch.Tensor | None = None
        for name, one, other in zip(self._outputs, actual, expected, strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                raise ValueError(
                    f"{self._name}: {name} is {one.dtype} {list(one.shape)}, "
                    f"it is compared with {other.dtype} {list(other.shape)}"
                )
            unequal = (bits(one) != bits(other)).reshape(len(one), -1).any(dim=1)
            differing = unequal if differing is None else differing | unequal
        if differing is None:
            raise ValueError(f"{self._name}: no output to compare")
        return differing

    def _note_first(
        self,
        size: int,
        actual: Sequence[torch.Tensor],
        expected: Sequence[torch.Tensor],
        row: int,
        row_numbers: torch.Tensor | None,
    ) -> None:
        for name, one, other in zip(self._outputs, actual, expected, strict=True):
            ours, theirs = one[row].reshape(-1), other[row].reshape(-1)
            unequal = bits(ours) != bits(theirs)
            if not unequal.any():
                continue
            element = int(unequal.nonzero()[0])
            number = row if row_numbers is None else int(row_numbers[row])
            mismatch = _mismatch(size, number, name, element, ours[element], theirs[element])
            if self._smallest is None or mismatch.order < self._smallest.order:
                self._smallest = mismatch
            return

    def check(self, note: str = "") -> Check:
        """What was found so far."""
        return Check(self._name, self._rows, self._elements, self._differing, self._smallest, note)


def _mismatch(size: int, row: int, output: str, element: int, value: torch.Tensor, expected: torch.Tensor) -> Mismatch:
    ours, theirs = int(bits(value.reshape(1))), int(bits(expected.reshape(1)))
    width = value.element_size() * 8
    finite = math.isfinite(float(value)) and math.isfinite(float(expected))
    return Mismatch(
        size=size,
        row=row,
        output=output,
        element=element,
        value=float(value),
        expected=float(expected),
        value_bits=_hexadecimal(ours, width),
        expected_bits=_hexadecimal(theirs, width),
        ulps=abs(_place(ours, width) - _place(theirs, width)) if finite else None,
    )


def _hexadecimal(integer: int, width: int) -> str:
    return f"0x{integer & ((1 << width) - 1):0{width // 4}x}"


def _place(integer: int, width: int) -> int:
    """Where a float stands among all of its dtype: its bits are sign and magnitude, and -0 is next to 0."""
    return integer if integer >= 0 else -(integer & ((1 << (width - 1)) - 1)) - 1

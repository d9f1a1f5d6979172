"""What is timed: calls whose weights together exceed the L2, on random data such as models have. Imports torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bidispatch import ops
from bidispatch.bench.timing import copies_beyond_cache
from bidispatch.errors import UsageError
from bidispatch.ops import quantize
from bidispatch.ops.moe import known_experts
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute

__all__ = ["ExpertsOperands", "Operands", "ProductOperands", "operands_of"]

Call = list[torch.Tensor | None]
"""An op's arguments in the catalogue's order."""

_ROUTINGS = 16
"""Of the experts, draws of which tokens go where: few tokens read few experts, which the L2 would hold."""
_BYTES_PER_US = 3e6
_FLOP_PER_US = {"float32": 4e7}
_FLOP_PER_US_16 = 6e8


class Operands:
    """Weights of one problem, kept, and calls of any number of rows on them."""

    def __init__(self, problem: Problem, device: torch.device, most_sets: int = 32) -> None:
        self.problem, self.device = problem, device
        self._dtype: torch.dtype = getattr(torch, problem.dtype)
        weights = sum(self._elements()) * self._dtype.itemsize
        sets = copies_beyond_cache(weights, device, most=most_sets) if weights else 1
        self.weights = [self._weights(index) for index in range(sets)]

    def _elements(self) -> tuple[int, ...]:
        """Elements of each weight."""
        raise NotImplementedError

    def _weights(self, index: int) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def calls(self, m: int) -> list[Call]:
        """The arguments of calls of m rows, to be made in turns."""
        raise NotImplementedError

    def work(self, m: int) -> tuple[float, float]:
        """FLOP, and bytes of operands and results, each read or written once, of a call of m rows."""
        raise NotImplementedError

    def estimate_us(self, m: int) -> float:
        """About how long a call takes on a large GPU."""
        flops, moved = self.work(m)
        return max(moved / _BYTES_PER_US, flops / _FLOP_PER_US.get(self.problem.dtype, _FLOP_PER_US_16))

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal values in the problem's dtype."""
        return (torch.randn(*shape, device=self.device) * scale).to(self._dtype)

    @property
    def _out_size(self) -> int:
        size: int = getattr(torch, str(self.problem["out_dtype"])).itemsize
        return size


class ProductOperands(Operands):
    """Of an op with one weight of n rows and k columns, on what its own generator draws."""

    def _place(self) -> int:
        """Which argument is the weight."""
        return [argument.name for argument in ops.get(self.problem.op).arguments].index("weight")

    def _drawn(self, m: int, seed: int) -> Call:
        generate: Callable[..., Call] = load_attribute(ops.get(self.problem.op).inputs)
        return generate(self.problem, m, device=self.device, seed=seed)

    def _elements(self) -> tuple[int, ...]:
        return (self.problem.size("n") * self.problem.size("k"),)

    def _weights(self, index: int) -> tuple[torch.Tensor, ...]:
        weight = self._drawn(1, index)[self._place()]
        return () if weight is None else (weight,)

    def calls(self, m: int) -> list[Call]:
        arguments, place = self._drawn(m, 0), self._place()
        return [[*arguments[:place], *weight, *arguments[place + 1 :]] for weight in self.weights]

    def work(self, m: int) -> tuple[float, float]:
        n, k = self.problem.size("n"), self.problem.size("k")
        return 2.0 * m * n * k, float((m + n) * k * self._dtype.itemsize + m * n * self._out_size)


class PackedOperands(ProductOperands):
    """The same with a weight of 4-bit integers."""

    def _elements(self) -> tuple[int, ...]:
        return (self.problem.size("n") * self.problem.size("k") // (2 * self._dtype.itemsize),)

    def work(self, m: int) -> tuple[float, float]:
        n, k = self.problem.size("n"), self.problem.size("k")
        scales = n * k / self.problem.size("group_size")
        moved = n * k / 2 + (m * k + scales) * self._dtype.itemsize + m * n * self._out_size
        return 2.0 * m * n * k, moved


class ExpertsOperands(Operands):
    """Of `moe.experts`; tokens go to experts evenly."""

    def _sizes(self) -> tuple[int, int, int]:
        return self.problem.size("experts"), self.problem.size("hidden"), self.problem.size("intermediate")

    def _elements(self) -> tuple[int, ...]:
        experts, hidden, inner = self._sizes()
        return (2 * experts * hidden * inner, experts * hidden * inner)

    def _weights(self, index: int) -> tuple[torch.Tensor, ...]:
        experts, hidden, inner = self._sizes()
        if self._fp8:
            first, second = self.randn(experts, 2 * inner, hidden), self.randn(experts, hidden, inner)
            return first.to(torch.float8_e4m3fn), second.to(torch.float8_e4m3fn)
        first = self.randn(experts, 2 * inner, hidden, scale=hidden**-0.5)
        return first, self.randn(experts, hidden, inner, scale=inner**-0.5)

    def calls(self, m: int) -> list[Call]:
        experts, hidden, _ = self._sizes()
        everywhere, top_k = known_experts(self.problem.dims), self.problem.size("top_k")
        expert_map = None
        if self.problem.flag("expert_map"):
            expert_map = torch.full((everywhere,), -1, dtype=torch.int32, device=self.device)
            expert_map[:experts] = torch.arange(experts, device=self.device, dtype=torch.int32)
        x = self.randn(m, hidden)
        add = self.randn(m, hidden) if self.problem.flag("shared") else None
        found: list[Call] = []
        for index in range(max(len(self.weights), _ROUTINGS)):
            scores = torch.rand(m, everywhere, device=self.device).softmax(-1)
            weights, ids = scores.topk(top_k, dim=-1)
            w13, w2 = self.weights[index % len(self.weights)]
            found.append([x, w13, w2, weights, ids.int(), *self._biases(), *self._scales(), expert_map, add])
        return found

    def _biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self.problem.flag("bias"):
            return None, None
        experts, hidden, inner = self._sizes()
        return self.randn(experts, 2 * inner), self.randn(experts, hidden)

    def _scales(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self._fp8:
            return None, None
        experts, hidden, inner = self._sizes()
        shapes = ((experts, 2 * inner, hidden), (experts, hidden, inner))
        first, second = (torch.rand(e, n // GROUP, k // GROUP, device=self.device) * k**-0.5 for e, n, k in shapes)
        return first, second

    @property
    def _fp8(self) -> bool:
        return self.problem["weight_dtype"] == FP8

    def work(self, m: int) -> tuple[float, float]:
        """On average, of the pairs that name an expert of this rank; an expert that is named is read once."""
        experts, hidden, inner = self._sizes()
        everywhere, top_k = known_experts(self.problem.dims), self.problem.size("top_k")
        pairs = m * top_k * experts / everywhere
        touched = experts * (1 - (1 - top_k / everywhere) ** m)
        weight_item = 1 if self._fp8 else self._dtype.itemsize
        rows = m * hidden * (self._dtype.itemsize + self._out_size)
        moved = 3 * touched * hidden * inner * weight_item + rows
        return 6.0 * pairs * hidden * inner, moved


class RowOperands(Operands):
    """Of an op without a weight to speak of, which reads what the kernel before it wrote: one set, on what its own
    generator draws.
    """

    def _elements(self) -> tuple[int, ...]:
        return (0,)

    def _weights(self, index: int) -> tuple[torch.Tensor, ...]:
        return ()

    def calls(self, m: int) -> list[Call]:
        generate: Callable[..., Call] = load_attribute(ops.get(self.problem.op).inputs)
        return [generate(self.problem, m, device=self.device)]

    def work(self, m: int) -> tuple[float, float]:
        """A result takes at most as many bytes as the row it is made of."""
        width = next(self.problem.size(dim) for dim in ("experts", "k", "n") if dim in self.problem.dims)
        return 0.0, 2.0 * m * width * self._dtype.itemsize


_PRODUCTS = ("gemm", "gemm.fp8_block", "gemm.fp8")
_ROWS = ("moe.router", *(op.name for op in quantize.OPS))
_OF_OP: dict[str, type[Operands]] = {**dict.fromkeys(_PRODUCTS, ProductOperands)}
_OF_OP |= {"gemm.int4": PackedOperands, "moe.experts": ExpertsOperands, **dict.fromkeys(_ROWS, RowOperands)}


def operands_of(problem: Problem, device: torch.device, most_sets: int = 32) -> Operands:
    """The operands of a problem; `most_sets` of weights at most. Raises `UsageError` for an op that has none here."""
    if problem.op not in _OF_OP:
        raise UsageError(f"{problem.op} is not timed by itself; {', '.join(_OF_OP)} are")
    return _OF_OP[problem.op](problem, device, most_sets)

"""The operands of an attention benchmark: one pool of pages, block tables of full width, lengths that change in place.

Every tensor keeps its address, so that a graph captured at the longest context can be replayed for any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_judge import PREFILLS

from bidispatch import ops
from bidispatch.ops.schema import Problem
from bidispatch.runtime.arguments import TensorSpec, output_shape, tensor_specs

__all__ = ["MAX_CONTEXT", "Call", "Pool", "Shape", "floor_us"]

MAX_CONTEXT = 131072
"""Positions the block tables have room for, and the lengths graphs are captured with."""
_DRAWN = 1 << 26
"""Elements of a cache that are drawn; the others repeat them."""


@dataclass(frozen=True)
class Shape:
    """What a benchmark must know of a problem's heads, the same for attention and for its latent form."""

    problem: Problem
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int

    @classmethod
    def of(cls, problem: Problem) -> Shape:
        heads, page_size = problem.size("num_heads"), problem.size("page_size")
        if problem.op == "attention":
            head_dim = problem.size("head_dim")
            return cls(problem, heads, problem.size("num_kv_heads"), head_dim, head_dim, page_size)
        rank = problem.size("kv_lora_rank")
        return cls(problem, heads, 1, rank + problem.size("rope_dim"), rank, page_size)

    @property
    def item(self) -> int:
        return int(getattr(torch, self.problem.dtype).itemsize)

    @property
    def position_bytes(self) -> int:
        """Bytes of the KV of one position: the latent form has its values inside its keys."""
        values = self.value_dim if self.problem.op == "attention" else 0
        return self.kv_heads * (self.head_dim + values) * self.item

    def kv_bytes(self, batch: int, context: int) -> int:
        return batch * context * self.position_bytes


def floor_us(shape: Shape, phase: str, batch: int, context: int, flops: Mapping[str, float], bandwidth: float) -> float:
    """max(FLOP / peak, bytes / bandwidth): KV and queries read once, results written once; a prefill is causal and
    whole, and every query of it is counted with the positions it sees.
    """
    whole = phase in PREFILLS
    rows = batch * (context if whole else 1)
    pairs = batch * (context * (context + 1) // 2 if whole else context)
    work = 2 * pairs * shape.heads * (shape.head_dim + shape.value_dim)
    moved = shape.kv_bytes(batch, context) + rows * shape.heads * (shape.head_dim + shape.value_dim) * shape.item
    return max(work / flops[shape.problem.dtype], moved / bandwidth) * 1e6


class Pool:
    """The caches of a problem: so many pages of random data, used in a random order."""

    def __init__(self, shape: Shape, positions: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.pages = -(-positions // shape.page_size)
        self.order = torch.randperm(self.pages, device=device).to(torch.int32)
        specs = tensor_specs(ops.get(shape.problem.op).arguments, shape.problem)
        self.caches = {
            spec.name: _random(output_shape(spec, {"pages": self.pages, "page_size": shape.page_size}), spec, device)
            for spec in specs
            if spec.present and any(size == "pages" for _, size, _ in spec.sizes)
        }


def _random(shape: Sequence[int], spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """Normal values; what exceeds `_DRAWN` repeats them, which is faster to make."""
    tensor = torch.empty(tuple(shape), dtype=spec.dtype, device=device)
    flat = tensor.view(-1)
    drawn = flat[:_DRAWN]
    drawn.normal_()
    for start in range(_DRAWN, flat.numel(), _DRAWN):
        piece = flat[start : start + _DRAWN]
        piece.copy_(drawn[: piece.numel()])
    return tensor


@dataclass
class Call:
    """The tensors of one batch: several block tables over one pool, so that the KV of a launch is in no cache.

    batch: sequences. query: rows of each. sets: how many block tables there are; the i-th launch takes the i-th.
    """

    pool: Pool
    batch: int
    query: int
    sets: int
    context: int = 0
    tables: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape, device = self.pool.shape, self.pool.device
        self.problem = shape.problem
        op = ops.get(self.problem.op)
        self.width = MAX_CONTEXT // shape.page_size
        self.tokens = self.batch * self.query
        sizes = {"tokens": self.tokens, "seqs": self.batch, "max_pages": self.width, "pages": self.pool.pages}
        self.tables = [torch.zeros(self.batch, self.width, dtype=torch.int32, device=device) for _ in range(self.sets)]
        self.seq_lens = torch.zeros(self.batch, dtype=torch.int32, device=device)
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device=device)
        self.query_start_loc = starts * self.query
        fixed = {"seq_lens": self.seq_lens, "query_start_loc": self.query_start_loc, **self.pool.caches}
        specs = tensor_specs(op.arguments, self.problem)
        self._names = [spec.name for spec in specs]
        self._given: dict[str, torch.Tensor | None] = {}
        for spec in specs:
            if not spec.present:
                self._given[spec.name] = None
            elif spec.name != "block_table":
                given = fixed.get(spec.name)
                self._given[spec.name] = _random(output_shape(spec, sizes), spec, device) if given is None else given
        self.scalars = tuple(scalar.default_for(self.problem) for scalar in op.scalars)
        (out,) = tensor_specs(op.outputs, self.problem)
        self.out = torch.empty(output_shape(out, sizes), dtype=out.dtype, device=device)

    def __getitem__(self, name: str) -> Any:
        return self._given[name]

    def names_by_token(self) -> list[str]:
        """The arguments that have a row a token: the queries, in one tensor or several."""
        specs = tensor_specs(ops.get(self.problem.op).arguments, self.problem)
        return [spec.name for spec in specs if any(size == "tokens" for _, size, _ in spec.sizes)]

    def table(self, i: int) -> torch.Tensor:
        """The block table of the i-th launch [batch, width]."""
        return self.tables[i % self.sets]

    def arguments(self, i: int) -> tuple[Any, ...]:
        """What a bound kernel's `launch` takes."""
        table = self.table(i)
        tensors = [table if name == "block_table" else self._given[name] for name in self._names]
        return (*tensors, *self.scalars, self.out)

    def pages_of(self, context: int) -> int:
        """Pages of one sequence."""
        return -(-context // self.pool.shape.page_size)

    def set_context(self, context: int) -> None:
        """Give every sequence so many positions, in pages of its own as far as the pool has any; nothing moves."""
        self.context = context
        self.seq_lens.fill_(context)
        pages, order = self.pages_of(context), self.pool.order
        for number, table in enumerate(self.tables):
            first = number * self.batch * pages
            places = torch.arange(first, first + self.batch * pages, device=table.device) % len(order)
            table.zero_()
            table[:, :pages] = order[places].view(self.batch, pages)

"""Row-wise ops: every row of a batch against the same row computed alone. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from bidispatch.invariance import Invariance
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.compare import fill, take
from bidispatch.verify.report import Check
from bidispatch.verify.subject import Arguments, Subject, Trial, measure

__all__ = ["RowPool", "check_rows", "graph_trials", "stock_check"]

_DISTRIBUTIONS = ("normal", "positive", "scaled")
_MATRICES = "matrices"
_NEIGHBOUR_SIZES = (2, 17, 64, 200)
_SIDE_SIZES = (1, 3, 17, 64)
_REPLAYS = 3
# A last axis is rarely a multiple of these together: the next row of a wider tensor then starts at an odd address.
_WIDE, _ODD = 8, 3


class RowPool:
    """Distinct random rows, what each gives alone, and batches drawn from them with repetition."""

    def __init__(self, subject: Subject, size: int, distribution: str, seed: int = 0) -> None:
        self.subject, self.size = subject, size
        self.arguments = subject.inputs(size, distribution=distribution, seed=seed)
        declared = subject.op.arguments
        self._row_axes = subject.axes_of(subject.row_size, declared)
        self._matrix_axes = subject.axes_of(_MATRICES, declared)
        self.matrices = 0
        for tensor, axis in zip(self.arguments, self._matrix_axes, strict=True):
            if tensor is not None and axis is not None:
                self.matrices = tensor.shape[axis]
        self._generator = torch.Generator().manual_seed(seed)
        self._alone = self._run_alone()

    @property
    def has_places(self) -> bool:
        """Whether rows come with integers, which name places."""
        pairs = zip(self.arguments, self._row_axes, strict=True)
        return any(tensor is not None and axis is not None and not tensor.is_floating_point() for tensor, axis in pairs)

    def _run_alone(self) -> tuple[torch.Tensor, ...]:
        """Each row in a call of its own, and each matrix: [matrices · size, ...] or [size, ...] per output."""
        single = []
        for matrix in range(max(1, self.matrices)):
            of_matrix = self._take(self.arguments, self._matrix_axes, torch.tensor([matrix]))
            for row in range(self.size):
                call = self._take(of_matrix, self._row_axes, torch.tensor([row]))
                single.append(self.subject.alone(call))
        return tuple(torch.cat(rows) for rows in zip(*single, strict=True))

    def _take(self, arguments: Arguments, axes: Sequence[int | None], index: torch.Tensor) -> Arguments:
        on_device = index.to(self.subject.device)
        return [
            tensor if tensor is None or axis is None else take(tensor, axis, on_device)
            for tensor, axis in zip(arguments, axes, strict=True)
        ]

    def draw(self, count: int) -> torch.Tensor:
        """Random rows of the pool."""
        return torch.randint(self.size, (count,), generator=self._generator)

    def draw_matrices(self, count: int) -> torch.Tensor:
        """Random matrices of the pool; where an op has none, what `batch` and `expected` take for that."""
        return torch.randint(max(1, self.matrices), (count,), generator=self._generator)

    def shuffled(self, count: int) -> torch.Tensor:
        """The numbers below `count` in random order."""
        return torch.randperm(count, generator=self._generator)

    def batch(self, rows: torch.Tensor, matrices: torch.Tensor | None = None) -> Arguments:
        """The arguments of a call with these rows, of all matrices in order or of those given."""
        arguments = self._take(self.arguments, self._row_axes, rows)
        return arguments if matrices is None else self._take(arguments, self._matrix_axes, matrices)

    def expected(self, rows: torch.Tensor, matrices: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """What those rows gave alone, in the order in which a call's run-time axes flatten."""
        if matrices is None:
            matrices = torch.arange(max(1, self.matrices))
        index = (matrices[:, None] * self.size + rows[None, :]).reshape(-1).to(self.subject.device)
        return tuple(alone[index] for alone in self._alone)

    def trial(self, rows: torch.Tensor, matrices: torch.Tensor | None = None) -> Trial:
        """A plain batch."""
        return Trial(len(rows), self.batch(rows, matrices), self.expected(rows, matrices))

    def map_rows(self, arguments: Arguments, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Arguments:
        """Change every argument that has rows; `change` is given the tensor and its row axis."""
        return [
            tensor if tensor is None or axis is None else change(tensor, axis)
            for tensor, axis in zip(arguments, self._row_axes, strict=True)
        ]

    def map_matrices(self, arguments: Arguments, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Arguments:
        """The same for every argument that has matrices."""
        return [
            tensor if tensor is None or axis is None else change(tensor, axis)
            for tensor, axis in zip(arguments, self._matrix_axes, strict=True)
        ]


def check_rows(
    subject: Subject, level: Invariance, sizes: Sizes, rebind: Callable[[Limits], Subject] | None = None
) -> Iterator[Check]:
    """Every check of a row-wise op. `rebind` gives the same kernel bound for other limits."""
    pool = RowPool(subject, sizes.pool, "normal")
    yield measure("repeated calls", subject, _repeated(pool, sizes))
    if level < Invariance.BATCH:
        return
    for distribution in _DISTRIBUTIONS:
        drawn = pool if distribution == "normal" else RowPool(subject, sizes.pool, distribution, seed=1)
        yield measure(f"batch sizes, {distribution}", subject, (drawn.trial(drawn.draw(m)) for m in sizes.rows))
    if pool.matrices:
        yield measure("batches of matrices", subject, _matrices(pool, sizes))
    yield measure("neighbours of NaN, inf and huge", subject, _neighbours(pool, sizes))
    if pool.has_places:
        yield measure("neighbours in other places", subject, _other_places(pool, sizes))
    yield measure("memory around the batch", subject, _margins(pool, sizes))
    yield measure("strided and unaligned rows", subject, _strided(pool, sizes))
    if rebind is not None:
        for tokens in (1, 3):
            other = rebind(Limits(tokens))
            yield measure(f"bound for {tokens} rows", other, (pool.trial(pool.draw(tokens)) for _ in range(3)))


def stock_check(subject: Subject, sizes: Sizes) -> Check:
    """How many rows of plain torch differ from the rows alone, over the batch sizes."""
    pool = RowPool(subject, sizes.pool, "normal")
    return measure("stock torch, batch sizes", subject, (pool.trial(pool.draw(m)) for m in sizes.rows))


def graph_trials(subject: Subject, sizes: Sizes) -> Iterator[list[Trial]]:
    """For each size, batches of that size: a graph captured with the first is replayed with all."""
    pool = RowPool(subject, sizes.pool, "normal", seed=2)
    for m in sizes.graph_rows:
        yield [pool.trial(pool.draw(m)) for _ in range(_REPLAYS)]


def _up_to(candidates: Sequence[int], sizes: Sizes) -> list[int]:
    """Those that the kernel is bound for."""
    return [size for size in candidates if size <= max(sizes.rows)]


def _repeated(pool: RowPool, sizes: Sizes) -> Iterator[Trial]:
    """A batch against itself, run before."""
    for m in (1, max(sizes.rows)):
        arguments = pool.batch(pool.draw(m))
        yield Trial(m, arguments, pool.subject.alone(arguments))


def _matrices(pool: RowPool, sizes: Sizes) -> Iterator[Trial]:
    for count in (1, 2, 5, 8):
        for m in _up_to(_SIDE_SIZES, sizes):
            yield pool.trial(pool.draw(m), pool.draw_matrices(count))


def _neighbours(pool: RowPool, sizes: Sizes) -> Iterator[Trial]:
    """Some rows keep their values; all others, and other matrices, hold what must not leak."""
    for bad in _bad_values(pool.subject):
        for m in _up_to(_NEIGHBOUR_SIZES, sizes):
            picks = pool.draw(m)
            order = pool.shuffled(m)
            kept, spoiled = order[: max(1, m // 4)].sort().values, order[max(1, m // 4) :]
            arguments = pool.map_rows(pool.batch(picks), _filler(spoiled, bad))
            matrix = 0
            if pool.matrices:
                matrix = int(pool.draw_matrices(1))
                others = torch.tensor([other for other in range(pool.matrices) if other != matrix])
                arguments = pool.map_matrices(arguments, _filler(others, bad))
            rows = (matrix * m + kept).to(pool.subject.device)
            yield Trial(m, arguments, pool.expected(picks[kept], torch.tensor([matrix])), rows=rows)


def _bad_values(subject: Subject) -> tuple[float, ...]:
    huge = torch.finfo(subject.argument_specs[0].dtype).max
    return (float("nan"), float("inf"), float("-inf"), huge)


def _filler(index: torch.Tensor, value: float) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Integers stay as they are: they name places, and another place of the neighbour's is no worse."""

    def change(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return fill(tensor, axis, index.to(tensor.device), value)

    return change


def _other_places(pool: RowPool, sizes: Sizes) -> Iterator[Trial]:
    """Some rows keep their integers; all others name what the first of those names, or nothing: -1, or far outside."""
    for places in (None, -1, torch.iinfo(torch.int32).max):
        for m in _up_to(_NEIGHBOUR_SIZES, sizes):
            picks = pool.draw(m)
            order = pool.shuffled(m)
            kept, others = order[: max(1, m // 4)].sort().values, order[max(1, m // 4) :]
            arguments = pool.map_rows(pool.batch(picks), _placed(int(kept[-1]), others, places))
            rows = kept.to(pool.subject.device)
            yield Trial(m, arguments, pool.expected(picks[kept]), rows=rows)


def _placed(like: int, rows: torch.Tensor, place: int | None) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Sets the integers of these rows to one place, or to those of the row `like`."""

    def fill(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor
        index = rows.to(tensor.device)
        if place is not None:
            return tensor.index_fill(axis, index, place)
        copied = tensor.index_select(axis, torch.full_like(index, like))
        return tensor.index_copy(axis, index, copied)

    return fill


def _margins(pool: RowPool, sizes: Sizes) -> Iterator[Trial]:
    """The batch is the middle of larger tensors: NaN around the inputs, bits that must stay around the outputs."""
    for m in _up_to(_SIDE_SIZES, sizes):
        picks = pool.draw(m)
        arguments = pool.map_rows(pool.batch(picks), lambda tensor, axis: _inside(tensor, axis, 2, 2))
        yield Trial(m, arguments, pool.expected(picks), margin=2)


def _strided(pool: RowPool, sizes: Sizes) -> Iterator[Trial]:
    """Rows cut out of wider ones, so that they are strided, and start at addresses of every alignment."""
    for m in _up_to(_SIDE_SIZES, sizes):
        for before, after in ((0, _WIDE), (_WIDE, 0), (1, _ODD)):
            picks = pool.draw(m)

            def widen(tensor: torch.Tensor, axis: int, before: int = before, after: int = after) -> torch.Tensor:
                return _inside(tensor, tensor.ndim - 1, before, after)

            arguments = pool.map_rows(pool.batch(picks), widen)
            yield Trial(m, arguments, pool.expected(picks), gap=before + after)


def _inside(tensor: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    """The same values as a view of a tensor that is longer on one axis; elsewhere NaN, or -1 between integers."""
    shape = list(tensor.shape)
    shape[axis] += before + after
    around = float("nan") if tensor.is_floating_point() else -1
    outer = torch.full(shape, around, dtype=tensor.dtype, device=tensor.device)
    view = outer.narrow(axis, before, tensor.shape[axis])
    view.copy_(tensor)
    return view

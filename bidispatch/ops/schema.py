"""What an op is: its dims, its tensors, and where its reference lives. Imports no torch.

A `Problem` is what selection is asked about. It names the op, the dtype and the dims a layer knows
when it is built, and on purpose nothing that depends on the batch: there is no M, no token count and
no batch size, so nothing selected from it can follow them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from bidispatch.errors import UsageError, did_you_mean

__all__ = [
    "DTYPES",
    "SAME_DTYPE",
    "WIDE_DTYPES",
    "Argument",
    "Dim",
    "DimValue",
    "Op",
    "Problem",
    "Scalar",
    "parse_dtype",
]

DimValue = int | float | str | bool

DTYPES: Mapping[str, str] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8",
}
"""Dtype names, as torch spells them, and the short forms people type."""

SAME_DTYPE = "dtype"
"""In a dtype dim or an argument: the dtype of the problem."""

WIDE_DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes a result can be rounded to as it is, without a scale."""

# Asked for often enough, by habit, to deserve the reason instead of "unknown dim".
_BATCH_WORDS = frozenset({"m", "b", "batch", "batch_size", "rows", "tokens", "num_tokens", "num_seqs", "seq_len"})


@dataclass(frozen=True, slots=True)
class Dim:
    """One static size or switch of an op. `default` None means it must be given."""

    name: str
    type: type
    doc: str
    default: DimValue | None = None
    minimum: float | None = None
    choices: tuple[str, ...] = ()
    typical: DimValue | None = None
    """The value `plan` shows a table for when nobody names one; the default when None."""

    @property
    def holds_dtype(self) -> bool:
        """Whether its value names a dtype: `"dtype"` for the problem's own, or any spelling `parse_dtype` reads."""
        return self.name.endswith("dtype")

    def parse(self, value: object, op: str) -> DimValue:
        """Return `value` as this dim's type (text is converted, as the command line needs); raise `UsageError`."""
        wanted = f"dim {self.name!r} of {op} is {'an' if self.type is int else 'a'} {self.type.__name__}"
        if isinstance(value, str) and self.type is not str:
            value = _from_text(value, self.type, wanted)
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.type:
            raise UsageError(f"{wanted}, not {value!r} ({type(value).__name__})")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{wanted}, finite, not {value!r}")
        if self.holds_dtype and value != SAME_DTYPE:
            value = parse_dtype(str(value))
        if self.minimum is not None and value < self.minimum:  # type: ignore[operator]
            raise UsageError(f"{wanted} of at least {self.minimum}, not {value!r}")
        if self.choices and value not in self.choices:
            raise UsageError(
                f"{wanted}, one of {', '.join(self.choices)}, not {value!r}{did_you_mean(str(value), self.choices)}"
            )
        return value  # type: ignore[return-value]


def _from_text(text: str, kind: type, wanted: str) -> DimValue:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{wanted} (true or false), not {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)  # type: ignore[no-any-return]
    except ValueError:
        raise UsageError(f"{wanted}, not {text!r}") from None


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor an op takes or gives.

    `shape` holds, per axis, a number, a dim's name, `"2*dim"`, `"dim/128"` or `"dim/dim"` (rounded up: a shorter last
    group counts), the sum of two (`"dim+dim"`), a run-time size in lower case such as `"m"`, or such a size plus one
    (`"seqs+1"`). `dtype` is `"dtype"` (the problem's), the name
    of a dim that holds one (`"out_dtype"`), or a torch dtype name. `when` names a bool dim that must be true for the
    tensor to be there, or a dim and the value it must have (`"kv_dtype=float8_e4m3fn"`); it is None otherwise.
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: str = "dtype"
    when: str = ""
    any_strides: bool = False
    """Whether its last axis may be strided too."""

    def present(self, problem: Problem) -> bool:
        """Whether a problem has this tensor."""
        dim, given, value = self.when.partition("=")
        if given:
            return str(problem[dim]) == value
        return not dim or problem.flag(dim)


@dataclass(frozen=True, slots=True)
class Scalar:
    """A float an op takes at each call. Its default is a number or follows from the problem."""

    name: str
    default: float | Callable[[Problem], float]
    doc: str = ""

    def default_for(self, problem: Problem) -> float:
        return self.default(problem) if callable(self.default) else self.default


@dataclass(frozen=True)
class Op:
    """An entry of the catalogue.

    A kernel of the op is called with every argument, then every scalar, then every output, positionally and
    in the order given here; an absent optional tensor is None. A ladder of kernels is chosen by the size of
    axis `row_axis` of the first argument.

    `reference`, `inputs` and `stock` are `"module:attribute"` and load torch: the fp64 reference, the input
    generator, and what plain torch does. An op without a reference is planned for a later release.
    """

    name: str
    summary: str
    dims: tuple[Dim, ...] = ()
    arguments: tuple[Argument, ...] = ()
    scalars: tuple[Scalar, ...] = ()
    outputs: tuple[Argument, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    reference: str = ""
    inputs: str = ""
    stock: str = ""
    sequences: str = ""
    """Of an op on sequences over a paged cache, `"module:attribute"` of what builds its batches for given lengths:
    `f(problem, query_lens, kv_lens, **options)` with the options of `bidispatch.ops.reference.attention.paged_batch`.
    `verify` then compares chunks, decodes and prefills. The op's arguments are `q`, caches whose first axis is `pages`,
    `block_table`, `seq_lens`, `query_start_loc`, and whatever does not follow the batch."""
    row_axis: int = 0
    """The axis of the first argument that counts rows (tokens)."""
    conflict: Callable[[Mapping[str, DimValue]], str | None] | None = None
    """What is wrong between dims that are each fine alone (heads that do not divide), or None. It is given the dims,
    and the problem's dtype as `"dtype"`."""

    @cached_property
    def dim_names(self) -> tuple[str, ...]:
        return tuple(dim.name for dim in self.dims)

    @property
    def caches(self) -> tuple[str, ...]:
        """Names of the arguments that are paged caches."""
        return tuple(argument.name for argument in self.arguments if argument.shape[0] == "pages")

    @property
    def available(self) -> bool:
        """False for an op the catalogue only leaves room for."""
        return bool(self.reference)

    def problem(self, dtype: str, dims: Mapping[str, object] | None = None) -> Problem:
        """Check dims and dtype and fill in defaults. Raise `UsageError` for what this op does not have."""
        given = dict(dims or {})
        for name in given:
            if name in self.dim_names:
                continue
            if name.lower() in _BATCH_WORDS:
                raise UsageError(
                    f"{self.name} has no dim {name!r}: selection does not see the batch, so that nothing it chooses "
                    f"can follow it; its dims are {', '.join(self.dim_names) or 'none'}"
                )
            raise UsageError(
                f"{self.name} has no dim {name!r}; it has {', '.join(self.dim_names) or 'none'}"
                + did_you_mean(name, self.dim_names)
            )
        dtype = parse_dtype(dtype)
        if dtype not in self.dtypes:
            raise UsageError(f"{self.name} takes {', '.join(self.dtypes)}, not {dtype}")
        values: dict[str, DimValue] = {}
        missing = []
        for dim in self.dims:
            if dim.name in given:
                values[dim.name] = dim.parse(given[dim.name], self.name)
            elif dim.default is not None:
                values[dim.name] = dim.default
            else:
                missing.append(dim.name)
            if dim.holds_dtype and values.get(dim.name) == SAME_DTYPE:
                values[dim.name] = dtype
        if missing:
            raise UsageError(
                f"{self.name} needs {', '.join(missing)}; "
                f"for example {' '.join(f'--dim {d.name}={d.typical}' for d in self.dims if d.name in missing)}"
            )
        if self.conflict and (why := self.conflict(values | {SAME_DTYPE: dtype})):
            raise UsageError(f"{self.name}: {why}")
        return Problem(self.name, dtype, values)

    def typical(self, dtype: str) -> Problem:
        """The problem `plan` shows when nobody names dims."""
        return self.problem(dtype, {dim.name: dim.typical for dim in self.dims if dim.typical is not None})


def parse_dtype(text: str) -> str:
    """Return torch's name for a dtype given as `bfloat16`, `bf16` or `torch.bfloat16`; raise `UsageError`."""
    name = text.removeprefix("torch.")
    for full, short in DTYPES.items():
        if name in (full, short):
            return full
    known = [*DTYPES, *DTYPES.values()]
    raise UsageError(f"unknown dtype {text!r}; known: {', '.join(known)}{did_you_mean(name, known)}")


@dataclass(frozen=True)
class Problem:
    """An op, a dtype and every dim, checked and with defaults filled in. Made by `Op.problem`."""

    op: str
    dtype: str
    dims: Mapping[str, DimValue] = field(default_factory=dict)

    def __getitem__(self, dim: str) -> DimValue:
        return self.dims[dim]

    def size(self, dim: str) -> int:
        """The value of an integer dim."""
        return int(self.dims[dim])

    def flag(self, dim: str) -> bool:
        """The value of a bool dim."""
        return bool(self.dims[dim])

    @cached_property
    def key(self) -> str:
        """One line that names the problem, the same in every process: JSON with sorted keys."""
        return json.dumps({"op": self.op, "dtype": self.dtype, "dims": dict(self.dims)}, sort_keys=True)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Problem) and self.key == other.key

    def __str__(self) -> str:
        dims = " ".join(f"{name}={_short(value)}" for name, value in self.dims.items())
        return f"{self.op} {self.dtype} {dims}".rstrip()


def _short(value: DimValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

"""`softmax`, `log_softmax` and `token_logprob` over rows that are cut into chunks at fixed columns.

A chunk gives its maximum and the sum of exp(x - maximum); a row's are made of its chunks' in one fixed order. So a row
has the same bits whoever computes its chunks, and it is always the same three steps:

- a row of one chunk: one program reads it once;
- a longer one: a program a chunk. Where the chunks of a row are sure to run at the same time they wait for each other
  and keep what they have read (`softmax_joint_kernel`): one read, one write. Elsewhere a second kernel reads again.
- `token_logprob` writes one number a row: the chunk that arrives last does it, and nobody waits.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, ceil_div, pointer, power_of_two
from bidispatch_backends.triton.params import SoftmaxParams, SoftmaxTile, chunks_of, row_width
from bidispatch_backends.triton.rows import row_block, row_launch, tree_sum

__all__ = [
    "bind_log_softmax",
    "bind_softmax",
    "bind_token_logprob",
    "chunk_finish_kernel",
    "chunk_statistics_kernel",
    "launches",
    "softmax_joint_kernel",
    "softmax_rows_kernel",
    "token_chunks_kernel",
    "token_rows_kernel",
]

_LOG2_E = tl.constexpr(math.log2(math.e))
_MOST_POLLS = tl.constexpr(1 << 24)
"""About ten seconds: then the chunks of a row do not run together, and the row is NaN instead of a hang."""
_WORKSPACE_ROWS = 1 << 14
"""Rows of one launch: a call with more is several."""


@triton.jit
def _statistics(x):
    """The maximum of each row of x [rows, lanes] fp32 and the sum of exp(x - maximum): [rows] each."""
    maximum = tl.max(x, axis=1)
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)  # -inf less -inf would be NaN
    return maximum, tree_sum(tl.exp2((x - reference[:, None]) * _LOG2_E))


@triton.jit
def _merged(maxima, totals):
    """The same of whole rows from those of their chunks [rows, chunks], -inf and 0 where there is none."""
    maximum = tl.max(maxima, axis=1)
    return maximum, tree_sum(totals * tl.exp2((maxima - maximum[:, None]) * _LOG2_E))


@triton.jit
def _softmax(x, maximum, total, LOG: tl.constexpr):
    """The result for x [rows, lanes]."""
    if LOG:
        return x - maximum[:, None] - tl.log(total)[:, None]
    return tl.exp2((x - maximum[:, None]) * _LOG2_E) * (1.0 / total)[:, None]


@triton.jit
def _logprob(x_rows, token, live, maximum, total, N: tl.constexpr):
    """log_softmax of rows at pointers `x_rows` at columns `token`, NaN outside; all [rows, 1]."""
    known = (token >= 0) & (token < N)
    x = tl.load(x_rows + token, mask=live & known, other=0.0).to(tl.float32)
    return tl.where(known, _softmax(x, maximum, total, True), float("nan"))


@triton.jit
def _chunk(x_ptr, stride_x, row, chunk, N: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk of a row: its columns, which exist, and its values as fp32, [1, CHUNK] each."""
    columns = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = columns < N
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(
        tl.float32
    )
    return columns, inside, x


@triton.jit
def _put_partials(maxima_ptr, totals_ptr, row, chunk, maximum, total, CHUNKS: tl.constexpr):
    place = row * CHUNKS + chunk + tl.arange(0, 1)
    tl.store(maxima_ptr + place, maximum)
    tl.store(totals_ptr + place, total)


@triton.jit
def _merged_partials(maxima_ptr, totals_ptr, row, CHUNKS: tl.constexpr, PLACES: tl.constexpr):
    """The maximum and total of a row, [1] each. Other programs of the same launch may just have written them."""
    place = tl.arange(0, PLACES)[None, :]
    there = place < CHUNKS
    maxima = tl.load(maxima_ptr + row * CHUNKS + place, mask=there, other=float("-inf"), volatile=True)
    totals = tl.load(totals_ptr + row * CHUNKS + place, mask=there, other=0.0, volatile=True)
    return _merged(maxima, totals)


@triton.jit(do_not_specialize=["rows"])
def softmax_rows_kernel(
    x_ptr,
    out_ptr,
    stride_x,
    stride_out,
    rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LOG: tl.constexpr,
):
    """Rows of one chunk, `ROWS` a program. `out` may be `x`."""
    row, live = row_block(ROWS, rows)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = live & (columns < N)
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first")
    x = x.to(tl.float32)
    maximum, total = _statistics(x)
    tl.debug_barrier()  # every thread has read the rows before one of them overwrites them
    value = _softmax(x, maximum, total, LOG)
    tl.store(out_ptr + row * stride_out + columns, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def token_rows_kernel(
    x_ptr, tokens_ptr, out_ptr, stride_x, rows, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """log_softmax of rows of one chunk at one token each."""
    row, live = row_block(ROWS, rows)
    x_rows = x_ptr + row * stride_x
    columns = tl.arange(0, BLOCK)[None, :]
    inside = live & (columns < N)
    x = tl.load(x_rows + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    maximum, total = _statistics(x)
    token = tl.load(tokens_ptr + row, mask=live, other=0)
    tl.store(out_ptr + row, _logprob(x_rows, token, live, maximum, total, N), mask=live)


@triton.jit
def chunk_statistics_kernel(
    x_ptr, maxima_ptr, totals_ptr, stride_x, N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """First of two kernels: the maximum and total of each chunk, [rows, CHUNKS] fp32."""
    program = tl.program_id(0)
    row, chunk = (program // CHUNKS).to(tl.int64), program % CHUNKS
    _, _, x = _chunk(x_ptr, stride_x, row, chunk, N, CHUNK)
    maximum, total = _statistics(x)
    _put_partials(maxima_ptr, totals_ptr, row, chunk, maximum, total, CHUNKS)


@triton.jit
def chunk_finish_kernel(
    x_ptr,
    out_ptr,
    maxima_ptr,
    totals_ptr,
    stride_x,
    stride_out,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PLACES: tl.constexpr,
    LOG: tl.constexpr,
):
    """Second of two kernels: the result of each chunk. `out` may be `x`."""
    program = tl.program_id(0)
    row, chunk = (program // CHUNKS).to(tl.int64), program % CHUNKS
    maximum, total = _merged_partials(maxima_ptr, totals_ptr, row, CHUNKS, PLACES)
    columns, inside, x = _chunk(x_ptr, stride_x, row, chunk, N, CHUNK)
    tl.debug_barrier()  # every thread has read the chunk before one of them overwrites it
    value = _softmax(x, maximum, total, LOG)
    tl.store(out_ptr + row * stride_out + columns, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_joint_kernel(
    x_ptr,
    out_ptr,
    maxima_ptr,
    totals_ptr,
    counts_ptr,
    stride_x,
    stride_out,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PLACES: tl.constexpr,
    LOG: tl.constexpr,
):
    """Both kernels in one: a chunk waits in its registers until the maxima and totals of its row are there.

    counts [rows, 2] int32, zero before and after: how many chunks of a row have arrived, and how many have left. A GPU
    starts the programs of a launch in order, so when one waits, all rows before its own run or are done: they end, and
    what remains of this row finds room, if the GPU holds CHUNKS programs. `out` may be `x`.
    """
    program = tl.program_id(0)
    row, chunk = (program // CHUNKS).to(tl.int64), program % CHUNKS
    columns, inside, x = _chunk(x_ptr, stride_x, row, chunk, N, CHUNK)
    maximum, total = _statistics(x)
    _put_partials(maxima_ptr, totals_ptr, row, chunk, maximum, total, CHUNKS)
    tl.debug_barrier()  # the partials are written before the count says so
    arrived = tl.atomic_add(counts_ptr + 2 * row, 1, sem="acq_rel", scope="gpu") + 1
    polls = 0
    while (arrived < CHUNKS) & (polls < _MOST_POLLS):
        arrived = tl.atomic_add(counts_ptr + 2 * row, 0, sem="acquire", scope="gpu")
        polls += 1
    maximum, total = _merged_partials(maxima_ptr, totals_ptr, row, CHUNKS, PLACES)
    total = tl.where(arrived < CHUNKS, float("nan"), total)
    if tl.atomic_add(counts_ptr + 2 * row + 1, 1, sem="acq_rel", scope="gpu") == CHUNKS - 1:
        # Nobody waits any more: ready for the next launch.
        tl.store(counts_ptr + 2 * row, 0)
        tl.store(counts_ptr + 2 * row + 1, 0)
    value = _softmax(x, maximum, total, LOG)
    tl.store(out_ptr + row * stride_out + columns, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def token_chunks_kernel(
    x_ptr,
    tokens_ptr,
    out_ptr,
    maxima_ptr,
    totals_ptr,
    counts_ptr,
    stride_x,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """log_softmax of longer rows at one token each. counts as in `softmax_joint_kernel`; nobody leaves here."""
    program = tl.program_id(0)
    row, chunk = (program // CHUNKS).to(tl.int64), program % CHUNKS
    _, _, x = _chunk(x_ptr, stride_x, row, chunk, N, CHUNK)
    maximum, total = _statistics(x)
    _put_partials(maxima_ptr, totals_ptr, row, chunk, maximum, total, CHUNKS)
    tl.debug_barrier()  # the partials are written before the count says so
    if tl.atomic_add(counts_ptr + 2 * row, 1, sem="acq_rel", scope="gpu") == CHUNKS - 1:
        tl.store(counts_ptr + 2 * row, 0)
        maximum, total = _merged_partials(maxima_ptr, totals_ptr, row, CHUNKS, PLACES)
        token = tl.load(tokens_ptr + row + tl.arange(0, 1)[:, None])
        value = _logprob(x_ptr + row * stride_x, token, token == token, maximum, total, N)
        tl.store(out_ptr + row + tl.arange(0, 1)[:, None], value)


def launches(problem: Problem, params: SoftmaxParams, tile: SoftmaxTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch for rows of one chunk, and for `token_logprob`; else those of the two kernels.

    The joint kernel's comes third where the tile asks for it: only the device says how many programs it holds.
    """
    n = problem.size("n")
    chunks, width = chunks_of(n, params.chunk), row_width(n, params.chunk)
    x: dict[str, ArgumentType] = {"x_ptr": pointer(problem.dtype)}
    out: dict[str, ArgumentType] = {"out_ptr": pointer(str(problem.dims.get("out_dtype", "float32")))}
    tokens: dict[str, ArgumentType] = {"tokens_ptr": pointer("int64")}
    partials: dict[str, ArgumentType] = dict.fromkeys(("maxima_ptr", "totals_ptr"), pointer("float32"))
    counts: dict[str, ArgumentType] = {"counts_ptr": pointer("int32")}
    strides: dict[str, ArgumentType] = {"stride_x": n, "stride_out": n}
    one_token = problem.op == "token_logprob"
    log: dict[str, Constant] = {"LOG": problem.op == "log_softmax"}

    if chunks == 1:
        rows: dict[str, ArgumentType] = {"rows": "i32"}
        shape: dict[str, Constant] = {"N": n, "BLOCK": width, "ROWS": tile.rows}
        if one_token:
            arguments = x | tokens | out | {"stride_x": n} | rows
            return (row_launch(token_rows_kernel, arguments, arch, tile.num_warps, **shape),)
        arguments = x | out | strides | rows
        return (row_launch(softmax_rows_kernel, arguments, arch, tile.num_warps, **shape, **log),)

    cut: dict[str, Constant] = {"N": n, "CHUNK": params.chunk, "CHUNKS": chunks}
    merged = cut | {"PLACES": power_of_two(chunks)}
    if one_token:
        arguments = x | tokens | out | partials | counts | {"stride_x": n}
        return (row_launch(token_chunks_kernel, arguments, arch, tile.num_warps, **merged),)
    pair = (
        row_launch(chunk_statistics_kernel, x | partials | {"stride_x": n}, arch, tile.num_warps, **cut),
        row_launch(chunk_finish_kernel, x | out | partials | strides, arch, tile.num_warps, **merged, **log),
    )
    if not tile.joint:
        return pair
    arguments = x | out | partials | counts | strides
    return (*pair, row_launch(softmax_joint_kernel, arguments, arch, tile.num_warps, **merged, **log))


@dataclass(frozen=True)
class _Workspace:
    """What the chunks of a launch leave for each other: maxima and totals [rows, chunks], counts [rows, 2]."""

    rows: int
    maxima: torch.Tensor
    totals: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, context: BindContext, chunks: int) -> _Workspace:
        rows = min(context.limits.max_tokens, _WORKSPACE_ROWS)
        device = torch.device(context.device.torch_device)
        maxima, totals = (torch.empty(rows * chunks, dtype=torch.float32, device=device) for _ in range(2))
        counts = torch.zeros(rows * 2, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the zeros are there, whichever stream launches first
        return cls(rows, maxima, totals, counts)

    def parts(self, m: int) -> Iterator[tuple[int, int]]:
        """The first row of each launch, and how many it has."""
        for first in range(0, m, self.rows):
            yield first, min(self.rows, m - first)


def bind_softmax(context: BindContext) -> Kernel:
    """`softmax` or, by the problem's op, `log_softmax`: x and out [m, n].

    Rows of several chunks take a workspace. The joint kernel is used where the tile asks for it and the device has at
    least as many multiprocessors as a row has chunks; the other two give the same bits.
    """
    tile = context.tile
    first, *others = launches(context.problem, context.params, tile, context.device.arch)
    chunks = chunks_of(context.problem.size("n"), context.params.chunk)
    if chunks == 1:

        def softmax(x: torch.Tensor, out: torch.Tensor) -> None:
            rows = x.shape[0]
            first((ceil_div(rows, tile.rows),), x, out, x.stride(0), out.stride(0), rows)

        return softmax

    space = _Workspace.of(context, chunks)
    finish = others[0]
    if tile.joint and _multiprocessors(context) >= chunks:
        together = others[1]

        def softmax_joint(x: torch.Tensor, out: torch.Tensor) -> None:
            strides = (x.stride(0), out.stride(0))
            for start, rows in space.parts(x.shape[0]):
                tensors = (x[start:], out[start:]) if start else (x, out)
                together((rows * chunks,), *tensors, space.maxima, space.totals, space.counts, *strides)

        return softmax_joint

    def softmax_in_two(x: torch.Tensor, out: torch.Tensor) -> None:
        strides = (x.stride(0), out.stride(0))
        for start, rows in space.parts(x.shape[0]):
            x_part, out_part = (x[start:], out[start:]) if start else (x, out)
            first((rows * chunks,), x_part, space.maxima, space.totals, strides[0])
            finish((rows * chunks,), x_part, out_part, space.maxima, space.totals, *strides)

    return softmax_in_two


bind_log_softmax = bind_softmax


def bind_token_logprob(context: BindContext) -> Kernel:
    """x [m, n], token_ids [m] int64, out [m] fp32. Rows of several chunks take a workspace."""
    tile = context.tile
    (launch,) = launches(context.problem, context.params, tile, context.device.arch)
    chunks = chunks_of(context.problem.size("n"), context.params.chunk)
    if chunks == 1:

        def token_logprob(x: torch.Tensor, token_ids: torch.Tensor, out: torch.Tensor) -> None:
            rows = x.shape[0]
            launch((ceil_div(rows, tile.rows),), x, token_ids, out, x.stride(0), rows)

        return token_logprob

    space = _Workspace.of(context, chunks)

    def token_logprob_of_chunks(x: torch.Tensor, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        for start, rows in space.parts(x.shape[0]):
            tensors = (x[start:], token_ids[start:], out[start:]) if start else (x, token_ids, out)
            launch((rows * chunks,), *tensors, space.maxima, space.totals, space.counts, x.stride(0))

    return token_logprob_of_chunks


def _multiprocessors(context: BindContext) -> int:
    """Of the device a kernel is bound on; none in the interpreter, which runs one program after the other."""
    device = torch.device(context.device.torch_device)
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0

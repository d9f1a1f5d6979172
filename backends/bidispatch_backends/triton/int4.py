"""`gemm.int4`: the weight is unpacked and scaled in registers, and is the left operand of the matrix unit from there.

The layout of `bidispatch.int4` puts what a thread loads, 16 bytes of a row, where the matrix unit wants it from that
thread: neither shuffles nor shared memory lie between the unpacking and the product. Each weight is rounded to the
activations' dtype before it is multiplied, so the bits are those of `gemm` with the dequantised weight.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.errors import ArgumentError
from bidispatch.ops.int4 import K_BLOCK, SYMMETRIC_ZERO
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.gemm import tile_of
from bidispatch_backends.triton.int4_params import (
    Int4Params,
    Int4Tile,
    SplitInt4Params,
    fits_tensor_memory,
    on_tensor_memory,
)
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, ceil_div, options, pointer
from bidispatch_backends.triton.split_gemm import fold_partials, is_last

__all__ = ["bind_int4", "bind_int4_split_k", "launches", "split_launches"]

_K_BLOCK: tl.constexpr = tl.constexpr(K_BLOCK)
_ZERO: tl.constexpr = tl.constexpr(SYMMETRIC_ZERO)

_WORD = 4

# Two halves, each with four weights: the low bits of the mantissa of 128 (bf16) or 1024 (fp16) hold one exactly. Then
# minus the zero point, exactly, then times the scale, rounded once; both as fused multiply-adds, which sm80 has too.
_UNPACK = """
{{
    .reg .b32 a, b, c, d, one, none;
    shr.u32 b, $4, 4;
    shr.u32 c, $4, 8;
    shr.u32 d, $4, 12;
    lop3.b32 a, $4, 0x000f000f, {magic}, 0xea;
    lop3.b32 b, b, 0x000f000f, {magic}, 0xea;
    lop3.b32 c, c, 0x000f000f, {magic}, 0xea;
    lop3.b32 d, d, 0x000f000f, {magic}, 0xea;
    mov.b32 one, {one};
    mov.b32 none, 0x80008000;
    fma.rn.{dtype} a, a, one, $6;
    fma.rn.{dtype} b, b, one, $6;
    fma.rn.{dtype} c, c, one, $6;
    fma.rn.{dtype} d, d, one, $6;
    fma.rn.{dtype} $0, a, $5, none;
    fma.rn.{dtype} $1, b, $5, none;
    fma.rn.{dtype} $2, c, $5, none;
    fma.rn.{dtype} $3, d, $5, none;
}}
"""
_UNPACK_BF16: tl.constexpr = tl.constexpr(_UNPACK.format(magic="0x43004300", one="0x3f803f80", dtype="bf16x2"))
_UNPACK_FP16: tl.constexpr = tl.constexpr(_UNPACK.format(magic="0x64006400", one="0x3c003c00", dtype="f16x2"))


@triton.jit
def _weights(halves, scale, zero, PACKED: tl.constexpr):
    """Four tensors of weights, (q - zero) * scale, for the four nibbles of each 16-bit half; zero is an integer."""
    dtype = scale.dtype
    if PACKED:
        if dtype == tl.bfloat16:
            minus = (zero | 0xC300).to(tl.uint16).to(dtype, bitcast=True)  # -(128 + zero)
            weights = tl.inline_asm_elementwise(
                _UNPACK_BF16, "=r,=r,=r,=r,r,r,r", [halves, scale, minus], (dtype, dtype, dtype, dtype), True, 2
            )
        else:
            minus = (zero | 0xE400).to(tl.uint16).to(dtype, bitcast=True)  # -(1024 + zero)
            weights = tl.inline_asm_elementwise(
                _UNPACK_FP16, "=r,=r,=r,=r,r,r,r", [halves, scale, minus], (dtype, dtype, dtype, dtype), True, 2
            )
    else:
        # Exact in fp32, then rounded: the same bits.
        wide = scale.to(tl.float32)
        weights = (
            (((halves & 15) - zero).to(tl.float32) * wide).to(dtype),
            (((halves >> 4 & 15) - zero).to(tl.float32) * wide).to(dtype),
            (((halves >> 8 & 15) - zero).to(tl.float32) * wide).to(dtype),
            (((halves >> 12 & 15) - zero).to(tl.float32) * wide).to(dtype),
        )
    return weights


@triton.jit
def _of_groups(words, shift, stride_group, LOADED: tl.constexpr, GROUPS: tl.constexpr):
    """What belongs to each half of a block of K, [LOADED, 32]: `words` [LOADED] holds that of the first group, `shift`
    bits up; the block's other groups follow `stride_group` words apart.

    Words are loaded as vectors and not as [LOADED, GROUPS], whose layout would win over that of the weight.
    """
    values = tl.broadcast_to((tl.load(words) >> shift)[:, None], (LOADED, 32))
    of_half = tl.arange(0, 32) % 8 // (8 // GROUPS)
    for group in tl.static_range(1, GROUPS):
        others = tl.load(words + group * stride_group) >> shift
        values = tl.where((of_half == group)[None, :], others[:, None], values)
    return values


@triton.jit
def accumulate(
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    rows,
    first_column,
    first,
    length,
    m,
    n,
    stride_x_row,
    stride_weight_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    FENCED: tl.constexpr,
):
    """The sum over `length` elements of K from `first` on, from a fresh accumulator: [BLOCK_N, BLOCK_M].

    The tile is loaded as rows of 64 bytes, a block of K of a row of the weight each, in the order in which a matrix
    instruction has its rows in threads: 8 in the lanes, then the warps, then the other 8 of a warp's 16.
    Columns past the end read column 0. Rows past the end read nothing.
    """
    BLOCKS: tl.constexpr = BLOCK_K // _K_BLOCK
    GROUPS: tl.constexpr = _K_BLOCK // GROUP_SIZE if GROUP_SIZE < _K_BLOCK else 1
    LOADED: tl.constexpr = BLOCKS * BLOCK_N
    REPEATS: tl.constexpr = BLOCK_N // (16 * ROW_WARPS)
    loaded = tl.arange(0, LOADED)
    in_tile = (
        loaded // (16 * ROW_WARPS) % REPEATS * (16 * ROW_WARPS)
        + loaded // 8 % ROW_WARPS * 16
        + loaded // (8 * ROW_WARPS) % 2 * 8
        + loaded % 8
    )
    columns = first_column + in_tile
    columns = tl.where(columns < n, columns, 0)
    block = loaded // BLOCK_N
    halves_ptr = weight_ptr.to(tl.pointer_type(tl.int16)) + first // 4
    halves_ptrs = halves_ptr + (columns.to(tl.int64) * (2 * stride_weight_row) + block * 32)[:, None]
    halves_ptrs += tl.arange(0, 32)[None, :]
    # Scales and zero points are loaded as words, with their neighbours: copies ahead take 4 bytes or more.
    scale_words = scales_ptr.to(tl.pointer_type(tl.int32)) + columns // 2
    if zeros_ptr is not None:
        zero_words = zeros_ptr.to(tl.pointer_type(tl.int32)) + columns // 4
    steps = tl.arange(0, BLOCK_K)
    x_rows = tl.where(rows < m, rows, 0).to(tl.int64) * stride_x_row
    x_ptrs = x_ptr + first + x_rows[None, :] + steps[:, None]
    x_inside = (rows < m)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, length, BLOCK_K):
        halves = tl.load(halves_ptrs)
        group = (first + start + block * _K_BLOCK) // GROUP_SIZE
        scale = _of_groups(scale_words + group * (n // 2), columns % 2 * 16, n // 2, LOADED, GROUPS)
        scale = scale.to(tl.int16).to(scales_ptr.dtype.element_ty, bitcast=True)
        if zeros_ptr is not None:
            zero = _of_groups(zero_words + group * (n // 4), columns % 4 * 8, n // 4, LOADED, GROUPS) & 255
        else:
            zero = tl.full((LOADED, 32), _ZERO, tl.int32)
        x = tl.load(x_ptrs, mask=x_inside, other=0.0)
        # [.., s, h] of the layout: nibble 2 s + h of a half.
        at_00, at_01, at_10, at_11 = _weights(halves, scale, zero, PACKED)
        weight = tl.join(tl.join(at_00, at_01), tl.join(at_10, at_11))  # [loaded, half, h, s]
        # [block, repeat, half of 16, warp, 8 | c, j, p | h, s] -> [repeat, warp, half of 16, 8 | block, j, s, h, c, p]
        weight = weight.reshape(BLOCKS, REPEATS, 2, ROW_WARPS, 8, 4, 4, 2, 2, 2)
        weight = weight.permute(1, 3, 2, 4, 0, 6, 9, 8, 5, 7).reshape(BLOCK_N, BLOCK_K)
        if FENCED:
            # A move that may have effects is where the compiler's look at a product's operand ends: it would take the
            # joins for operands that were narrow, and give each thread of mma.sync other neighbours in K.
            weight = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weight], weight.dtype, False, 2)
        acc = tl.dot(weight, x, acc)
        halves_ptrs += BLOCK_K // 4
        x_ptrs += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["m"])
def int4_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    stride_x_row,
    stride_weight_row,
    stride_out_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    K_CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
    FENCED: tl.constexpr,
):
    """out = x @ weight.T + bias: one [BLOCK_M, BLOCK_N] tile a program.

    With K_CHUNK every so many elements of K start from a fresh accumulator; what came before is added in order.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if K_CHUNK == 0:
        acc = accumulate(
            *(x_ptr, weight_ptr, scales_ptr, zeros_ptr, rows, tile_n * BLOCK_N, 0, k, m, n),
            *(stride_x_row, stride_weight_row),
            *(BLOCK_M, BLOCK_N, BLOCK_K, ROW_WARPS, GROUP_SIZE, PACKED, FENCED),
        )
    else:
        acc = accumulate(
            *(x_ptr, weight_ptr, scales_ptr, zeros_ptr, rows, tile_n * BLOCK_N, 0, min(k, K_CHUNK), m, n),
            *(stride_x_row, stride_weight_row),
            *(BLOCK_M, BLOCK_N, BLOCK_K, ROW_WARPS, GROUP_SIZE, PACKED, FENCED),
        )
        for first in range(K_CHUNK, k, K_CHUNK):
            acc += accumulate(
                *(x_ptr, weight_ptr, scales_ptr, zeros_ptr, rows, tile_n * BLOCK_N, first, min(k - first, K_CHUNK)),
                *(m, n, stride_x_row, stride_weight_row),
                *(BLOCK_M, BLOCK_N, BLOCK_K, ROW_WARPS, GROUP_SIZE, PACKED, FENCED),
            )
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    _store(out_ptr, bias_ptr, acc, rows, columns, m, n, stride_out_row)


@triton.jit
def _store(out_ptr, bias_ptr, acc, rows, columns, m, n, stride_out_row):
    """acc [columns, rows] plus the bias, rounded, into rows of out."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * stride_out_row + columns[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < m)[None, :] & (columns < n)[:, None])


@triton.jit(do_not_specialize=["m", "stride_chunk"])
def int4_split_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    m,
    n,
    k,
    stride_x_row,
    stride_weight_row,
    stride_out_row,
    stride_chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    K_CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
    FENCED: tl.constexpr,
):
    """The same; program (tile, chunk). partial [chunks, m, n] fp32, counter [tiles] zero."""
    tile = tl.program_id(0)
    chunks = tl.num_programs(1)
    tile_m, tile_n = tile_of(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * K_CHUNK
    acc = accumulate(
        *(x_ptr, weight_ptr, scales_ptr, zeros_ptr, rows, tile_n * BLOCK_N, first, min(k - first, K_CHUNK), m, n),
        *(stride_x_row, stride_weight_row),
        *(BLOCK_M, BLOCK_N, BLOCK_K, ROW_WARPS, GROUP_SIZE, PACKED, FENCED),
    )
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < m)[None, :] & (columns < n)[:, None]
    partial_ptrs = partial_ptr + rows.to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(partial_ptrs + tl.program_id(1).to(tl.int64) * stride_chunk, acc, mask=inside)
    if is_last(counter_ptr + tile, chunks):
        total = fold_partials(partial_ptrs, stride_chunk, chunks, inside)
        _store(out_ptr, bias_ptr, total, rows, columns, m, n, stride_out_row)


def _constants(problem: Problem, params: Int4Params, tile: Int4Tile, arch: Arch) -> dict[str, Constant]:
    """The constants of both kernels. Raises ValueError for a tile whose steps do not divide K or a chunk of it, and for
    one that would leave Blackwell's large matrix unit, which is of another class until proved.
    """
    k = problem.size("k")
    if on_tensor_memory(arch) and not fits_tensor_memory(tile.block_m, tile.block_n, tile.num_warps):
        raise ValueError(
            f"{arch.name} needs tiles of at least 16 rows of x and 64 of the weight, 4 or 8 warps, and up to 2048 sums "
            f"a warp, not {tile}"
        )
    if k % tile.block_k or params.k_chunk % tile.block_k:
        raise ValueError(f"block_k={tile.block_k} does not divide k={k} and k_chunk={params.k_chunk}")
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "ROW_WARPS": min(tile.num_warps, tile.block_n // 16),
        "GROUP_M": tile.group_m,
        "GROUP_SIZE": problem.size("group_size"),
        "K_CHUNK": params.k_chunk if k > params.k_chunk else 0,
        "PACKED": arch.vendor == "nvidia",
        "FENCED": arch.vendor == "nvidia" and not on_tensor_memory(arch),
    }


def _tensors(problem: Problem) -> dict[str, ArgumentType]:
    of_dtype = pointer(problem.dtype)
    return {
        "x_ptr": of_dtype,
        "weight_ptr": pointer("int32"),
        "scales_ptr": of_dtype,
        "zeros_ptr": pointer("int8") if problem.flag("zero_points") else None,
        "bias_ptr": of_dtype if problem.flag("bias") else None,
        "out_ptr": pointer(str(problem["out_dtype"])),
    }


def _sizes(problem: Problem) -> dict[str, ArgumentType]:
    n, k = problem.size("n"), problem.size("k")
    return {
        "m": "i32",
        "n": n,
        "k": k,
        "stride_x_row": k,
        "stride_weight_row": k // 8,
        "stride_out_row": n,
    }


def launches(problem: Problem, params: Int4Params, tile: Int4Tile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `triton.int4`."""
    arguments = {**_tensors(problem), **_sizes(problem)}
    # The sums of chunks are of what the matrix unit gives: no product outside of it that a sum could be fused with.
    compiler = options(arch, tile.num_warps, tile.num_stages, fp_fusion=False)
    return (Launch(int4_kernel, arguments, _constants(problem, params, tile, arch), compiler),)


def split_launches(problem: Problem, params: SplitInt4Params, tile: Int4Tile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of `triton.int4_split_k`."""
    workspaces: dict[str, ArgumentType] = {"partial_ptr": pointer("float32"), "counter_ptr": pointer("int32")}
    arguments = {**_tensors(problem), **workspaces, **_sizes(problem), "stride_chunk": "i64"}
    constants = {**_constants(problem, params, tile, arch), "K_CHUNK": params.k_chunk}
    compiler = options(arch, tile.num_warps, tile.num_stages, fp_fusion=False)
    return (Launch(int4_split_kernel, arguments, constants, compiler),)


def _need_words(problem: Problem, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
    """Raise `ArgumentError` where scales or zero points cannot be read as 32-bit words."""
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and (tensor.data_ptr() % _WORD or not tensor.is_contiguous()):
            raise ArgumentError(
                f"{problem}: {name} must be contiguous and begin on {_WORD} bytes, its strides are {tensor.stride()}; "
                "pass .contiguous(), once, at load"
            )


def bind_int4(context: BindContext) -> Kernel:
    """`kernel(x, weight, scales, zeros, bias, out)`; see the op `gemm.int4`."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    problem = context.problem
    n, k = problem.size("n"), problem.size("k")
    block_m = context.tile.block_m
    tiles_n = ceil_div(n, context.tile.block_n)

    def int4(
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        m = x.shape[0]
        grid = (ceil_div(m, block_m) * tiles_n,)
        _need_words(problem, scales, zeros)
        launch(grid, x, weight, scales, zeros, bias, out, m, n, k, x.stride(0), weight.stride(0), out.stride(0))

    return int4


def bind_int4_split_k(context: BindContext) -> Kernel:
    """The same with chunks of K in parallel. Holds chunks · max_tokens · n fp32 of workspace."""
    (launch,) = split_launches(context.problem, context.params, context.tile, context.device.arch)
    problem = context.problem
    n, k = problem.size("n"), problem.size("k")
    most, block_m = context.limits.max_tokens, context.tile.block_m
    chunks = ceil_div(k, context.params.k_chunk)
    tiles_n = ceil_div(n, context.tile.block_n)
    device = context.device.torch_device
    partial = torch.empty(chunks * most * n, dtype=torch.float32, device=device)
    counter = torch.zeros(ceil_div(most, block_m) * tiles_n, dtype=torch.int32, device=device)

    def split(
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        m = x.shape[0]
        grid = (ceil_div(m, block_m) * tiles_n, chunks)
        _need_words(problem, scales, zeros)
        launch(
            *(grid, x, weight, scales, zeros, bias, out, partial, counter),
            *(m, n, k, x.stride(0), weight.stride(0), out.stride(0), m * n),
        )

    return split

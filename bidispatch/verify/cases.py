"""What is verified: which problems, and how many rows, sequences and neighbours. Imports no torch.

A record proves exactly the problem it was made for, so the catalogue's typical dims come first: they are what `plan`
shows. The others are there to fall between tiles: sizes that no tile divides, and every switch of an op.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.errors import UsageError, did_you_mean
from bidispatch.ops.schema import DimValue, Op, Problem, parse_dtype
from bidispatch.planning.selection import Selection

__all__ = ["EFFORTS", "MOST_ELEMENTS", "Sizes", "problems_for", "sizes_for", "widest_dim"]

EFFORTS = ("quick", "full")

Dims = Mapping[str, DimValue]

_HEADS: Dims = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
_FP8: Dims = {"weight_dtype": "float8_e4m3fn"}
_RANK: Dims = {"experts": 5, "top_k": 6, "expert_map": True, "global_experts": 20}
# Beside the typical dims. Small, so that a processor can take them; a GPU's tiles do not divide them either.
_EXTRA: Mapping[str, Sequence[Dims]] = {
    "gemm": (
        {"n": 203, "k": 333},
        {"n": 320, "k": 1024, "bias": True, "out_dtype": "float32"},
        {"n": 1, "k": 64, "bias": True},
    ),
    "gemm.int4": (
        {"n": 208, "k": 384, "zero_points": True, "group_size": 32},
        {"n": 16, "k": 128, "group_size": 64, "bias": True, "out_dtype": "float32"},
    ),
    "bmm": ({"n": 77, "k": 129}, {"n": 64, "k": 80, "out_dtype": "float32"}),
    "gemm.fp8_block": (
        {"n": 203, "k": 333},
        {"n": 320, "k": 1024, "out_dtype": "float32"},
        {"n": 129, "k": 256, "out_dtype": "float16", "scale_format": "ue8m0"},
        {"n": 1, "k": 64},
    ),
    "gemm.fp8": (
        {"n": 203, "k": 333, "bias": True, "out_dtype": "float32"},
        {"n": 320, "k": 1024, "x_scaling": "tensor", "weight_scaling": "tensor"},
        {"n": 129, "k": 40, "bias": True, "x_scaling": "tensor"},
    ),
    "quantize.fp8_group": ({"k": 1003}, {"k": 40}, {"k": 1024, "scale_format": "ue8m0"}),
    "quantize.fp8_token": ({"k": 1003}, {"k": 40}),
    "quantize.fp8_tensor": ({"k": 1003}, {"k": 40}),
    "silu_and_mul.fp8_group": ({"n": 333}, {"n": 256, "scale_format": "ue8m0"}),
    "rms_norm.fp8_group": ({"n": 128}, {"n": 1003, "gemma": True, "scale_format": "ue8m0"}, {"n": 40}),
    "fused_add_rms_norm.fp8_group": ({"n": 1003, "gemma": True}, {"n": 256, "scale_format": "ue8m0"}),
    "rms_norm": ({"n": 128}, {"n": 1003, "gemma": True}),
    "fused_add_rms_norm": ({"n": 1003, "gemma": True},),
    "qk_norm": ({"head_dim": 80, "num_heads": 6, "num_kv_heads": 3, "gemma": True},),
    "silu_and_mul": ({"n": 333},),
    "gelu_tanh_and_mul": ({"n": 333},),
    "softmax": ({"n": 1003}, {"n": 40, "out_dtype": "float32"}),
    "log_softmax": ({"n": 9001, "out_dtype": "float32"},),
    "token_logprob": ({"n": 9001}, {"n": 40}),
    "mean": ({"n": 1003},),
    "sum": ({"n": 1003}, {"n": 40, "out_dtype": "float32"}),
    "moe.router": (
        {"experts": 60, "top_k": 4, "renormalize": False},
        {"experts": 40, "top_k": 6, "scoring": "sigmoid", "correction_bias": True, "n_group": 8, "topk_group": 4},
        {"experts": 7, "top_k": 7, "n_group": 7, "topk_group": 7},
    ),
    "moe.experts": (
        {"experts": 7, "top_k": 2, "hidden": 100, "intermediate": 72, "bias": True, "out_dtype": "float32"},
        {**_RANK, "hidden": 64, "intermediate": 48, "activation": "gelu", "shared": True},
        {"experts": 12, "top_k": 4, "hidden": 96, "intermediate": 33, "activation": "swiglu_clamped", "bias": True},
        {"experts": 1, "top_k": 1, "hidden": 17, "intermediate": 1},
        {**_RANK, "hidden": 256, "intermediate": 128, **_FP8},
        {"experts": 4, "top_k": 2, "hidden": 128, "intermediate": 384, "scale_format": "ue8m0", "bias": True, **_FP8},
    ),
    "attention": (
        {**_HEADS, "window": 100},
        {**_HEADS, "softcap": 20.0, "sinks": True},
        {**_HEADS, "num_kv_heads": 1, "head_dim": 80, "page_size": 8},
        {**_HEADS, "num_kv_heads": 8, "causal": False},
        {**_HEADS, "alibi": True, "kv_dtype": "float8_e4m3fn"},
    ),
    "attention.mla": (
        {"num_heads": 3, "kv_lora_rank": 64, "rope_dim": 16, "page_size": 16},
        {"num_heads": 20, "kv_lora_rank": 96, "rope_dim": 24, "page_size": 5},
    ),
}
_EXTRA_ON_GPU: Mapping[str, Sequence[Dims]] = {
    "gemm": (
        {"n": 6144, "k": 4096, "bias": True},
        {"n": 4097, "k": 4104},
        {"n": 4096, "k": 12288, "out_dtype": "float32"},
        {"n": 1, "k": 4097},
        {"n": 7, "k": 1000},
        {"n": 1000, "k": 7},
        {"n": 4097, "k": 1},
    ),
    "gemm.fp8_block": (
        {"n": 6144, "k": 4096},
        {"n": 2112, "k": 7168},
        {"n": 4096, "k": 12288, "out_dtype": "float32"},
        {"n": 4097, "k": 4104},
        {"n": 1000, "k": 7},
        {"n": 4097, "k": 1},
    ),
    "gemm.fp8": ({"n": 6144, "k": 4096, "bias": True}, {"n": 4097, "k": 4104}, {"n": 4096, "k": 12288}),
    "rms_norm.fp8_group": ({"n": 7168}, {"n": 16384}),
    "gemm.int4": (
        {"n": 6144, "k": 4096, "zero_points": True},
        {"n": 1536, "k": 14336, "bias": True},
        {"n": 4112, "k": 4224, "zero_points": True, "group_size": 64, "bias": True},
        {"n": 8192, "k": 3584, "group_size": 3584},
    ),
    "bmm": ({"n": 512, "k": 128},),
    "rms_norm": ({"n": 8192}, {"n": 20003}),
    "mean": ({"n": 20003},),
    "softmax": ({"n": 50257},),
    "log_softmax": ({"n": 151936}, {"n": 151936, "out_dtype": "float32"}),
    "token_logprob": ({"n": 151936},),
    "moe.router": (
        {"experts": 256, "scoring": "sigmoid", "correction_bias": True, "n_group": 8, "topk_group": 4},
        {"experts": 512, "top_k": 10},
    ),
    "moe.experts": (
        {"intermediate": 768},  # Qwen3-30B-A3B
        {"experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 1792, "out_dtype": "float32"},  # Mixtral-8x7B, TP 8
        {"experts": 32, "hidden": 7168, "intermediate": 2048, "expert_map": True, "global_experts": 256},  # EP 8
        {"experts": 32, "top_k": 4, "hidden": 2880, "intermediate": 360, "activation": "swiglu_clamped", "bias": True},
        {"intermediate": 768, **_FP8},
        {"experts": 256, "hidden": 7168, "intermediate": 256, "out_dtype": "float32", **_FP8},  # DeepSeek-V3, TP 8
    ),
    "attention": (
        {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "window": 1000, "sinks": True},
        {"num_heads": 16, "num_kv_heads": 8, "head_dim": 256, "softcap": 50.0},
        {"num_heads": 16, "num_kv_heads": 16, "head_dim": 128, "alibi": True},
        {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "kv_dtype": "float8_e4m3fn"},
    ),
    "attention.mla": ({"num_heads": 16}, {"num_heads": 128, "page_size": 16}),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is compared for one problem."""

    rows: tuple[int, ...]
    """M of each batch."""
    pool: int
    """Distinct rows."""
    graph_rows: tuple[int, ...]
    lengths: tuple[int, ...]
    """KV lengths of the sequences."""
    chunks: tuple[int, ...]
    decodes: int
    """Positions of each sequence that are decoded, at most."""
    singles: int
    """Calls of one decode step, or of one chunk of a size."""
    max_seqs: int
    accuracy_rows: int = 67
    """M of the calls that are compared with the fp64 reference."""
    every_m: int = 512
    """Up to which M a rung that chooses inside is run at every M."""
    max_tokens: int = 8192
    """What such a rung is bound for, so that it names its edges up to there; less where a call would be too large."""


_ON_GPU = Sizes(
    rows=(1, 2, 3, 5, 7, 8, 16, 17, 33, 64, 100, 200, 257, 1000, 2049),
    pool=64,
    graph_rows=(1, 16, 17, 64, 257),
    lengths=(1, 16, 17, 100, 511, 512, 513, 777, 2049, 5000),
    chunks=(1, 7, 64, 512),
    decodes=200,
    singles=24,
    max_seqs=64,
)
_ON_CPU = Sizes(
    rows=(1, 2, 3, 5, 7, 8, 16, 17, 33, 64, 100, 200),
    pool=16,
    graph_rows=(1, 16, 17, 64),
    lengths=(1, 16, 17, 100, 300),
    chunks=(1, 7, 64, 512),
    decodes=24,
    singles=6,
    max_seqs=24,
    every_m=128,
)
# For the typical dims of products and attention, which take a processor long.
_ON_CPU_LARGE = replace(
    _ON_CPU, rows=(1, 2, 7, 17, 64), pool=4, lengths=(1, 17, 200), chunks=(7, 64), decodes=8, singles=3, max_seqs=8
)
_LARGE = 1 << 19
"""Multiplications a row from which a processor takes the sizes above."""
_TYPICAL_CONTEXT = 256
_SHORTEST_TILE = 32
"""KV tiles are wider; smaller integers among params count rows, heads or warps."""
MOST_ELEMENTS = 1 << 28
"""Of the widest tensor of a batch, of which a GPU must hold several copies. Edges of the ladder are never left out."""


def problems_for(
    device: Device, op_names: Sequence[str] | None = None, dtypes: Sequence[str] | None = None
) -> Iterator[Problem]:
    """The default problems: typical dims and odd ones, for each op asked for (all that exist, when None) and dtype.

    Raises `UsageError` for an op or dtype that does not exist, and for an op asked for by name that nothing implements.
    """
    chosen = [op for op in ops.CATALOGUE.values() if op.available]
    if op_names is not None:
        chosen = [_available(name) for name in dict.fromkeys(op_names)]
    wanted = None if dtypes is None else {parse_dtype(dtype) for dtype in dtypes}
    for op in chosen:
        for dtype in op.dtypes:
            if wanted is None or dtype in wanted:
                yield from dict.fromkeys(_problems_of(op, dtype, device))


def _available(name: str) -> Op:
    op = ops.get(name)
    if not op.available:
        available = [other.name for other in ops.CATALOGUE.values() if other.available]
        raise UsageError(f"{name} is unsupported: no backend implements it yet; verify takes {', '.join(available)}")
    return op


def _problems_of(op: Op, dtype: str, device: Device) -> Iterator[Problem]:
    yield op.typical(dtype)
    extra = [*_EXTRA.get(op.name, ())]
    if device.arch.vendor != "cpu":
        extra += _EXTRA_ON_GPU.get(op.name, ())
    needed = {dim.name: dim.typical for dim in op.dims if dim.default is None}
    for dims in extra:
        yield op.problem(dtype, {**needed, **dims})


def sizes_for(selection: Selection, effort: str) -> Sizes:
    """How much to compare for a ladder: fixed sizes, and both sides of every edge it has.

    Raises `UsageError` for an effort that does not exist.
    """
    if effort not in EFFORTS:
        raise UsageError(f"unknown effort {effort!r}; known: {', '.join(EFFORTS)}{did_you_mean(effort, EFFORTS)}")
    on_cpu = selection.device.arch.vendor == "cpu"
    base = _ON_GPU
    if on_cpu:
        base = _ON_CPU_LARGE if _work_of_a_row(selection.problem) >= _LARGE else _ON_CPU
    rows = {*base.rows, *_edges(selection, max(base.rows))}
    lengths = {*base.lengths, *(edge for edge in _edges(selection, max(base.lengths)) if edge > _SHORTEST_TILE)}
    if effort == "full":
        # Libraries choose inside a rung, where nobody sees the edges: every M.
        rows |= set(range(1, 129 if on_cpu else 513))
        lengths |= {257, 300, 513, 777}
        if not on_cpu:
            lengths |= {9001, 40_000}
            base = replace(base, chunks=(*base.chunks, 2048), max_seqs=256)
    width = widest_dim(selection.problem)
    rungs = {edge for rung in selection.rungs if rung.max_m for edge in _around(rung.max_m)}
    return replace(
        base,
        rows=tuple(sorted(rungs | {m for m in rows if m * width <= MOST_ELEMENTS})),
        lengths=tuple(sorted(lengths)),
        decodes=base.decodes * (1 if effort == "quick" else 4),
        singles=base.singles * (1 if effort == "quick" else 4),
    )


def widest_dim(problem: Problem) -> int:
    """About how many elements the widest row of a call has."""
    return max(value for value in problem.dims.values() if type(value) is int)


def _work_of_a_row(problem: Problem) -> int:
    """Roughly how many multiplications a row takes, where that can be many."""
    if ops.get(problem.op).sequences:
        width = sum(problem.size(dim) for dim in ("head_dim", "kv_lora_rank", "rope_dim") if dim in problem.dims)
        return problem.size("num_heads") * width * _TYPICAL_CONTEXT
    if "intermediate" in problem.dims:
        return 3 * problem.size("top_k") * problem.size("hidden") * problem.size("intermediate")
    return problem.size("n") * problem.size("k") if {"n", "k"} <= problem.dims.keys() else 0


def _edges(selection: Selection, most: int) -> set[int]:
    """Both sides of every integer among a ladder's params and tiles, up to a size.

    Blocks of rows, tiles and splits of the KV have edges too, and a kernel that follows one differs there.
    """
    values: set[object] = set()
    for rung in selection.rungs:
        sizes = [*rung.params.model_dump().values(), *(rung.tile.model_dump().values() if rung.tile else ())]
        for value in sizes:  # growing ones are text: 256/512@4096
            values |= {int(number) for number in re.findall(r"\d+", value)} if isinstance(value, str) else {value}
    blocks = [value for value in values if type(value) is int and 8 <= value <= most]
    return {edge for block in blocks for edge in _around(block)}


def _around(edge: int) -> tuple[int, ...]:
    return tuple(size for size in (edge - 1, edge, edge + 1) if size > 0)

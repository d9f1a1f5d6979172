"""Run each kernel of this machine's plan once, on small odd shapes, for a memory checker.

::

    compute-sanitizer --tool memcheck python tests/gpu/sanitize_small.py [OP...]

All ops if none is named. Exits 1 when a result is not near the reference. On a machine without a GPU it runs the
processor's kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.ops.reference.mla import latent_batch
from bidispatch.ops.schema import Problem
from bidispatch.registry import default_registry
from bidispatch.runtime.bind import load_attribute
from bidispatch.verify.subject import limits_for

ROWS = (1, 19, 70)
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2, "float8_e4m3fn": 5e-3}
QUANTISED = 5e-2
"""Of a result in fp8, whatever the dtype of the problem."""
_RANK = {"experts": 5, "top_k": 6, "expert_map": True, "global_experts": 20}
DIMS = {
    "gemm": ({"n": 67, "k": 93, "bias": True}, {"n": 130, "k": 256, "out_dtype": "float32"}),
    "gemm.int4": (
        {"n": 80, "k": 2176, "bias": True},
        {"n": 144, "k": 256, "zero_points": True, "group_size": 32, "out_dtype": "float32"},
    ),
    "bmm": ({"n": 37, "k": 51},),
    "gemm.fp8_block": ({"n": 67, "k": 93}, {"n": 300, "k": 300, "scale_format": "ue8m0"}, {"n": 136, "k": 256}),
    "gemm.fp8": ({"n": 67, "k": 93, "bias": True}, {"n": 130, "k": 300, "x_scaling": "tensor"}),
    "quantize.fp8_group": ({"k": 203}, {"k": 40, "scale_format": "ue8m0"}),
    "quantize.fp8_token": ({"k": 203}, {"k": 4100}),
    "quantize.fp8_tensor": ({"k": 203},),
    "silu_and_mul.fp8_group": ({"n": 203},),
    "rms_norm.fp8_group": ({"n": 203}, {"n": 40, "gemma": True}),
    "fused_add_rms_norm.fp8_group": ({"n": 203},),
    "rms_norm": ({"n": 203}, {"n": 17001, "gemma": True}),
    "fused_add_rms_norm": ({"n": 203},),
    "qk_norm": ({"head_dim": 80, "num_heads": 6, "num_kv_heads": 3},),
    "silu_and_mul": ({"n": 203},),
    "gelu_tanh_and_mul": ({"n": 203},),
    "softmax": ({"n": 203},),
    "log_softmax": ({"n": 203}, {"n": 9001}),
    "token_logprob": ({"n": 203}, {"n": 9001}),
    "mean": ({"n": 203},),
    "attention": (
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64},
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 80, "page_size": 5, "window": 40},
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 80, "page_size": 5, "sinks": True, "softcap": 9.0},
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "alibi": True},
    ),
    "moe.router": (
        {"experts": 20, "top_k": 3},
        {"experts": 20, "top_k": 3, "scoring": "sigmoid", "correction_bias": True, "n_group": 4, "topk_group": 2},
    ),
    "moe.experts": (
        {"experts": 5, "top_k": 2, "hidden": 72, "intermediate": 56},
        {"experts": 9, "top_k": 3, "hidden": 67, "intermediate": 33, "activation": "swiglu_clamped", "bias": True},
        {**_RANK, "hidden": 80, "intermediate": 96, "activation": "gelu", "shared": True},
        {**_RANK, "hidden": 256, "intermediate": 128, "weight_dtype": "float8_e4m3fn"},
    ),
    "attention.mla": (
        {"num_heads": 16},
        {"num_heads": 3, "kv_lora_rank": 80, "rope_dim": 24, "page_size": 5},
    ),
}


# Kernels that a plan leaves to other M or dtypes, forced. Three chunks of K, the last one short.
FORCED = (
    ("triton.fp8_block", "float8_e4m3fn", {"n": 136, "k": 300}),
    ("triton.gemm", "bfloat16", {"n": 67, "k": 93, "bias": True}),
    ("triton.gemm_split_k", "bfloat16", {"n": 67, "k": 2093, "out_dtype": "float32"}),
    ("triton.gemm_split_k", "float32", {"n": 67, "k": 2093, "bias": True}),
)


# Decode steps of so many sequences that a program walks the splits of one after the other, and prompts and chunks.
LENGTHS = (1, 63, 300, 700, 257) * 30
DECODE, PROMPTS = (tuple(1 for _ in LENGTHS), LENGTHS), ((300, 20, 1, 90, 17, 0), (300, 40, 1, 700, 600, 0))
STEPS = (
    ("attention", {"num_heads": 16, "num_kv_heads": 8, "head_dim": 64}, paged_batch, DECODE),
    (
        "attention",
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 128, "window": 100, "sinks": True},
        paged_batch,
        DECODE,
    ),
    *(
        ("attention.mla", {"num_heads": heads, "page_size": page}, latent_batch, lengths)
        for heads, page, lengths in ((16, 64, DECODE), (128, 64, DECODE), (16, 16, PROMPTS), (128, 64, PROMPTS))
    ),
)


def has_e4m3(plan: bid.Plan) -> bool:
    """Whether the device has fp8 of this format: NVIDIA's from Ada on, and the processor."""
    return plan.device.arch.name not in ("sm80", "sm86", "sm87", "gfx942")


def worst_error(plan: bid.Plan, problem: Problem, rows: int) -> float:
    """`error_of` a call of so many rows of the op's own inputs."""
    arguments = load_attribute(ops.get(problem.op).inputs)(problem, rows, device=plan.device.torch_device)
    return error_of(plan, problem, arguments)


def error_of(plan: bid.Plan, problem: Problem, arguments: Sequence[torch.Tensor | None]) -> float:
    """Run one call; return the largest ‖out − ref‖ / ‖ref‖ of its outputs, as a part of what rounding may give."""
    op = ops.get(problem.op)
    limits = limits_for(problem, [arguments])
    kernel = plan.select_problem(problem).bind(
        max_tokens=limits.max_tokens,
        max_seqs=limits.max_seqs,
        max_seq_len=limits.max_seq_len,
        max_query_len=limits.max_query_len,
    )
    outputs = kernel(*arguments)
    scalars = [scalar.default_for(problem) for scalar in op.scalars]
    references = load_attribute(op.reference)(problem, *arguments, *scalars)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return max(
        float((out.double() - wanted.double()).norm() / wanted.double().norm()) / _tolerance(problem, out)
        for out, wanted in zip(outputs, references, strict=True)
    )


def _tolerance(problem: Problem, out: torch.Tensor) -> float:
    """Of an output. Products of fp8 weights quantise what lies between, where an element may round to its neighbour."""
    if out.dtype is torch.float8_e4m3fn:
        return QUANTISED
    inner = str(problem["weight_dtype"]) if "weight_dtype" in problem.dims else problem.dtype
    return max(TOLERANCE[problem.dtype], TOLERANCE[inner])


def main(only: Sequence[str]) -> int:
    """Run everything, or these ops; return the exit code."""
    plan = bid.plan("auto")
    wrong = calls = 0
    for name, every in DIMS.items():
        if only and name not in only:
            continue
        for dtype in ops.get(name).dtypes:
            for dims in every:
                problem = ops.get(name).problem(dtype, dims)
                if "fp8" in name and not has_e4m3(plan):
                    continue
                for rows in ROWS:
                    error = worst_error(plan, problem, rows)
                    calls += 1
                    if not error <= 1:
                        wrong += 1
                        print(f"{problem}, {rows} rows: {error:.2f} of the tolerance")  # noqa: T201 - a script
    for name, dims, batch, (queries, lengths) in STEPS:
        if only and name not in only:
            continue
        problem = ops.get(name).problem("bfloat16", dims)
        step = batch(problem, queries, lengths, device=plan.device.torch_device)
        error = error_of(plan, problem, step)
        calls += 1
        if not error <= 1:
            wrong += 1
            print(f"{problem}, {len(lengths)} sequences: {error:.2f} of the tolerance")  # noqa: T201 - a script
    if plan.device.arch.vendor != "cpu":
        for name, dtype, dims in FORCED:
            op = ops.get(default_registry().get(name).op)
            if only and op.name not in only:
                continue
            with bid.override(f"{op.name}={name}"):
                errors = [worst_error(plan, op.problem(dtype, dims), rows) for rows in ROWS]
            calls += len(errors)
            wrong += sum(not error <= 1 for error in errors)
        torch.cuda.synchronize()
    print(f"{calls} calls on {plan.device.name}, {wrong} wrong")  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

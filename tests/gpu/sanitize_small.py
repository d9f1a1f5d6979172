"""Run each kernel of this machine's plan once, on small odd shapes, for a memory checker.

::

    compute-sanitizer --tool memcheck python tests/gpu/sanitize_small.py

Exits 1 when a result is not near the reference. Without a GPU it runs the processor's kernels.
"""

from __future__ import annotations

import sys

import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute
from bidispatch.verify.subject import limits_for

ROWS = (1, 19, 70)
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2}
DIMS = {
    "gemm": ({"n": 67, "k": 93, "bias": True}, {"n": 130, "k": 256, "out_dtype": "float32"}),
    "gemm.int4": (
        {"n": 80, "k": 2176, "bias": True},
        {"n": 144, "k": 256, "zero_points": True, "group_size": 32, "out_dtype": "float32"},
    ),
    "bmm": ({"n": 37, "k": 51},),
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
    "attention.mla": (
        {"num_heads": 16},
        {"num_heads": 3, "kv_lora_rank": 80, "rope_dim": 24, "page_size": 5},
    ),
}


# Kernels that a plan leaves to other M or dtypes, forced. Three chunks of K, the last one short.
FORCED = (
    ("triton.gemm", "bfloat16", {"n": 67, "k": 93, "bias": True}),
    ("triton.gemm_split_k", "bfloat16", {"n": 67, "k": 2093, "out_dtype": "float32"}),
    ("triton.gemm_split_k", "float32", {"n": 67, "k": 2093, "bias": True}),
)


def largest_error(plan: bid.Plan, problem: Problem, rows: int) -> float:
    """Run one call; return the largest ‖out − ref‖ / ‖ref‖ of its outputs."""
    op = ops.get(problem.op)
    arguments = load_attribute(op.inputs)(problem, rows, device=plan.device.torch_device)
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
        float((out.double() - wanted).norm() / wanted.norm()) for out, wanted in zip(outputs, references, strict=True)
    )


def main() -> int:
    """Run everything; return the exit code."""
    plan = bid.plan("auto")
    wrong = calls = 0
    for name, every in DIMS.items():
        for dtype in ops.get(name).dtypes:
            for dims in every:
                problem = ops.get(name).problem(dtype, dims)
                for rows in ROWS:
                    error = largest_error(plan, problem, rows)
                    calls += 1
                    if not error <= TOLERANCE[dtype]:
                        wrong += 1
                        print(f"{problem}, {rows} rows: error {error:.2e}")  # noqa: T201 - a script
    if plan.device.arch.vendor != "cpu":
        for name, dtype, dims in FORCED:
            with bid.override(f"gemm={name}"):
                errors = [largest_error(plan, ops.get("gemm").problem(dtype, dims), rows) for rows in ROWS]
            calls += len(errors)
            wrong += sum(not error <= TOLERANCE[dtype] for error in errors)
        torch.cuda.synchronize()
    print(f"{calls} calls on {plan.device.name}, {wrong} wrong")  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

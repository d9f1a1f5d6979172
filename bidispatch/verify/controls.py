"""Negative controls: kernels broken on purpose that the checks must catch, run with every verification.

They go through the same comparison as what is verified. A control that is not caught means that the checks prove
nothing here, and fails the run; so does a sound kernel that does not pass. Imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.planning.selection import Selection
from bidispatch.registry import Implementation, Params, Rung
from bidispatch.verify.broken import ControlParams
from bidispatch.verify.cases import Sizes
from bidispatch.verify.decode_steps import MOST_QUERIES, named
from bidispatch.verify.ladder import verify_selection
from bidispatch.verify.report import SOUND, ControlResult, ProblemResult

__all__ = [
    "ATTENTION_FAULTS",
    "EXPERTS_FAULTS",
    "EXPERTS_PROBLEM",
    "LADDER_FAULTS",
    "PRODUCT_FAULTS",
    "SEQUENCE_PROBLEMS",
    "control_selection",
    "run_controls",
]

_ACCURACY = "accuracy"
_WITHOUT_DRAFTS, _WITH_DRAFTS = (named(queries) for queries in MOST_QUERIES)

PRODUCT_FAULTS: Mapping[str, str] = {
    "splits follow M": "batch sizes, normal",
    "a row is skipped": "batch sizes, normal",
    "splits change by the call": "repeated calls",
    "neighbours leak": "neighbours of NaN, inf and huge",
    "a row too many": "memory around the batch",
    "strides ignored": "strided and unaligned rows",
    "splits follow the limits": "bound for",
    "splits follow N": "merged and separate weights",
    "last k dropped": _ACCURACY,
}
"""Each fault of the product, and the check that must catch it (its name, or how that begins)."""

ATTENTION_FAULTS: Mapping[str, str] = {
    "splits follow the longest": "mixed batches, normal",
    "splits follow the chunk": "decode against prefill",
    "splits follow the page": "page order",
    "splits follow the limits": "bound for",
    "splits of a decode binding": _WITHOUT_DRAFTS,
    "splits of a binding for drafts": _WITH_DRAFTS,
    "neighbours leak": "neighbours of NaN, inf and huge",
    "unused slots leak": "mixed batches, normal",
    "padding is written": "padding rows and empty sequences",
    "wrong scale": _ACCURACY,
}

EXPERTS_FAULTS: Mapping[str, str] = {
    "slots in an order that follows M": "batch sizes, normal",
    "experts have room for few": "neighbours in other places",
    "padding counts": _ACCURACY,
}

LADDER_FAULTS: Mapping[str, ControlParams] = {
    "of another class": ControlParams(splits=2),
    "another split at one M": ControlParams(fault="another split at one M"),
    "another split above an edge": ControlParams(fault="another split above an edge"),
}
"""What is wrong with the second rung of a ladder, which must be named. The last two stand for libraries that choose."""

_CAPTURE = "splits follow the capture"
_SIZES = Sizes(
    rows=(1, 2, 5, 17),
    pool=6,
    graph_rows=(1, 17),
    lengths=(1, 4, 5, 9, 18),
    chunks=(7,),
    decodes=6,
    singles=6,
    max_seqs=6,
    accuracy_rows=8,
    every_m=40,
    max_tokens=640,
)
_PRODUCT = ops.get("gemm").problem("float32", {"n": 5, "k": 32})
SEQUENCE_PROBLEMS: Mapping[str, Problem] = {
    "attention": ops.get("attention").problem(
        "float32", {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "page_size": 4}
    ),
    # In fp32, which the op itself does not take: 16 bits round most of a fault away.
    "attention.mla": Problem(
        "attention.mla", "float32", {"num_heads": 2, "kv_lora_rank": 8, "rope_dim": 2, "page_size": 4}
    ),
}
"""What the controls of each op over sequences are given; every such op has one."""


EXPERTS_PROBLEM = Problem(
    "moe.experts",
    "float32",
    {
        **ops.get("moe.experts").problem("float16", {"experts": 3, "top_k": 3, "hidden": 12, "intermediate": 6}).dims,
        "weight_dtype": "float32",
        "out_dtype": "float32",
    },
)
"""What the controls of `moe.experts` are given, in fp32 for the same reason."""


def run_controls(
    device: Device,
    *,
    rows: bool = True,
    experts: bool = True,
    over_sequences: Iterable[str] = SEQUENCE_PROBLEMS,
    cuda_graph: bool = False,
) -> Iterator[ControlResult]:
    """Run the controls of the row-wise checks, of `moe.experts`, of the ops over sequences, and of graph replay."""
    if rows:
        yield _must_pass("a sound product", device, _PRODUCT)
        for fault, by in PRODUCT_FAULTS.items():
            yield _must_fail(f"product: {fault}", by, _verify(device, _PRODUCT, [ControlParams(fault=fault)]))
        for fault, params in LADDER_FAULTS.items():
            result = _verify(device, _PRODUCT, [ControlParams(), params])
            yield _must_fail(f"second rung: {fault}", "rung 2", result)
    if experts:
        yield _must_pass("a sound moe.experts", device, EXPERTS_PROBLEM)
        for fault, by in EXPERTS_FAULTS.items():
            found = _verify(device, EXPERTS_PROBLEM, [ControlParams(fault=fault)])
            yield _must_fail(f"moe.experts: {fault}", by, found)
    for op in over_sequences:
        problem = SEQUENCE_PROBLEMS[op]
        yield _must_pass(f"a sound {op}", device, problem)
        for fault, by in ATTENTION_FAULTS.items():
            yield _must_fail(f"{op}: {fault}", by, _verify(device, problem, [ControlParams(fault=fault)]))
    if cuda_graph:
        result = _verify(device, _PRODUCT, [ControlParams(fault=_CAPTURE)], cuda_graph=True)
        yield _must_fail(f"product: {_CAPTURE}", "CUDA graph replay", result)


def control_selection(device: Device, problem: Problem, rungs: Sequence[Params]) -> Selection:
    """A ladder of control kernels; its first rungs serve M up to 4, 8 and so on."""
    tops = [*(4 * (index + 1) for index in range(len(rungs) - 1)), None]
    ladder = tuple(Rung(_kernel(problem, params), params, None, top) for params, top in zip(rungs, tops, strict=True))
    return Selection(problem, device, ladder, "control", Invariance.SEQUENCE, ())


def _kernel(problem: Problem, params: Params) -> Implementation:
    over_sequences = problem.op in SEQUENCE_PROBLEMS
    kernel = "product" if problem.op == "gemm" else problem.op.replace(".", "_")
    return Implementation(
        name=f"control.{kernel}",
        op=problem.op,
        load=f"bidispatch.verify.broken:bind_{kernel}",
        archs=("*",),
        dtypes=("float32",),
        numerics=lambda params, problem: "control",
        params=ControlParams,
        libraries=("torch",),
        chooses_inside=isinstance(params, ControlParams) and params.fault.startswith("another split"),
        cuda_graph=not over_sequences,
    )


def _verify(
    device: Device, problem: Problem, rungs: Sequence[ControlParams], *, cuda_graph: bool = False
) -> ProblemResult:
    return verify_selection(
        control_selection(device, problem, rungs),
        cuda_graph=cuda_graph,
        select=lambda part: control_selection(device, part, rungs),
        stock=False,
        sizes=_SIZES,
    )


def _must_fail(name: str, by: str, result: ProblemResult) -> ControlResult:
    if by == _ACCURACY:
        wrong = [accuracy for accuracy in result.accuracy if not accuracy.passed]
        detail = f"error {wrong[0].error:.2e}" if wrong else ""
        return ControlResult(name, by, bool(wrong), detail or result.error)
    failed = [check for check in (*result.checks, *result.classes) if check.name.startswith(by) and not check.passed]
    return ControlResult(name, by, bool(failed), str(failed[0]) if failed else result.error)


def _must_pass(name: str, device: Device, problem: Problem) -> ControlResult:
    """A check that fails everything catches every control: a kernel without fault must pass."""
    result = _verify(device, problem, [ControlParams()])
    return ControlResult(name, SOUND, result.passed, "; ".join(result.faults))

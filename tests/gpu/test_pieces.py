"""Experts' calls in pieces on a GPU: the bits of whole ones, eager and in a graph, and what pieces cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bidispatch import ops
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.context import Limits
from bidispatch.verify.compare import bits

FP8 = "float8_e4m3fn"
MOST = 8192
ROWS = (4095, 4097, 6000, 8191, 8192)
SHAPES = {
    "Qwen3-30B-A3B": {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768},
    "a rank of DeepSeek-V3": {"experts": 256, "top_k": 8, "hidden": 7168, "intermediate": 256},
    "gpt-oss": {"experts": 32, "top_k": 4, "hidden": 2880, "intermediate": 2880, "bias": True},
}


def kernels_of(plan, problem):
    """The plan's ladder with room for all rows, and with room for fewer and fewer."""
    selection = plan.select_problem(problem)
    for size in (4096, 128, 48):
        rungs = tuple(
            replace(rung, tile=rung.tile.model_copy(update={"workspace_mb": size})) for rung in selection.rungs
        )
        yield size, bind(problem, plan.device, rungs, Limits(MOST))


@pytest.mark.parametrize("weights", ["bfloat16", FP8])
@pytest.mark.parametrize("dims", SHAPES.values(), ids=SHAPES)
def test_pieces_have_the_bits_of_the_whole(plan, dims, weights, record_property):
    if weights == FP8 and dims["hidden"] % 128:
        pytest.skip("fp8 weights have blocks of 128")
    problem = ops.get("moe.experts").problem("bfloat16", {**dims, "weight_dtype": weights})
    arguments = load_attribute(ops.get(problem.op).inputs)(problem, MOST, device="cuda", distribution="normal")
    per_row = [argument.shape[0] == "m" for argument in ops.get(problem.op).arguments]
    (_, whole), *cut = kernels_of(plan, problem)
    for rows in ROWS:
        given = [a[:rows] if a is not None and of_rows else a for a, of_rows in zip(arguments, per_row, strict=True)]
        wanted = bits(whole(*given))
        for size, kernel in cut:
            assert torch.equal(bits(kernel(*given)), wanted), (size, rows)
            graph, out = torch.cuda.CUDAGraph(), torch.empty_like(given[0])
            with torch.cuda.graph(graph):
                kernel(*given, out=out)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(bits(out), wanted), (size, rows, "graph")
    for size, kernel in ((4096, whole), *cut):
        record_property(f"ms_{size}", milliseconds(lambda kernel=kernel: kernel(*arguments)))


def milliseconds(call):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    for _ in range(5):
        call()
    end.record()
    torch.cuda.synchronize()
    return round(begin.elapsed_time(end) / 5, 3)

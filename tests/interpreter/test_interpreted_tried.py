"""The launch shapes that `tune` tries for rows: all give the bits of the one that serves by itself."""

from __future__ import annotations

import pytest
from interpreted import SM90, bind, draw_inputs, implementation, run, same_bits, tiles

from bidispatch import ops
from bidispatch.ops import quantize
from bidispatch.runtime.bind import load_attribute

ROWS = 9
PROBLEMS = {
    "moe.router": {"experts": 200, "top_k": 3},
    **{op.name: {"k" if "k" in op.dim_names else "n": 700} for op in quantize.OPS},
}


@pytest.mark.parametrize("op", PROBLEMS)
def test_every_shape_that_is_tried_gives_the_same_bits(op: str) -> None:
    problem = ops.get(op).problem("float16", PROBLEMS[op])
    found = implementation(problem)
    arguments = draw_inputs(problem, ROWS)
    wanted = run(problem, arguments, bind(problem, tile=tiles(problem)[0]))
    tried = list(load_attribute(found.search)(SM90, problem, found.params(), ROWS))
    assert len(tried) > 3
    for tile in tried:
        results = run(problem, arguments, bind(problem, tile=tile))
        assert all(same_bits(result, expected) for result, expected in zip(results, wanted, strict=True)), tile

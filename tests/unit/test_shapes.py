"""Files of shapes: what they may hold, and the ones that come with the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from bidispatch import ops
from bidispatch.errors import UsageError
from bidispatch.ops.shapes import read_shapes

SWEEPS = Path(__file__).parents[2] / "benchmarks" / "sweeps"


def write(tmp_path, text):
    path = tmp_path / "shapes.yaml"
    path.write_text(text)
    return path


def test_entries_of_equal_dims_become_one_with_every_name(tmp_path):
    shapes = read_shapes(write(tmp_path, "- {name: a, n: 8, k: 4}\n- {name: b, n: 9, k: 4}\n- {name: c, k: 4, n: 8}\n"))
    assert [(shape.names, shape.dims) for shape in shapes] == [
        (("a", "c"), {"n": 8, "k": 4}),
        (("b",), {"n": 9, "k": 4}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a list of shapes"),
        ("a: 1", "not a list of shapes"),
        ("- 5", "entry 1 .* not a mapping"),
        ("- {n: 5}", "entry 1 .* has no name"),
        ("- {name: 5, n: 5}", "has no name"),
        ("- {name: a}", "needs dims"),
        ("- {name: a, n: [5]}", "plain values"),
        ("- {name: a, n: 5}\n- {name: a, n: 6}", "the name 'a' twice"),
        ("- {name: a, n: 5, n: 6}", "not YAML"),
        ("- {name: a, n: 5", "not YAML"),
    ],
)
def test_what_is_no_file_of_shapes_is_refused(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        read_shapes(write(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_shapes(tmp_path / "none.yaml")


def test_the_shapes_of_gemm_are_problems_each_once():
    shapes = read_shapes(SWEEPS / "gemm.yaml")
    problems = {ops.get("gemm").problem("bfloat16", shape.dims) for shape in shapes}
    assert len(problems) == len(shapes) == 33
    assert sum(len(shape.names) for shape in shapes) == 35
    (router,) = [shape for shape in shapes if "role" in shape.dims]
    assert router.dims == {"n": 256, "k": 7168, "role": "router", "out_dtype": "float32"}

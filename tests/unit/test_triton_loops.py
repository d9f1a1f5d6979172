"""Triton kernels hold no value that a loop carries only to bound a loop within it.

Triton 3.6 takes such a value for unused and keeps its first one: the inner loop's bounds count as no use (its pull
request 9036). Neither the interpreter nor later versions, which the tests compile with, would show it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "backends").rglob("*.py"))
LOOPS = (ast.For, ast.While)


def names(tree: ast.AST, context: type[ast.expr_context]) -> Iterator[str]:
    return (node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context))


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def lost(source: str) -> list[str]:
    """Names, with their lines, that a kernel's loop carries and reads nowhere but in the bounds of loops within."""
    found = []
    kernels = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and is_kernel(node)]
    for loop in (node for kernel in kernels for node in ast.walk(kernel) if isinstance(node, LOOPS)):
        body = ast.Module(loop.body, [])
        bounds = [inner.iter for inner in ast.walk(body) if isinstance(inner, ast.For)]
        inside = [name for bound in bounds for name in names(bound, ast.Load)]
        read = [*names(body, ast.Load), *(names(loop.test, ast.Load) if isinstance(loop, ast.While) else ())]
        assigned = set(names(body, ast.Store))
        found += [
            f"{name}, line {loop.lineno}"
            for name in sorted(set(inside) & assigned)
            if read.count(name) == inside.count(name) and first(loop.body, name) == "read"
        ]
    return found


def first(body: list[ast.stmt], name: str) -> str:
    """What statements do with a name first: "read" it, so that a loop around them carries it, surely "assign" it, or
    neither: "".
    """
    for statement in body:
        blocks = [getattr(statement, block, []) for block in ("body", "orelse")]
        inner = [first(block, name) for block in blocks if block]
        head = [part for part in ast.iter_child_nodes(statement) if not isinstance(part, ast.stmt)]
        updated = isinstance(statement, ast.AugAssign) and name in names(statement.target, ast.Store)
        if updated or name in names(ast.Module(head, []), ast.Load) or "read" in inner:
            return "read"
        if name in names(ast.Module(head, []), ast.Store) and not isinstance(statement, LOOPS):
            return "assign"
        if isinstance(statement, ast.If) and len(inner) == len(blocks) and set(inner) == {"assign"}:
            return "assign"
    return ""


def test_no_kernel_carries_a_value_for_bounds_alone():
    checked = [path for path in SOURCES if "jit" in path.read_text(encoding="utf-8")]
    assert len(checked) > 10
    assert {path.name: found for path in checked if (found := lost(path.read_text(encoding="utf-8")))} == {}


KERNEL = """
@triton.jit
def kernel(x_ptr, n):
    own = 1
    total = 0
    for split in range(n):
        stop = split * 4
        {before}
        for tile in range(own, stop, 2):
            total += tile
        {after}
    return total
"""


@pytest.mark.parametrize(
    ("before", "after", "caught"),
    [
        ("pass", "own = stop + 1", True),
        ("pass", "own += 2", True),
        ("own = stop - 3", "pass", False),  # new in each turn
        ("own = stop - 3; own += 1", "pass", False),
        ("if split: own = 1", "own = stop", True),
        ("pass", "own = stop + 1; total += own", False),  # read elsewhere
        ("pass", "pass", False),  # carried by no turn
    ],
)
def test_such_a_value_is_caught(before, after, caught):
    assert bool(lost(KERNEL.format(before=before, after=after))) == caught

"""Calls made in pieces: how long those are, and that what has no rows goes with each."""

from __future__ import annotations

import pytest
import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch_backends.pieces import in_pieces, most_rows
from bidispatch_backends.triton.moe_params import ExpertsTile, experts_workspaces, most_tokens

DEEPSEEK = {"experts": 256, "top_k": 8, "hidden": 7168, "intermediate": 2048, "weight_dtype": "float8_e4m3fn"}


@pytest.mark.parametrize(
    ("limit", "rows", "most"),
    [(10_000, 8192, 896), (10_000, 900, 900), (10_000, 1000, 896), (10, 8192, 128), (10, 5, 5), (1 << 30, 8192, 8192)],
)
def test_the_most_rows_within_a_limit_are_whole_steps(limit, rows, most):
    assert most_rows(lambda count: 11 * count, limit, rows) == most


class Recorded:
    """A kernel of `moe.experts` that tells of its calls."""

    edges = (4, 7)

    def __init__(self):
        self.calls = []

    def __call__(self, *arguments):
        self.calls.append(arguments)


def call(kernel, rows):
    x, out, weights, ids = (torch.arange(rows)[:, None] + first for first in (0, 0, 1000, 2000))
    w13, w2 = torch.zeros(2, 3), torch.zeros(2, 4)
    kernel(x, w13, w2, weights, ids, *[None] * 6, out)
    return x, w13, w2


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, [1]), (256, [256]), (257, [256, 1]), (512, [256, 256]), (700, [256, 256, 188]), (513, [256, 256, 1])],
)
def test_pieces_are_those_of_the_rows_in_order(rows, sizes):
    kernel = Recorded()
    x, w13, w2 = call(in_pieces(kernel, "moe.experts", 256, 8192), rows)
    assert [len(arguments[0]) for arguments in kernel.calls] == sizes
    for first in (0, 3, 4, 11):
        assert torch.equal(torch.cat([each[first] for each in kernel.calls]) % 1000, x)
    assert all(each[1] is w13 and each[2] is w2 and each[5:11] == (None,) * 6 for each in kernel.calls)


def test_pieces_are_of_about_the_same_size():
    kernel = Recorded()
    call(in_pieces(kernel, "moe.experts", 1024, 8192), 1100)
    assert [len(arguments[0]) for arguments in kernel.calls] == [640, 460]


def test_a_kernel_with_room_for_all_is_called_itself():
    kernel = Recorded()
    assert in_pieces(kernel, "moe.experts", 64, 64) is kernel
    assert in_pieces(kernel, "moe.experts", 64, 65).edges == kernel.edges


def bytes_of(problem, tile, tokens):
    sizes = experts_workspaces(problem, tile, tokens).values()
    return sum(count * getattr(torch, dtype).itemsize for count, dtype in sizes)


@pytest.mark.parametrize("ranks", [1, 8])
def test_experts_hold_no_more_than_their_tile_says_and_pieces_stay_long(ranks):
    dims = {**DEEPSEEK, "intermediate": 2048 // ranks}
    selection = bid.plan("sm90").select("moe.experts", dtype="bfloat16", **dims)
    tile = selection.rungs[-1].tile
    most = most_tokens(selection.problem, tile, 8192)
    assert 4096 <= most < 8192
    assert bytes_of(selection.problem, tile, most) <= tile.workspace_mb << 20 < bytes_of(selection.problem, tile, 8192)


def test_a_larger_workspace_is_a_choice_of_the_tile():
    problem = ops.get("moe.experts").problem("bfloat16", DEEPSEEK)
    tile = bid.plan("sm90").select_problem(problem).rungs[-1].tile
    assert isinstance(tile, ExpertsTile)
    assert most_tokens(problem, tile.model_copy(update={"workspace_mb": 2048}), 8192) == 8192

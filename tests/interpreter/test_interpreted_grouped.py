"""deep_gemm.moe on a stand-in for the library: the kernels around its products, in both layouts.

In fp16, which the interpreter rounds as a GPU does; on a GPU the problem is bfloat16 alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import CPU, TOLERANCE, draw_inputs, reference, relative_error, rows_of, run, same_bits

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from fake_deep_gemm import GroupedDeepGemm

from bidispatch import ops
from bidispatch.errors import BackendError
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params
from bidispatch.runtime.context import BindContext, Kernel, Limits
from bidispatch_backends.deep_gemm import moe, moe_params
from bidispatch_backends.deep_gemm.moe_params import GroupedTile

SMALL = {"experts": 5, "top_k": 3, "hidden": 48, "intermediate": 40}
FP8 = {"hidden": 256, "intermediate": 128, "weight_dtype": "float8_e4m3fn"}
FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"shared": True, "activation": "gelu"},
    {"activation": "swiglu_clamped", "expert_map": True, "global_experts": 12},
    FP8,
    {**FP8, "scale_format": "ue8m0", "shared": True, "expert_map": True, "global_experts": 9},
)
LAYOUTS = ("masked", "contiguous")
X, W13, W2, WEIGHTS, IDS = range(5)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> GroupedDeepGemm:
    fake = GroupedDeepGemm()
    monkeypatch.setattr(moe, "library", lambda: fake)
    return fake


def experts(**dims: Any) -> Problem:
    return ops.get("moe.experts").problem("float16", {**SMALL, **dims})


def bind(problem: Problem, layout: str, max_tokens: int = 40) -> Kernel:
    """Its workspaces full of NaN, which no row of a result may come near."""
    tile = GroupedTile.model_validate({"layout": layout})
    kernel = moe.bind_experts(BindContext(CPU, problem, Params(), tile, Limits(max_tokens)))
    for memory in (kernel.wide, kernel.both, kernel.act, kernel.x_scales, kernel.act_scales):  # type: ignore[attr-defined]
        if memory is not None:
            memory.view(torch.uint8).fill_(0xFF)
    return kernel


@pytest.mark.parametrize("dims", FEATURES, ids=str)
def test_both_layouts_are_near_the_reference_and_give_the_same_bits(dims: dict[str, Any]) -> None:
    problem = experts(**dims)
    arguments = draw_inputs(problem, 19)
    exact = reference(problem, arguments)[0]
    masked, contiguous = (run(problem, arguments, bind(problem, layout))[0] for layout in LAYOUTS)
    # Gate and up are rounded before what follows is quantised, where 1 of 128 elements then goes to the next fp8 value.
    assert relative_error(masked, exact) < (10 if "weight_dtype" in dims else 1) * TOLERANCE["float16"]
    assert same_bits(masked, contiguous)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [{}, FP8], ids=str)
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(layout: str, dims: dict[str, Any]) -> None:
    problem = experts(**dims)
    arguments = draw_inputs(problem, 23)
    kernel = bind(problem, layout)
    (whole,) = run(problem, arguments, kernel)
    for row in (0, 2, 11, 22):
        (out,) = run(problem, rows_of(problem, arguments, slice(row, row + 1)), kernel)
        assert same_bits(out, whole[row : row + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spread", ["all to one", "none", "out of range", "one row", "twice the same"])
def test_any_spread_of_tokens_over_experts_is_right(spread: str, layout: str) -> None:
    problem = experts()
    arguments = draw_inputs(problem, 140)
    ids = arguments[IDS]
    if spread == "all to one":
        ids[:] = 3
    elif spread == "none":
        ids[:] = -1
    elif spread == "out of range":
        ids[::2] = torch.tensor([5, 2**31 - 1, -(2**31)], dtype=torch.int32)
    elif spread == "one row":
        ids[1:] = -1
    else:
        ids[:, 1] = ids[:, 0]
    (out,) = run(problem, arguments, bind(problem, layout, 140))
    exact = reference(problem, arguments)[0]
    if spread == "none":
        assert (out == 0).all()
    else:
        assert relative_error(out, exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [{}, FP8], ids=str)
def test_rows_beside_nan_and_other_experts_keep_their_bits(layout: str, dims: dict[str, Any]) -> None:
    problem = experts(**dims)
    arguments = draw_inputs(problem, 21)
    kernel = bind(problem, layout)
    (clean,) = run(problem, arguments, kernel)
    dirty = [None if tensor is None else tensor.clone() for tensor in arguments]
    dirty[X][0::3], dirty[X][1::3] = float("nan"), float("inf")
    dirty[WEIGHTS][0::3] = float("nan")
    dirty[IDS][0::3], dirty[IDS][1::3] = dirty[IDS][2], -1
    (beside,) = run(problem, dirty, kernel)
    assert same_bits(clean[2::3], beside[2::3])
    assert (beside[1::3] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_with_gaps_give_the_same_bits(layout: str) -> None:
    problem = experts(shared=True)
    arguments = draw_inputs(problem, 6)
    (plain,) = run(problem, arguments, bind(problem, layout))
    strided = list(arguments)
    for place, tensor in enumerate(arguments):
        if tensor is not None and tensor.dim() > 1:
            wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 5, dtype=tensor.dtype)
            wide[..., 2:-3] = tensor
            strided[place] = wide[..., 2:-3]
    assert same_bits(plain, run(problem, strided, bind(problem, layout))[0])


def test_the_library_is_told_what_follows_from_limits_alone(library: GroupedDeepGemm) -> None:
    problem = experts()
    arguments = draw_inputs(problem, 40)
    masked, contiguous = bind(problem, "masked"), bind(problem, "contiguous")
    for rows in (1, 3, 40):
        for kernel in (masked, contiguous):
            run(problem, rows_of(problem, arguments, slice(rows)), kernel)
    assert {call for call in library.calls if call[0] == "masked"} == {("masked", 24, "")}
    blocks = [most // 128 for name, most, _ in library.calls if name == "contiguous"]
    assert blocks == [3, 3, 5, 5, 5, 5]


def test_another_alignment_of_the_library_is_refused(library: GroupedDeepGemm) -> None:
    problem = experts()
    arguments = draw_inputs(problem, 3)
    kernel = bind(problem, "contiguous")
    library.alignment = 64
    run(problem, arguments, kernel)
    library.alignment = 224
    with pytest.raises(BackendError, match="multiples of 224 rows"):
        run(problem, arguments, kernel)


@pytest.mark.parametrize("dims", [{}, FP8], ids=str)
def test_a_call_in_pieces_gives_the_bits_of_the_whole(dims: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = experts(**dims)
    arguments = draw_inputs(problem, 30)
    (whole,) = run(problem, arguments, bind(problem, "contiguous"))
    monkeypatch.setattr(moe, "most_tokens", lambda *_: 13)
    tile = GroupedTile(layout="contiguous")
    cut = moe.bind_experts(BindContext(CPU, problem, Params(), tile, Limits(30)))
    assert same_bits(run(problem, arguments, cut)[0], whole)


def test_groups_of_less_than_a_tile_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a tile stored past its group spoils the next one's rows."""
    monkeypatch.setattr(moe_params, "BLOCK_ROWS", 32)
    problem = experts()
    arguments = draw_inputs(problem, 30)
    (out,) = run(problem, arguments, bind(problem, "masked", 30))
    assert not relative_error(out, reference(problem, arguments)[0]) < 100 * TOLERANCE["float16"]


def test_a_weight_on_the_wrong_slot_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the comparison sees weights that are not a slot's own."""
    problem = experts()
    arguments = draw_inputs(problem, 12)
    exact = reference(problem, arguments)[0]
    arguments[WEIGHTS] = arguments[WEIGHTS].flip(1).contiguous()
    (out,) = run(problem, arguments, bind(problem, "masked"))
    assert relative_error(out, exact) > 100 * TOLERANCE["float16"]

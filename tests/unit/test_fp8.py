"""fp8 without a GPU: shapes with groups, what a scale is, kernels on the processor, what is refused and why."""

from __future__ import annotations

import contextlib
import math
import sys

import pytest
import torch
from fakes import H200
from hypothesis import given
from hypothesis import strategies as st

import bidispatch as bid
from bidispatch import ops
from bidispatch.bench import operands
from bidispatch.bench.timing import Timing
from bidispatch.device import ARCHS, Device
from bidispatch.errors import ArgumentError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.quantize import unfused
from bidispatch.ops.reference.draw import draw
from bidispatch.ops.schema import Argument
from bidispatch.registry import default_registry
from bidispatch.runtime.arguments import tensor_specs
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import BindContext, Limits
from bidispatch.tune import search
from bidispatch.tune.ladder import Choice
from bidispatch.tune.proof import Prover
from bidispatch.verify.cases import sizes_for
from bidispatch.verify.classes import check_merged
from bidispatch.verify.compare import bits, fill, poison, take
from bidispatch.verify.rows import check_rows
from bidispatch.verify.subject import Subject
from bidispatch_backends.triton.fp8_params import Fp8BlockParams, fp8_tiles, fp8_tiles_for, tile_fault
from bidispatch_backends.triton.gemm_params import ProductTile

FP8 = torch.float8_e4m3fn
FUSED = ("silu_and_mul.fp8_group", "rms_norm.fp8_group", "fused_add_rms_norm.fp8_group")


@pytest.fixture(scope="module")
def plan():
    return bid.plan("cpu")


def same(one, other):
    return torch.equal(bits(one), bits(other))


def inputs(problem, rows, **options):
    return load_attribute(ops.get(problem.op).inputs)(problem, rows, **options)


def block(n, k, **dims):
    return ops.get("gemm.fp8_block").problem("fp8", {"n": n, "k": k, **dims})


# -- shapes --------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 5000), k=st.integers(1, 5000))
def test_an_axis_of_groups_is_rounded_up(n, k):
    argument = Argument("scales", ("n/128", "k/128"), dtype="float32")
    (spec,) = tensor_specs([argument], block(n, k))
    assert spec.known == ((0, math.ceil(n / 128)), (1, math.ceil(k / 128)))


def test_a_run_time_size_may_lead_groups():
    (spec,) = tensor_specs([Argument("scales", ("m", "k/128"))], block(1, 129))
    assert (spec.sizes, spec.known) == (((0, "m", 0),), ((1, 2),))


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"x_scales": (3, 2)}, r"x_scales must be \[m, 3\], not \[3, 2\]"),
        ({"x_scales": (3,)}, r"x_scales must be \[m, 3\], not \[3\]"),
        ({"x_scales": (4, 3)}, "x_scales has 4 on axis 0, but m is 3"),
        ({"weight_scales": (1, 3)}, r"weight_scales must be \[2, 3\], not \[1, 3\]"),
    ],
)
def test_scales_of_the_wrong_shape_are_refused(plan, shapes, says):
    problem = block(200, 300)
    arguments = dict(zip(("x", "x_scales", "weight", "weight_scales"), inputs(problem, 3), strict=True))
    arguments |= {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(ArgumentError, match=says):
        plan.select_problem(problem).bind(max_tokens=4)(*arguments.values())


def test_operands_of_another_dtype_are_refused(plan):
    problem = block(200, 300)
    x, *rest = inputs(problem, 3)
    with pytest.raises(ArgumentError, match=r"x must be torch\.float8_e4m3fn, not torch\.bfloat16"):
        plan.select_problem(problem).bind(max_tokens=4)(x.bfloat16(), *rest)
    with pytest.raises(UsageError, match="takes float8_e4m3fn, not bfloat16"):
        ops.get("gemm.fp8_block").problem("bf16", {"n": 1, "k": 1})


def test_scales_that_the_problem_does_not_have_are_refused(plan):
    problem = ops.get("gemm.fp8").problem("fp8", {"n": 8, "k": 8})
    x, _, x_scales, *rest = inputs(problem, 3)
    with pytest.raises(ArgumentError, match="x_scale given, but it was bound without; select with x_scaling=tensor"):
        plan.select_problem(problem).bind(max_tokens=4)(x, x_scales[:1], x_scales, *rest)


def test_no_rows_give_an_empty_result(plan):
    problem = block(200, 300)
    out = plan.select_problem(problem).bind(max_tokens=4)(*inputs(problem, 0))
    assert (out.shape, out.dtype) == ((0, 200), torch.bfloat16)


# -- quantisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("k", [1, 40, 128, 300, 1003])
def test_quantisation_has_the_bits_of_its_definition(plan, k, dtype, scale_format):
    problem = ops.get("quantize.fp8_group").problem(dtype, {"k": k, "scale_format": scale_format})
    kernel = plan.select_problem(problem).bind(max_tokens=9)
    for distribution in ("normal", "scaled"):
        (x,) = inputs(problem, 9, distribution=distribution)
        x[3] = 0
        q, scales = kernel(x)
        wanted = load_attribute(ops.get(problem.op).stock)(problem, x)
        assert same(q, wanted[0])
        assert same(scales, wanted[1])


@pytest.mark.parametrize("op", ["quantize.fp8_token", "quantize.fp8_tensor"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("k", [1, 40, 1003])
def test_whole_scales_have_the_bits_of_their_definition(plan, k, dtype, op):
    problem = ops.get(op).problem(dtype, {"k": k})
    kernel = plan.select_problem(problem).bind(max_tokens=9)
    for distribution in ("normal", "scaled"):
        x, *others = inputs(problem, 9, distribution=distribution)
        x[3] = 0
        made = kernel(x, *others)
        wanted = load_attribute(ops.get(op).stock)(problem, x, *others)
        assert all(map(same, made if isinstance(made, tuple) else (made,), wanted))


@given(exponent=st.integers(-30, 30), mantissa=st.floats(1, 2, width=32))
def test_a_power_of_two_is_the_next_one_up(exponent, mantissa):
    problem = ops.get("quantize.fp8_group").problem("float32", {"k": 1, "scale_format": "ue8m0"})
    x = torch.full((1, 1), mantissa * 2.0**exponent)
    _, scales = bid.plan("cpu").select_problem(problem).bind(max_tokens=1)(x)
    _, wanted = load_attribute(ops.get(problem.op).reference)(problem, x)
    plain = max(float(x / torch.tensor(448.0)), 1e-10)
    assert scales.item() == wanted.item() == 2.0 ** math.ceil(math.log2(plain))


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("n", [40, 300, 1024])
def test_a_fused_op_gives_the_bits_of_the_two(plan, op, n, scale_format):
    problem = ops.get(op).problem("bfloat16", {"n": n, "scale_format": scale_format})
    before, after = unfused(problem)
    arguments = inputs(problem, 20)
    q, scales, *others = plan.select_problem(problem).bind(max_tokens=20)(*arguments)
    first = plan.select_problem(before).bind(max_tokens=20)(*arguments)
    first, *rest = first if isinstance(first, tuple) else (first,)
    wanted = plan.select_problem(after).bind(max_tokens=20)(first)
    assert all(same(one, other) for one, other in zip((q, scales, *others), (*wanted, *rest), strict=True))


def test_rows_that_are_not_finite(plan):
    problem = ops.get("quantize.fp8_group").problem("float32", {"k": 256})
    x = torch.ones(3, 256)
    x[0, 3], x[1, 3] = math.nan, math.inf
    q, scales = plan.select_problem(problem).bind(max_tokens=3)(x)
    assert q.float().isnan().sum(1).tolist() == [1, 1, 0]
    assert scales[0].tolist() == scales[2].tolist()
    assert scales[1].isinf().tolist() == [True, False]


# -- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [{}, {"bias": True}, {"x_scaling": "tensor"}, {"weight_scaling": "tensor"}])
def test_a_whole_scale_is_that_of_every_row(plan, dims):
    problem = ops.get("gemm.fp8").problem("fp8", {"n": 40, "k": 70, "out_dtype": "float32", **dims})
    arguments = inputs(problem, 5)
    (exact,) = load_attribute(ops.get(problem.op).reference)(problem, *arguments)
    out = plan.select_problem(problem).bind(max_tokens=5)(*arguments)
    assert float((out.double() - exact).norm() / exact.norm()) < 1e-6


def test_merged_weights_are_cut_where_scales_are(plan):
    """Parts are whole blocks: half of one would have no scale of its own."""
    for n, cut in ((300, 128), (1024, 256)):
        selection = plan.select_problem(block(n, 256))
        asked = []

        def select(part, asked=asked):
            asked.append(part.size("n"))
            return plan.select_problem(part)

        check = check_merged(selection, sizes_for(selection, "quick"), select)
        assert check.passed
        assert check.rows
        assert asked == [cut, n - cut]
    selection = plan.select_problem(block(100, 256))
    check = check_merged(selection, sizes_for(selection, "quick"), plan.select_problem)
    assert (check.rows, check.note) == (0, "n=100 has no parts")


# -- tuning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["gemm.fp8_block", "gemm.fp8"])
def test_winners_are_compared_row_by_row_and_with_a_bias(op):
    """Scales have rows as x has; a bias has the dtype of the result."""
    problem = ops.get(op).problem("fp8", {"n": 40, "k": 300})
    found = default_registry().get("torch_cpu." + op.removeprefix("gemm."))
    prover = Prover(Device(ARCHS["cpu"], "cpu"), problem, [(found, found.params())], 20)
    choice = Choice(found, found.params(), None)
    assert prover.check(choice, 3, 20).passed
    assert prover.check_bias(choice, 3, 20).passed
    assert prover.comparisons


@pytest.mark.parametrize("op", ["gemm", "gemm.fp8_block", "gemm.fp8"])
def test_the_timer_calls_a_kernel_with_each_weight_in_turn(op, monkeypatch, plan):
    """The GPU's timer, played on the processor."""
    problem = ops.get(op).problem(ops.get(op).dtypes[0], {"n": 40, "k": 300})
    kernel = plan.select_problem(problem).bind(max_tokens=8)
    seen = []
    launch = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *everything: (seen.append(everything), launch(*everything)))

    def interleaved(launches, **options):
        for run in launches.values():
            run(0), run(1), run(2)
        return dict.fromkeys(launches, Timing(1.0, 1.0, 1.0))

    monkeypatch.setattr(search, "interleaved", interleaved)
    monkeypatch.setattr(operands, "copies_beyond_cache", lambda *arguments, **options: 2)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda place: contextlib.nullcontext())
    assert search.gpu_timer(plan.device)(problem, 8, {"it": kernel}, False) == {"it": 1.0}
    index = [argument.shape for argument in ops.get(op).arguments].index(("n", "k"))
    weights = [everything[index].data_ptr() for everything in seen[-3:]]
    assert weights[0] == weights[2] != weights[1]
    assert all(len(everything[0]) == 8 for everything in seen)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arch", "dims", "says"),
    [
        ("triton.fp8_block", "sm80", {}, ["needs sm89 or sm90"]),
        ("triton.fp8_block", "gfx942", {}, ["needs sm89 or sm90"]),
        ("triton.fp8_block", "sm120", {}, []),
        ("deep_gemm.fp8", "sm90", {}, []),
        ("deep_gemm.fp8", "sm90", {"n": 100, "k": 200}, ["n a multiple of 8", "k a multiple of 128"]),
        ("deep_gemm.fp8", "sm90", {"out_dtype": "float32"}, ["out_dtype in bfloat16"]),
        ("deep_gemm.fp8", "sm120", {}, ["needs sm90", "splits K on sm120"]),
        ("deep_gemm.fp8_ue8m0", "sm100", {}, ["scale_format in ue8m0"]),
        ("deep_gemm.fp8_ue8m0", "sm103", {"scale_format": "ue8m0", "out_dtype": "float32"}, []),
        ("deep_gemm.fp8_ue8m0", "sm120", {"scale_format": "ue8m0"}, ["needs sm100 or sm103", "splits K on sm120"]),
    ],
)
def test_what_a_kernel_cannot_do_is_said(name, arch, dims, says):
    device = Device(ARCHS[arch], arch, predicted=True)
    reasons = default_registry().get(name).unmet(device, block(**{"n": 4096, "k": 4096, **dims}))
    assert len(reasons) == len(says)
    assert all(said in reason for said, reason in zip(says, reasons, strict=True))


def test_a_row_too_long_to_stay_in_registers_is_refused():
    found = default_registry().get("triton.rms_norm_fp8_group")
    problem = ops.get("rms_norm.fp8_group").problem("bf16", {"n": 16385})
    (reason,) = found.unmet(Device(ARCHS["sm90"], "sm90", predicted=True), problem)
    assert reason == "needs n at most 16384, asked for 16385"


@pytest.mark.parametrize("arch", ["sm89", "sm90", "sm100", "sm103", "sm120"])
@pytest.mark.parametrize("op", ["gemm.fp8_block", "gemm.fp8"])
@given(n=st.integers(1, 200_000), m=st.integers(1, 9000))
def test_every_tile_is_of_its_class(op, arch, n, m):
    device = Device(ARCHS[arch], arch, predicted=True)
    problem = ops.get(op).problem("fp8", {"n": n, "k": 4096})
    (found,) = (one for one in default_registry().for_op(op) if one.backend == "triton")
    params = found.params()
    ladder = fp8_tiles(device, problem, params)
    assert [top for top, _ in ladder] == [16, 32, 64, 128, 512, None]
    tiles = [tile for _, tile in ladder] + list(fp8_tiles_for(device, problem, params, m))
    assert len(tiles) > len(ladder)
    assert not any(tile_fault(ARCHS[arch], params, tile) for tile in tiles)


@pytest.mark.parametrize("arch", ["sm89", "sm90", "sm100", "sm103", "sm120"])
def test_longer_steps_have_tiles_that_fit(arch):
    device = Device(ARCHS[arch], arch, predicted=True)
    found = default_registry().get("triton.fp8")
    problem = ops.get("gemm.fp8").problem("fp8", {"n": 4096, "k": 4096})
    params = found.params(max_num_imprecise_acc=256)
    assert found.numerics(params, problem) == "fp8_chunks.256.fp8"
    for _, tile in fp8_tiles(device, problem, params):
        assert (tile.block_m + tile.block_n) * 256 * tile.num_stages < ARCHS[arch].shared_memory


@pytest.mark.parametrize(
    ("arch", "tile", "products", "fault"),
    [
        ("sm90", {"block_m": 16, "block_n": 64}, "fp8", "needs 64 rows of the left operand on sm90, this tile has 16"),
        ("sm103", {"block_m": 64, "block_n": 32, "swap": True}, "fp8", "this tile has 32"),
        ("sm90", {"block_m": 64, "block_n": 64, "num_warps": 2}, "fp8", "needs 4 warps on sm90"),
        ("sm90", {"block_m": 4, "block_n": 64, "swap": True}, "fp8", "too small"),
        ("sm90", {"block_m": 16, "block_n": 64}, "fp16", None),
        ("sm100", {"block_m": 16, "block_n": 64}, "fp16", "needs 64 rows of the left operand on sm100"),
        ("sm120", {"block_m": 16, "block_n": 64}, "fp8", None),
        ("sm90", {"block_m": 8, "block_n": 64, "swap": True}, "fp8", "another class"),
        ("sm90", {"block_m": 16, "block_n": 64, "swap": True}, "fp8", None),
    ],
)
def test_a_tile_on_another_path_is_refused(arch, tile, products, fault):
    made = ProductTile(**{"num_warps": 4, "num_stages": 3, **tile})
    found = tile_fault(ARCHS[arch], Fp8BlockParams(products=products), made)
    assert (found is None) if fault is None else (fault in found)


def test_instructions_are_part_of_the_class():
    found = default_registry().get("triton.fp8_block")
    labels = {found.numerics(found.params(products=products), block(8, 8)) for products in ("fp8", "fp16")}
    labels.add(default_registry().get("deep_gemm.fp8").numerics(None, block(8, 8)))
    assert len(labels) == 2  # DeepGEMM's is that of fp8


# -- DeepGEMM, against a stand-in ----------------------------------------------------------------------------------


class FakeDeepGemm:
    def __init__(self):
        self.calls = []

    def fp8_gemm_nt(self, a, b, d, c=None, compiled_dims="nk"):
        (x, x_scales), (weight, weight_scales) = a, b
        for tensor in (x, weight, d):
            assert tensor.data_ptr() % 16 == tensor.stride(0) * tensor.element_size() % 16 == 0
        padded = -(-len(x) // 4) * 4
        assert x_scales.stride() == (1, padded)
        assert x_scales.data_ptr() % 16 == weight_scales.data_ptr() % 16 == 0
        assert weight_scales.stride() == (weight_scales.shape[1], 1)
        self.calls.append((len(x), x_scales.data_ptr(), compiled_dims))
        n, k = weight.shape
        d.copy_(load_attribute(ops.get("gemm.fp8_block").reference)(block(n, k), x, x_scales, weight, weight_scales)[0])


@pytest.fixture
def library(monkeypatch):
    fake = FakeDeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", fake)
    monkeypatch.setattr(
        "bidispatch.requirements.installed_version", lambda name: "0.1.5" if name == "sgl-deep-gemm" else None
    )
    return fake


def deep_gemm(problem, max_tokens=300):
    found = default_registry().get("deep_gemm.fp8")
    cpu = Device(ARCHS["cpu"], "a processor that plays the GPU")
    return load_attribute(found.load)(BindContext(cpu, problem, found.params(), None, Limits(max_tokens=max_tokens)))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("extra", [0, 3])
def test_deep_gemm_takes_any_address_and_row(library, offset, extra):
    problem = block(48, 128)

    def place(values):
        rows, columns = values.shape
        memory = torch.zeros(rows * (columns + extra) + offset, dtype=values.dtype)
        view = memory[offset:].as_strided(values.shape, (columns + extra, 1))
        return view.copy_(values)

    arguments = inputs(problem, 5)
    out = place(torch.zeros(5, 48, dtype=torch.bfloat16))
    deep_gemm(problem)(*(place(argument) for argument in arguments), out)
    (exact,) = load_attribute(ops.get(problem.op).reference)(problem, *arguments)
    assert same(out, exact.to(out.dtype))
    assert [(rows, dims) for rows, _, dims in library.calls] == [(5, "")]


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_deep_gemm_is_given_scales_side_by_side_as_they_are(library, rows):
    problem = block(48, 256)
    x, x_scales, weight, weight_scales = inputs(problem, rows)
    side_by_side = torch.empty_strided(x_scales.shape, (1, -(-rows // 4) * 4)).copy_(x_scales)
    outs = [torch.empty(rows, 48, dtype=torch.bfloat16) for _ in range(2)]
    for scales, out in zip((x_scales, side_by_side), outs, strict=True):
        deep_gemm(problem)(x, scales, weight, weight_scales, out)
    assert same(*outs)
    assert [place == side_by_side.data_ptr() for _, place, _ in library.calls] == [False, True]


def test_deep_gemms_edges_are_those_of_its_tiles(library):
    assert deep_gemm(block(48, 128), 128).edges == (16, 32, 64)
    assert default_registry().get("deep_gemm.fp8").chooses_inside


def test_a_missing_library_is_said():
    reasons = default_registry().get("deep_gemm.fp8").unmet(H200, block(4096, 4096))
    assert any("sgl-deep-gemm==0.1.5" in reason for reason in reasons)


# -- negative control ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_a_scale_of_the_whole_batch_is_caught(plan, shared):
    """What verify compares sees per-tensor scaling, whose scale follows the neighbours, and passes a scale a group."""
    selection = plan.select("quantize.fp8_group", dtype="fp32", k=200)
    kernel = selection.bind(max_tokens=300).launch

    def launch(x, q, scales):
        kernel(x, q, scales)
        if shared:
            scales[:] = scales.amax()
            q.copy_((x / scales[:1, :1]).to(FP8))

    subject = Subject(selection.problem, torch.device("cpu"), launch)
    checks = list(check_rows(subject, Invariance.BATCH, sizes_for(selection, "quick")))
    failed = [check.name for check in checks if not check.passed]
    assert any(name.startswith("batch sizes") for name in failed) is shared
    assert bool(failed) is shared


# -- what verify does with bytes -----------------------------------------------------------------------------------


def test_poison_of_fp8_differs_by_its_salt():
    """A byte that nobody writes must differ from itself."""
    tensors = [torch.zeros(8, dtype=FP8) for _ in range(2)]
    for salt, tensor in enumerate(tensors):
        poison(tensor, salt)
        assert tensor.float().isnan().all()
    assert not (bits(tensors[0]) == bits(tensors[1])).any()


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.int64])
def test_rows_are_taken_whatever_the_dtype(dtype):
    tensor = torch.arange(12).reshape(4, 3).to(dtype)
    index = torch.tensor([2, 0])
    assert torch.equal(take(tensor, 0, index).float(), tensor.float()[index])
    assert torch.equal(take(tensor, 1, index).float(), tensor.float()[:, index])


@pytest.mark.parametrize("value", [math.nan, 448.0])
def test_rows_are_filled_whatever_the_dtype(value):
    filled = [
        fill(torch.ones(3, 2, dtype=dtype), 0, torch.tensor([1]), value).float() for dtype in (FP8, torch.float32)
    ]
    assert torch.equal(filled[0][::2], torch.ones(2, 2))
    assert torch.equal(filled[0][1].isfinite(), filled[1][1].isfinite())


@pytest.mark.parametrize("distribution", ["normal", "positive", "scaled"])
def test_drawn_fp8_is_finite(distribution):
    assert draw((200, 200), 0, dtype="float8_e4m3fn", distribution=distribution).float().isfinite().all()


# -- scales side by side -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_scales_of_a_group_may_lie_side_by_side(plan, rows):
    """As a host makes them for DeepGEMM: written by the quantisation, read by the product."""
    quantize = plan.select("quantize.fp8_group", dtype="bf16", k=300).bind(max_tokens=8)
    x = torch.randn(rows, 300).bfloat16()
    side_by_side = torch.empty_strided((rows, 3), (1, -(-rows // 4) * 4))
    q, scales = quantize(x)
    again = torch.empty_like(q)
    quantize(x, q=again, scales=side_by_side)
    assert same(again, q)
    assert same(side_by_side, scales)
    problem = block(40, 300)
    _, _, weight, weight_scales = inputs(problem, rows)
    product = plan.select_problem(problem).bind(max_tokens=8)
    assert same(product(q, side_by_side, weight, weight_scales), product(q, scales, weight, weight_scales))

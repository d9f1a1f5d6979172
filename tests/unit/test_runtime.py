"""Bound kernels on CPU tensors: argument checks, outputs, empty calls, the rung at every edge, and the torch op."""

from __future__ import annotations

import gc
from dataclasses import replace

import fakes
import pytest
import torch
from fakes import CPU, H200, BlockTile, fake, gemm_rule, launches, plan_of, registry_of
from hypothesis import given, settings
from hypothesis import strategies as st

import bidispatch as bid
from bidispatch import ops
from bidispatch.errors import ArgumentError, DeviceError
from bidispatch.registry import Rung
from bidispatch.runtime.bind import _on_device, bind
from bidispatch.runtime.bound import BoundKernel
from bidispatch.runtime.context import BindContext, Limits
from bidispatch.runtime.scratch import Scratch, empties

N, K = 6, 8
HEADS = {"head_dim": 8, "num_heads": 4, "num_kv_heads": 2}


def bound(op: str = "gemm", dtype: str = "float32", *, tops=(None,), limits=None, **dims) -> BoundKernel:
    """A fake kernel for an op on the CPU, with one rung a top, whose tile's block_m is its place in the ladder."""
    dims = dims or {"n": N, "k": K}
    implementation = fake(f"fake.{op}", op=op)
    rungs = [Rung(implementation, implementation.params(), BlockTile(block_m=i), top) for i, top in enumerate(tops)]
    return bind(ops.get(op).problem(dtype, dims), CPU, rungs, limits or Limits(64, 8, 64, 64))


@pytest.fixture(autouse=True)
def no_calls():
    launches.clear()


def x(rows: int = 3, **options) -> torch.Tensor:
    return torch.randn(rows, K, **options)


def weight(**options) -> torch.Tensor:
    return torch.randn(N, K, **options)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


# --- workspaces ----------------------------------------------------------------------------------------------------


def test_scratch_is_shared_until_a_kernel_needs_more():
    scratch = Scratch()
    bases, states = scratch.take(((3, torch.int32), (5, torch.float32)), "cpu")
    assert (bases.shape, bases.dtype, states.shape, states.dtype) == ((3,), torch.int32, (5,), torch.float32)
    assert states.data_ptr() - bases.data_ptr() == 256
    (again,) = scratch.take(((1000, torch.float32),), "cpu")
    assert again.data_ptr() == bases.data_ptr()
    (more,) = scratch.take(((1 << 23, torch.float32),), "cpu")
    assert more.data_ptr() != bases.data_ptr()
    (none,) = scratch.take(((0, torch.float32),), "cpu")
    assert none.numel() == 0


def test_a_kernel_without_scratch_has_a_workspace_of_its_own():
    context = BindContext(CPU, ops.get("gemm").problem("float32", {"n": N, "k": K}), None, None, Limits(1))
    one, other = (empties(context, (4, torch.float32))[0] for _ in range(2))
    assert one.data_ptr() != other.data_ptr()
    shared = replace(context, scratch=Scratch())
    one, other = (empties(shared, (4, torch.float32))[0] for _ in range(2))
    assert one.data_ptr() == other.data_ptr()


# --- calls --------------------------------------------------------------------------------------------------------


def test_a_call_computes_allocates_and_returns():
    a, w = x(), weight()
    out = bound()(a, w)
    assert same_bits(out, torch.nn.functional.linear(a, w))
    assert out.shape == (3, N)


def test_the_output_given_is_written_and_returned():
    a, w, out = x(), weight(), torch.full((3, N), float("nan"))
    assert bound()(a, w, out=out) is out
    assert same_bits(out, torch.nn.functional.linear(a, w))


def test_several_outputs_come_as_a_tuple_and_each_may_be_given():
    kernel = bound("fused_add_rms_norm", n=K)
    residual_out = torch.full((3, K), float("nan"))
    a, residual = x(), x()
    out, second = kernel(a, residual, torch.ones(K), residual_out=residual_out)
    assert second is residual_out
    assert same_bits(second, a + residual)
    assert out.isfinite().all()


def test_an_output_dtype_of_its_own_is_allocated():
    assert (
        bound("gemm", "bfloat16", n=N, k=K, out_dtype="float32")(x().bfloat16(), weight().bfloat16()).dtype
        == torch.float32
    )
    assert bound("mean", n=K)(x(5)).shape == (5,)


def test_tensors_may_be_named_and_an_absent_optional_one_left_out():
    a, w, b = x(), weight(), torch.randn(N)
    wanted = bound()(a, w)
    assert same_bits(bound()(a, weight=w), wanted)
    assert same_bits(bound()(x=a, weight=w), wanted)
    assert same_bits(bound()(a, w, None), wanted)
    assert same_bits(bound(n=N, k=K, bias=True)(a, w, bias=b), torch.nn.functional.linear(a, w, b))


def test_a_scalar_is_passed_and_has_the_problems_default():
    kernel, seen = bound("rms_norm", n=K), []
    kernel.launch = lambda *everything: seen.append(everything[2])
    kernel(x(), torch.ones(K))
    kernel(x(), torch.ones(K), eps=0.5)
    kernel(x(), torch.ones(K), eps=1)
    assert seen == [1e-6, 0.5, 1]


def attention_arguments(tokens=3, seqs=1, pages=4):
    cache = torch.randn(pages, 16, 2, 8)
    lens = torch.full((seqs,), 5, dtype=torch.int32)
    starts = torch.linspace(0, tokens, seqs + 1).to(torch.int32)
    return (torch.randn(tokens, 4, 8), cache, cache.clone(), torch.zeros(seqs, 2, dtype=torch.int32), lens, starts)


def test_launch_takes_everything_and_is_what_a_call_launches():
    kernel, seen = bound("attention", **HEADS), []
    kernel.launch = lambda *everything: seen.append(everything)
    arguments = attention_arguments()
    out = kernel(*arguments)
    (everything,) = seen
    assert len(everything) == 12
    assert all(one is other for one, other in zip(everything, arguments, strict=False))
    assert everything[6:10] == (None,) * 4
    assert everything[10] == 8**-0.5
    assert everything[11] is out


# --- what is refused ----------------------------------------------------------------------------------------------

BAD = {
    "shape": (lambda: (torch.randn(3, K + 1), weight()), {}, r"x must be \[m, 8\], not \[3, 9\]"),
    "fewer axes": (lambda: (torch.randn(K), weight()), {}, r"x must be \[m, 8\], not \[8\]"),
    "more axes": (lambda: (torch.randn(1, 3, K), weight()), {}, r"x must be \[m, 8\], not \[1, 3, 8\]"),
    "no axes": (lambda: (torch.tensor(1.0), weight()), {}, r"x must be \[m, 8\], not \[\]"),
    "shape of a weight": (lambda: (x(), weight().T), {}, r"weight must be \[6, 8\], not \[8, 6\]"),
    "dtype": (lambda: (x().half(), weight()), {}, "x must be torch.float32, not torch.float16"),
    "device": (lambda: (x(device="meta"), weight()), {}, "x is on meta, the kernel was bound for cpu"),
    "device of a weight": (lambda: (x(), weight(device="meta")), {}, "weight is on meta"),
    "stride": (
        lambda: (torch.randn(K, 3).T, weight()),
        {},
        r"last axis of x must be contiguous.*\(1, 3\).*contiguous\(\)",
    ),
    "grad": (lambda: (x(), weight(requires_grad=True)), {}, "weight requires grad.*torch.no_grad"),
    "missing": (lambda: (x(),), {}, "weight is missing"),
    "all missing": (tuple, {}, "x is missing"),
    "none": (lambda: (x(), None), {}, "weight is missing"),
    "an optional one it was bound without": (
        lambda: (x(), weight(), torch.ones(N)),
        {},
        "bias given.*select with bias=true",
    ),
    "a list": (lambda: ([[1.0] * K], weight()), {}, "x must be a tensor, not list"),
    "a number": (lambda: (3, weight()), {}, "x must be a tensor, not int"),
    "too many": (lambda: (x(), weight(), None, None), {}, r"takes 3 tensors \(x, weight, bias\), 4 given.*by name"),
    "unknown name": (lambda: (x(), weight()), {"output": None}, "gemm takes no output; it takes x, weight, bias, out"),
    "given twice": (lambda: (x(), weight(), None), {"weight": None}, "gemm got weight twice, by place and by name"),
    "too many tokens": (lambda: (x(65), weight()), {}, "65 m, but it was bound for at most 64.*larger max_tokens"),
    "shape of out": (lambda: (x(), weight()), {"out": torch.empty(4, N)}, "out has 4 on axis 0, but m is 3"),
    "width of out": (lambda: (x(), weight()), {"out": torch.empty(3, N + 1)}, r"out must be \[m, 6\]"),
    "dtype of out": (lambda: (x(), weight()), {"out": torch.empty(3, N).half()}, "out must be torch.float32"),
    "device of out": (lambda: (x(), weight()), {"out": torch.empty(3, N, device="meta")}, "out is on meta"),
    "stride of out": (lambda: (x(), weight()), {"out": torch.empty(N, 3).T}, "last axis of out must be contiguous"),
    "grad of out": (lambda: (x(), weight()), {"out": torch.empty(3, N, requires_grad=True)}, "out requires grad"),
    "out that is no tensor": (lambda: (x(), weight()), {"out": [1]}, "out must be a tensor, not list"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("door", ["__call__", "torch_op"])
def test_what_does_not_fit_is_an_argument_error_and_nothing_is_launched(case, door):
    arguments, named, message = BAD[case]
    with pytest.raises(ArgumentError, match=message):
        getattr(bound(), door)(*arguments(), **named)
    assert launches == []


def test_the_message_names_the_problem():
    with pytest.raises(ArgumentError, match="gemm float32 n=6 k=8 bias=false out_dtype=float32 role=linear: x must be"):
        bound()(torch.randn(3, 9), weight())


@pytest.mark.parametrize("value", [None, "1e-6", True, torch.tensor(1e-6)], ids=str)
def test_a_scalar_that_is_no_float_is_refused(value):
    with pytest.raises(ArgumentError, match="eps is a float, not"):
        bound("rms_norm", n=K)(x(), torch.ones(K), eps=value)


ATTENTION_BAD = {
    "q": (0, lambda t: t[:, :3], r"q must be \[tokens, 4, 8\], not \[3, 3, 8\]"),
    "k_cache": (1, lambda t: t[:, :8], r"k_cache must be \[pages, 16, 2, 8\]"),
    "v_cache": (2, lambda t: t[:3], "v_cache has 3 on axis 0, but pages is 4 by an argument before it"),
    "block_table": (3, lambda t: t.long(), "block_table must be torch.int32, not torch.int64"),
    "seq_lens": (4, lambda t: t.repeat(2), "seq_lens has 2 on axis 0, but seqs is 1"),
    "query_start_loc": (5, lambda t: t[:1], "query_start_loc has 1 on axis 0, but seqs is 1"),
}


@pytest.mark.parametrize("name", ATTENTION_BAD)
def test_attention_tensors_that_disagree_are_refused(name):
    place, change, message = ATTENTION_BAD[name]
    arguments = list(attention_arguments())
    arguments[place] = change(arguments[place])
    with pytest.raises(ArgumentError, match=message):
        bound("attention", **HEADS)(*arguments)


def test_attention_over_more_sequences_than_bound_for_is_refused():
    with pytest.raises(ArgumentError, match="9 seqs, but it was bound for at most 8; bind with a larger max_seqs"):
        bound("attention", **HEADS)(*attention_arguments(tokens=9, seqs=9))


def test_grad_is_no_matter_where_it_is_off():
    with torch.no_grad():
        bound()(x(requires_grad=True), weight(requires_grad=True))
    with torch.inference_mode():
        bound()(x(requires_grad=True), weight())


def test_strided_rows_and_a_last_axis_of_one_are_taken():
    wide, w = torch.randn(3, 5 * K), weight()
    a = wide[:, K : 2 * K]
    assert same_bits(bound()(a, w), torch.nn.functional.linear(a.contiguous(), w))
    bound("softmax", n=1)(torch.randn(4, 3)[:, :1])
    matrices = torch.randn(2, N, K).transpose(1, 2)  # b of bmm may have any strides
    bound("bmm", n=N, k=K)(torch.randn(2, 3, K), matrices)


@pytest.mark.parametrize(
    ("op", "dims", "limits", "message"),
    [
        ("gemm", {"n": N, "k": K}, {"max_tokens": 0}, "max_tokens"),
        ("attention", HEADS, {"max_tokens": 8, "max_seqs": 1}, "max_seq_len"),
        ("attention", HEADS, {"max_tokens": 8, "max_seqs": 0, "max_seq_len": 8}, "max_seqs"),
    ],
)
def test_limits_that_allow_no_call_are_refused(op, dims, limits, message):
    with pytest.raises(ArgumentError, match=message):
        bound(op, limits=Limits(**limits), **dims)


# --- empty calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["__call__", "torch_op"])
def test_an_empty_batch_returns_empty_and_launches_nothing(door):
    kernel = bound()
    out = torch.empty(0, N)
    assert getattr(kernel, door)(x(0), weight()).shape == (0, N)
    assert getattr(kernel, door)(x(0), weight(), out=out) is out
    assert launches == []


def test_an_empty_batch_in_any_axis_launches_nothing():
    kernel = bound("bmm", n=N, k=K)
    assert kernel(torch.randn(0, 3, K), torch.randn(0, K, N)).shape == (0, 3, N)
    assert kernel(torch.randn(2, 0, K), torch.randn(2, K, N)).shape == (2, 0, N)
    attention = bound("attention", **HEADS)
    assert attention(*attention_arguments(tokens=0)).shape == (0, 4, 8)
    out = torch.full((3, 4, 8), 7.0)
    q, k, v, _, _, _ = attention_arguments()
    none = torch.zeros(0, dtype=torch.int32)
    assert (
        attention(q, k, v, torch.zeros(0, 2, dtype=torch.int32), none, torch.zeros(1, dtype=torch.int32), out=out)
        is out
    )
    assert (out == 7).all()
    assert launches == []


# --- the ladder ---------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(tops=st.sets(st.integers(1, 60), max_size=6), data=st.data())
def test_the_rung_is_the_first_whose_top_is_not_below_m(tops, data):
    ladder = [*sorted(tops), None]
    kernel, w = bound(tops=ladder), weight()
    edges = sorted({m for top in tops for m in (top - 1, top, top + 1) if m > 0} | {1, 64})
    for m in [*edges, data.draw(st.integers(1, 64))]:
        launches.clear()
        kernel(x(m), w)
        wanted = next(i for i, top in enumerate(ladder) if top is None or m <= top)
        assert launches == [("bind", wanted)], f"M = {m} in {ladder}"


def test_bmm_chooses_by_the_rows_of_a_matrix_and_not_by_the_matrices():
    kernel = bound("bmm", tops=(4, None), n=N, k=K)
    for matrices, rows, wanted in ((9, 4, 0), (1, 5, 1)):
        launches.clear()
        kernel(torch.randn(matrices, rows, K), torch.randn(matrices, K, N))
        assert launches == [("bind", wanted)]


def test_a_ladder_of_two_implementations_calls_each_in_its_range(tmp_path):
    registry = registry_of(fake("a.gemm", tile=None), fake("b.gemm", tile=None, load="fakes:bind_other"))
    plan = plan_of(tmp_path, registry, gemm_rule("impl: a.gemm, max_m: 4", "impl: b.gemm"), device=CPU)
    linear = plan.select("gemm", dtype="fp32", n=N, k=K).bind(max_tokens=64)
    for rows in (4, 5):
        linear(x(rows), weight())
    assert launches == [("bind", None), ("bind_other", None)]
    assert repr(linear).endswith("a.gemm -> b.gemm>")


def test_a_lone_rung_is_launched_without_a_choice():
    kernel = bound()
    assert kernel.launch.__name__ == "launch"
    assert kernel.launch.__module__ == fakes.__name__


# --- devices ------------------------------------------------------------------------------------------------------


def test_a_predicted_device_cannot_be_bound(tmp_path):
    selection = bid.plan("sm103").select("gemm", dtype="bf16", n=N, k=K)
    with pytest.raises(DeviceError, match=r"planned for sm103, which this machine does not have.*device='auto'"):
        selection.bind(max_tokens=8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that sees no GPU")
def test_a_gpu_torch_cannot_use_is_a_device_error(tmp_path):
    plan = plan_of(tmp_path, registry_of(fake("a.gemm", tile=None)), gemm_rule("impl: a.gemm"), device=H200)
    with pytest.raises(DeviceError, match=r"NVIDIA H200 is here, but this torch .* cannot use it"):
        plan.select("gemm", dtype="bf16", n=N, k=K).bind(max_tokens=8)


# --- the torch op -------------------------------------------------------------------------------------------------


def test_the_torch_op_gives_the_same_bits_and_chooses_its_rung_when_it_runs():
    kernel, w = bound(tops=(4, None)), weight()
    for rows, wanted in ((4, 0), (5, 1)):
        a = x(rows)
        launches.clear()
        assert same_bits(kernel.torch_op(a, w), torch.nn.functional.linear(a, w))
        assert launches == [("bind", wanted)]


def test_every_op_of_the_catalogue_can_be_defined_and_called():
    kernel = bound("attention", **HEADS)
    assert kernel.torch_op(*attention_arguments()).shape == (3, 4, 8)
    out, residual = bound("fused_add_rms_norm", n=K).torch_op(x(), x(), torch.ones(K), eps=0.5)
    assert out.shape == residual.shape == (3, K)
    assert bound("log_softmax", n=K).torch_op(x()).shape == (3, K)


def test_a_dispatch_mode_sees_one_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    kernel, a, w, out = bound(), x(), weight(), torch.empty(3, N)
    with Watch():
        kernel.torch_op(a, w, out=out)
    assert seen == ["bidispatch.gemm.default"]


def test_a_bound_kernel_that_is_gone_is_said_and_not_called():
    kernel, a, w, out = bound(), x(), weight(), torch.empty(3, N)
    kernel.torch_op(a, w, out=out)
    handle = kernel.handle
    del kernel
    gc.collect()
    with pytest.raises(RuntimeError, match="keep a reference to it"):
        torch.ops.bidispatch.gemm(handle, a, w, None, out)


def test_torch_compile_keeps_the_op_whole_and_does_not_freeze_the_rung():
    kernel, w = bound(tops=(4, None)), weight()
    kernel.torch_op(x(1), w)

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def layer(a, out):
        torch.ops.bidispatch.gemm(kernel.handle, a * 2, w, None, out)
        return out + 1

    for rows, wanted in ((3, 0), (4, 0), (5, 1), (64, 1)):
        a, out = x(rows), torch.full((rows, N), float("nan"))
        launches.clear()
        assert same_bits(layer(a, out), torch.nn.functional.linear(a * 2, w) + 1)
        assert launches == [("bind", wanted)]


def test_the_schema_and_the_fake_of_the_op_are_right():
    kernel = bound()
    kernel.torch_op(x(1), weight())
    torch.library.opcheck(
        torch.ops.bidispatch.gemm.default,
        (kernel.handle, x(), weight(), None, torch.empty(3, N)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_with_several_gpus_a_kernel_runs_on_its_own_whichever_is_current(monkeypatch):
    entered, ran = [], []

    class Entered:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *error):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    _on_device(lambda *arguments: ran.append((arguments, list(entered))), 1)("x")
    _on_device(lambda *arguments: ran.append((arguments, list(entered))), 0)("y")
    assert ran == [(("x",), [1]), (("y",), [1, "left"])]

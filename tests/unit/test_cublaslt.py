"""cublaslt.pinned against a stand-in for the library: which algorithm serves which M, and what a launch asks of it."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fake_cublaslt import BROKEN, FakeCublasLt, sequential
from fakes import H200
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.errors import BackendError, InvarianceError, UsageError
from bidispatch.registry import default_registry
from bidispatch.runtime.context import BindContext, Limits
from bidispatch.verify.compare import bits
from bidispatch_backends.cublaslt.params import CublasLtParams, CublasLtTile
from bidispatch_backends.cublaslt.products import buckets, whole_of
from bidispatch_backends.numerics import product_numerics

PACKAGE = "bidispatch_backends.cublaslt"
MODULES = ("library", "algorithms", "proof", "pinned", "chunks", "gemm")
CPU = Device(ARCHS["cpu"], "a processor that plays the GPU")
GOOD, OTHER = "66.10.35.0.1.4.0", "66.11.35.0.2.4.0"
WRONG = f"66.12.35.0.{BROKEN}.4.0"
PRODUCT = {"n": 48, "k": 160}


@pytest.fixture
def library(monkeypatch):
    """The stand-in in the library's place, with this backend's modules loaded anew around it."""
    fake = FakeCublasLt()
    bindings = ModuleType("nvmath.bindings")
    bindings.cublasLt = fake
    monkeypatch.setitem(sys.modules, "nvmath", ModuleType("nvmath"))
    monkeypatch.setitem(sys.modules, "nvmath.bindings", bindings)
    monkeypatch.setitem(sys.modules, "nvmath.bindings.cublasLt", fake)
    fold = ModuleType("bidispatch_backends.triton.fold")
    fold.bind_fold = bind_fold
    monkeypatch.setitem(sys.modules, fold.__name__, fold)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)
    yield fake
    for name in MODULES:
        sys.modules.pop(f"{PACKAGE}.{name}", None)


def bind_fold(dtype, n, bias_dtype, arch):
    def fold(partial, bias, out):
        assert partial.is_contiguous()
        total = left_fold(partial)
        out.copy_(total if bias is None else total + bias)

    return fold


def left_fold(parts):
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def problem_of(dtype="bfloat16", **dims):
    return ops.get("gemm").problem(dtype, {**PRODUCT, **dims})


def bind(problem, params=None, tile=None, max_tokens=300):
    """The kernel of `cublaslt.pinned`, bound as the registry says."""
    implementation = default_registry().get("cublaslt.pinned")
    module, _, attribute = implementation.load.partition(":")
    context = BindContext(
        CPU, problem, params or CublasLtParams(), tile or CublasLtTile(), Limits(max_tokens=max_tokens)
    )
    return getattr(importlib.import_module(module), attribute)(context)


def module(name):
    return importlib.import_module(f"{PACKAGE}.{name}")


def draw(problem, m):
    dtype = getattr(torch, problem.dtype)
    n, k = problem.size("n"), problem.size("k")
    bias = torch.randn(n, dtype=dtype) if problem.flag("bias") else None
    return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), bias


def expected(problem, x, weight, bias=None, chunk=0):
    step = chunk or problem.size("k")
    starts = range(0, problem.size("k"), step)
    total = left_fold([sequential(x[:, i : i + step], weight[:, i : i + step]) for i in starts])
    total = total if bias is None else total + bias.float()
    return total.to(getattr(torch, str(problem["out_dtype"])))


def call(kernel, problem, x, weight, bias=None, out=None):
    if out is None:
        out = torch.full((len(x), problem.size("n")), torch.nan, dtype=getattr(torch, str(problem["out_dtype"])))
    kernel(x, weight, bias, out)
    return out


def same(one, other):
    return torch.equal(bits(one), bits(other))


def by_rows(dtype, m):
    """A heuristic of three algorithms, one up to 24 rows, one up to 192."""
    return [f"66.{10 if m <= 24 else 20 if m <= 192 else 30}.35.0.1.4.0"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out_dtype", ["dtype", "float32"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_row_has_the_bits_of_the_class(library, dtype, out_dtype, bias):
    library.table = by_rows
    problem = problem_of(dtype, out_dtype=out_dtype, bias=bias)
    kernel = bind(problem)
    x, weight, added = draw(problem, 260)
    wanted = expected(problem, x, weight, added)
    for m in (1, 2, 24, 25, 192, 193, 260):
        assert same(call(kernel, problem, x[:m], weight, added), wanted[:m])


def test_the_algorithm_follows_m_at_the_edges_the_kernel_names(library):
    library.table = by_rows
    problem = problem_of()
    kernel = bind(problem)
    assert kernel.edges == (24, 192)
    library.launches.clear()
    x, weight, _ = draw(problem, 300)
    for m in (1, 24, 25, 192, 193, 300):
        call(kernel, problem, x[:m], weight)
    assert [launch["config"].split(".")[1] for launch in library.launches] == ["10", "10", "20", "20", "30", "30"]


def test_a_call_asks_the_library_nothing_but_the_product(library):
    problem = problem_of()
    kernel = bind(problem)
    asked = library.questions
    library.launches.clear()
    x, weight, _ = draw(problem, 9)
    call(kernel, problem, x, weight)
    call(kernel, problem, x, weight)
    assert library.questions == asked
    assert [launch["m"] for launch in library.launches] == [9, 9]


@given(limit=st.integers(1, 100_000), m=st.integers(1, 100_000))
def test_every_m_up_to_the_limit_is_in_one_bucket_whatever_the_limit(limit, m):
    found = [(low, top) for low, top in buckets(limit) if low <= m <= top]
    assert len(found) == (m <= buckets(limit)[-1][1])
    assert buckets(limit)[-1][1] >= limit
    assert buckets(2 * limit)[: len(buckets(limit))] == buckets(limit)


# Proof


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_algorithm_that_adds_in_another_order_is_left_out(library, dtype, bias):
    """Negative control of the proof; outputs of 16 bits do not hide it."""
    wrong, good = ("55.12.0.0.9.0.0", "55.5.0.1.0.0.0") if dtype == "float32" else (WRONG, GOOD)
    library.table = lambda dtype, m: [good] if m >= 256 else [wrong, good]
    library.limited = lambda number, m: []
    problem = problem_of(dtype, bias=bias)
    kernel = bind(problem)
    library.launches.clear()
    x, weight, added = draw(problem, 33)
    assert same(call(kernel, problem, x, weight, added), expected(problem, x, weight, added))
    assert [launch["config"] for launch in library.launches] == [good]
    assert kernel.edges == ()


def test_without_the_proof_that_algorithm_would_serve_and_differ(library, monkeypatch):
    """What the control above rests on."""
    library.table = lambda dtype, m: [GOOD] if m >= 256 else [WRONG, GOOD]
    monkeypatch.setattr(module("proof").Prover, "proves", lambda self, algorithm, m: True)
    problem = problem_of(out_dtype="float32")
    kernel = bind(problem)
    x, weight, _ = draw(problem, 33)
    assert not same(call(kernel, problem, x, weight), expected(problem, x, weight))


def test_no_algorithm_left_is_an_error_that_names_the_product(library):
    library.table = lambda dtype, m: [GOOD] if m == 256 else [WRONG]
    with pytest.raises(InvarianceError, match=r"1 algorithms .* 1 to 1 rows of gemm n=48 k=160, bfloat16"):
        bind(problem_of())


def test_no_algorithm_at_all_is_an_error_that_says_how_to_go_on(library):
    library.table = lambda dtype, m: [f"{GOOD} split", f"{OTHER} workspace", f"{OTHER} unsupported"]
    with pytest.raises(BackendError, match=r"offers no algorithm for 1 to 1 rows.*`disable: "):
        bind(problem_of())


def test_a_failure_of_the_library_names_the_problem(library):
    def table(dtype, m):
        raise library.cuBLASLtError("INTERNAL_ERROR (14)")

    library.table = table
    with pytest.raises(BackendError, match=r"cuBLASLt failed while gemm bfloat16 n=48 .*INTERNAL_ERROR"):
        bind(problem_of())


def test_a_library_that_does_not_load_says_so(library):
    def create():
        raise RuntimeError("Failed to dlopen libcublasLt.so.13")

    library.create = create
    with pytest.raises(BackendError, match=r"cannot start cuBLASLt: Failed to dlopen libcublasLt.so.13; `bidispatch"):
        bind(problem_of())


def test_a_second_layer_of_that_k_proves_nothing_again(library):
    bind(problem_of())
    proofs = len(library.launches)
    assert proofs
    bind(problem_of())
    bind(problem_of(n=64))
    assert len(library.launches) == proofs
    bind(problem_of(k=168))
    assert len(library.launches) > proofs


def test_a_proof_leaves_the_random_numbers_of_a_model_alone(library):
    before = torch.get_rng_state()
    bind(problem_of())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_algorithm_that_does_not_serve_the_bucket_is_passed_over(library):
    library.table = lambda dtype, m: [GOOD, OTHER]
    library.refuses = lambda config, m: config == GOOD and m < 4
    assert bind(problem_of()).edges == (4,)  # the bucket of 3 and 4 rows begins at 3


# Explicit algorithms


def test_an_algorithm_of_the_tile_serves_every_m(library):
    library.table = by_rows
    problem = problem_of()
    offered = module("algorithms").offered(torch.device("cpu"), whole_of(problem, CublasLtParams()), 64)
    tile = CublasLtTile(algorithm=offered[0].config, version=library.version)
    kernel = bind(problem, tile=tile)
    library.launches.clear()
    x, weight, _ = draw(problem, 300)
    for m in (1, 100, 300):
        call(kernel, problem, x[:m], weight)
    assert {launch["config"] for launch in library.launches} == {"66.20.35.0.1.4.0"}
    assert {launch["algorithm"] for launch in library.launches} == {offered[0].data}
    assert kernel.edges == ()


@pytest.mark.parametrize(
    ("algorithm", "version", "says"),
    [
        ("66.20.35.0.1.4.0", 120800, "cuBLASLt 130200 is loaded, algorithm 66.20.35.0.1.4.0 was found with 120800"),
        ("99.20.35.0.1.4.0", 130200, "knows no algorithm 99.20"),
        ("66.77.35.0.1.4.0", 130200, "has no use for algorithm 66.77"),
        (f"66.20.35.0.{BROKEN}.4.0", 130200, "has no use for algorithm 66.20"),
    ],
)
def test_an_algorithm_that_cannot_be_had_gives_way_with_one_warning(library, caplog, algorithm, version, says):
    library.table = by_rows
    library.refuses = lambda config, m: config.startswith("66.77")
    tile = CublasLtTile(algorithm=algorithm, version=version)
    with caplog.at_level(logging.WARNING, logger="bidispatch_backends"):
        kernels = [bind(problem_of(), tile=tile) for _ in range(2)]
    assert [kernel.edges for kernel in kernels] == [(24, 192), (24, 192)]
    (record,) = caplog.records
    assert says in record.getMessage()
    assert "tune" in record.getMessage()


def test_that_fp32_results_cannot_have_the_algorithm_is_no_warning(library, caplog):
    library.refuses = lambda config, m: config == OTHER
    with caplog.at_level(logging.WARNING, logger="bidispatch_backends"):
        bind(problem_of(out_dtype="float32"), tile=CublasLtTile(algorithm=OTHER, version=library.version))
    assert not caplog.records


def test_an_algorithm_that_serves_some_m_gives_way_where_it_does_not(library, caplog):
    library.table = lambda dtype, m: [GOOD]
    library.refuses = lambda config, m: config == OTHER and m > 64
    assert bind(problem_of(), tile=CublasLtTile(algorithm=OTHER, version=library.version)).edges == (64,)
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"algorithm": "66.1.2.3.4.5.6"}, "needs the cuBLASLt version"),
        ({"algorithm": "66.1.2", "version": 1}, "pattern"),
        ({"algorithm": "a.b.c.d.e.f.g", "version": 1}, "pattern"),
        ({"batch_max_m": -1}, "greater than or equal"),
    ],
)
def test_a_tile_that_makes_no_sense_is_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        CublasLtTile(**fields)


def test_candidates_are_what_the_heuristic_offers_each_once(library):
    library.table = lambda dtype, m: [OTHER, "66.1.1.1.1.1.1 split", GOOD, OTHER, "66.2.2.2.2.2.2 workspace"]
    found = module("algorithms").search(CPU, problem_of(), CublasLtParams(), 64)
    assert found == [CublasLtTile(algorithm=config, version=library.version) for config in (OTHER, GOOD)]


def test_candidates_for_chunks_come_in_turn_and_at_once(library):
    library.table = lambda dtype, m: ["11.0.0.0.0.0.0"]
    params = CublasLtParams(k_chunk=64)
    found = module("algorithms").search(CPU, problem_of("float32"), params, 16)
    assert [(tile.algorithm, tile.batch_max_m) for tile in found] == [("55.5.0.1.0.0.0", 0), ("55.5.0.1.0.0.0", 16)]


# Tensors that are not aligned


def misaligned(tensor, offset=1, extra=0):
    """The same values at an address and with rows that 16-byte loads cannot take."""
    rows, columns = tensor.shape
    memory = torch.zeros(rows * (columns + extra) + offset, dtype=tensor.dtype)
    view = memory[offset:].as_strided((rows, columns), (columns + extra, 1))
    view.copy_(tensor)
    return view


@pytest.mark.parametrize(("dtype", "chunk"), [("bfloat16", 0), ("float32", 0), ("float32", 64)])
@pytest.mark.parametrize(("offset", "extra"), [(1, 0), (0, 1), (3, 5), (0, 8)])
@pytest.mark.parametrize("which", ["x", "weight", "out", "all"])
def test_any_address_and_row_gives_the_same_bits(library, dtype, offset, extra, which, chunk):
    problem = problem_of(dtype, bias=True)
    kernel = bind(problem, CublasLtParams(k_chunk=chunk), CublasLtTile(batch_max_m=4 if chunk else 0))
    for m in (1, 7):
        x, weight, bias = draw(problem, m)
        wanted = expected(problem, x, weight, bias, chunk)
        out = torch.full_like(wanted, torch.nan)
        x = misaligned(x, offset, extra) if which in ("x", "all") else x
        weight = misaligned(weight, offset, extra) if which in ("weight", "all") else weight
        out = misaligned(out, offset, extra) if which in ("out", "all") else out
        assert same(call(kernel, problem, x, weight, bias, out=out), wanted)


def test_rows_that_are_one_row_give_the_same_bits(library):
    problem = problem_of()
    kernel = bind(problem)
    x, weight, _ = draw(problem, 1)
    wanted = expected(problem, x, weight)
    assert same(call(kernel, problem, x.expand(5, -1), weight), wanted.expand(5, -1))
    assert same(call(kernel, problem, x.as_strided(x.shape, (3, 1)), weight), wanted)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_each_call_adds_its_own_bias(library, out_dtype):
    problem = problem_of(bias=True, out_dtype=out_dtype)
    kernel = bind(problem)
    x, weight, first = draw(problem, 3)
    second = torch.randn(2 * len(first)).to(torch.bfloat16)[1 : 1 + len(first)]  # its address is odd
    for bias in (first, second, first, first.neg()):
        assert same(call(kernel, problem, x, weight, bias), expected(problem, x, weight, bias))


# fp32


def test_fp32_is_served_by_algorithms_that_are_known_to_add_in_order(library):
    library.table = lambda dtype, m: ["11.0.0.0.0.0.0", "13.0.0.0.0.0.0"] if m <= 16 else ["55.7.0.1.0.0.0"]
    problem = problem_of("float32")
    kernel = bind(problem)
    library.launches.clear()
    x, weight, _ = draw(problem, 33)
    for m in (1, 33):
        assert same(call(kernel, problem, x[:m], weight), expected(problem, x[:m], weight))
    assert [launch["config"] for launch in library.launches] == ["55.5.0.1.0.0.0", "55.7.0.1.0.0.0"]
    assert {launch["compute"] for launch in library.launches} == {68}


@pytest.mark.parametrize("k", [128, 160])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_in_turn_and_at_once_are_the_same_left_fold(library, k, bias):
    problem = problem_of("float32", k=k, bias=bias)
    params = CublasLtParams(k_chunk=32)
    in_turn = bind(problem, params)
    at_once = bind(problem, params, CublasLtTile(batch_max_m=16))
    for m in (1, 16, 17, 40):
        x, weight, added = draw(problem, m)
        wanted = expected(problem, x, weight, added, chunk=32)
        assert same(call(in_turn, problem, x, weight, added), wanted)
        assert same(call(at_once, problem, x, weight, added), wanted)
        assert not same(expected(problem, x, weight, added), wanted)


def test_how_chunks_are_run_follows_m_alone(library):
    problem = problem_of("float32")  # K 160: two chunks of 64 and 32 more
    kernel = bind(problem, CublasLtParams(k_chunk=64), CublasLtTile(batch_max_m=16))
    assert 16 in kernel.edges
    x, weight, _ = draw(problem, 17)
    library.launches.clear()
    call(kernel, problem, x[:16], weight)
    assert [(one["k"], one["batch"], one["beta"]) for one in library.launches] == [(64, 2, 0), (32, 1, 0)]
    library.launches.clear()
    call(kernel, problem, x, weight)
    steps = [(one["k"], one["batch"], one["beta"]) for one in library.launches]
    assert steps == [(64, 1, 0), (64, 1, 1), (32, 1, 1)]


def test_the_workspace_is_for_the_rows_of_the_limit(library):
    problem = problem_of("float32")
    kernel = bind(problem, CublasLtParams(k_chunk=64), CublasLtTile(batch_max_m=64), max_tokens=5)
    assert all(edge < 5 for edge in kernel.edges)
    x, weight, _ = draw(problem, 5)
    assert same(call(kernel, problem, x, weight), expected(problem, x, weight, chunk=64))


def test_a_chunk_that_adds_in_another_order_is_left_out_of_a_batch_too(library):
    """Negative control: the proof of a batch compares each of its products with that product alone."""
    library.limited = lambda number, m: ["55.5.0.1.0.0.0"] if m >= 256 else ["55.5.0.1.9.0.0", "55.5.0.1.0.0.0"]
    library.table = lambda dtype, m: []
    problem = problem_of("float32")
    kernel = bind(problem, CublasLtParams(k_chunk=64), CublasLtTile(batch_max_m=16))
    library.launches.clear()
    x, weight, _ = draw(problem, 16)
    assert same(call(kernel, problem, x, weight), expected(problem, x, weight, chunk=64))
    assert all(launch["config"] == "55.5.0.1.0.0.0" for launch in library.launches)


def test_a_tile_that_batches_without_triton_is_an_import_error(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "bidispatch_backends.triton.fold", None)
    params = CublasLtParams(k_chunk=64)
    with pytest.raises(ImportError):
        bind(problem_of("float32"), params, CublasLtTile(batch_max_m=16))
    bind(problem_of("float32"), params)


# Descriptors


def test_layouts_do_not_pile_up_and_go_with_the_kernel(library, monkeypatch):
    monkeypatch.setattr(module("pinned"), "_MOST_ENTRIES", 4)
    problem = problem_of()
    gc.collect()
    before = len(library.live)
    kernel = bind(problem)
    x, weight, _ = draw(problem, 60)
    for m in range(1, 60):
        assert same(call(kernel, problem, x[:m], weight), expected(problem, x[:m], weight))
    gc.collect()
    assert len(library.live) <= before + 1 + 3 * 4
    del kernel
    gc.collect()
    assert len(library.live) == before


# Planning


@pytest.mark.parametrize(
    ("dtype", "precision", "chunk", "label"),
    [
        ("bfloat16", "ieee", 0, "k_sequential"),
        ("float16", "tf32", 4096, "k_sequential"),
        ("bfloat16", "ieee", 1024, "k_chunks.1024"),
        ("float32", "ieee", 0, "k_sequential.ieee"),
        ("float32", "tf32", 1024, "k_chunks.1024.tf32"),
        ("float32", "ieee", 8192, "k_sequential.ieee"),
    ],
)
def test_labels_say_the_order_and_the_precision(dtype, precision, chunk, label):
    assert product_numerics(problem_of(dtype, k=4096), precision, chunk) == label


def test_chunks_are_for_fp32():
    implementation = default_registry().get("cublaslt.pinned")
    with pytest.raises(UsageError, match="k_chunk=64 is for float32"):
        implementation.numerics(CublasLtParams(k_chunk=64), problem_of())
    assert implementation.numerics(CublasLtParams(k_chunk=64), problem_of("float32")) == "k_chunks.64.ieee"


@pytest.mark.parametrize(
    ("dtype", "dims", "says"),
    [
        ("bfloat16", {"n": 4097}, "needs n and k multiples of 8 in bfloat16, asked for n=4097"),
        ("float16", {"n": 4, "k": 12}, "asked for n=4, k=12"),
        ("float32", {"k": 4098}, "needs n and k multiples of 4 in float32, asked for k=4098"),
        ("bfloat16", {"out_dtype": "float16"}, "gives bfloat16 or float32, asked for float16"),
        ("float32", {"out_dtype": "bfloat16"}, "gives float32 or float32"),
    ],
)
def test_what_it_cannot_do_is_said(dtype, dims, says):
    implementation = default_registry().get("cublaslt.pinned")
    device = SimpleNamespace(arch=ARCHS["sm90"], predicted=True)
    (reason,) = implementation.unmet(device, problem_of(dtype, **dims))
    assert says in reason


def test_a_real_device_needs_the_package_a_predicted_one_does_not(monkeypatch):
    monkeypatch.setattr("bidispatch.requirements.installed_version", lambda name: None)
    implementation = default_registry().get("cublaslt.pinned")
    assert implementation.unmet(Device(ARCHS["sm90"], "sm90", predicted=True), problem_of()) == ()
    (reason,) = implementation.unmet(H200, problem_of())
    assert reason == "needs the package nvmath-python>=0.6, which is not installed"


def test_chunks_run_at_once_by_default_as_far_as_memory_allows_and_triton_is_there(monkeypatch):
    implementation = default_registry().get("cublaslt.pinned")
    predicted = Device(ARCHS["sm90"], "sm90", predicted=True)

    def rows(problem, chunk, device=predicted):
        ((top, tile),) = implementation.tiles(device, problem, CublasLtParams(k_chunk=chunk))
        assert top is None
        return tile.batch_max_m

    assert rows(problem_of("float32", n=4096, k=4096), 1024) == 256
    assert rows(problem_of("float32", n=32768, k=4096), 1024) == 64
    assert rows(problem_of("float32", n=151936, k=4096), 1024) == 27
    assert rows(problem_of("bfloat16", n=256, k=7168, out_dtype="float32"), 1792) == 4096
    assert rows(problem_of("float32", n=4096, k=1024), 1024) == 0
    assert rows(problem_of("bfloat16", n=4096, k=4096), 0) == 0
    monkeypatch.setattr("bidispatch.requirements.installed_version", lambda name: None)
    assert rows(problem_of("float32", n=4096, k=4096), 1024, H200) == 0


def test_explain_shows_it_for_an_arch_that_is_elsewhere(monkeypatch, as_json):
    monkeypatch.setenv("BIDISPATCH_IMPL", "gemm=cublaslt.pinned")
    words = ("explain", "gemm", "--device", "sm90", "--dtype", "bf16", "--dim", "n=6144", "--dim", "k=4096")
    code, document = as_json(*words)
    assert code == 0
    assert document["selection"]["numerics"] == "k_sequential"
    assert "cublaslt.pinned" in str(document)

"""deep_gemm.bf16 against a stand-in for the library: what it is called with, and that its switch stays as it was."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fakes import H200

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.registry import default_registry
from bidispatch.runtime.context import BindContext, Limits
from bidispatch.verify.compare import bits

CPU = Device(ARCHS["cpu"], "a processor that plays the GPU")
PREDICTED = Device(ARCHS["sm90"], "sm90", predicted=True)
IMPLEMENTATION = default_registry().get("deep_gemm.bf16")


def problem_of(dtype="bfloat16", **dims):
    return ops.get("gemm").problem(dtype, {"n": 48, "k": 64, **dims})


def product(x, weight):
    return x.double() @ weight.double().T


class FakeDeepGemm(ModuleType):
    def __init__(self, name="deep_gemm"):
        super().__init__(name)
        self.calls = []
        self.deterministic = False

    def bf16_gemm_nt(self, a, b, d, c=None, compiled_dims="nk"):
        for tensor in (a, b, d):
            assert tensor.data_ptr() % 16 == tensor.stride(0) * tensor.element_size() % 16 == 0
        self.calls.append((len(a), compiled_dims, self.deterministic))
        d.copy_(product(a, b))


def with_switch(fake, can_ask=True):
    fake.use_deterministic_algorithms = lambda on: setattr(fake, "deterministic", on)
    if can_ask:
        fake.get_deterministic_algorithms = lambda: fake.deterministic
    return fake


@pytest.fixture
def library(monkeypatch):
    fake = FakeDeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", fake)
    monkeypatch.setattr("bidispatch.requirements.installed_version", installed("sgl-deep-gemm"))
    monkeypatch.delitem(sys.modules, "bidispatch_backends.deep_gemm.gemm", raising=False)
    yield fake
    sys.modules.pop("bidispatch_backends.deep_gemm.gemm", None)


def installed(*names, version="0.1.5"):
    return lambda name: version if name in names else None


def bind(problem, max_tokens=300):
    module, _, attribute = IMPLEMENTATION.load.partition(":")
    context = BindContext(CPU, problem, IMPLEMENTATION.params(), None, Limits(max_tokens=max_tokens))
    return getattr(importlib.import_module(module), attribute)(context)


def same(one, other):
    return torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("extra", [0, 3])
def test_any_address_and_row_gives_the_product(library, out_dtype, offset, extra):
    problem = problem_of(out_dtype=out_dtype)
    kernel = bind(problem)

    def place(shape, dtype):
        rows, columns = shape
        memory = torch.randn(rows * (columns + extra) + offset).to(dtype)
        return memory[offset:].as_strided(shape, (columns + extra, 1))

    x, weight = place((5, 64), torch.bfloat16), place((48, 64), torch.bfloat16)
    out = place((5, 48), getattr(torch, out_dtype))
    kernel(x, weight, None, out)
    assert same(out, product(x, weight).to(out.dtype))
    assert library.calls == [(5, "", False)]


@pytest.mark.parametrize(
    ("max_tokens", "edges"), [(1, ()), (17, (16,)), (128, (16, 32, 64)), (300, (16, 32, 64, 128, 192, 256))]
)
def test_edges_are_every_m_at_which_its_tile_may_change(library, max_tokens, edges):
    assert bind(problem_of(), max_tokens).edges == edges


def test_edges_end_where_its_tile_no_longer_changes(library):
    assert bind(problem_of(), 100_000).edges[-1] == 8192


@pytest.mark.parametrize("before", [False, True])
def test_newer_versions_are_deterministic_for_the_call_alone(library, before):
    with_switch(library).deterministic = before
    kernel = bind(problem_of())
    x, weight = torch.randn(2, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    kernel(x, weight, None, torch.empty(2, 48, dtype=torch.bfloat16))
    assert library.calls == [(2, "", True)]
    assert library.deterministic is before


def test_a_call_that_fails_leaves_the_switch_as_it_was(library):
    with_switch(library)

    def fail(*arguments, **named):
        raise RuntimeError("no kernel")

    library.bf16_gemm_nt = fail
    with pytest.raises(RuntimeError, match="no kernel"):
        bind(problem_of())(torch.randn(2, 64).bfloat16(), torch.randn(48, 64).bfloat16(), None, torch.empty(2, 48))
    assert library.deterministic is False


def test_a_switch_that_cannot_be_read_stays_on(library):
    with_switch(library, can_ask=False)
    kernel = bind(problem_of())
    kernel(
        torch.randn(2, 64).bfloat16(), torch.randn(48, 64).bfloat16(), None, torch.empty(2, 48, dtype=torch.bfloat16)
    )
    assert library.deterministic is True


def test_vllms_copy_serves_where_sgl_deep_gemm_is_not_installed(library, monkeypatch):
    copy = with_switch(FakeDeepGemm("vllm.third_party.deep_gemm"))
    for name, found in (("vllm", ModuleType("vllm")), ("vllm.third_party", ModuleType("x")), (copy.__name__, copy)):
        monkeypatch.setitem(sys.modules, name, found)
    monkeypatch.setattr("bidispatch.requirements.installed_version", installed("vllm"))
    kernel = bind(problem_of())
    kernel(
        torch.randn(2, 64).bfloat16(), torch.randn(48, 64).bfloat16(), None, torch.empty(2, 48, dtype=torch.bfloat16)
    )
    assert (copy.calls, library.calls) == ([(2, "", True)], [])


def test_the_class_is_the_one_other_libraries_share():
    assert IMPLEMENTATION.numerics(IMPLEMENTATION.params(), problem_of(out_dtype="float32")) == "k_sequential"
    assert IMPLEMENTATION.chooses_inside


@pytest.mark.parametrize(
    ("arch", "dtype", "dims", "says"),
    [
        ("sm90", "float16", {}, ["takes bfloat16", "needs out_dtype"]),
        ("sm90", "bfloat16", {"n": 4, "k": 12}, ["needs n a multiple of 8", "needs k a multiple of 8"]),
        ("sm90", "bfloat16", {"bias": True}, ["needs bias in False"]),
        ("sm100", "bfloat16", {"out_dtype": "float16"}, ["needs out_dtype in bfloat16, float32"]),
        ("sm120", "bfloat16", {}, ["needs sm90 or sm100 or sm103", "splits K on sm120"]),
        ("sm89", "bfloat16", {}, ["needs sm90 or sm100 or sm103"]),
        ("sm103", "bfloat16", {}, []),
    ],
)
def test_what_it_cannot_do_is_said(arch, dtype, dims, says):
    reasons = IMPLEMENTATION.unmet(Device(ARCHS[arch], arch, predicted=True), problem_of(dtype, **dims))
    assert len(reasons) == len(says)
    assert all(said in reason for said, reason in zip(says, reasons, strict=True))


@pytest.mark.parametrize(
    ("packages", "bundled", "missing"),
    [((), False, True), (("sgl-deep-gemm",), False, False), (("vllm",), True, False), (("vllm",), False, True)],
)
def test_either_package_will_do(monkeypatch, tmp_path, packages, bundled, missing):
    monkeypatch.setattr("bidispatch.requirements.installed_version", installed(*packages))
    if bundled:
        (tmp_path / "third_party" / "deep_gemm").mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name in packages else None)
    reasons = IMPLEMENTATION.unmet(H200, problem_of())
    assert bool(reasons) is missing
    assert all("sgl-deep-gemm==0.1.5" in reason and "vllm.third_party.deep_gemm" in reason for reason in reasons)
    assert IMPLEMENTATION.unmet(PREDICTED, problem_of()) == ()


def test_another_version_is_named(monkeypatch):
    monkeypatch.setattr("bidispatch.requirements.installed_version", installed("sgl-deep-gemm", version="0.2.5"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (reason,) = IMPLEMENTATION.unmet(H200, problem_of())
    assert "needs sgl-deep-gemm==0.1.5, 0.2.5 is installed" in reason


def test_explain_shows_it_for_an_arch_that_is_elsewhere(monkeypatch, as_json):
    monkeypatch.setenv("BIDISPATCH_IMPL", "gemm=deep_gemm.bf16")
    words = ("explain", "gemm", "--device", "sm100", "--dtype", "bf16", "--dim", "n=6144", "--dim", "k=4096")
    code, document = as_json(*words)
    assert code == 0
    assert document["selection"]["numerics"] == "k_sequential"

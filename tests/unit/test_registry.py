"""The registry: the key (arch, op, dtype), names that clash, and backends that do not load."""

from __future__ import annotations

import pytest
from fakes import CPU, H200, fake, gemm_rule, plan_of, registry_of

import bidispatch as bid
from bidispatch import ops, registry
from bidispatch.device import ARCHS, Device
from bidispatch.errors import BackendError, BidispatchError, SelectionError, UsageError
from bidispatch.planning.decisions import REJECTED
from bidispatch.registry import Registry
from bidispatch.requirements import Check, DimAtMost, DimIn, DimMultipleOf, Package

GEMM = ops.get("gemm").problem("bfloat16", {"n": 64, "k": 64})
RULE = gemm_rule("impl: broken.gemm", "impl: fine.gemm")


class Entry:
    """An installed entry point."""

    def __init__(self, name, register, distribution="dist", version="1.0"):
        self.name, self.value, self._register = name, f"{distribution}:register", register
        self.dist = type("Dist", (), {"name": distribution, "version": version})()

    def load(self):
        if isinstance(self._register, BaseException):
            raise self._register
        return self._register


@pytest.fixture
def installed(monkeypatch):
    """Make these the installed entry points and load them."""

    def load(*entries) -> Registry:
        monkeypatch.setattr(
            registry.metadata, "entry_points", lambda *, group: entries if group == "bidispatch.backends" else ()
        )
        found = Registry()
        found.load_entry_points()
        return found

    return load


def registering(*names):
    return lambda target: [target.register(fake(name)) for name in names]


def test_the_key_arch_op_dtype_leads_to_the_implementations():
    registry = registry_of(
        fake("a.gemm", archs=("sm*",), dtypes=("bfloat16",)),
        fake("b.gemm", archs=("sm90", "gfx*")),
        fake("c.gemm", archs=("cpu",)),
        fake("a.softmax", op="softmax"),
    )

    def names(*key):
        return [implementation.name for implementation in registry.find(*key)]

    assert names("sm90", "gemm", "bfloat16") == ["a.gemm", "b.gemm"]
    assert names("sm90", "gemm", "float32") == ["b.gemm"]
    assert names("gfx942", "gemm", "bfloat16") == ["b.gemm"]
    assert names("cpu", "gemm", "bfloat16") == ["c.gemm"]
    assert names("sm90", "softmax", "bfloat16") == ["a.softmax"]
    assert names("sm90", "mean", "bfloat16") == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_implementation_covers_a_key_exactly_when_nothing_is_unmet(arch, dtype):
    implementation = fake("a.gemm", archs=("sm9*", "cpu"), dtypes=("bfloat16",))
    problem = ops.get("gemm").problem(dtype, {"n": 8, "k": 8})
    assert implementation.covers(arch, dtype) == (not implementation.unmet(Device(ARCHS[arch], arch), problem))


def test_unmet_gives_every_reason_with_both_values():
    implementation = fake(
        "a.gemm",
        archs=("sm100", "gfx942"),
        dtypes=("float32",),
        requires=(
            DimMultipleOf("n", 48),
            DimAtMost("k", 32),
            DimIn("bias", (True,)),
            Check(lambda device, problem: f"no {device.name}"),
            DimMultipleOf("k", 8),
            Package("no-such-distribution", ">=2"),
            Package("pytest", "<1"),
        ),
    )
    reasons = implementation.unmet(H200, GEMM)
    assert reasons[:6] == (
        "needs sm100 or gfx942, the device is sm90",
        "takes float32, asked for bfloat16",
        "needs n a multiple of 48, asked for 64",
        "needs k at most 32, asked for 64",
        "needs bias in True, asked for False",
        "no NVIDIA H200",
    )
    assert reasons[6] == "needs the package no-such-distribution>=2, which is not installed"
    assert reasons[7] == f"needs pytest<1, {pytest.__version__} is installed"
    assert len(reasons) == 8


def test_a_package_is_assumed_on_a_predicted_device():
    implementation = fake("a.gemm", requires=(Package("no-such-distribution"),))
    assert implementation.unmet(Device(ARCHS["sm90"], "sm90", predicted=True), GEMM) == ()


def test_a_name_taken_twice_is_refused_and_both_sides_are_named():
    registry = Registry()
    registry.register(fake("a.gemm"), origin="acme 1.0")
    with pytest.raises(BidispatchError, match=r"a.gemm is registered twice, by acme 1.0 and by other 2.0"):
        registry.register(fake("a.gemm"), origin="other 2.0")
    assert registry.origin("a.gemm") == "acme 1.0"


@pytest.mark.parametrize(("name", "op", "message"), [("gemm", "gemm", "backend.kernel"), ("a.x", "gem", "unknown op")])
def test_a_name_without_backend_and_an_unknown_op_are_refused(name, op, message):
    with pytest.raises(UsageError, match=message):
        registry_of(fake(name, op=op))


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(UsageError, match=r"unknown implementation 'a.gem' \(did you mean 'a.gemm'\?\)"):
        registry_of(fake("a.gemm")).get("a.gem")


def test_ours_and_a_third_partys_backends_come_in_the_same_way(installed):
    registry = installed(
        Entry("triton", registering("triton.gemm"), "bidispatch"),
        Entry("acme", registering("acme.gemm"), "acme-kernels"),
    )
    assert [implementation.name for implementation in registry.for_op("gemm")] == ["acme.gemm", "triton.gemm"]
    assert registry.origin("acme.gemm") == "acme from acme-kernels 1.0"
    assert registry.backends == {"triton": "bidispatch 1.0", "acme": "acme-kernels 1.0"}


def test_two_backends_of_one_name_raise_and_both_distributions_are_named(installed):
    with pytest.raises(BidispatchError, match=r"two backends are named 'acme': one from one 1.0, one from two 1.0"):
        installed(Entry("acme", registering("acme.a"), "one"), Entry("acme", registering("acme.b"), "two"))


def test_one_distribution_listed_twice_is_one_backend(installed):
    entry = Entry("acme", registering("acme.gemm"))
    assert "acme.gemm" in installed(entry, entry)


def test_loading_again_changes_nothing(installed):
    registry = installed(Entry("acme", registering("acme.gemm")))
    registry.load_entry_points()
    assert [implementation.name for implementation in registry] == ["acme.gemm"]
    assert not registry.failures


def test_a_backend_may_only_use_its_own_name(installed):
    registry = installed(Entry("acme", registering("triton.gemm")))
    assert "triton.gemm" not in registry
    assert "name it acme.<kernel>" in str(registry.failures["acme"])


def test_a_backend_that_fails_half_way_leaves_nothing_behind(installed):
    def register(target):
        target.register(fake("acme.gemm"))
        raise RuntimeError("half way")

    registry = installed(Entry("acme", register), Entry("fine", registering("fine.gemm")))
    assert [implementation.name for implementation in registry] == ["fine.gemm"]
    assert isinstance(registry.failures["acme"].error, RuntimeError)
    assert "acme" in registry.backends
    with pytest.raises(KeyError):
        registry.origin("acme.gemm")


@pytest.fixture
def with_broken(installed):
    cause = ImportError("libacme.so: cannot open shared object file")
    return installed(Entry("broken", cause, "acme-kernels", "2.1"), Entry("fine", registering("fine.gemm")))


def test_a_backend_whose_import_raises_is_kept_and_shown_and_not_fatal(with_broken, tmp_path):
    selection = plan_of(tmp_path, with_broken, RULE).select("gemm", dtype="bfloat16", n=64, k=64)
    assert selection.implementations == ("fine.gemm",)
    (decision,) = [d for d in selection.decisions if d.implementation == "broken.gemm"]
    assert decision.verdict == REJECTED
    assert "backend 'broken' (acme-kernels 2.1) failed to load: ImportError: libacme.so" in decision.reasons[0]
    assert "broken.gemm: rejected" in selection.explain()


def test_a_backend_that_ends_the_process_when_imported_is_kept_too(installed):
    found = installed(Entry("quits", SystemExit(7)), Entry("fine", registering("fine.gemm")))
    assert isinstance(found.failures["quits"].error, SystemExit)
    assert "fine.gemm" in found


def _raises(*arguments):
    raise ZeroDivisionError("by its own fault")


class _Faulty:
    def unmet(self, device, problem):
        return _raises()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"numerics": _raises}, "its backend raised ZeroDivisionError: by its own fault"),
        ({"tiles": _raises}, "its backend raised ZeroDivisionError: by its own fault"),
        ({"requires": (_Faulty(),)}, "its backend raised ZeroDivisionError: by its own fault"),
        ({"tiles": lambda *a: ((32, None), (16, None), (None, None))}, "tiles() must give rising max_m"),
        ({"tiles": lambda *a: ((16, None),)}, "tiles() must give rising max_m"),
        ({"tiles": lambda *a: ()}, "tiles() must give rising max_m"),
    ],
)
def test_a_backend_whose_own_functions_fail_is_rejected_with_that_as_the_reason(tmp_path, fields, reason):
    registry = registry_of(fake("broken.gemm", **fields), fake("fine.gemm"))
    selection = plan_of(tmp_path, registry, RULE).select("gemm", dtype="bfloat16", n=64, k=64)
    assert selection.implementations == ("fine.gemm",)
    (decision,) = [d for d in selection.decisions if d.implementation == "broken.gemm"]
    assert any(reason in given for given in decision.reasons)


def test_a_preferred_implementation_of_a_broken_backend_is_shown(with_broken, tmp_path):
    plan = plan_of(tmp_path, with_broken, RULE, head="prefer: [broken.fast]")
    selection = plan.select("gemm", dtype="bfloat16", n=64, k=64)
    assert selection.implementations == ("fine.gemm",)
    (decision,) = [d for d in selection.decisions if d.implementation == "broken.fast"]
    assert "failed to load" in decision.reasons[0]
    assert decision.source.endswith("sm90.yaml:2")


def test_a_broken_backend_is_fatal_when_it_is_forced_and_the_cause_is_chained(with_broken, tmp_path):
    plan = plan_of(tmp_path, with_broken, RULE)
    with (
        bid.override("gemm=broken.gemm"),
        pytest.raises(BackendError, match=r"forced by bid.override.*libacme") as info,
    ):
        plan.select("gemm", dtype="bfloat16", n=64, k=64)
    assert info.value.__cause__ is with_broken.failures["broken"].error


def test_a_broken_backend_that_was_all_there_is_is_the_reason_given(with_broken, tmp_path):
    plan = plan_of(tmp_path, with_broken, gemm_rule("impl: broken.gemm"))
    with pytest.raises(SelectionError, match="nothing fits") as info:
        plan.select("gemm", dtype="bfloat16", n=64, k=64)
    assert "libacme" in str(info.value)


@pytest.mark.parametrize(
    ("load", "cause"),
    [
        ("a_module_that_is_not_there:bind", ImportError),
        ("fakes:no_such_attribute", AttributeError),
        ("fakes:bind_needs_library", ImportError),
        ("broken_kernels:bind", OSError),
    ],
)
def test_a_kernel_that_does_not_import_is_a_backend_error_with_its_cause(load, cause, tmp_path, monkeypatch):
    (tmp_path / "broken_kernels.py").write_text("raise OSError('libcuda.so.1')\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = registry_of(fake("a.gemm", load=load, tile=None))
    plan = plan_of(tmp_path, registry, gemm_rule("impl: a.gemm"), device=CPU)
    selection = plan.select("gemm", dtype="bfloat16", n=64, k=64)
    with pytest.raises(BackendError, match=r"a.gemm was chosen, but .* does not load") as info:
        selection.bind(max_tokens=8)
    assert isinstance(info.value.__cause__, cause)

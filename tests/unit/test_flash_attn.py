"""flash_attn.*: which library serves, what is refused and why, and what a class is named after.

What the kernels are called with is in tests/interpreter/test_interpreted_flash_attn.py: the calls need Triton.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import fake_flash_attn as fake
import pytest
import torch
from fakes import H200, plan_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import bidispatch
from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.errors import BackendError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.registry import Registry
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import BindContext, Limits
from bidispatch_backends.flash_attn import discovery, params, register

CPU = Device(ARCHS["cpu"], "a processor that plays the GPU")
REGISTRY = Registry()
register(REGISTRY)
NAMES = tuple(implementation.name for implementation in REGISTRY)
LATENT = tuple(name for name in NAMES if "mla" in name)
SPLITTING = tuple(name for name in NAMES if "split" in name)


def problem_of(dtype="bfloat16", **dims):
    return ops.get("attention").problem(dtype, {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, **dims})


def latent_problem(dtype="bfloat16", **dims):
    return ops.get("attention.mla").problem(dtype, {"num_heads": 16, **dims})


def any_problem(name, **dims):
    """Of the op that an implementation serves."""
    return latent_problem(**dims) if "mla" in name else problem_of(**dims)


def predicted(arch="sm90"):
    return Device(ARCHS[arch], arch, predicted=True)


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host with the given libraries and versions; `files` are what vLLM's folder holds."""

    def install(versions, files=("_vllm_fa2_C.abi3.so", "_vllm_fa3_C.abi3.so"), module=True):
        folder = tmp_path / "vllm" / "vllm_flash_attn"
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            (folder / file).touch()
        places = {}
        if "vllm" in versions:
            places["vllm"] = SimpleNamespace(submodule_search_locations=[str(folder.parent)])
        if "flash-attn" in versions and module:
            places["flash_attn_2_cuda"] = SimpleNamespace(origin=str(tmp_path / "flash_attn_2_cuda.so"))
        everywhere = {"triton": "3.6.0", **versions}
        monkeypatch.setattr("importlib.util.find_spec", places.get)
        monkeypatch.setattr("bidispatch.requirements.installed_version", everywhere.get)
        return folder

    return install


def unmet(name, problem, device=H200):
    return REGISTRY.get(f"flash_attn.{name}").unmet(device, problem)


def test_planning_imports_no_library():
    code = (
        "import sys; from bidispatch.registry import Registry; from bidispatch_backends.flash_attn import register;"
        "register(Registry()); print(sorted({'torch', 'triton', 'vllm', 'flash_attn'} & set(sys.modules)))"
    )
    import subprocess

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["fa2", "fa2_kv_split", "fa2_splits", "fa3", "fa3_kv_split"])
def test_vllm_alone_serves_pages_of_16(host, name):
    host({"vllm": "0.25.1"})
    assert unmet(name, problem_of()) == ()


@pytest.mark.parametrize("name", ["fa2", "fa2_kv_split", "fa2_capacity_splits"])
def test_the_package_alone_serves_pages_of_256(host, name):
    host({"flash-attn": "2.8.3"})
    assert unmet(name, problem_of(page_size=256)) == ()
    (reason,) = unmet(name, problem_of())
    assert "flash-attn needs page_size a multiple of 256, asked for 16" in reason


@pytest.mark.parametrize(
    ("name", "versions", "says"),
    [
        ("fa2", {}, ["flash-attn>=2.8.3,<2.8.4 is not installed", "pip install", "vllm>=0.20,<0.34 is not installed"]),
        ("fa2", {"flash-attn": "2.5.0"}, ["needs flash-attn>=2.8.3,<2.8.4, 2.5.0 is installed"]),
        ("fa3", {"flash-attn": "2.8.3"}, ["needs FA3 of vLLM", "vllm>=0.20,<0.34 is not installed"]),
        ("fa3", {"vllm": "0.40.0"}, ["needs vllm>=0.20,<0.34, 0.40.0 is installed"]),
        ("fa2_splits", {"flash-attn": "2.8.3"}, ["FA2 of vLLM", "vllm>=0.20,<0.34 is not installed"]),
        (
            "fa2_capacity_splits",
            {"vllm": "0.25.1"},
            ["FA2 of the flash-attn package", "flash-attn>=2.8.3,<2.8.4 is not"],
        ),
    ],
)
def test_what_is_missing_and_what_to_install_is_said(host, name, versions, says):
    host(versions)
    (reason,) = unmet(name, problem_of(page_size=256 if name.startswith("fa2") else 64))
    assert all(said in reason for said in says), reason


def test_a_library_without_its_file_is_said(host):
    host({"vllm": "0.25.1", "flash-attn": "2.8.3"}, files=("_vllm_fa2_C.abi3.so",), module=False)
    (reason,) = unmet("fa3", problem_of())
    assert "vllm 0.25.1 is installed without _vllm_fa3_C" in reason
    assert unmet("fa2", problem_of(page_size=256)) == ()
    assert discovery.FA2.choose(H200, problem_of(page_size=256)) is discovery.VLLM_FA2


def test_the_package_is_used_where_both_can(host):
    folder = host({"vllm": "0.25.1", "flash-attn": "2.8.3"})
    assert discovery.FA2.choose(H200, problem_of(page_size=256)) is discovery.FLASH_ATTN
    assert discovery.FA2.choose(H200, problem_of(page_size=16)) is discovery.VLLM_FA2
    assert discovery.VLLM_FA3.file() == folder / "_vllm_fa3_C.abi3.so"


@pytest.mark.parametrize("name", NAMES)
def test_records_are_tied_to_the_libraries_that_may_serve(name):
    implementation = REGISTRY.get(name)
    possible = {
        "fa2": ("flash-attn", "vllm"),
        "fa2_kv_split": ("flash-attn", "vllm", "triton"),  # the merge's arithmetic is Triton's
        "fa3_kv_split": ("vllm", "triton"),
        "fa3_triton_splits": ("vllm", "triton"),
        "fa2_capacity_splits": ("flash-attn",),
    }
    assert implementation.libraries == possible.get(name.partition(".")[2], ("vllm",))


@pytest.mark.parametrize("name", NAMES)
def test_only_one_split_claims_prefill_equal_to_decode(name):
    claim = REGISTRY.get(name).claims
    assert claim is (Invariance.BATCH if name in SPLITTING else Invariance.SEQUENCE)


@pytest.mark.parametrize(
    ("name", "arch", "dtype", "dims", "says"),
    [
        ("fa2", "sm80", "bfloat16", {}, []),
        ("fa2", "sm120", "float16", {"causal": False, "softcap": 30.0, "head_dim": 256}, []),
        ("fa2", "sm90", "float32", {}, ["takes bfloat16, float16, asked for float32"]),
        ("fa2", "gfx942", "bfloat16", {}, ["the device is gfx942"]),
        ("fa2", "sm90", "bfloat16", {"head_dim": 260}, ["head_dim a multiple of 8", "head_dim at most 256"]),
        ("fa2", "sm90", "bfloat16", {"page_size": 24}, ["vllm needs page_size a multiple of 16, asked for 24"]),
        ("fa2", "sm90", "bfloat16", {"window": 128}, ["needs window=0, asked for 128"]),
        ("fa2", "sm90", "bfloat16", {"sinks": True}, ["FA2 takes no sinks"]),
        ("fa2", "sm90", "bfloat16", {"alibi": True}, ["needs alibi=False"]),
        ("fa3", "sm90", "bfloat16", {"kv_dtype": "float8_e4m3fn"}, ["needs a cache of bfloat16"]),
        ("fa2_kv_split", "sm90", "bfloat16", {"page_size": 48}, ["needs page_size to divide 256, asked for 48"]),
        ("fa3", "sm90", "bfloat16", {"head_dim": 64}, []),
        ("fa3", "sm90", "bfloat16", {"head_dim": 96}, ["needs head_dim in 64, 128, asked for 96"]),
        ("fa3", "sm100", "bfloat16", {}, ["needs sm90, the device is sm100"]),
        ("fa3", "sm90", "bfloat16", {"page_size": 128}, ["needs page_size in 16, 32, 64, asked for 128"]),
        ("fa3", "sm90", "bfloat16", {"causal": False}, ["needs causal=True"]),
        ("fa3", "sm90", "bfloat16", {"sinks": True, "window": 64}, ["window=0", "FA3 takes them in bf16"]),
        ("fa3_kv_split", "sm90", "bfloat16", {"head_dim": 64}, ["needs head_dim in 128"]),
    ],
)
def test_what_it_cannot_do_is_said(name, arch, dtype, dims, says):
    reasons = unmet(name, problem_of(dtype, **dims), predicted(arch))
    assert len(reasons) == len(says), reasons
    assert all(said in reason for said, reason in zip(says, reasons, strict=True)), reasons


@pytest.mark.parametrize(
    ("name", "arch", "dtype", "dims", "says"),
    [
        ("fa3_mla", "sm90", "bfloat16", {}, []),
        ("fa3_mla_splits", "sm90", "float16", {"num_heads": 128, "page_size": 256}, []),
        ("fa3_mla", "sm90", "bfloat16", {"num_heads": 20, "page_size": 48}, []),
        ("fa3_mla", "sm90", "bfloat16", {"page_size": 8}, ["vllm needs page_size a multiple of 16, asked for 8"]),
        ("fa3_mla", "sm90", "bfloat16", {"kv_lora_rank": 256}, ["needs kv_lora_rank in 512, asked for 256"]),
        ("fa3_mla", "sm90", "bfloat16", {"rope_dim": 32}, ["needs rope_dim in 64, asked for 32"]),
        ("fa3_mla", "sm100", "bfloat16", {}, ["needs sm90, the device is sm100"]),
        (
            "fa3_mla_splits",
            "sm90",
            "bfloat16",
            {"page_size": 8},
            ["vllm needs page_size a multiple of 16, asked for 8"],
        ),
    ],
)
def test_what_it_cannot_do_for_latents_is_said(name, arch, dtype, dims, says):
    reasons = unmet(name, latent_problem(dtype, **dims), predicted(arch))
    assert len(reasons) == len(says), reasons
    assert all(said in reason for said, reason in zip(says, reasons, strict=True)), reasons


@pytest.mark.parametrize("name", LATENT)
def test_latents_need_the_library_and_say_what_to_install(host, name):
    name = name.partition(".")[2]
    host({"vllm": "0.25.1"})
    assert unmet(name, latent_problem()) == ()
    host({"vllm": "0.40.0"})
    assert "needs vllm>=0.20,<0.34, 0.40.0 is installed" in unmet(name, latent_problem())[0]
    host({})
    assert "vllm>=0.20,<0.34 is not installed (`pip install" in unmet(name, latent_problem())[0]


@pytest.mark.parametrize(("num_heads", "splits"), [(16, (1024, 16, 256, 64)), (128, (2048, 8, 512, 32))])
def test_hopper_has_splits_of_latents_at_level_batch(host, num_heads, splits):
    host({"vllm": "0.25.1"})
    problem = latent_problem(num_heads=num_heads)
    (rung,) = bidispatch.plan("sm90", require="batch").select_problem(problem).rungs
    assert rung.implementation.name == "flash_attn.fa3_mla_splits"
    params = rung.params
    assert (params.split_size, params.least_splits, params.smallest_split, params.num_splits) == splits
    (rung,) = bidispatch.plan("sm90").select_problem(problem).rungs
    assert rung.implementation.name == "triton.mla"


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("fa3_mla", {"num_splits": 4}, "only 1 keeps prefill = decode"),
        ("fa3_mla_splits", {"split_size": 1000}, "split_size=1000 is not a multiple of 64"),
        ("fa3_mla_splits", {"num_splits": 1}, "greater than or equal to 2"),
        ("fa3_mla_splits", {"num_splits": 129}, "less than or equal to 128"),
        ("fa3_mla_splits", {"num_splits": 4, "least_splits": 5}, "least_splits=5 is more than num_splits=4"),
        ("fa3_mla_splits", {"smallest_split": 100}, "smallest_split=100 is not a multiple of 64"),
        ("fa3_mla_splits", {"split_size": 128, "least_splits": 2}, "smallest_split=256 is more than split_size=128"),
        ("fa2", {"num_splits": 4}, "flash_attn.fa2_splits"),
        ("fa3", {"num_splits": 0}, "only 1 keeps prefill = decode"),
        ("fa2_splits", {"num_splits": 1}, "greater than or equal to 2"),
        ("fa2_splits", {"num_splits": 129}, "less than or equal to 128"),
        ("fa2_capacity_splits", {"num_splits": 7}, "not a multiple of num_splits=7 x 256"),
        ("fa2_kv_split", {"split_size": 1000}, "split_size=1000 is not a multiple of 256"),
        ("fa3_kv_split", {"workspace_mb": 1}, "Extra inputs"),
    ],
)
def test_params_that_cannot_hold_are_refused(name, given, says):
    with pytest.raises(ValidationError, match=says):
        REGISTRY.get(f"flash_attn.{name}").params(**given)


def label(name, problem=None, **given):
    implementation = REGISTRY.get(f"flash_attn.{name}")
    return implementation.numerics(implementation.params(**given), problem or any_problem(name))


def test_labels_name_what_fixes_the_bits(host):
    host({"vllm": "0.25.1", "flash-attn": "2.8.3"})
    assert label("fa2") == "fa2.vllm-0.25.1"
    assert label("fa2", problem_of(page_size=256)) == "fa2.flash-attn-2.8.3"
    assert label("fa3") == "fa3.vllm-0.25.1"
    assert label("fa2_splits", num_splits=8) == "fa2_splits.8.vllm-0.25.1"
    pages = problem_of(page_size=256)
    found = label("fa2_capacity_splits", pages, num_splits=8, kv_capacity=8192)
    assert found == "fa2_capacity_splits.8.8192.flash-attn-2.8.3"
    assert label("fa2_kv_split", split_size=2048) == "fa2_kv_split.2048.vllm-0.25.1"
    assert label("fa3_kv_split", split_size=2048) == "fa3_kv_split.2048.vllm-0.25.1"
    assert label("fa3_mla") == "fa3_mla.vllm-0.25.1"
    assert label("fa3_mla_splits") == "fa3_mla_splits.512.32.vllm-0.25.1"
    assert label("fa3_mla_splits", least_splits=4) == "fa3_mla_splits.256-512.4-32.vllm-0.25.1"
    assert len({label(name.partition(".")[2]) for name in NAMES}) == len(NAMES)


def test_another_version_is_another_class(host):
    """The same call has other KV blocks in another version: one label for both would be a lie."""
    host({"vllm": "0.25.1"})
    before = {label(name.partition(".")[2]) for name in NAMES if "capacity" not in name}
    host({"vllm": "0.26.0"})
    after = {label(name.partition(".")[2]) for name in NAMES if "capacity" not in name}
    assert not before & after
    host({})
    assert label("fa2") == "fa2.none"


@given(st.integers(1, 128), st.integers(1, 8), st.sampled_from([16, 32, 64]))
def test_labels_are_free_of_heads_and_pages(heads, kv_heads, page_size):
    """Tensor parallelism divides heads: the class must not follow them."""
    for name in NAMES:
        sizes = {} if name in LATENT else {"num_kv_heads": kv_heads}
        problem = any_problem(name, num_heads=heads * kv_heads, page_size=page_size, **sizes)
        assert label(name.partition(".")[2], problem) == label(name.partition(".")[2])


def bind(name, problem, limits, given=None):
    found = REGISTRY.get(f"flash_attn.{name}")
    chosen = found.params(**(given or {}))
    ((_, tile),) = found.tiles(CPU, problem, chosen) if found.tile else ((None, None),)
    return load_attribute(found.load)(BindContext(CPU, problem, chosen, tile, limits))


def test_limits_that_cannot_hold_are_refused_at_bind(host, monkeypatch):
    fake.register()
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", fake.package())
    host({"vllm": "0.25.1", "flash-attn": "2.8.3"})
    for name in NAMES:
        with pytest.raises(UsageError, match="max_seq_len=<longest KV of a sequence>"):
            bind(name.partition(".")[2], any_problem(name, page_size=256 if "capacity" in name else 16), Limits(4, 4))
    with pytest.raises(UsageError, match="max_seq_len=131073, above kv_capacity=131072"):
        bind("fa2_capacity_splits", problem_of(page_size=256), Limits(4, 4, 131073))


def test_a_library_that_went_away_is_said_at_bind(host):
    host({})
    with pytest.raises(BackendError, match=r"flash-attn>=2\.8\.3,<2\.8\.4 is not installed"):
        bind("fa2_capacity_splits", problem_of(page_size=256), Limits(4, 4, 64))


def test_a_shared_object_that_does_not_load_is_said(host, monkeypatch):
    from bidispatch_backends.flash_attn import library

    folder = host({"vllm": "0.25.1"}, files=("_vllm_other_C.abi3.so",))
    broken = discovery.Source("vllm", "", "_vllm_other_C", 16, "pip install vllm")
    with pytest.raises(BackendError, match=r"_vllm_other_C\.abi3\.so does not load with torch"):
        library._load(broken)
    (folder / "_vllm_other_C.abi3.so").unlink()
    with pytest.raises(BackendError, match="installed without _vllm_other_C; pip install vllm"):
        library._load(broken)


def test_other_arguments_than_those_that_were_read_are_refused():
    from bidispatch_backends.flash_attn import library

    namespace = ModuleType("ops")
    other = torch.library.Library("_vllm_fa9_C", "DEF")
    other.define("varlen_fwd" + fake.FA2_SCHEMAS["varlen_fwd"].replace("int num_splits, Generator? gen", "int seed"))
    namespace.varlen_fwd = torch.ops._vllm_fa9_C.varlen_fwd
    with pytest.raises(BackendError, match="not the 22 arguments of the versions that were read"):
        library._checked(discovery.VLLM_FA2, namespace, "varlen_fwd", *library._VARLEN)


def test_fa3_refuses_splits():
    from bidispatch_backends.flash_attn.library import Fa3

    with pytest.raises(BackendError, match="num_splits=4 must be 1"):
        Fa3(lambda *arguments: []).decode(*[torch.empty(1)] * 7, num_splits=4, scale=1.0, softcap=0.0)


def test_a_profile_can_name_them(host, tmp_path):
    host({"vllm": "0.25.1"})
    rule = (
        "  attention:\n    - dtypes: [bf16]\n"
        "      candidates: [{impl: flash_attn.fa3_kv_split, params: {split_size: 2048}}, {impl: flash_attn.fa3}]\n"
    )
    for level, chosen in (("batch", "flash_attn.fa3_kv_split"), ("sequence", "flash_attn.fa3")):
        head = f"name: sm90\ninvariance: {{require: {level}, trust: claimed}}"
        plan = plan_of(tmp_path / level, REGISTRY, rule, head=head)
        selection = plan.select_problem(problem_of())
        assert [rung.implementation.name for rung in selection.rungs] == [chosen]
        assert selection.numerics == ("fa3_kv_split.2048.vllm-0.25.1" if level == "batch" else "fa3.vllm-0.25.1")


def test_tune_tries_packing_where_heads_share_keys():
    search = load_attribute(REGISTRY.get("flash_attn.fa2").search)
    packing = [tile.pack_lone_queries for tile in search(H200, problem_of(), params.OneSplitParams(), 8)]
    assert packing == [False, True]
    assert len(search(H200, problem_of(num_kv_heads=32), params.OneSplitParams(), 8)) == 1


def test_tiles_are_no_params():
    assert not set(params.WorkspaceTile.model_fields) & set(params.SplitSizeParams.model_fields)

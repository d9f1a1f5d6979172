"""Tuned ladders: a file that `tune` wrote, named by a rule, comes before the rule's own candidates."""

from __future__ import annotations

import json

import pytest

import bidispatch as bid
from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.errors import ProfileError, SelectionError
from bidispatch.planning.select import tuned_elsewhere
from bidispatch.profiles.load import lint_file
from bidispatch.profiles.tiles import TunedEntry, TunedFile, TunedRung, read_tuned, write_tuned
from bidispatch.registry import default_registry

SM90 = Device(ARCHS["sm90"], "sm90", predicted=True)
SMALL = {"block_m": 16, "block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4}
LARGE = {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3}
PROFILE = """
schema_version: 1
extends: sm90
ops:
  gemm:
    - dtypes: [bfloat16, float16, float32]
      tuned: [tiles/gemm.json]
      candidates: [{impl: triton.gemm}]
"""


def entry(n=6144, k=4096, **changes):
    rungs = [
        TunedRung(impl="triton.gemm", max_m=16, tile=SMALL, us=9.5),
        TunedRung(impl="cublaslt.pinned", max_m=512, us=20.0),
        TunedRung(impl="triton.gemm", tile=LARGE, us=90.0),
    ]
    content = {
        "op": "gemm",
        "dtype": "bfloat16",
        "dims": {"n": n, "k": k, "out_dtype": "bfloat16", "role": "linear"},
        "numerics": "k_sequential",
        "rungs": rungs,
        "comparisons": 12,
        "made": "2026-11-25T10:00:00+00:00",
    }
    return TunedEntry(**{**content, **changes})


@pytest.fixture
def tuned(tmp_path):
    """Writes a profile and its tuned file; gives the plan."""

    def make(*entries, arch="sm90", profile=PROFILE, device=""):
        environment = {"arch": arch, "device": device}
        write_tuned(tmp_path / "tiles" / "gemm.json", TunedFile(environment=environment, entries=list(entries)))
        path = tmp_path / "mine.yaml"
        path.write_text(profile)
        return bid.plan(SM90, profile=str(path))

    return make


def ladder(plan, dtype="bfloat16", n=6144, k=4096, **dims):
    selection = plan.select("gemm", dtype=dtype, n=n, k=k, **dims)
    return [(rung.implementation.name, rung.max_m) for rung in selection.rungs]


TUNED = [("triton.gemm", 16), ("cublaslt.pinned", 512), ("triton.gemm", None)]


def test_a_tuned_ladder_serves_the_problem_it_was_found_for_and_no_other(tuned):
    plan = tuned(entry())
    generic = ladder(plan, n=6145)
    assert ladder(plan) == ladder(plan, bias=True) == TUNED
    assert plan.select("gemm", dtype="bf16", n=6144, k=4096).rungs[0].tile.block_m == 16
    for other in ({"n": 4096}, {"dtype": "float16"}, {"out_dtype": "float32"}, {"role": "router"}):
        assert ladder(plan, **other) == generic != TUNED


def test_every_decision_names_the_file_and_the_entry(tuned):
    selection = tuned(entry()).select("gemm", dtype="bf16", n=6144, k=4096)
    sources = [decision.source for decision in selection.decisions if decision.verdict == "chosen"]
    assert len(sources) == 3
    assert all(source.endswith("gemm.json (n=6144 k=4096)") for source in sources)


def test_a_rung_that_cannot_be_had_leaves_its_range_to_the_next(tuned):
    disabled = PROFILE + "disable: {cublaslt.pinned: not here}\n"
    assert ladder(tuned(entry(), profile=disabled)) == [("triton.gemm", 16), ("triton.gemm", None)]
    missing = [TunedRung(impl="acme.gemm", max_m=64), TunedRung(impl="cublaslt.pinned", max_m=512)]
    plan = tuned(entry(rungs=missing))
    assert ladder(plan)[0] == ("cublaslt.pinned", 512)
    assert ladder(plan)[-1] == ("triton.gemm", None)
    decisions = plan.select("gemm", dtype="bf16", n=6144, k=4096).decisions
    assert "no installed backend has acme.gemm" in str(decisions[0])


def test_a_tuned_rung_of_another_class_is_refused(tuned):
    mixed = [
        TunedRung(impl="triton.gemm", max_m=16, params={"k_chunk": 1024}, tile=SMALL),
        TunedRung(impl="triton.gemm", tile=LARGE),
    ]
    with_class = PROFILE.replace("      tuned", "      numerics: k_sequential\n      tuned")
    plan = tuned(entry(rungs=mixed), profile=with_class)
    selection = plan.select("gemm", dtype="bf16", n=6144, k=4096)
    assert [rung.max_m for rung in selection.rungs] == [None]
    assert "its class is k_chunks.1024, the ladder's is k_sequential" in selection.explain()


def test_a_file_of_another_arch_is_not_used(tuned):
    plan = tuned(entry(), arch="sm80")
    assert ladder(plan) == ladder(plan, n=6145)


def test_explain_says_which_files_of_elsewhere_are_not_used(tuned, cli, as_json, tmp_path):
    words = ("explain", "gemm", "--device", "sm90", "--profile", str(tmp_path / "mine.yaml"))
    tuned(entry(), arch="sm80", device="NVIDIA A100")
    code, out, _ = cli(*words)
    said = "tiles/gemm.json: made on NVIDIA A100 (sm80), here sm90 (sm90), not used"
    assert (code, said in " ".join(out.split())) == (0, True)
    _, document = as_json(*words)
    assert [line.endswith(said) for line in document["tuned_elsewhere"]] == [True]
    tuned(entry(), device="NVIDIA H200")
    assert "made on" not in cli(*words)[1]


def test_a_file_of_another_device_of_the_arch_is_used_and_named(tuned):
    plan = tuned(entry(), device="NVIDIA H200")
    here = Device(ARCHS["sm90"], "NVIDIA H100")
    asked = [ops.get("gemm").problem("bf16", {"n": n, "k": 4096}) for n in (6144, 6145)]
    (line,) = tuned_elsewhere(asked[0], plan.profile, here)
    assert "made on NVIDIA H200 (sm90), here NVIDIA H100 (sm90), used" in line
    assert tuned_elsewhere(asked[1], plan.profile, here) == []
    assert tuned_elsewhere(asked[0], plan.profile, Device(ARCHS["sm90"], "NVIDIA H200")) == []
    with bid.override("gemm=triton.gemm"):
        assert tuned_elsewhere(asked[0], plan.profile, here) == []


def test_a_file_named_twice_is_a_fault_with_its_line(tuned, tmp_path):
    tuned(entry())
    (tmp_path / "mine.yaml").write_text(
        PROFILE.replace("[tiles/gemm.json]", "[tiles/gemm.json, tiles/../tiles/gemm.json]")
    )
    (fault,) = lint_file(tmp_path / "mine.yaml", default_registry())
    assert (fault.line, "the file 'tiles/gemm.json' again" in fault.message) == (7, True)


@pytest.mark.parametrize(
    "searched",
    [
        {"rows": [], "implementations": ["a.b"]},
        {"rows": [8, 1], "implementations": ["a.b"]},
        {"rows": [0], "implementations": ["a.b"]},
        {"rows": [1], "implementations": []},
        {"rows": [1], "implementations": ["a.b"], "more": 1},
    ],
)
def test_what_was_searched_is_checked_when_it_is_read(tuned, tmp_path, searched):
    plan, path = tuned(entry()), tmp_path / "tiles" / "gemm.json"
    content = json.loads(path.read_text())
    content["entries"][0]["searched"] = searched
    path.write_text(json.dumps(content))
    with pytest.raises(ProfileError, match=r"gemm\.json.*bidispatch tune"):
        ladder(plan)


def test_a_tile_the_kernel_does_not_have_is_rejected_with_the_reason(tuned):
    plan = tuned(entry(rungs=[TunedRung(impl="triton.gemm", tile={"block_q": 3})]))
    assert "its tile is refused" in plan.select("gemm", dtype="bf16", n=6144, k=4096).explain()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "bidispatch-tiles", "version": 2}'])
def test_a_file_that_tune_did_not_write_is_an_error_that_names_it(tuned, tmp_path, content):
    plan = tuned(entry())
    (tmp_path / "tiles" / "gemm.json").write_text(content)
    with pytest.raises(ProfileError, match=r"gemm\.json.*bidispatch tune"):
        ladder(plan)


def test_a_file_that_is_not_there_is_a_fault_with_its_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    (fault,) = lint_file(path, default_registry())
    assert (fault.line, "tiles/gemm.json" in fault.message) == (7, True)


def test_what_is_written_is_read_again_and_stays_whole(tmp_path):
    path = tmp_path / "gemm.json"
    file = TunedFile(environment={"arch": "sm90", "soft": {"driver": None}}, entries=[entry(), entry(n=8)])
    write_tuned(path, file)
    assert read_tuned(path) == file
    assert json.loads(path.read_text())["entries"][1]["dims"]["n"] == 8
    write_tuned(path, TunedFile(environment={}, entries=[]))
    assert read_tuned(path).entries == []
    assert [other.name for other in tmp_path.iterdir()] == ["gemm.json"]


def test_the_plan_shows_a_tuned_ladder_by_implementation(tuned, cli, tmp_path):
    typical = ops.get("gemm").typical("bfloat16")
    same = [TunedRung(impl="triton.gemm", max_m=m, tile=SMALL) for m in (1, 2, 4, 8)]
    tuned(entry(n=typical.size("n"), k=typical.size("k"), rungs=[*same, TunedRung(impl="cublaslt.pinned")]))
    code, out, _ = cli("plan", "--device", "sm90", "--profile", str(tmp_path / "mine.yaml"))
    assert code == 0
    assert "triton.gemm (1 <= M <= 8)" in out
    assert "cublaslt.pinned (M > 8)" in out


def test_a_ladder_without_an_open_end_and_no_candidate_behind_it_is_an_error(tuned):
    closed = entry(rungs=[TunedRung(impl="cublaslt.pinned", max_m=512)])
    nothing = PROFILE.replace("{impl: triton.gemm}", "{impl: deep_gemm.bf16, max_m: 4}")
    with pytest.raises(SelectionError, match="nothing serves M > 512"):
        ladder(tuned(closed, profile=nothing))

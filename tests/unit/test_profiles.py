"""Profiles: every fault of a file at once and in its place, `extends`, layers, and the profiles we ship."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from fakes import CPU, H200, WITHOUT_E4M3, SplitParams, fake, registry_of, uses_e4m3
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

import bidispatch as bid
from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.errors import BidispatchError, ProfileError, SelectionError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.planning.decisions import CHOSEN, REJECTED, UNLISTED
from bidispatch.planning.select import select
from bidispatch.profiles.document import Document, read_document
from bidispatch.profiles.lint import faults_of
from bidispatch.profiles.load import ProfileStore, builtin_folder, lint_file
from bidispatch.profiles.schema import Candidate, Condition, ProfileFile, Rule, json_schema
from bidispatch.registry import default_registry

REGISTRY = registry_of(fake("a.gemm"), fake("b.gemm"), fake("a.softmax", op="softmax", tile=None))
HEAD = "schema_version: 1\n"
RULE = HEAD + "ops:\n  gemm:\n    - dtypes: [bf16]\n      candidates: [{impl: a.gemm%s}]\n"
WHEN = HEAD + "ops:\n  gemm:\n    - dtypes: [bf16]\n      when: {%s}\n      candidates: [{impl: a.gemm}]\n"


def lint(folder: Path, text: str) -> list[tuple[int, int, str]]:
    path = folder / "profile.yaml"
    path.write_text(text)
    faults = lint_file(path, REGISTRY)
    assert all(fault.path == str(path) for fault in faults)
    return [(fault.line, fault.column, fault.message) for fault in faults]


# --- faults of one file -------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, list[tuple[int, int, str]]]] = {
    "unknown top key": (HEAD + "extend: _base\n", [(2, 1, "unknown key 'extend' (did you mean 'extends'?)")]),
    "unknown match key": (HEAD + "match: {arch: sm90, devicename: x}\n", [(2, 21, "did you mean 'device_name'")]),
    "unknown rule key": (
        RULE.replace("dtypes: [bf16]", "dtypes: [bf16]\n      numeric: x") % "",
        [(5, 7, "unknown key 'numeric' (did you mean 'numerics'?); known: dtypes, when, numerics, tuned, candidates")],
    ),
    "unknown candidate key": (RULE % ", maxm: 4", [(5, 35, "unknown key 'maxm' (did you mean 'max_m'?)")]),
    "unknown invariance key": (HEAD + "invariance:\n  requires: batch\n", [(3, 3, "did you mean 'require'")]),
    "unknown condition": (WHEN % "n: {multipleof: 8}", [(5, 18, "did you mean 'multiple_of'")]),
    "no version": ("name: x\n", [(1, 1, "'schema_version' is missing")]),
    "future version": ("schema_version: 2\n", [(1, 17, "should be 1 here, not 2 (an int)")]),
    "version as text": ("schema_version: '1'\n", [(1, 17, "should be 1 here, not '1' (text)")]),
    "version as a flag": ("schema_version: true\n", [(1, 17, "should be 1 here, not True (a bool)")]),
    "empty file": ("", [(1, 1, "a profile is a mapping, this is nothing")]),
    "a list": ("- a\n- b\n", [(1, 1, "a profile is a mapping, this is a list")]),
    "wrong type of name": (HEAD + "name: 3\n", [(2, 7, "valid string here, not 3 (an int)")]),
    "wrong type of ops": (HEAD + "ops: [gemm]\n", [(2, 6, "valid dictionary here, not a list")]),
    "wrong type of rules": (HEAD + "ops:\n  gemm: a.gemm\n", [(3, 9, "valid list here, not 'a.gemm' (text)")]),
    "wrong type of prefer": (HEAD + "prefer: a.gemm\n", [(2, 9, "valid list here")]),
    "disable without reason": (HEAD + "disable: [a.gemm]\n", [(2, 10, "valid dictionary here, not a list")]),
    "reason that is no text": (HEAD + "disable: {a.gemm: true}\n", [(2, 19, "valid string here, not True (a bool)")]),
    "max_m as text": (RULE % ", max_m: '4'", [(5, 42, "valid integer here, not '4' (text)")]),
    "max_m as bool": (RULE % ", max_m: true", [(5, 42, "valid integer here, not True (a bool)")]),
    "max_m of zero": (RULE % ", max_m: 0", [(5, 42, "greater than 0 here, not 0")]),
    "a param that is a list": (
        RULE % ", params: {splits: [1]}",
        [(5, 52, "a bool, an int, a float or text here, not a list")],
    ),
    "a condition that is a list": (WHEN % "n: [8]", [(5, 17, "text or conditions here, not a list")]),
    "a minimum that is text": (WHEN % "n: {min: low}", [(5, 23, "should be an int or a float here, not 'low' (text)")]),
    "no is text in YAML 1.2": (HEAD + "invariance: {trust: no}\n", [(2, 21, "'verified' here, not 'no' (text)")]),
    "duplicate key": (HEAD + "name: a\nname: b\n", [(3, 1, "duplicate key 'name', first on line 2")]),
    "duplicate op": (HEAD + "ops:\n  gemm: []\n  gemm: []\n", [(4, 3, "duplicate key 'gemm', first on line 3")]),
    "merge key": (
        HEAD + "ops: {}\nmatch:\n  <<: {arch: sm90}\n  arch: sm90\n",
        [(4, 3, "merge keys (<<) are not supported")],
    ),
    "tag": (HEAD + "name: !mine x\n", [(2, 7, "'x' cannot be read as !mine")]),
    "date out of range": (HEAD + "name: 2024-13-45\n", [(2, 7, "cannot be read as")]),
    "key that is a list": (HEAD + "? [a, b]\n: 3\n", [(2, 3, "a key is text here")]),
    "alias inside its anchor": (
        HEAD + "match: &x\n  arch: *x\n",
        [(2, 8, "an alias (*) stands inside its own anchor (&)"), (2, 8, "valid string here, not nothing")],
    ),
    "unclosed bracket": (HEAD + "prefer: [a.gemm\n", [(3, 1, "not valid YAML: ")]),
    "tab": (HEAD + "match:\n\tarch: sm90\n", [(3, 1, "not valid YAML: ")]),
    "two documents": (HEAD + "---\nname: x\n", [(2, 1, "not valid YAML: but found another document")]),
    # Deeper than any limit in force: torch.compile doubles the process's, and its tests may have run before.
    "nested too deeply": ("a: " + "[" * 20_000, [(0, 0, "nested too deeply")]),
    "unknown arch": (HEAD + "match: {arch: sm91}\n", [(2, 15, "unknown arch 'sm91' (did you mean 'sm90'?)")]),
    "unknown op": (HEAD + "ops:\n  gem: []\n", [(3, 3, "unknown op 'gem' (did you mean 'gemm'?)")]),
    "unknown dtype": (RULE.replace("bf16", "bf16, float61") % "", [(4, 22, "unknown dtype 'float61'")]),
    "no dtypes": (RULE.replace("bf16", "") % "", [(4, 15, "at least 1 item")]),
    "unknown dim": (WHEN % "nn: 8", [(5, 14, "gemm has no dim 'nn' (did you mean 'n'?)")]),
    "a dim that is the batch": (WHEN % "m: 8", [(5, 14, "gemm has no dim 'm'")]),
    "a dim of another type": (WHEN % "n: big", [(5, 17, "n is an int, never 'big' (text)")]),
    "a bool as a number": (WHEN % "bias: 1", [(5, 20, "bias is a bool, never 1 (an int)")]),
    "a minimum of a bool": (WHEN % "bias: {min: 1}", [(5, 21, "bias is a bool, which has no 'min'")]),
    "a short dtype in a condition": (WHEN % "out_dtype: bf16", [(5, 25, "out_dtype is one of float32")]),
    "a choice of another type": (WHEN % "n: {in: [64, big]}", [(5, 27, "n is an int, never 'big'")]),
    "unknown implementation": (
        RULE.replace("a.gemm", "a.gemn") % "",
        [(5, 27, "unknown implementation 'a.gemn' (did you mean 'a.gemm'?); `bidispatch doctor` lists them")],
    ),
    "unknown implementation preferred": (HEAD + "prefer: [a.gemm, a.gem]\n", [(2, 18, "did you mean 'a.gemm'")]),
    "unknown implementation disabled": (HEAD + "disable: {a.gem: slow}\n", [(2, 11, "did you mean 'a.gemm'")]),
    "implementation of another op": (
        RULE.replace("a.gemm", "a.softmax") % "",
        [(5, 27, "a.softmax implements softmax, not gemm")],
    ),
    "no implementation": (RULE.replace("impl: a.gemm", "max_m: 3") % "", [(5, 20, "'impl' is missing")]),
    "param inside tile": (
        RULE % ", tile: {splits: 2, block_m: 16}",
        [(5, 42, "'splits' is a reduction param of a.gemm: it fixes the bits, so it belongs in `params`")],
    ),
    "tile size inside params": (
        RULE % ", params: {block_m: 16}",
        [(5, 44, "'block_m' is a tile size of a.gemm: it belongs in `tile`")],
    ),
    "unknown param": (RULE % ", params: {split: 2}", [(5, 44, "no param 'split' (did you mean 'splits'?)")]),
    "unknown tile size": (
        RULE % ", tile: {block_n: 2, block_m: 1}",
        [(5, 42, "no tile size 'block_n' (did you mean 'block_m'?)")],
    ),
    "tile of what has none": (
        HEAD + "ops:\n  softmax:\n    - {dtypes: [fp32], candidates: [{impl: a.softmax, tile: {block_m: 4}}]}\n",
        [(4, 62, "a.softmax has no tile size 'block_m'; it has none")],
    ),
    "param of the wrong type": (RULE % ", params: {splits: two}", [(5, 52, "valid integer here, not 'two' (text)")]),
    "param that is a float": (RULE % ", params: {splits: 2.0}", [(5, 52, "valid integer here, not 2.0 (a float)")]),
    "tile without its size": (RULE % ", tile: {}", [(5, 41, "'block_m' is missing")]),
    "max_m that falls": (
        RULE.replace("{impl: a.gemm%s}", "{impl: a.gemm, max_m: 64}, {impl: b.gemm, max_m: 16}"),
        [(5, 69, "max_m must rise: 16 comes after 64")],
    ),
    "max_m that stays": (
        RULE.replace("{impl: a.gemm%s}", "{impl: a.gemm, max_m: 64}, {impl: b.gemm}, {impl: b.gemm, max_m: 64}"),
        [(5, 85, "max_m must rise: 64 comes after 64")],
    ),
    "missing extends": (HEAD + "extends: sm9\n", [(2, 10, "extends 'sm9', which is not there (did you mean 'sm90'?)")]),
    "extends itself": (HEAD + "extends: profile\n", [(2, 10, "`extends` goes in a circle: profile extends itself")]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_named_at_its_line_and_column(case, tmp_path):
    text, wanted = BAD[case]
    found = lint(tmp_path, text)
    assert [(line, column) for line, column, _ in found] == [(line, column) for line, column, _ in wanted], found
    for (_, _, message), (_, _, part) in zip(found, wanted, strict=True):
        assert part in message


def test_all_faults_of_a_file_come_at_once_and_in_order(tmp_path):
    text = """schema_version: 1
nam: x
extends: sm91
match: {arch: sm9000}
invariance: {require: batches}
prefer: [a.gem]
ops:
  gemm:
    - dtypes: [bfloat]
      when: {q: 3}
      candidates:
        - {impl: a.gemm, max_m: 64, tile: {splits: 1}}
        - {impl: c.gemm, max_m: 32}
        - {impl: b.gemm, params: {block_m: 1}, params: {}}
  gemmm: []
"""
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    found = lint_file(path, REGISTRY)
    assert [fault.line for fault in found] == [2, 3, 4, 5, 6, 9, 10, 12, 12, 13, 13, 14, 14, 15]
    store = ProfileStore(REGISTRY, builtin=tmp_path)
    with pytest.raises(ProfileError) as info:
        store.named(str(path))
    # Loading reads the file before it follows `extends`, so it reports every other fault.
    assert set(info.value.faults) == {fault for fault in found if fault.line != 3}
    assert str(info.value).splitlines()[0].endswith("profile.yaml:2:1: " + found[0].message)


def test_a_file_that_is_not_there_or_not_text_is_a_fault(tmp_path):
    (fault,) = lint_file(tmp_path / "nowhere.yaml", REGISTRY)
    assert "cannot be read" in fault.message
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00schema")
    (fault,) = lint_file(tmp_path / "binary.yaml", REGISTRY)
    assert "cannot be read" in fault.message


def test_a_fault_of_the_profile_extended_is_shown_too(tmp_path):
    (tmp_path / "base.yaml").write_text(HEAD + "nam: x\n")
    (tmp_path / "mine.yaml").write_text(HEAD + "extends: base\n")
    (fault,) = lint_file(tmp_path / "mine.yaml", REGISTRY)
    assert (Path(fault.path).name, fault.line) == ("base.yaml", 2)


def test_a_good_file_has_no_faults(tmp_path):
    text = WHEN % "n: {multiple_of: 8, min: 16, max: 1e6}, k: {in: [64, 128]}, bias: false, out_dtype: float32"
    assert lint(tmp_path, text) == []
    assert lint(tmp_path, RULE % ", params: {splits: 4}, tile: {block_m: 32}, max_m: 7") == []
    assert lint(tmp_path, HEAD + "match: {arch: sm90, device_name: 'NVIDIA H200*'}\ndisable: {a.gemm: no}\n") == []


def test_anchors_that_do_not_nest_are_read(tmp_path):
    (tmp_path / "p.yaml").write_text("a: &x [1, 2]\nb: *x\n")
    assert read_document(tmp_path / "p.yaml").data == {"a": [1, 2], "b": [1, 2]}


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.text(max_size=6))
FIELDS = [name for model in (ProfileFile, Rule, Candidate, Condition) for name in model.model_fields]
WORDS = st.sampled_from([*FIELDS, "gemm", "a.gemm", "arch", "require", "splits", "block_m", "n", "in"])
DATA = st.recursive(
    st.one_of(SCALARS, WORDS), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4)
)


def same_shape(data) -> Document:
    document = Document("p.yaml", data)

    def walk(value, where):
        document.values[where] = (len(where) + 1, 1)
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            document.keys[(*where, key)] = (len(where) + 2, 1)
            walk(inner, (*where, key))

    walk(data, ())
    return document


@given(data=DATA, rule=DATA, candidate=DATA)
def test_lint_answers_whatever_the_data_is_and_agrees_with_the_models(data, rule, candidate):
    wrapped = {"schema_version": 1, "ops": {"gemm": [rule, {"dtypes": ["bf16"], "candidates": [candidate]}]}}
    for content in (data, wrapped):
        faults = faults_of(same_shape(content), REGISTRY)
        if not faults:
            ProfileFile.model_validate(content)
            jsonschema.validate(content, json_schema())


# --- extends ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Write files of the built-in and the user's folder; get the store of both."""

    def make(builtin: dict[str, str], user: dict[str, str] | None = None) -> ProfileStore:
        for layer, files in (("builtin", builtin), ("user", user or {})):
            (tmp_path / layer).mkdir()
            for name, text in files.items():
                (tmp_path / layer / f"{name}.yaml").write_text(HEAD + text)
        return ProfileStore(REGISTRY, builtin=tmp_path / "builtin", user=tmp_path / "user")

    return make


def rule(impl: str, op: str = "gemm") -> str:
    return f"  {op}:\n    - dtypes: [bf16]\n      candidates: [{{impl: {impl}}}]\n"


def impls(profile, op="gemm"):
    return [candidate.impl for each in profile.rules[op] for candidate in each.candidates]


@pytest.mark.parametrize("length", [2, 3])
def test_extends_in_a_circle_is_refused_with_the_circle(folders, length):
    names = ["sm90", "x", "y"][:length]
    store = folders({name: f"extends: {names[(i + 1) % length]}\n" for i, name in enumerate(names)})
    with pytest.raises(ProfileError, match="goes in a circle: " + " extends ".join([*names, names[0]]) + "$") as info:
        store.for_device(H200)
    assert [(fault.line, fault.column) for fault in info.value.faults] == [(2, 10)]


def test_a_missing_extends_is_refused_with_what_there_is(folders):
    store = folders({"sm90": "extends: _bass\n", "_base": ""})
    with pytest.raises(ProfileError, match=r"sm90.yaml:2:10: extends '_bass'.*did you mean '_base'"):
        store.for_device(H200)


def test_mappings_merge_and_lists_are_replaced(folders):
    store = folders(
        {
            "_base": "invariance: {require: sequence, trust: verified}\nprefer: [a.gemm, b.gemm]\n"
            "disable: {a.gemm: first, b.gemm: kept}\nops:\n" + rule("a.gemm") + rule("a.softmax", "softmax"),
            "sm90": "extends: _base\ninvariance: {require: batch}\nprefer: [b.gemm]\ndisable: {a.gemm: second}\nops:\n"
            + rule("b.gemm"),
        }
    )
    profile = store.for_device(H200)
    assert (profile.require, profile.trust) == (Invariance.BATCH, "verified")
    assert impls(profile) == ["b.gemm"]
    assert impls(profile, "softmax") == ["a.softmax"]
    assert [name for name, _ in profile.prefer] == ["b.gemm"]
    assert {name: reason for name, (reason, _) in profile.disable.items()} == {"a.gemm": "second", "b.gemm": "kept"}
    assert [Path(path).name for path in profile.chain] == ["_base.yaml", "sm90.yaml"]


def test_an_empty_prefer_takes_the_inherited_one_back(folders):
    store = folders({"_base": "prefer: [a.gemm]\n", "sm90": "extends: _base\nprefer: []\n"})
    assert store.for_device(H200).prefer == ()


def test_everything_knows_the_file_and_line_it_came_from(folders):
    store = folders(
        {"_base": "ops:\n" + rule("a.gemm"), "sm90": "extends: _base\n\nprefer: [b.gemm]\ndisable:\n  a.gemm: slow\n"}
    )
    profile = store.for_device(H200)
    assert str(profile.rules["gemm"][0].source).endswith("_base.yaml:4")
    assert str(profile.rules["gemm"][0].candidates[0].source).endswith("_base.yaml:5")
    assert str(profile.prefer[0][1]).endswith("sm90.yaml:4")
    assert str(profile.disable["a.gemm"][1]).endswith("sm90.yaml:6")


# --- which profile ------------------------------------------------------------------------------------------------


def test_the_users_file_edits_the_built_in_one(folders):
    store = folders({"sm90": "ops:\n" + rule("a.gemm")}, {"sm90": "prefer: [b.gemm]\n"})
    profile = store.for_device(H200)
    assert impls(profile) == ["a.gemm"]
    assert [name for name, _ in profile.prefer] == ["b.gemm"]
    assert [Path(path).parent.name for path in profile.chain] == ["builtin", "user"]


def test_the_users_file_may_extend_the_built_in_one_it_is_named_after(folders):
    store = folders({"sm90": "ops:\n" + rule("a.gemm")}, {"sm90": "extends: sm90\nprefer: [b.gemm]\n"})
    assert len(store.for_device(H200).chain) == 2


@pytest.mark.parametrize("stem", ["sm90", "anything"])
def test_the_users_file_is_found_by_its_match_whatever_its_name(folders, stem):
    store = folders({"sm90": ""}, {stem: "name: mine\nmatch: {arch: sm90}\n"})
    assert store.for_device(H200).name == "mine"


def test_the_users_file_without_match_is_for_the_arch_its_file_is_named_after(folders):
    store = folders({"sm90": ""}, {"sm90": "name: mine\n", "sm80": "name: other\n"})
    assert store.for_device(H200).name == "mine"


def test_a_profile_that_names_the_device_wins_over_one_that_does_not(folders):
    store = folders(
        {"sm90": ""},
        {
            "sm90": "name: any\n",
            "z": "name: exact\nmatch: {arch: sm90, device_name: 'NVIDIA H200*'}\n",
            "a": "name: wrong\nmatch: {arch: sm90, device_name: 'NVIDIA H100*'}\n",
        },
    )
    assert store.for_device(H200).name == "exact"
    assert store.for_device(Device(ARCHS["sm90"], "NVIDIA GH200")).name == "any"


def test_two_profiles_that_match_alike_are_refused(folders):
    store = folders({"sm90": ""}, {"x": "match: {arch: sm90}\n", "y": "match: {arch: sm90}\n"})
    with pytest.raises(ProfileError, match="several profiles match NVIDIA H200; keep one") as info:
        store.for_device(H200)
    assert len(info.value.faults) == 2


def test_a_faulty_user_file_for_another_arch_does_not_matter(folders):
    store = folders({"sm90": ""}, {"sm80": "nam: half written\n"})
    assert store.for_device(H200).name == "sm90"
    with pytest.raises(ProfileError):
        store.for_device(Device(ARCHS["sm80"], "A100"))


@pytest.mark.parametrize("edited", [False, True])
def test_the_familys_profile_serves_and_says_so(folders, edited, tmp_path, monkeypatch):
    store = folders({"sm100": "ops:\n" + rule("a.gemm")})
    if edited:
        (tmp_path / "mine.yaml").write_text(HEAD + "prefer: [b.gemm]\n")
        monkeypatch.setenv("BIDISPATCH_PROFILE", str(tmp_path / "mine.yaml"))
    profile = store.for_device(Device(ARCHS["sm103"], "B300"))
    assert impls(profile) == ["a.gemm"]
    assert profile.note == "no profile for sm103: its family's, sm100"
    assert store.for_device(Device(ARCHS["sm100"], "B200")).note == ""


def test_an_exact_profile_wins_over_the_familys_in_any_layer(folders):
    store = folders({"sm103": "name: exact\n"}, {"sm100": "name: family\n"})
    profile = store.for_device(Device(ARCHS["sm103"], "B300"))
    assert (profile.name, profile.note) == ("exact", "")


def test_no_profile_is_an_error_that_says_how_to_start_one(folders):
    store = folders({"sm90": "", "_base": ""})
    with pytest.raises(
        SelectionError, match=r"no profile for gfx942 .*there are profiles for sm90.*profile init gfx942"
    ):
        store.for_device(Device(ARCHS["gfx942"], "MI300X"))


def test_the_variable_chooses_by_name_or_by_path(folders, tmp_path, monkeypatch):
    store = folders({"sm90": ""}, {"mine": "name: by name\n"})
    monkeypatch.setenv("BIDISPATCH_PROFILE", "mine")
    assert store.for_device(H200).name == "by name"
    (tmp_path / "file.yaml").write_text(HEAD + "name: by path\n")
    monkeypatch.setenv("BIDISPATCH_PROFILE", str(tmp_path / "file.yaml"))
    assert store.for_device(H200).name == "by path"


def test_the_variables_file_edits_what_the_layers_below_give(folders, tmp_path, monkeypatch):
    store = folders({"sm90": "ops:\n" + rule("a.gemm")}, {"sm90": "disable: {a.gemm: slow}\n"})
    (tmp_path / "file.yaml").write_text(HEAD + "prefer: [b.gemm]\n")
    monkeypatch.setenv("BIDISPATCH_PROFILE", str(tmp_path / "file.yaml"))
    profile = store.for_device(H200)
    assert [Path(path).parent.name for path in profile.chain] == ["builtin", "user", tmp_path.name]
    assert (list(profile.disable), [name for name, _ in profile.prefer]) == (["a.gemm"], ["b.gemm"])


def test_the_variable_naming_a_profile_for_another_device_is_refused(folders, monkeypatch):
    store = folders({"sm90": "", "sm80": "match: {arch: sm80}\n"})
    monkeypatch.setenv("BIDISPATCH_PROFILE", "sm80")
    with pytest.raises(UsageError, match="BIDISPATCH_PROFILE=sm80 is for sm80, the device is sm90"):
        store.for_device(H200)


def test_the_variable_naming_nothing_is_refused_with_a_suggestion(folders, monkeypatch):
    store = folders({"sm90": ""})
    monkeypatch.setenv("BIDISPATCH_PROFILE", "sm09")
    with pytest.raises(UsageError, match=r"no profile 'sm09' \(did you mean 'sm90'\?\)"):
        store.for_device(H200)


# --- the profiles we ship -----------------------------------------------------------------------------------------

SHIPPED = sorted(builtin_folder().glob("*.yaml"))
SHIPPED_ARCHS = [path.stem for path in SHIPPED if not path.stem.startswith("_")]


def test_every_arch_of_the_first_release_has_a_profile():
    assert set(SHIPPED_ARCHS) >= {"sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "gfx942", "cpu"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_profile_lints_clean_and_is_named_after_its_file(path):
    assert lint_file(path, default_registry()) == []
    content = YAML(typ="safe").load(path)
    assert content["name"] == path.stem
    match = content.get("match", {"arch": path.stem})
    assert match["arch"] == (content["extends"] if "device_name" in match else path.stem)


@pytest.mark.parametrize(
    ("device_name", "profile"), [("NVIDIA H200", "h200"), ("NVIDIA H200 NVL", "h200"), ("NVIDIA H100 PCIe", "sm90")]
)
def test_a_shipped_profile_that_names_a_device_is_chosen_there_alone(device_name, profile):
    assert bid.plan(Device(ARCHS["sm90"], device_name)).profile.name == profile


@pytest.mark.parametrize("name", ARCHS)
def test_every_op_and_dtype_is_selected_or_refused_with_reasons_on_every_arch(name):
    plan = bid.plan(Device(ARCHS[name], name, predicted=name != "cpu"))
    if name not in SHIPPED_ARCHS:
        assert plan.profile.note == f"no profile for {name}: its family's, {ARCHS[name].family}"
    results = plan.supported()
    assert [problem.op for problem, _ in results] == [op.name for op in ops.CATALOGUE.values() for _ in op.dtypes]
    for problem, result in results:
        op = ops.get(problem.op)
        registered = {implementation.name for implementation in plan.registry.for_op(op.name)}
        if isinstance(result, SelectionError):
            lacking = name in WITHOUT_E4M3 and uses_e4m3(op)
            assert lacking or not op.available, f"{problem} is not served on {name}: {result}"
            assert ("needs sm89" if lacking else f"{op.name} is unsupported") in str(result)
            continue
        assert {decision.implementation for decision in result.decisions} >= registered
        assert result.level >= plan.require
        for decision in result.decisions:
            assert decision.reasons or decision.verdict not in (REJECTED, UNLISTED)
            assert decision.source.startswith("hw_profiles/") or decision.verdict == UNLISTED
        assert any(decision.verdict == CHOSEN for decision in result.decisions)


# --- schema.json --------------------------------------------------------------------------------------------------


def test_schema_json_is_current():
    stored = json.loads((builtin_folder() / "schema.json").read_text())
    assert stored == json_schema(), "run `python -m bidispatch.profiles.schema > hw_profiles/schema.json`"


def test_the_module_prints_the_schema():
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-m", "bidispatch.profiles.schema"], capture_output=True, text=True, check=True
    )
    assert json.loads(printed.stdout) == json_schema()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_schema_accepts_a_shipped_profile(path):
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.validate(YAML(typ="safe").load(path), json_schema())


# What only the registry, the other keys of a rule, or the YAML reader can know, an editor's schema cannot.
BEYOND_A_SCHEMA = {
    "duplicate key", "duplicate op", "merge key", "tag", "date out of range", "key that is a list", "two documents",
    "alias inside its anchor", "unclosed bracket", "tab", "nested too deeply", "unknown dim", "a dim that is the batch",
    "a dim of another type", "a bool as a number", "a minimum of a bool", "a short dtype in a condition",
    "a choice of another type", "unknown implementation", "unknown implementation preferred",
    "unknown implementation disabled", "implementation of another op", "param inside tile", "tile size inside params",
    "unknown param", "unknown tile size", "tile of what has none", "param of the wrong type", "param that is a float",
    "tile without its size", "max_m that falls", "max_m that stays", "missing extends", "extends itself",
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD.keys() - BEYOND_A_SCHEMA))
def test_the_schema_refuses_what_lint_refuses(case):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(YAML(typ="safe").load(BAD[case][0]), json_schema())


# --- choices that are wrong only for a device or a problem --------------------------------------------------------


def test_params_that_a_validator_refuses_are_a_reason_not_a_crash(folders):
    class Picky(SplitParams):
        splits: int

    registry = registry_of(fake("a.gemm", params=Picky), fake("b.gemm"))
    store = folders(
        {"cpu": "ops:\n  gemm:\n    - dtypes: [fp32]\n      candidates: [{impl: a.gemm}, {impl: b.gemm}]\n"}
    )
    store = ProfileStore(registry, builtin=store._folders[0], user=store._folders[1])
    problem = ops.get("gemm").problem("fp32", {"n": 8, "k": 8})
    profile = store.for_device(CPU)
    selection = select(
        problem, CPU, profile, registry, profile.require, lambda selection: None, lambda problem, rungs: ()
    )
    assert selection.implementations == ("b.gemm",)
    assert "its params are refused" in selection.decisions[0].reasons[0]


def test_every_error_of_this_module_is_a_bidispatch_error():
    assert issubclass(ProfileError, BidispatchError)
    assert issubclass(ProfileError, ValueError)

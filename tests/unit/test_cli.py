"""The command line through its door: exit codes, what is printed where, JSON, and bad input without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from fakes import WITHOUT_E4M3, uses_e4m3

import bidispatch
from bidispatch.cli import main
from bidispatch.device import ARCHS
from bidispatch.profiles.load import builtin_folder, lint_file
from bidispatch.registry import Registry, default_registry


def table_rows(out: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column is called `first`, split at two spaces."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return [[word for word in line.split("  ") if word] for line in lines[start + 1 : end]]


# --- the whole -------------------------------------------------------------------------------------------------------


def test_the_version_is_printed(cli):
    assert cli("--version") == (0, f"bidispatch {bidispatch.__version__}\n", "")


@pytest.mark.parametrize("words", [[], ["profile"]])
def test_a_group_without_a_command_prints_its_help_as_a_usage_error(cli, words):
    code, out, _ = cli(*words)
    assert code == 2
    assert "Commands:" in out


@pytest.mark.parametrize(
    "words", [[c] for c in ("plan", "explain", "verify", "doctor", "demo", "audit", "profile")]
    + [["profile", c] for c in ("list", "show", "lint", "diff", "init")]
)  # fmt: skip
def test_every_command_has_help_with_an_example_and_a_json_option(cli, words):
    code, out, _ = cli(*words, "--help")
    assert code == 0
    if words != ["profile"]:
        assert f"Example: bidispatch {' '.join(words)}" in out
        assert "--json" in out


BAD_COMMAND_LINES = {
    "unknown command": (["pla"], 2, "No such command"),
    "unknown option": (["plan", "--devise", "cpu"], 2, "--devise"),
    "missing argument": (["explain"], 2, "OP"),
    "unknown op": (["explain", "gem", "--device", "cpu"], 2, "did you mean 'gemm'?"),
    "unknown arch": (["plan", "--device", "sm9"], 2, "unknown arch 'sm9'"),
    "unknown dtype": (["explain", "gemm", "--dtype", "bfloat", "--device", "cpu"], 2, "did you mean 'bfloat16'?"),
    "unknown dim": (["explain", "gemm", "--dim", "kk=1", "--device", "cpu"], 2, "gemm has no dim 'kk'"),
    "a dim of the batch": (["explain", "gemm", "--dim", "m=1", "--device", "cpu"], 2, "does not see the batch"),
    "missing dim": (["explain", "gemm", "--dim", "k=8", "--device", "cpu"], 2, "gemm needs n"),
    "dim of another type": (["explain", "gemm", "--dim", "n=8.5", "--dim", "k=8"], 2, "is an int, not '8.5'"),
    "dim without value": (["explain", "gemm", "--dim", "n"], 2, "is not NAME=VALUE"),
    "dim given twice": (["explain", "gemm", "--dim", "n=1", "--dim", "n=2"], 2, "given twice"),
    "unknown level": (["plan", "--require", "bach"], 2, "did you mean 'batch'?"),
    "unknown profile": (["plan", "--profile", "sm9O", "--device", "sm90"], 2, "did you mean 'sm90'?"),
    "profile that is not there": (["plan", "--profile", "[no]/such.yaml", "--device", "sm90"], 2, "[no]/such.yaml"),
    "GPU that is not there": (["plan", "--device", "cuda:63"], 3, "sees no GPU 63"),
    "verify nothing": (["verify"], 2, "--all"),
    "verify some and all": (["verify", "gemm", "--all"], 2, "--all"),
    "verify dims of two ops": (["verify", "gemm", "bmm", "--dim", "n=8"], 2, "for one op"),
    "verify an unknown op": (["verify", "gem", "--device", "cpu"], 2, "did you mean 'gemm'?"),
    "verify at an unknown level": (["verify", "gemm", "--level", "bach"], 2, "did you mean 'batch'?"),
    "verify what an unknown level selects": (["verify", "gemm", "--require", "bach"], 2, "did you mean 'batch'?"),
    "verify a GPU that is elsewhere": (["verify", "--all", "--device", "gfx942"], 3, "not in this machine"),
    "verify what is planned for later": (["verify", "lora", "--device", "cpu"], 2, "lora is unsupported"),
    "graphs on a processor": (["verify", "mean", "--cuda-graph", "--device", "cpu"], 3, "CUDA graphs"),
    "demo on a GPU that is elsewhere": (["demo", "--device", "gfx942"], 3, "not in this machine"),
    "demo of a folder that is not there": (["demo", "--model", "[no]/model", "--device", "cpu"], 2, "[no]/model"),
    "demo of no requests": (["demo", "--requests", "0"], 2, "requests"),
    "audit of a folder that is not there": (["audit", "--model", "no/model", "--device", "cpu"], 2, "no/model"),
    "audit of an unknown framework": (["audit", "--framework", "jax"], 2, "jax"),
    "audit of transformers without a model": (["audit", "--framework", "transformers"], 2, "--model DIR"),
    "init of an unknown arch": (["profile", "init", "sm9"], 2, "unknown arch 'sm9'"),
    "show of an unknown profile": (["profile", "show", "sm9O"], 2, "did you mean 'sm90'?"),
    "diff with an unknown profile": (["profile", "diff", "sm90", "sm9O"], 2, "did you mean 'sm90'?"),
}


@pytest.mark.parametrize("case", BAD_COMMAND_LINES)
def test_a_bad_command_line_gets_its_exit_code_and_a_reason_on_stderr(cli, case):
    words, expected, reason = BAD_COMMAND_LINES[case]
    code, out, err = cli(*words)
    assert code == expected
    assert reason in err
    assert out == ""


@pytest.mark.parametrize("case", BAD_COMMAND_LINES)
def test_a_bad_command_line_gets_the_same_exit_code_and_one_document_as_json(as_json, case):
    words, expected, reason = BAD_COMMAND_LINES[case]
    code, document = as_json(*words)
    assert code == expected
    assert reason in document["error"]["message"]
    assert document["error"]["type"].endswith("Error")
    assert isinstance(document["error"]["faults"], list)


def test_debug_shows_the_traceback_and_nothing_else_does(capsys):
    assert main(["--debug", "plan", "--device", "sm9"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_command_runs_as_a_module_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "bidispatch", "plan", "--device", "sm9"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unknown arch 'sm9'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "bidispatch", "plan", "--device", "sm90", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)
    process.stderr.close()


def test_an_interrupt_ends_with_130_and_one_line():
    process = subprocess.Popen(
        [sys.executable, "-m", "bidispatch", "demo", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts in the background with the signal ignored, and this inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline().startswith("device")  # it has started, and has a minute of work before it
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # Python ends itself by the signal, which a shell shows as 130 too, where an interrupt came through an `exec` of
    # text, as imports of dataclasses have (`unhandled_keyboard_interrupt` in CPython's pythonrun.c).
    assert process.returncode in (130, -signal.SIGINT)
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


WITHOUT_TORCH = """
import sys
from importlib import metadata

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

real = metadata.version

def version(name):
    if name in ("torch", "triton"):
        raise metadata.PackageNotFoundError(name)
    return real(name)

sys.meta_path.insert(0, Missing())
metadata.version = version
from bidispatch.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", "--device", "sm103"], 0),
        (["explain", "attention", "--device", "gfx942"], 0),
        (["profile", "list"], 0),
        (["profile", "show", "sm103", "--resolved"], 0),
        (["profile", "lint", str(builtin_folder() / "sm90.yaml")], 0),
        (["plan", "--device", "cpu"], 3),  # it plans, and finds that nothing there can run
        (["verify", "gemm"], 3),
        (["demo"], 3),
        (["audit"], 3),
        (["doctor"], 3),
    ],
)
def test_without_torch_planning_works_and_the_rest_says_what_is_missing(words, expected):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
    assert ("torch" in done.stderr) == (expected == 3)
    if expected < 3:
        assert done.stdout


# --- plan and explain ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_plan_shows_every_available_op_with_its_source_and_names_the_others(cli, arch):
    code, out, _ = cli("plan", "--device", arch)
    assert code == 0
    rows = table_rows(out, "op ")
    lacking = arch in WITHOUT_E4M3
    available = [
        op.name for op in bidispatch.ops.CATALOGUE.values() if op.available and not (lacking and uses_e4m3(op))
    ]
    first_cells = {row[0].strip() for row in rows}
    more_rungs = {cell for cell in first_cells if " (" in cell}
    assert first_cells - more_rungs == set(available)
    assert all(".yaml:" in row[-1] or ".json (" in row[-1] for row in rows)
    for name in ("lora", "all_reduce"):
        assert name in out.partition("unsupported")[2]


def test_plan_says_so_when_the_familys_profile_serves(cli, as_json, monkeypatch):
    code, out, _ = cli("plan", "--device", "sm87")
    assert (code, "its family's, sm80" in out) == (0, True)
    assert "sm80" in as_json("plan", "--device", "sm87")[1]["profile"]["note"]


def test_plan_as_json_says_what_the_table_says(cli, as_json):
    code, document = as_json("plan", "--device", "sm103")
    _, out, _ = cli("plan", "--device", "sm103")
    assert code == 0
    assert document["fingerprint"] in out
    assert document["fingerprint"].startswith("predicted-sm103-sequence-")
    assert document["device"]["predicted"]
    served = {(problem["op"], problem["dtype"]) for problem in document["problems"]}
    missing = {(problem["op"], problem["dtype"]) for problem in document["unsupported"]}
    assert served | missing == {(op.name, d) for op in bidispatch.ops.CATALOGUE.values() for d in op.dtypes}
    assert not served & missing
    for problem in document["problems"]:
        assert problem["candidates"][0]["implementation"] in out
        assert problem["rungs"][-1]["max_m"] is None


def test_plan_merges_dtypes_that_are_served_alike_and_only_those(cli, as_json):
    _, document = as_json("plan", "--device", "sm80")
    classes = {p["dtype"]: p["numerics"] for p in document["problems"] if p["op"] == "gemm"}
    rows = [row for row in table_rows(cli("plan", "--device", "sm80")[1], "op ") if row[0] == "gemm"]
    assert len(rows) == len(set(classes.values()))
    assert sum(len(row[1].split()) for row in rows) == len(classes)


def test_plan_shows_the_rows_each_implementation_of_a_ladder_serves(cli, extra_backend, own_profile):
    own_profile("""
        extends: cpu
        ops:
          mean:
            - dtypes: [float32]
              candidates: [{impl: extra.sound, max_m: 8}, {impl: extra.variant}]
    """)
    _, out, _ = cli("plan", "--device", "cpu")
    assert "extra.sound (1 <= M <= 8)" in out
    assert "extra.variant (M > 8)" in out


def test_plan_is_a_finding_when_the_level_cannot_be_had(cli):
    code, out, _ = cli("plan", "--device", "sm90", "--require", "topology")
    assert code == 1
    assert "requires topology" in out


def test_plan_is_a_finding_when_a_forced_choice_does_not_fit(cli, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_IMPL", "gemm=triton.gemm")
    code, out, _ = cli("plan", "--device", "cpu")
    assert code == 1
    assert "BIDISPATCH_IMPL forces triton.gemm" in out


def test_a_forced_choice_nobody_knows_is_a_usage_error(cli, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_IMPL", "gemm=triton.gem")
    code, _, err = cli("plan", "--device", "cpu")
    assert (code, "did you mean 'triton.gem" in err) == (2, True)


def test_plan_is_a_finding_when_only_proof_counts_and_there_is_none(cli, own_profile):
    own_profile("extends: cpu\ninvariance: {trust: verified}\n")
    code, out, _ = cli("plan", "--device", "cpu")
    assert code == 1
    assert "bidispatch verify gemm --dtype" in out


def test_plan_reports_every_fault_of_a_profile_at_once(cli, as_json, own_profile):
    path = own_profile("ops:\n  gem: []\n  gemm:\n    - dtypes: [bf17]\n      candidates: [{impl: triton.gem}]\n")
    code, _, err = cli("plan", "--device", "cpu")
    assert code == 2
    assert [line.rpartition(path.name)[2].split(": ")[0] for line in err.splitlines()] == [":3:3", ":5:16", ":6:27"]
    _, document = as_json("plan", "--device", "cpu")
    assert [(fault["line"], fault["column"]) for fault in document["error"]["faults"]] == [(3, 3), (5, 16), (6, 27)]


def test_explain_shows_every_candidate_and_the_rungs(cli, as_json):
    words = ("explain", "gemm", "--dtype", "bf16", "--dim", "n=6144", "--dim", "k=4096", "--device", "sm90")
    code, out, _ = cli(*words)
    assert code == 0
    registered = {i.name for i in default_registry() if i.op == "gemm"}
    assert registered <= {row[0].strip() for row in table_rows(out, "implementation")}
    _, document = as_json(*words)
    rungs = table_rows(out, "M  ")
    assert len(rungs) == len(document["selection"]["rungs"])
    assert all("block_m=" in row[-1] or "algorithm=" in row[-1] for row in rungs)
    assert {decision["implementation"] for decision in document["decisions"]} == registered
    assert document["problem"]["dims"] == {
        "n": 6144,
        "k": 4096,
        "bias": False,
        "out_dtype": "bfloat16",
        "role": "linear",
    }


def test_explain_keeps_the_table_when_nothing_fits(cli, as_json, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_IMPL", "gemm=triton.gemm")
    code, out, err = cli("explain", "gemm", "--device", "cpu")
    assert code == 1
    assert "needs sm* or gfx942, the device is cpu" in out
    assert "BIDISPATCH_IMPL forces triton.gemm" in err
    code, document = as_json("explain", "gemm", "--device", "cpu")
    assert code == 1
    assert document["selection"] is None
    assert document["error"]["type"] == "SelectionError"
    assert any("needs sm*" in reason for reason in document["decisions"][0]["reasons"])


def test_explain_shows_why_something_is_disabled(cli, own_profile):
    own_profile('extends: cpu\ndisable: {torch_cpu.mean: "wrong on [my] machine"}\n')
    code, out, _ = cli("explain", "mean", "--device", "cpu")
    assert code == 1
    assert "disabled: wrong on [my] machine" in out


# --- backends --------------------------------------------------------------------------------------------------------


def test_a_backend_that_raises_is_shown_and_fatal_only_when_chosen(cli, as_json, install, monkeypatch):
    install(("extra", "raise OSError('libmissing.so: cannot open [shared] object')"))
    code, out, err = cli("plan", "--device", "cpu")
    assert code == 0
    assert "cannot open [shared] object" in err
    assert "torch_cpu.gemm" in out
    assert "extra" in as_json("plan", "--device", "cpu")[1]["failed_backends"]
    monkeypatch.setenv("BIDISPATCH_IMPL", "gemm=extra.gemm")
    code, _, err = cli("plan", "--device", "cpu")
    assert code == 3
    assert "cannot open [shared] object" in err


def test_two_backends_of_one_name_are_an_error_of_the_machine(cli, install, monkeypatch):
    monkeypatch.setattr(Registry, "_load", lambda self, entry, distribution: None)
    install(("extra", ""), ("extra", ""))
    for point, name in zip(metadata.entry_points(group="bidispatch.backends")[-2:], ("one", "two"), strict=True):
        vars(point)["dist"] = type("Distribution", (), {"name": name, "version": "1"})()
    for words in (["plan", "--device", "cpu"], ["doctor"]):
        code, _, err = cli(*words)
        assert code == 3
        assert "error: two backends are named 'extra'" in err


# --- profiles --------------------------------------------------------------------------------------------------------


def test_profile_list_names_every_file_and_the_chain_in_use(cli, as_json, own_profile):
    path = own_profile("extends: cpu\n", "cpu")
    code, document = as_json("profile", "list")
    assert code == 0
    listed = {entry["path"]: entry for entry in document["profiles"]}
    assert listed[str(path)]["layer"] == "yours"
    assert {p.stem for p in builtin_folder().glob("*.yaml")} - {"cpu"} <= {e["name"] for e in document["profiles"]}
    assert cli("profile", "list")[0] == 0


def test_profile_list_survives_a_faulty_file(cli, own_profile):
    own_profile("extends: [\n", "sm90")
    code, out, _ = cli("profile", "list")
    assert code == 0
    assert "sm90" in out


def test_profile_show_prints_the_file_as_it_is(cli):
    text = (builtin_folder() / "_base.yaml").read_text()
    assert cli("profile", "show", "_base") == (0, text, "")


@pytest.mark.parametrize("path", sorted(builtin_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_a_resolved_profile_is_a_profile_that_says_the_same(cli, as_json, path, tmp_path):
    code, out, _ = cli("profile", "show", path.stem, "--resolved")
    assert code == 0
    again = tmp_path / "again.yaml"
    again.write_text(out)
    assert lint_file(again, default_registry()) == []
    assert as_json("profile", "diff", path.stem, str(again)) == (
        0,
        {"before": path.stem, "after": str(again), "changes": []},
    )


def test_a_resolved_profile_names_the_line_of_each_candidate(cli, as_json):
    _, out, _ = cli("profile", "show", "sm103", "--resolved")
    _, document = as_json("profile", "show", "sm103", "--resolved")
    source = document["ops"]["gemm"][0]["candidates"][0]["source"]
    file, _, line = source.partition(":")
    assert "triton.gemm" in (builtin_folder() / Path(file).name).read_text().splitlines()[int(line) - 1]
    (line_of_candidate,) = [shown for shown in out.splitlines() if shown.endswith(f"# {source}")]
    assert "impl: triton.gemm" in line_of_candidate


def test_lint_prints_every_fault_of_every_file(cli, as_json, tmp_path):
    bad = tmp_path / "[bad].yaml"
    bad.write_text("schema_version: 1\nprefre: []\nops:\n  gemm:\n    - dtypes: [bf16]\n      candidates: []\n")
    loop = tmp_path / "loop.yaml"
    loop.write_text("schema_version: 1\nextends: loop\n")
    good = builtin_folder() / "sm90.yaml"
    code, out, _ = cli("profile", "lint", str(bad), str(loop), str(good), str(tmp_path / "absent.yaml"))
    assert code == 1
    assert f"{bad}:2:1: unknown key 'prefre' (did you mean 'prefer'?)" in out
    assert f"{loop}:2:10: " in out
    assert f"{good}: no faults" in out
    assert "absent.yaml:0:0: cannot be read" in out
    code, document = as_json("profile", "lint", str(bad), str(loop), str(good))
    assert code == 1
    assert document["faults"] == sum(len(file["faults"]) for file in document["files"]) >= 3
    assert cli("profile", "lint", str(good))[0] == 0


def test_a_reduction_param_in_a_tile_is_a_fault_with_its_place(cli, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema_version: 1\nops:\n  attention:\n    - dtypes: [bf16]\n"
        "      candidates: [{impl: triton.paged_attention, tile: {kv_split: 512}}]\n"
    )
    code, out, _ = cli("profile", "lint", str(path))
    assert code == 1
    assert "mine.yaml:5:" in out
    assert "'kv_split' is a reduction param" in out


def test_diff_shows_what_changed_with_both_sources(cli, as_json, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'schema_version: 1\nextends: sm90\ndisable: {triton.mean: "not [mine]"}\ninvariance: {require: batch}\n'
        "ops:\n  gemm:\n    - dtypes: [bf16]\n      candidates: [{impl: triton.gemm}]\n"
    )
    code, document = as_json("profile", "diff", "sm90", str(path))
    changes = {change["where"]: change for change in document["changes"]}
    assert code == 0
    assert set(changes) == {
        "invariance.require",
        "disable triton.mean",
        "gemm [bfloat16, float16] when {role: router, out_dtype: float32}",
        "gemm [bfloat16, float16]",
        "gemm [float32]",
        "gemm [bfloat16]",
    }
    assert changes["gemm [bfloat16]"]["after_source"].endswith("mine.yaml:7")
    assert changes["invariance.require"]["before"] == "sequence"
    _, out, _ = cli("profile", "diff", "sm90", str(path))
    assert '  + not [mine]  # ' in out  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_init_writes_a_profile_that_changes_nothing_and_lints_clean_with_every_line_uncommented(cli, arch, tmp_path):
    path = tmp_path / "new" / f"{arch}.yaml"
    code, out, _ = cli("profile", "init", arch, "--out", str(path))
    assert (code, out) == (0, f"wrote {path}\n")
    text = path.read_text()
    assert lint_file(path, default_registry()) == []
    base = next(line.split()[1] for line in text.splitlines() if line.startswith("extends:"))
    if base == arch:
        assert "come to the same" in cli("profile", "diff", base, str(path))[1]
    edits = ("# prefer:", "# disable:", "# invariance:")
    uncommented = [line[2:] if line.startswith(edits) else line for line in text.splitlines()]
    assert len([line for line in text.splitlines() if line.startswith(edits)]) == 3
    path.write_text("\n".join(uncommented))
    assert lint_file(path, default_registry()) == []


def test_init_goes_to_the_users_folder_and_never_overwrites(cli, isolated):
    path = isolated / "config" / "sm90.yaml"
    assert cli("profile", "init", "sm_90a") == (0, f"wrote {path}\n", "")
    path.write_text("mine")
    code, _, err = cli("profile", "init", "sm90")
    assert code == 2
    assert "not overwritten" in err
    assert path.read_text() == "mine"


def test_init_into_a_place_that_cannot_be_written_is_a_usage_error(cli, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli("profile", "init", "sm90", "--out", str(tmp_path / "file" / "sm90.yaml"))
    assert code == 2
    assert "cannot be written" in err


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_shows_packages_backends_and_folders(cli, as_json, isolated):
    pytest.importorskip("torch")
    code, out, _ = cli("doctor")
    assert code == 0
    for text in ("torch_cpu", "triton", str(builtin_folder()), str(isolated / "config"), str(isolated / "records")):
        assert text in out
    code, document = as_json("doctor")
    assert code == 0
    assert document["ready"]
    assert not document["lacks"]


def test_doctor_shows_failed_backends_with_their_cause(cli, install):
    install(("extra", "import a_library_nobody_has"))
    code, out, err = cli("doctor")
    assert code == 0
    assert "FAILED" in out
    assert "No module named 'a_library_nobody_has'" in err


def test_doctor_reports_variables_that_change_bits(cli, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    code, out, err = cli("doctor")
    assert code == 0
    assert "TRITON_DEFAULT_FP_FUSION" in out
    assert "contraction" in err


def test_doctor_reports_a_faulty_profile_and_a_foreign_record_file(cli, own_profile, isolated):
    assert cli("doctor")[0] == 0
    records = isolated / "records"
    records.mkdir()
    from bidispatch.device import Device
    from bidispatch.records import RecordStore

    RecordStore(Device.detect()).path.write_text('{"half":')
    code, _, err = cli("doctor")
    assert (code, "is not a readable record file" in err) == (0, True)
    path = own_profile("extends: nothing\n", Device.detect().arch.name)
    code, _, err = cli("doctor")
    assert code == 1
    assert f"error: {path}:2:10: extends 'nothing', which is not there" in err


def test_doctor_lists_every_fault_of_the_profile_in_use(as_json, own_profile):
    from bidispatch.device import Device

    path = own_profile("prefre: []\nprefer: [torch_cpu.gem]\n", Device.detect().arch.name)
    code, document = as_json("doctor")
    assert (code, document["ready"]) == (1, False)
    assert [fault.partition(" ")[0] for fault in document["faults"]] == [f"{path}:2:1:", f"{path}:3:10:"]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("BIDISPATCH_IMPL", "gem=torch_cpu.gemm", "did you mean 'gemm'?"),
        ("BIDISPATCH_IMPL", "gemm=torch_cpu.gem", "did you mean 'torch_cpu.gemm'?"),
        ("BIDISPATCH_IMPL", "gemm=torch_cpu.paged_attention", "paged_attention implements attention, not gemm"),
        ("BIDISPATCH_IMPL", "gemm", "is not op=implementation"),
        ("BIDISPATCH_IMPL", "gemm=extra.gemm", "No module named 'a_library_nobody_has'"),
        ("BIDISPATCH_PROFILE", "/nowhere/mine.yaml", "cannot be read"),
        ("BIDISPATCH_PROFILE", "sm9O", "did you mean 'sm90'?"),
    ],
)
def test_doctor_finds_a_variable_that_names_what_is_not_there(cli, install, monkeypatch, variable, value, said):
    install(("extra", "import a_library_nobody_has"))
    monkeypatch.setenv(variable, value)
    code, _, err = cli("doctor")
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {variable}={value}: ")
    assert said in line


def test_doctor_takes_a_variable_that_names_what_is_there(cli, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_IMPL", "gemm=torch_cpu.gemm")
    code, out, err = cli("doctor")
    assert (code, "error: " in err) == (0, False)
    assert "gemm=torch_cpu.gemm" in out


def test_doctor_says_when_torch_cannot_use_the_gpu_that_is_there(cli, monkeypatch):
    torch = pytest.importorskip("torch")
    pynvml = pytest.importorskip("pynvml")
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlSystemGetDriverVersion": lambda: "999.1",
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: "NVIDIA Test",
        "nvmlDeviceGetMemoryInfo": lambda handle: type("Memory", (), {"total": 2**30})(),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, out, err = cli("doctor")
    assert code == 3
    assert "NVIDIA Test, 1 GiB, driver 999.1" in out
    assert "can use none" in err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose: nothing is missing
    code, _, err = cli("doctor")
    assert (code, "CUDA_VISIBLE_DEVICES hides" in err) == (0, True)

"""Record files: broken, foreign and newer ones are refused, writers lose nothing, readers never see half a file."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading

import pytest
from fakes import CPU, H200, BlockTile, SplitParams, fake, gemm_rule, plan_of, registry_of

from bidispatch import ops
from bidispatch.environment import describe
from bidispatch.errors import RecordError
from bidispatch.records import Record, RecordStore, Refutation, records_folder
from bidispatch.registry import Rung


def record(name: str = "a", **changes) -> Record:
    fields = {
        "problem": name,
        "ladder": "[]",
        "numerics": "k",
        "level": "sequence",
        "comparisons": 10,
        "cuda_graph": False,
        "made": "2025-01-01T00:00:00+00:00",
        "environment": {"device": "x", "soft": {"driver": "1"}},
    }
    return Record(**{**fields, **changes})


@pytest.fixture
def store(isolated) -> RecordStore:
    return RecordStore(H200)


def test_the_file_is_named_after_the_device_in_the_folder_the_variable_names(store, isolated, monkeypatch):
    assert store.path == isolated / "records" / "sm90-nvidia-h200.json"
    monkeypatch.delenv("BIDISPATCH_RECORDS_DIR")
    assert records_folder().parts[-2:] == ("bidispatch", "records")


def test_what_is_added_is_read_back(store):
    assert store.load() == []
    store.add([record("a"), record("b", level="batch")])
    assert store.load() == [record("a"), record("b", level="batch")]
    assert RecordStore(CPU).load() == []


def test_a_newer_record_of_the_same_thing_replaces_the_older(store):
    store.add([record("a"), record("b")])
    store.add([record("a", made="2026", comparisons=20, environment={"device": "x", "soft": {"driver": "2"}})])
    assert [(each.problem, each.comparisons) for each in store.load()] == [("b", 10), ("a", 20)]


@pytest.mark.parametrize(
    "change",
    [{"ladder": "[1]"}, {"level": "batch"}, {"environment": {"device": "y"}}],
    ids=lambda change: next(iter(change)),
)
def test_a_record_of_something_else_stays(store, change):
    store.add([record("a")])
    store.add([record("a", **change)])
    assert len(store.load()) == 2


WHOLE = {"format": "bidispatch-records", "version": 1, "records": []}
ONE = json.loads(json.dumps({name: getattr(record(), name) for name in Record.__slots__}))
BROKEN = {
    "truncated": (json.dumps(WHOLE)[:-9], "is not a readable record file"),
    "empty": ("", "is not a readable record file"),
    "not text": (b"\xff\xfe\x00", "is not a readable record file"),
    "foreign json": ('{"results": []}', "was not written by bidispatch"),
    "a list": ("[]", "was not written by bidispatch"),
    "a number": ("3", "was not written by bidispatch"),
    "future version": (json.dumps({**WHOLE, "version": 2}), "has format version 2, this bidispatch reads 1"),
    "no version": (json.dumps({"format": WHOLE["format"]}), "has format version None"),
    "no records": (json.dumps({"format": WHOLE["format"], "version": 1}), "a record that is not whole"),
    "records of another type": (json.dumps({**WHOLE, "records": {}}), "a record that is not whole"),
    "a record that is text": (json.dumps({**WHOLE, "records": ["x"]}), "a record that is not whole"),
    "a record that lacks a field": (
        json.dumps({**WHOLE, "records": [{name: value for name, value in ONE.items() if name != "level"}]}),
        "not whole",
    ),
    "a field of another type": (json.dumps({**WHOLE, "records": [{**ONE, "environment": 5}]}), "not whole"),
    "a level nobody knows": (json.dumps({**WHOLE, "records": [{**ONE, "level": "perfect"}]}), "not whole.*'perfect'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_a_record_error_that_says_what_to_do(store, case):
    content, message = BROKEN[case]
    store.path.parent.mkdir()
    store.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for use in (store.load, lambda: store.add([record()])):
        with pytest.raises(RecordError, match=f"(?s){store.path.name} .*{message}") as info:
            use()
        assert any(word in str(info.value) for word in ("delete", "move it away", "verify --all --record"))
    before = content if isinstance(content, bytes) else content.encode()
    assert store.path.read_bytes() == before  # nothing was thrown away


@pytest.mark.parametrize("trust", ["claimed", "verified"])
def test_a_broken_file_warns_once_where_claims_are_trusted_and_stops_where_they_are_not(store, trust, tmp_path, caplog):
    store.path.parent.mkdir()
    store.path.write_text("{")
    registry = registry_of(fake("a.gemm"))
    plan = plan_of(tmp_path, registry, gemm_rule("impl: a.gemm"), head=f"invariance: {{trust: {trust}}}")
    for n in (8, 16):
        if trust == "verified":
            with pytest.raises(RecordError, match="not a readable record file"):
                plan.select("gemm", dtype="fp32", n=n, k=8)
        else:
            with caplog.at_level(logging.WARNING):
                assert plan.select("gemm", dtype="fp32", n=n, k=8).evidence is None
    assert len(caplog.records) == (trust == "claimed")


def test_two_processes_that_write_at_once_lose_nothing(store):
    code = """
import sys
from bidispatch.device import ARCHS, Device
from bidispatch.records import Record, RecordStore
store = RecordStore(Device(ARCHS["sm90"], "NVIDIA H200"))
store.load()
print("ready", flush=True)
sys.stdin.readline()
for i in range(25):
    store.add([Record(f"{sys.argv[1]}-{i}", "[]", "k", "batch", 1, False, "2025", {})])
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for writer in writers:  # both are ready before either starts
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert {each.problem for each in store.load()} == {f"{name}-{i}" for name in ("one", "two") for i in range(25)}


def test_a_reader_never_sees_half_a_file(store):
    store.add([record("first")])
    done = threading.Event()

    def write() -> None:
        for i in range(40):
            store.add([record(str(i), environment={"padding": "x" * 2000})])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set() or not reads:
        assert RecordStore(H200).load()[0].problem == "first"
        reads += 1
    writer.join()
    assert len(store.load()) == 41


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(store, monkeypatch):
    store.add([record("first")])

    def full(*args) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr("pathlib.Path.replace", full)
        with pytest.raises(OSError, match="disk full"):
            store.add([record("second")])
    assert [each.problem for each in store.load()] == ["first"]
    assert not list(store.path.parent.glob("*.new"))


def test_a_folder_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIDISPATCH_RECORDS_DIR", str(tmp_path / "file" / "records"))
    with pytest.raises(RecordError, match=r"records cannot be written to .*; set BIDISPATCH_RECORDS_DIR"):
        RecordStore(H200).prepare()


def refutation(problem, rung, **changes) -> Refutation:
    fields = {
        "found": "1 of 10 rows differ",
        "retry": "bidispatch verify",
        "made": "2026-01-02",
        "environment": describe(H200, {rung.implementation}),
    }
    return Refutation(problem.key, rung.key, **{**fields, **changes})


PROBLEM = ops.get("gemm").problem("float32", {"n": 8, "k": 8})
RUNGS = [Rung(fake("a.gemm"), SplitParams(), BlockTile(block_m=block), None) for block in (16, 32)]


def test_a_refutation_holds_for_its_rung_problem_and_environment(store):
    against = refutation(PROBLEM, RUNGS[0])
    store.add([record()], [against])
    assert store.load() == [record()]
    assert store.refutations(PROBLEM, RUNGS) == [against]
    assert store.refutations(PROBLEM, RUNGS[1:]) == []
    assert store.refutations(ops.get("gemm").problem("float32", {"n": 8, "k": 9}), RUNGS) == []
    store.add([], [refutation(PROBLEM, RUNGS[1], environment={"device": "another"})])
    assert store.refutations(PROBLEM, RUNGS[1:]) == []


@pytest.mark.parametrize(("role", "others"), [("linear", 1), ("router", 0)])
def test_a_rung_that_differs_at_one_n_serves_none_where_weights_are_merged(store, role, others):
    one, other = (ops.get("gemm").problem("float32", {"n": n, "k": 8, "role": role}) for n in (8, 16))
    store.add([], [refutation(one, RUNGS[0])])
    assert len(store.refutations(one, RUNGS)) == 1
    assert len(store.refutations(other, RUNGS)) == others


def test_a_newer_refutation_replaces_the_older_and_a_rung_that_holds_clears_it(store):
    store.add([], [refutation(PROBLEM, rung) for rung in RUNGS])
    store.add([], [refutation(PROBLEM, RUNGS[0], made="2026-03-04")])
    assert [each.made for each in store.refutations(PROBLEM, RUNGS)] == ["2026-03-04", "2026-01-02"]
    store.add([], [], [refutation(PROBLEM, RUNGS[0], found="")])
    assert [each.rung for each in store.refutations(PROBLEM, RUNGS)] == [RUNGS[1].key]


def test_a_broken_refutation_is_a_record_error(store):
    store.path.parent.mkdir()
    store.path.write_text(json.dumps({**WHOLE, "refuted": [{"problem": "x"}]}))
    with pytest.raises(RecordError, match="not whole"):
        store.load()

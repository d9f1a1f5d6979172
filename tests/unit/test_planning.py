"""Selection: ladders of one class that serve every M, decisions with their reasons, overrides, trust, fingerprints."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from fakes import CPU, H200, BlockTile, SplitParams, fake, gemm_rule, plan_of, registry_of
from hypothesis import given, settings
from hypothesis import strategies as st

import bidispatch as bid
from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.environment import describe
from bidispatch.errors import PlanFrozenError, SelectionError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.planning.decisions import CHOSEN, REJECTED, SPARE, UNLISTED
from bidispatch.planning.selection import rung_ranges, verify_command
from bidispatch.records import Record, RecordStore, Refutation
from bidispatch.requirements import Check, DimMultipleOf

DIMS = {"n": 64, "k": 64}


def select(plan, **dims):
    return plan.select("gemm", dtype="bfloat16", **{**DIMS, **dims})


def decision(selection_or_error, name):
    (found,) = [each for each in selection_or_error.decisions if each.implementation == name]
    return found


# --- generated ladders --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A candidate of a generated rule."""

    name: str
    max_m: int | None
    label: str
    claims: Invariance
    fits: bool
    disabled: bool
    tiles: tuple[tuple[int | None, int], ...]
    """(max_m, block_m) of its own launch shapes."""
    tile: int | None
    """block_m the profile names, if it names one."""

    @property
    def usable(self) -> bool:
        return self.fits and not self.disabled and self.claims >= Invariance.BATCH

    def implementation(self):
        return fake(
            self.name,
            claims=self.claims,
            numerics=lambda params, problem: self.label,
            requires=() if self.fits else (Check(lambda device, problem: "made not to fit"),),
            tiles=lambda device, problem, params: tuple((top, BlockTile(block_m=size)) for top, size in self.tiles),
        )

    def yaml(self) -> str:
        top = f", max_m: {self.max_m}" if self.max_m else ""
        tile = f", tile: {{block_m: {self.tile}}}" if self.tile else ""
        return f"impl: {self.name}{top}{tile}"


def mostly(usual, *others):
    return st.sampled_from([usual] * 4 + list(others))


@st.composite
def candidate_lists(draw):
    """Rules whose candidates mostly fit and mostly end open; each thing that can be wrong is wrong now and then."""
    count = draw(st.integers(1, 5))
    tops = sorted(draw(st.sets(st.integers(1, 40), min_size=count, max_size=count)))
    listed = []
    for i, top in enumerate(tops):
        inner = sorted(draw(st.sets(st.integers(1, 48), max_size=3)))
        listed.append(
            Listed(
                name=f"b{i}.gemm",
                max_m=draw(mostly(None, top) if i == count - 1 else mostly(top, None)),
                label=draw(mostly("k", "other")),
                claims=draw(
                    st.sampled_from([Invariance.SEQUENCE, Invariance.BATCH, Invariance.TOPOLOGY, Invariance.RUN])
                ),
                fits=draw(mostly(True, False)),
                disabled=draw(mostly(False, True)),
                tiles=tuple((edge, 8 * (j + 1)) for j, edge in enumerate([*inner, None])),
                tile=draw(mostly(None, 1000 + i)),
            )
        )
    return listed


def check_ladder(rungs, usable, label):
    """Every M is served once, from one class, by the first usable candidate that reaches it, in its launch shape."""
    tops = [rung.max_m for rung in rungs]
    assert tops[-1] is None
    assert None not in tops[:-1]
    assert tops[:-1] == sorted(set(tops[:-1]))
    for rung in rungs:
        assert rung.implementation.numerics(rung.params, PROBLEMS[0]) == label
    for m in range(1, 60):
        serving = [
            rung
            for rung, (first, last) in zip(rungs, rung_ranges(tops), strict=True)
            if first <= m and (last is None or m <= last)
        ]
        assert len(serving) == 1
        wanted = next(each for each in usable if each.max_m is None or m <= each.max_m)
        block = wanted.tile or next(size for top, size in wanted.tiles if top is None or m <= top)
        assert (serving[0].implementation.name, serving[0].tile.block_m) == (wanted.name, block)


def test_a_ladder_serves_every_m_once_from_one_class_by_what_fits(tmp_path):
    ladders, failures = [], []

    @settings(max_examples=200)
    @given(listed=candidate_lists(), numerics=mostly(None, "k", "other", "neither"))
    def check(listed, numerics):
        disabled = ", ".join(f"{each.name}: why" for each in listed if each.disabled)
        fields = {"numerics": numerics} if numerics else {}
        registry = registry_of(*(each.implementation() for each in listed))
        rule = gemm_rule(*(each.yaml() for each in listed), **fields)
        plan = plan_of(tmp_path, registry, rule, head=f"invariance: {{require: batch}}\ndisable: {{{disabled}}}")

        # What the rule says, written another way.
        label = numerics or next((each.label for each in listed if each.usable), None)
        usable = [each for each in listed if each.usable and each.label == label]
        if not any(each.max_m is None for each in usable):
            with pytest.raises(SelectionError) as info:
                select(plan)
            assert {each.implementation for each in info.value.decisions} == {each.name for each in listed}
            assert all(each.reasons for each in info.value.decisions if each.verdict == REJECTED)
            failures.append(info.value)
            return

        selection = select(plan)
        check_ladder(selection.rungs, usable, label)
        assert selection.numerics == label
        assert selection.level == min(rung.implementation.claims for rung in selection.rungs)
        for each in listed:
            found, fine = decision(selection, each.name), each in usable
            spare = SPARE if fine else REJECTED
            assert found.verdict == (CHOSEN if each.name in selection.implementations else spare)
            assert bool(found.reasons) == (not fine)
            assert found.source.startswith(str(tmp_path))
        ladders.append((selection, usable, label))

    check()
    # The examples must have been worth drawing: ladders of several implementations, and rules that cannot be met.
    several = [each for each in ladders if len(each[0].implementations) > 1]
    assert len(several) > 20
    assert len(failures) > 5
    # Negative control: a ladder changed in one place is caught.
    for selection, usable, label in several[:20]:
        first, second, *rest = selection.rungs
        raised = dataclasses.replace(first, max_m=first.max_m + 1)
        foreign = dataclasses.replace(first, implementation=fake("x.gemm", numerics=lambda params, problem: "x"))
        for broken in ([raised, second, *rest], [second, *rest], [second, first, *rest], [foreign, second, *rest]):
            with pytest.raises(AssertionError):
                check_ladder(broken, usable, label)


# --- single behaviours --------------------------------------------------------------------------------------------


def test_a_rung_that_cannot_be_had_leaves_its_range_to_the_next(tmp_path):
    registry = registry_of(fake("a.gemm", archs=("cpu",)), fake("b.gemm"), fake("c.gemm"))
    rule = gemm_rule("impl: a.gemm, max_m: 16", "impl: b.gemm, max_m: 64", "impl: c.gemm")
    selection = select(plan_of(tmp_path, registry, rule))
    assert [(rung.implementation.name, rung.max_m) for rung in selection.rungs] == [("b.gemm", 64), ("c.gemm", None)]
    assert decision(selection, "a.gemm").reasons == ("needs cpu, the device is sm90",)
    assert decision(selection, "b.gemm").serves == "1 <= M <= 64"
    assert decision(selection, "c.gemm").serves == "M > 64"


def test_a_candidate_outside_the_rules_class_is_rejected_with_both_classes(tmp_path):
    registry = registry_of(fake("a.gemm", numerics=lambda params, problem: f"split{params.splits}"), fake("b.gemm"))
    rule = gemm_rule("impl: a.gemm, params: {splits: 4}", "impl: b.gemm", numerics="k")
    selection = select(plan_of(tmp_path, registry, rule))
    assert selection.implementations == ("b.gemm",)
    assert decision(selection, "a.gemm").reasons == ("its class is split4, the ladder's is k",)


def test_a_level_below_what_is_required_is_rejected(tmp_path):
    registry = registry_of(fake("a.gemm", claims=Invariance.BATCH), fake("b.gemm"))
    rule = gemm_rule("impl: a.gemm", "impl: b.gemm")
    plan = plan_of(tmp_path, registry, rule, head="invariance: {require: sequence}")
    assert decision(select(plan), "a.gemm").reasons == ("claims level batch, the plan requires sequence",)
    plan.require = Invariance.TOPOLOGY
    with pytest.raises(SelectionError, match="claims level sequence, the plan requires topology"):
        plan.select("gemm", dtype="float32", **DIMS)


def test_require_of_the_plan_wins_over_the_profiles():
    assert bid.plan("sm90", require="topology").require is Invariance.TOPOLOGY
    with pytest.raises(UsageError, match=r"unknown invariance level 'sequense'.*did you mean 'sequence'"):
        bid.plan("sm90", require="sequense")


def test_the_first_rule_that_matches_is_used_and_the_others_say_why_not(tmp_path):
    registry = registry_of(fake("a.gemm"), fake("b.gemm"))
    rules = """  gemm:
    - {dtypes: [bf16], when: {n: {multiple_of: 128}}, candidates: [{impl: a.gemm}]}
    - {dtypes: [bf16], when: {n: {min: 8, max: 64}, k: {in: [32, 64]}, bias: false}, candidates: [{impl: b.gemm}]}
"""
    plan = plan_of(tmp_path, registry, rules)
    assert select(plan, n=256).implementations == ("a.gemm",)
    assert select(plan, n=64).implementations == ("b.gemm",)
    for dims, reason in (
        ({"n": 65}, "n=65 is over 64"),
        ({"n": 7}, "n=7 is under 8"),
        ({"k": 128}, "k=128 is not one of 32, 64"),
        ({"bias": True}, "bias is True, not False"),
        ({"n": 66}, "n=66 is not a multiple of 128"),
    ):
        with pytest.raises(SelectionError, match=r"no rule of profile sm90 .* matches") as info:
            select(plan, **dims)
        assert any(reason in why for why in decision(info.value, "a.gemm").reasons)
    with pytest.raises(SelectionError) as info:
        plan.select("gemm", dtype="float32", **DIMS)
    assert "it is for bfloat16" in str(info.value)


def test_an_op_no_backend_implements_is_unsupported_by_name(tmp_path):
    plan = plan_of(tmp_path, registry_of(fake("a.gemm")), gemm_rule("impl: a.gemm"))
    for op in ("lora", "all_reduce"):
        with pytest.raises(SelectionError, match=f"{op} is unsupported"):
            plan.select_problem(ops.get(op).typical(ops.get(op).dtypes[0]))


def test_a_registered_implementation_nobody_lists_is_shown_with_what_it_lacks(tmp_path):
    registry = registry_of(fake("a.gemm"), fake("z.gemm", requires=(DimMultipleOf("n", 48),)))
    found = decision(select(plan_of(tmp_path, registry, gemm_rule("impl: a.gemm"))), "z.gemm")
    assert (found.verdict, found.reasons) == (
        UNLISTED,
        ("the rule in use does not list it", "needs n a multiple of 48, asked for 64"),
    )


def test_a_preferred_implementation_comes_first_with_the_params_the_rule_gives_it(tmp_path):
    registry = registry_of(fake("a.gemm"), fake("b.gemm"))
    rule = gemm_rule("impl: a.gemm, max_m: 8", "impl: b.gemm, params: {splits: 2}, tile: {block_m: 32}")
    selection = select(plan_of(tmp_path, registry, rule, head="prefer: [b.gemm]"))
    (rung,) = selection.rungs
    assert (rung.implementation.name, rung.params, rung.tile) == (
        "b.gemm",
        SplitParams(splits=2),
        BlockTile(block_m=32),
    )
    assert decision(selection, "b.gemm").source.endswith("sm90.yaml:2")
    assert decision(selection, "a.gemm").verdict == SPARE


def test_a_preferred_implementation_leads_with_its_own_class_where_a_rule_names_another(tmp_path):
    """Unless it does not fit: then the rule's class is the ladder's, as without it."""
    registry = registry_of(fake("a.gemm"), fake("b.gemm", numerics=lambda params, problem: "other"))
    rule = gemm_rule("impl: a.gemm", numerics="k")
    selection = select(plan_of(tmp_path, registry, rule, head="prefer: [b.gemm]"))
    assert (selection.implementations, selection.numerics) == (("b.gemm",), "other")
    assert "its class is" in decision(selection, "a.gemm").reasons[0]
    unfit = registry_of(
        fake("a.gemm"),
        fake("b.gemm", numerics=lambda params, problem: "other", requires=(DimMultipleOf("n", 48),)),
    )
    selection = select(plan_of(tmp_path, unfit, rule, head="prefer: [b.gemm]"))
    assert selection.implementations == ("a.gemm",)


def test_a_disabled_implementation_is_left_out_and_the_reason_and_place_are_shown(tmp_path):
    registry = registry_of(fake("a.gemm"), fake("b.gemm"))
    rule = gemm_rule("impl: a.gemm", "impl: b.gemm")
    selection = select(plan_of(tmp_path, registry, rule, head="disable: {a.gemm: wrong on our driver}"))
    assert selection.implementations == ("b.gemm",)
    assert decision(selection, "a.gemm").reasons == (f"disabled: wrong on our driver [{tmp_path}/sm90.yaml:2]",)


def test_a_ladder_without_an_open_end_is_refused(tmp_path):
    plan = plan_of(tmp_path, registry_of(fake("a.gemm")), gemm_rule("impl: a.gemm, max_m: 16"))
    with pytest.raises(SelectionError, match="nothing serves M > 16; add a candidate without max_m"):
        select(plan)


# --- forced choices -----------------------------------------------------------------------------------------------


@pytest.fixture
def forcing(tmp_path):
    registry = registry_of(
        fake("a.gemm"), fake("b.gemm"), fake("c.gemm", archs=("cpu",)), fake("a.softmax", op="softmax", tile=None)
    )
    rule = gemm_rule("impl: a.gemm", "impl: b.gemm, params: {splits: 2}")
    softmax = "  softmax:\n    - {dtypes: [bf16], candidates: [{impl: a.softmax}]}\n"
    return plan_of(tmp_path, registry, rule + softmax)


def test_the_order_of_what_wins(forcing, monkeypatch):
    assert select(forcing).implementations == ("a.gemm",)
    monkeypatch.setenv("BIDISPATCH_IMPL", "gemm=b.gemm")
    selection = select(forcing)
    assert selection.implementations == ("b.gemm",)
    assert selection.rungs[0].params == SplitParams(splits=2)
    assert decision(selection, "b.gemm").source == "BIDISPATCH_IMPL"
    with bid.override("gemm=a.gemm"):
        selection = select(forcing)
        assert selection.implementations == ("a.gemm",)
        assert decision(selection, "a.gemm").source == "bid.override"
    assert select(forcing).implementations == ("b.gemm",)


def test_overrides_nest_and_the_inner_one_wins(forcing):
    with bid.override("gemm=b.gemm, softmax=a.softmax"):
        with bid.override("gemm=a.gemm"):
            assert select(forcing).implementations == ("a.gemm",)
            softmax = forcing.select("softmax", dtype="bf16", n=8)
            assert decision(softmax, "a.softmax").source == "bid.override"
        assert select(forcing).implementations == ("b.gemm",)
    assert decision(select(forcing), "b.gemm").source.endswith(".yaml:6")


def test_an_override_ends_when_its_block_raises(forcing):
    with pytest.raises(ZeroDivisionError), bid.override("gemm=b.gemm"):
        raise ZeroDivisionError
    assert select(forcing).implementations == ("a.gemm",)


@pytest.mark.parametrize("by", ["variable", "override"])
def test_a_forced_choice_that_does_not_fit_raises_with_the_trace(forcing, by, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_IMPL", "gemm=c.gemm" if by == "variable" else "")
    override = bid.override("gemm=c.gemm" if by == "override" else "")
    with override, pytest.raises(SelectionError, match=r"forces c.gemm for gemm .*nothing else is tried") as info:
        select(forcing)
    found = decision(info.value, "c.gemm")
    assert (found.verdict, found.reasons) == (REJECTED, ("needs cpu, the device is sm90",))
    assert "needs cpu, the device is sm90" in str(info.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gemm", "'gemm' is not op=implementation"),
        ("gemm=", "is not op=implementation"),
        ("gem=a.gemm", r"unknown op 'gem'.*did you mean 'gemm'"),
        ("gemm=a.gem", r"unknown implementation 'a.gem' \(did you mean 'a.gemm'\?\)"),
        ("gemm=a.softmax", "forces a.softmax for gemm, but it implements softmax"),
    ],
)
def test_a_forced_choice_nobody_can_read_is_refused(forcing, text, message, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_IMPL", text)
    with pytest.raises(UsageError, match=message):
        select(forcing)


# --- the plan -----------------------------------------------------------------------------------------------------


def test_a_selection_is_made_once(forcing):
    assert select(forcing) is select(forcing)
    assert forcing.selections == (select(forcing),)


def test_asking_what_is_supported_selects_nothing(forcing):
    select(forcing)
    before = forcing.fingerprint()
    forcing.freeze()
    assert any(isinstance(result, SelectionError) for _, result in forcing.supported())
    assert forcing.fingerprint([ops.get("gemm").problem("fp32", DIMS)]) != before
    assert forcing.fingerprint() == before
    assert len(forcing.selections) == 1


def test_a_frozen_plan_answers_what_it_was_asked_and_refuses_what_is_new(forcing):
    asked = select(forcing)
    forcing.freeze()
    assert select(forcing) is asked
    with pytest.raises(PlanFrozenError, match="never asked for gemm bfloat16 n=128"):
        select(forcing, n=128)
    with bid.override("gemm=b.gemm"), pytest.raises(PlanFrozenError):
        select(forcing)


def test_a_selection_as_json_holds_the_rungs(forcing):
    content = select(forcing).as_json()
    assert content["rungs"] == [{"implementation": "a.gemm", "max_m": None, "params": {"splits": 1}, "tile": None}]
    assert (content["evidence"], content["level"], content["dims"]["n"]) == ("claimed", "sequence", 64)


# --- trust --------------------------------------------------------------------------------------------------------


def record_of(selection, **changes) -> Record:
    record = Record(
        problem=selection.problem.key,
        ladder=selection.ladder_key,
        numerics=selection.numerics,
        level="sequence",
        comparisons=1000,
        cuda_graph=True,
        made="2025-01-01T00:00:00+00:00",
        environment=describe(selection.device, {rung.implementation for rung in selection.rungs}),
    )
    return dataclasses.replace(record, **changes)


LADDER = gemm_rule("impl: a.gemm, max_m: 16", "impl: b.gemm, tile: {block_m: 64}")
VERIFIED = "invariance: {trust: verified}"


@pytest.fixture
def trusting(tmp_path):
    registry = registry_of(fake("a.gemm", libraries=("pytest",)), fake("b.gemm"))
    selection = select(plan_of(tmp_path / "claimed", registry, LADDER))
    return (
        registry,
        selection,
        lambda ladder=LADDER, **given: plan_of(tmp_path / "verified", registry, ladder, head=VERIFIED, **given),
    )


def test_trust_verified_refuses_what_no_record_proves_and_says_how_to_prove_it(trusting):
    _, selection, verified = trusting
    assert selection.evidence is None
    with pytest.raises(
        SelectionError, match="bidispatch verify gemm --dtype bf16 --dim n=64 --dim k=64 --record"
    ) as info:
        select(verified())
    assert decision(info.value, "a.gemm").verdict == CHOSEN


def test_trust_verified_accepts_what_a_record_proves(trusting):
    _, selection, verified = trusting
    RecordStore(H200).add([record_of(selection, made="2024"), record_of(selection, made="2025", level="topology")])
    evidence = select(verified()).evidence
    assert (evidence.made, evidence.comparisons) == ("2025", 1000)


def test_a_claimed_plan_shows_the_evidence_it_has(trusting, tmp_path):
    registry, selection, _ = trusting
    RecordStore(H200).add([record_of(selection)])
    assert select(plan_of(tmp_path, registry, LADDER)).as_json()["evidence"] == "verified"


@pytest.mark.parametrize(
    "changes",
    [
        {"level": "batch"},
        {"numerics": "another"},
        {"comparisons": 0},
        {"problem": "{}"},
        {"ladder": "[]"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_record_of_something_else_or_less_does_not_count(trusting, changes):
    _, selection, verified = trusting
    RecordStore(H200).add([record_of(selection, **changes)])
    with pytest.raises(SelectionError, match="trusts only what is verified"):
        select(verified())


@pytest.mark.parametrize("part", ["device", "arch", "bidispatch", "libraries", "code", "variables"])
def test_a_record_of_another_environment_does_not_count(trusting, part):
    _, selection, verified = trusting
    environment = describe(H200, {rung.implementation for rung in selection.rungs})
    assert part in environment
    RecordStore(H200).add([record_of(selection, environment={**environment, part: "another"})])
    with pytest.raises(SelectionError, match="trusts only what is verified"):
        select(verified())


def test_a_record_made_with_another_driver_does_count(trusting):
    _, selection, verified = trusting
    environment = describe(H200, {rung.implementation for rung in selection.rungs})
    RecordStore(H200).add([record_of(selection, environment={**environment, "soft": {"driver": "1"}})])
    assert select(verified()).evidence is not None


@pytest.mark.parametrize(
    "ladder",
    [
        gemm_rule("impl: a.gemm, max_m: 17", "impl: b.gemm, tile: {block_m: 64}"),
        gemm_rule("impl: a.gemm, max_m: 16", "impl: b.gemm, tile: {block_m: 32}"),
        gemm_rule("impl: a.gemm, max_m: 16, params: {splits: 2}", "impl: b.gemm, tile: {block_m: 64}"),
        gemm_rule("impl: b.gemm, tile: {block_m: 64}"),
        gemm_rule("impl: b.gemm, max_m: 16", "impl: a.gemm, tile: {block_m: 64}"),
    ],
    ids=["max_m", "tile", "params", "fewer rungs", "swapped"],
)
def test_a_record_of_another_ladder_does_not_count(trusting, ladder):
    _, selection, verified = trusting
    RecordStore(H200).add([record_of(selection)])
    with pytest.raises(SelectionError, match="trusts only what is verified"):
        select(verified(ladder))


def test_a_record_proves_nothing_about_a_predicted_device(trusting):
    _, selection, verified = trusting
    predicted = Device(ARCHS["sm90"], "NVIDIA H200", predicted=True)
    RecordStore(predicted).add([record_of(selection)])
    with pytest.raises(SelectionError, match="trusts only what is verified"):
        select(verified(device=predicted))


# --- fingerprints -------------------------------------------------------------------------------------------------

PROBLEMS = [ops.get("gemm").problem(dtype, {"n": n, "k": 64}) for dtype in ("bf16", "fp32") for n in (64, 128)]


def labelled(tmp_path, label="k", name="a.gemm", head="", device=H200, **fields):
    registry = registry_of(fake(name, numerics=lambda params, problem: label, **fields))
    return plan_of(tmp_path, registry, gemm_rule(f"impl: {name}"), head=head, device=device)


@given(order=st.permutations(PROBLEMS))
def test_a_fingerprint_does_not_follow_the_order_of_the_problems(order, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fingerprint"
    asked = labelled(folder)
    for problem in order:
        asked.select_problem(problem)
    assert asked.fingerprint() == labelled(folder).fingerprint(order) == labelled(folder).fingerprint(PROBLEMS)


def test_a_fingerprint_follows_class_level_device_problems_and_versions(tmp_path, monkeypatch):
    base = labelled(tmp_path).fingerprint(PROBLEMS)
    others = {
        "class": labelled(tmp_path, label="other").fingerprint(PROBLEMS),
        "level": labelled(tmp_path, head="invariance: {require: sequence}").fingerprint(PROBLEMS),
        "device": labelled(tmp_path, device=Device(ARCHS["sm90"], "NVIDIA H100")).fingerprint(PROBLEMS),
        "problems": labelled(tmp_path).fingerprint(PROBLEMS[1:]),
        "library": labelled(tmp_path, libraries=("pytest",)).fingerprint(PROBLEMS),
        "predicted": labelled(tmp_path, device=dataclasses.replace(H200, predicted=True)).fingerprint(PROBLEMS),
    }
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    others["variable"] = labelled(tmp_path).fingerprint(PROBLEMS)
    assert len({base, *others.values()}) == 1 + len(others)
    assert others["predicted"].startswith("predicted-sm90-batch-")
    assert base.startswith("sm90-batch-")


def test_a_fingerprint_follows_neither_names_nor_soft_facts(tmp_path):
    base = labelled(tmp_path).fingerprint(PROBLEMS)
    assert labelled(tmp_path, name="another.kernel").fingerprint(PROBLEMS) == base
    assert labelled(tmp_path, device=dataclasses.replace(H200, driver="9")).fingerprint(PROBLEMS) == base


@pytest.mark.parametrize("device", ["sm103", "cpu"])
def test_two_processes_with_the_same_choices_have_one_fingerprint(device):
    code = (
        "import bidispatch as bid, sys; plan = bid.plan(sys.argv[1])\n"
        "for n in map(int, sys.argv[2:]): plan.select('gemm', dtype='bf16', n=n, k=64)\n"
        "print(plan.fingerprint())"
    )
    choices = [("1", ("64", "128")), ("2", ("128", "64"))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, device, *sizes],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed, sizes in choices
    ]
    runs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert runs[0] == runs[1]
    assert len(runs[0].split()) == 1


def test_the_warning_about_claims_is_given_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("bidispatch.planning.selection._warned", False)
    plan = plan_of(tmp_path, registry_of(fake("a.gemm", tile=None)), gemm_rule("impl: a.gemm"), device=CPU)
    for _ in range(2):
        select(plan).bind(max_tokens=4)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "bidispatch verify gemm --dtype bf16 --dim n=64 --dim k=64 --record" in message


@pytest.mark.parametrize(
    ("op", "dims", "words"),
    [
        ("mean", {"n": 9}, "bidispatch verify mean --dtype fp16 --dim n=9 --record"),
        ("gemm", {"n": 8, "k": 4, "bias": True}, "gemm --dtype fp16 --dim n=8 --dim k=4 --dim bias=true --record"),
        ("gemm", {"n": 8, "k": 4, "out_dtype": "fp32"}, "--dim k=4 --dim out_dtype=float32 --record"),
    ],
)
def test_the_command_that_proves_a_problem_names_that_very_problem(op, dims, words):
    problem = ops.get(op).problem("float16", dims)
    command = verify_command(problem)
    assert words in command
    given = dict(word.split("=") for word in command.split() if "=" in word)
    assert ops.get(op).problem("fp16", given) == problem


def test_the_command_that_proves_a_problem_names_a_level_that_the_profile_does_not(tmp_path):
    """What another level selects may be of another class, which a record of the profile's would not prove."""
    plan = plan_of(tmp_path, registry_of(fake("a.gemm", tile=None)), gemm_rule("impl: a.gemm"))
    asked = select(bid.Plan(plan.device, plan.profile, plan.registry, RecordStore(H200), Invariance.RUN)).asked
    assert (select(plan).asked, asked) == (None, Invariance.RUN)
    command = verify_command(ops.get("mean").problem("float16", {"n": 9}), asked)
    assert command == "bidispatch verify mean --dtype fp16 --dim n=9 --require run --record"
    more = bid.Plan(plan.device, plan.profile, plan.registry, RecordStore(H200), Invariance.TOPOLOGY)
    with pytest.raises(SelectionError, match=r"`bidispatch explain gemm .* --require topology"):
        select(more)


# --- what verify refuted --------------------------------------------------------------------------------------------


def refute(*rungs):
    key = ops.get("gemm").problem("bfloat16", DIMS).key
    made = "2026-01-02T03:04"
    against = [
        Refutation(key, rung.key, "2 of 9 rows differ", "verify --retry", made, describe(H200, {rung.implementation}))
        for rung in rungs
    ]
    RecordStore(H200).add([], against)


def tiled(name):
    tiles = ((16, BlockTile(block_m=16)), (None, BlockTile(block_m=64)))
    return fake(name, tiles=lambda device, problem, params: tiles)


def ladder(selection):
    return [
        (rung.implementation.name, rung.tile.block_m if rung.tile else None, rung.max_m) for rung in selection.rungs
    ]


@pytest.mark.parametrize(
    ("refuted", "left"),
    [
        ((), [("a.gemm", 16, 16), ("a.gemm", 64, 100), ("b.gemm", 64, None)]),
        ((0,), [("a.gemm", 64, 100), ("b.gemm", 64, None)]),
        ((1,), [("a.gemm", 16, 16), ("b.gemm", 64, None)]),
        ((0, 1), [("b.gemm", 16, 16), ("b.gemm", 64, None)]),
    ],
)
def test_a_refuted_rung_leaves_its_range_to_the_next(tmp_path, refuted, left):
    registry = registry_of(tiled("a.gemm"), tiled("b.gemm"))
    rule = gemm_rule("impl: a.gemm, max_m: 100", "impl: b.gemm")
    rungs = select(plan_of(tmp_path, registry, rule)).rungs
    refute(*(rungs[index] for index in refuted))
    selection = select(plan_of(tmp_path, registry, rule))
    assert ladder(selection) == left
    reasons = decision(selection, "a.gemm").reasons
    assert len(reasons) == len(refuted)
    for reason in reasons:
        assert "bits differed from the ladder's on 2026-01-02 (2 of 9 rows differ)" in reason
        assert "`verify --retry` tries again" in reason
    assert decision(selection, "a.gemm").verdict == (REJECTED if len(refuted) == 2 else CHOSEN)


def test_a_refuted_rung_is_no_choice_even_where_it_is_forced_or_the_only_one(tmp_path):
    registry = registry_of(tiled("a.gemm"), tiled("b.gemm"))
    rule = gemm_rule("impl: a.gemm", "impl: b.gemm")
    refute(*select(plan_of(tmp_path, registry, rule)).rungs)
    with bid.override("gemm=a.gemm"), pytest.raises(SelectionError, match="tries again"):
        select(plan_of(tmp_path, registry, rule))
    assert select(plan_of(tmp_path, registry, rule), k=128).rungs[0].implementation.name == "a.gemm"

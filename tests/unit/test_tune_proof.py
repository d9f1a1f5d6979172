"""What `tune` keeps must have been proved, here and now: negative controls for the proof, the file and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_tune import ROWS, bind_sound, fake, plan, problem, search, timer_of  # noqa: F401 - with a fixture

from bidispatch import ops
from bidispatch.cli import tune as command
from bidispatch.errors import SelectionError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.profiles.tiles import read_tuned, write_tuned
from bidispatch.requirements import DimIn
from bidispatch.tune import proof
from bidispatch.tune.runner import tune
from bidispatch.tune.search import contenders


def bind_other(context):
    """Off by a few units in the last place in every row: invariant, and of another class than it says."""
    sound = bind_sound(context)

    def kernel(x, weight, bias, out):
        sound(x, weight, bias, out)
        out.mul_(1.000001)

    return kernel


def bind_narrow(context):
    """Gives 16-bit results only, though nothing says so before it runs."""
    if context.problem["out_dtype"] == "float32":
        raise RuntimeError("out of resources: shared memory")
    return bind_sound(context)


def bind_broken(context):
    raise RuntimeError("out of resources: shared memory")


FAST_B = timer_of(lambda name, block, m: 1.0 if name == "b.gemm" else 1.2)


def other(name="b.gemm", load="bind_other"):
    """A fake whose kernel is bound here."""
    return replace(fake(name), load=f"{__name__}:{load}")


def winners(found):
    return {step.choice.implementation.name for step in found.steps}


def test_a_kernel_named_alone_is_still_compared_with_its_class(plan):  # noqa: F811
    made = plan(fake("a.gemm"), other())
    assert winners(search(made, problem(), ROWS, FAST_B)) == {"a.gemm"}
    with pytest.raises(SelectionError, match="3 kernels were refused for other bits"):
        search(made, problem(), ROWS, FAST_B, ["b.gemm"])


def bind_late(context):
    """One bit of the last row of calls of more than 40 rows."""
    sound = bind_sound(context)

    def kernel(x, weight, bias, out):
        sound(x, weight, bias, out)
        if len(x) > 40:
            out[-1, 0] = torch.nextafter(out[-1, 0], torch.tensor(float("inf")))

    return kernel


def bind_biased(context):
    """Sound, but that it rounds before it adds a bias."""
    sound = bind_sound(context)

    def kernel(x, weight, bias, out):
        sound(x, weight, None, out)
        if bias is not None:
            out.copy_((out.bfloat16() + bias).to(out.dtype))

    return kernel


def test_a_result_too_large_to_compare_at_once_is_compared_in_pieces_of_rows(plan, monkeypatch):  # noqa: F811
    """A vocabulary's winners for many rows: to the last row, each piece against rows that were called apart."""
    whole = search(plan(fake("a.gemm")), problem(), (64,), FAST_B).comparisons
    monkeypatch.setattr(proof, "_PIECE_ELEMENTS", 5 * 16)
    assert search(plan(fake("a.gemm")), problem(), (64,), FAST_B).comparisons == whole
    found = search(plan(fake("a.gemm"), other(load="bind_late")), problem(), (64,), FAST_B)
    assert (winners(found), len(found.refused)) == ({"a.gemm"}, 3)
    assert "M=63 row 62 out[0]" in found.refused[0]


def test_a_winner_is_compared_with_a_bias_at_the_edges_of_its_rung(plan):  # noqa: F811
    found = search(plan(fake("a.gemm"), other(load="bind_biased")), problem(), ROWS, FAST_B)
    assert (winners(found), len(found.refused)) == ({"a.gemm"}, 3)
    assert all(text.startswith("with a bias: b.gemm") for text in found.refused)


def test_what_takes_no_bias_is_not_compared_with_one(plan):  # noqa: F811
    """The plan does not use it there."""
    plain = replace(other(load="bind_biased"), requires=(DimIn("bias", (False,)),))
    apart = replace(other(load="bind_biased"), numerics=lambda params, problem: "d" if problem.flag("bias") else "c")
    for made in (plan(fake("a.gemm"), plain), plan(fake("a.gemm"), apart), plan(plain)):
        found = search(made, problem(), ROWS, FAST_B)
        assert (winners(found), found.refused) == ({"b.gemm"}, ())


def test_a_result_there_is_no_room_for_is_not_taken_for_equal(plan, monkeypatch):  # noqa: F811
    """Not even in fp32, which a kernel may have no room for in its tile: that was tried, this was not."""
    narrow = ops.get("gemm").problem("float32", {"n": 5, "k": 16, "out_dtype": "bfloat16"})
    call = proof.Subject.call

    def no_room(subject, arguments, outputs):
        if outputs[0].dtype == torch.float32 and len(outputs[0]) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        call(subject, arguments, outputs)

    monkeypatch.setattr(proof, "_PIECE_ELEMENTS", 5 * 16)
    monkeypatch.setattr(proof.Subject, "call", no_room)
    with pytest.raises(SelectionError, match="OutOfMemoryError"):
        search(plan(fake("a.gemm")), narrow, ROWS, FAST_B)


def test_what_cannot_be_bound_takes_no_part_and_is_counted(plan):  # noqa: F811
    found = search(plan(fake("a.gemm"), other(load="bind_broken")), problem(), ROWS, FAST_B)
    assert (winners(found), found.tried, found.skipped) == ({"a.gemm"}, 3, 3)


def test_what_runs_once_and_then_no_more_takes_no_part(plan):  # noqa: F811
    slow_a = timer_of(lambda name, block, m: 2.0 if name == "a.gemm" else 1.0)

    def timer(problem, m, kernels, brief):
        return {key: us for key, us in slow_a(problem, m, kernels, brief).items() if brief or "a.gemm" in key}

    found = search(plan(fake("a.gemm"), fake("b.gemm"), fake("c.gemm")), problem(), (8,), timer)
    assert (winners(found), found.skipped) == ({"a.gemm"}, 6)


def test_a_kernel_without_room_for_fp32_results_is_compared_in_its_own(plan):  # noqa: F811
    narrow = ops.get("gemm").problem("float32", {"n": 5, "k": 16, "out_dtype": "bfloat16"})
    found = search(plan(fake("a.gemm"), other(load="bind_narrow")), narrow, ROWS, FAST_B)
    assert (winners(found), found.refused) == ({"b.gemm"}, ())


def test_what_claims_less_than_the_plan_requires_takes_no_part(plan):  # noqa: F811
    made = plan(fake("a.gemm"), fake("b.gemm", claims=Invariance.RUN))
    assert contenders(made, problem()).names == ("a.gemm",)


def test_ladders_of_another_environment_serve_on_but_are_found_anew(plan, tmp_path):  # noqa: F811
    """Or a file would say that all in it was compared with the versions that only its last entry has seen."""
    made, path = plan(fake("a.gemm")), tmp_path / "gemm.json"
    problems = [problem(), problem(n=7)]
    tune(made, problems, path, FAST_B, rows=ROWS)
    old = read_tuned(path)
    write_tuned(path, old.model_copy(update={"environment": {**old.environment, "bidispatch": "0"}}))
    first = tune(made, problems[:1], path, FAST_B, rows=ROWS)
    assert [outcome.kept for outcome in first.outcomes] == [False]
    assert {entry.dims["n"]: entry.comparisons > 0 for entry in read_tuned(path).entries} == {5: True, 7: False}
    second = tune(made, problems, path, FAST_B, rows=ROWS)
    assert [outcome.kept for outcome in second.outcomes] == [True, False]
    assert all(entry.comparisons for entry in read_tuned(path).entries)


def test_a_file_of_another_arch_or_where_nothing_can_be_written_is_refused_before_the_work(plan, tmp_path):  # noqa: F811
    def timer(*arguments):
        pytest.fail("nothing shall be timed")

    made, path = plan(fake("a.gemm")), tmp_path / "gemm.json"
    tune(made, [problem()], path, FAST_B, rows=ROWS)
    old = read_tuned(path)
    write_tuned(path, old.model_copy(update={"environment": {**old.environment, "arch": "sm80"}}))
    with pytest.raises(UsageError, match="ladders of sm80"):
        tune(made, [problem(n=9)], path, timer, rows=ROWS)
    with pytest.raises(UsageError, match="--out"):
        tune(made, [problem(n=9)], path / "gemm.json", timer, rows=ROWS)


def test_a_shape_without_room_leaves_the_others_theirs(plan, tmp_path):  # noqa: F811
    def timer(asked, m, kernels, brief):
        if asked.size("n") == 7:
            raise RuntimeError("CUDA out of memory")
        return FAST_B(asked, m, kernels, brief)

    report = tune(plan(fake("a.gemm")), [problem(n=7), problem()], tmp_path / "x.json", timer, rows=ROWS)
    assert [outcome.error for outcome in report.outcomes] == ["CUDA out of memory", ""]
    assert (report.passed, report.left) == (False, ())


@pytest.fixture
def gpu(plan, monkeypatch, tmp_path):  # noqa: F811
    """The command as on a GPU: its plan and its timer are fakes, all else is real."""

    def make(timer, *implementations):
        made = plan(*implementations)
        stand_in = SimpleNamespace(arch=SimpleNamespace(vendor="nvidia", name="cpu"), predicted=False)
        monkeypatch.setattr(command.machine, "require_device", lambda device: None)
        asked = SimpleNamespace(device=stand_in, profile=made.profile, registry=made.registry)
        monkeypatch.setattr(command, "make_plan", lambda *arguments, **options: asked)
        monkeypatch.setattr(
            command,
            "_run",
            lambda _, problems, path, rows, only, budget, again: tune(
                made, problems, path, timer, rows=rows or ROWS, only=only, budget=budget, again=again
            ),
        )
        (tmp_path / "shapes.yaml").write_text("- {name: one, n: 5, k: 16}\n- {name: two, n: 7, k: 16}\n")
        out = tmp_path / "out" / "gemm.json"
        return ("tune", "gemm", "--dtype", "fp32", "--shapes", str(tmp_path / "shapes.yaml"), "--out", str(out))

    return make


def test_the_command_shows_ladders_and_lines_to_paste(cli, gpu):
    code, out, _ = cli(*gpu(FAST_B, fake("a.gemm"), fake("b.gemm")))
    assert code == 0
    for words in ("n=5 k=16", "b.gemm", "2 shapes in", "tuned: [", "candidates:"):
        assert words in out


def test_the_commands_document_is_one_and_says_what_was_refused(as_json, gpu):
    code, document = as_json(*gpu(FAST_B, fake("a.gemm"), other()))
    assert (code, document["passed"]) == (1, False)
    assert [len(outcome["refused"]) for outcome in document["outcomes"]] == [3, 3]
    assert all(outcome["entry"]["comparisons"] and outcome["skipped"] == 0 for outcome in document["outcomes"])
    assert document["yaml"][0] == "ops:"


def test_the_command_interrupted_says_how_to_go_on_and_goes_on(cli, gpu):
    calm = [False]

    def timer(asked, m, kernels, brief):
        if asked.size("n") == 7 and not calm[0]:
            raise KeyboardInterrupt
        return FAST_B(asked, m, kernels, brief)

    words = gpu(timer, fake("a.gemm"))
    code, out, _ = cli(*words)
    assert (code, "interrupted: 1 shapes are left; the same command goes on" in out) == (130, True)
    calm[0] = True
    code, out, _ = cli(*words)
    assert (code, "2 shapes in" in out, "1 of them from before" in out) == (0, True, True)


def test_the_command_with_a_budget_ends_well(cli, gpu):
    code, out, _ = cli(*gpu(FAST_B, fake("a.gemm")), "--budget", "0s")
    assert (code, "the budget is over: 2 shapes are left" in out) == (0, True)


def test_ranks_without_a_model_are_refused(cli, tmp_path):
    (tmp_path / "shapes.yaml").write_text(json.dumps([{"name": "one", "n": 5, "k": 16}]))
    code, _, err = cli("tune", "gemm", "--shapes", str(tmp_path / "shapes.yaml"), "--tp", "2")
    assert (code, "--tp divides the layers of --model" in err) == (2, True)

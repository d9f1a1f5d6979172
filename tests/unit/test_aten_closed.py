"""`aten_overrides` fails closed: no function of torch's reaches an op that may follow the batch without an error."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bidispatch as bid
from bidispatch.audit.trace import UNCOVERED, Trace
from bidispatch.errors import SelectionError, UsageError
from bidispatch.integrations.aten import elementwise
from bidispatch.integrations.aten.mode import OVERRIDDEN

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).abs() + 0.5
SQUARE = X[:, :6].contiguous()
ROW = X[0].contiguous()
INDEX = torch.tensor([0, 2])
CUBE = X.view(2, 3, 8)
IMAGE = X.view(1, 2, 3, 8)

ARGUMENTS = (
    (X,),
    (X, X),
    (X, X, X),
    (SQUARE, SQUARE),
    (SQUARE, SQUARE, SQUARE),
    (X, -1),
    (X, 0.5),
    (X, ROW),
    (X, 1, X),
    (ROW,),
    (ROW, ROW),
    (ROW, SQUARE),
    (SQUARE, SQUARE, ROW[:6]),
    (CUBE,),
    (CUBE, CUBE.mT),
    (CUBE[:, :, :6].contiguous(), CUBE.mT.contiguous(), CUBE),
    (CUBE, CUBE, CUBE),
    (CUBE, 2),
    (CUBE, torch.ones(4, 3, 2)),
    (IMAGE,),
    (IMAGE, 2),
    (IMAGE, torch.ones(2, 2, 2, 2)),
    (X, 0, INDEX),
    (X, 0, INDEX, X[:2]),
    (X, (8,)),
    (X, 2),
    ((X, X),),
    ([SQUARE, SQUARE],),
    ("ij,kj->ik", X, X),
    (INDEX, X),
    (X, INDEX.expand(3, 2).reshape(6) % 8),
    (X, torch.zeros(8), torch.ones(8)),
)
# The lowrank ones come to a decomposition of rank 0, which has no elements.
LEFT_OUT = {"pin_memory", "cuda", "svd_lowrank", "pca_lowrank"}


def functions():
    found = {}
    for members in torch.overrides.get_overridable_functions().values():
        for function in members:
            name = getattr(function, "__name__", "")
            if not isinstance(function, types.MethodWrapperType) and name not in LEFT_OUT:
                found[torch.overrides.resolve_name(function) or name] = function
    return found


def fresh(value):
    """Arguments that a function may write to."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(fresh(x) for x in value) if isinstance(value, (tuple, list)) else value


@pytest.fixture(scope="module")
def plan():
    return bid.plan("cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
def test_no_function_reaches_an_op_that_nothing_covers(plan, grad):
    reached, served, refused = {}, set(), set()
    for name, function in functions().items():
        for arguments in ARGUMENTS:
            given = fresh(arguments)
            with torch.set_grad_enabled(grad), Trace() as trace:
                try:
                    with bid.aten_overrides(plan):
                        function(*given)
                    served.add(name)
                except SelectionError:
                    refused.add(name)
                except Exception:  # noqa: BLE001, S110 - not this function's arguments
                    pass
            uncovered = {
                e.op
                for e in trace.entries
                # A refusal asks for the shapes first.
                if e.verdict == UNCOVERED and e.reason != "random by request" and e.device != "meta"
            }
            if uncovered:
                reached.setdefault(name, set()).update(uncovered)
    assert reached == {}, sorted(reached.items())
    # Not because nothing ran.
    assert len(served) > 600
    assert {"torch.cumsum", "torch.Tensor.prod", "torch.nn.functional.conv2d", "torch.functional.cdist"} <= refused
    assert {
        "torch.functional.einsum",
        "torch.nn.functional.layer_norm",
        "torch.Tensor.addcmul",
        "torch.Tensor.norm",
    } <= served


class Custom:
    """An op of somebody else's, of which nothing is known."""

    library = torch.library.Library("somebody_else", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x + x, "CompositeExplicitAutograd")


REFUSED = {
    "a scan": lambda: X.cumsum(-1),
    "float64": lambda: X.double() @ X.double().T,
    "a convolution": lambda: torch.nn.Conv1d(8, 2, 1)(CUBE.mT),
    "an op called by its name": lambda: torch.ops.aten.cumsum(X, 0),
    "an op of somebody else's": lambda: torch.ops.somebody_else.double(X),
    "a function of autograd": lambda: checkpoint(lambda x: x.cumsum(0), X, use_reentrant=False),
    "training by the batch's moments": lambda: torch.nn.BatchNorm1d(8)(X),
    "accumulating": lambda: torch.zeros(3).index_put_((INDEX,), X[0, :2], accumulate=True),
    "a norm of embeddings": lambda: torch.nn.functional.embedding(INDEX, X.clone(), max_norm=1.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_serves_raises_and_is_torchs_where_asked(plan, name):
    with torch.no_grad(), bid.aten_overrides(plan):
        with pytest.raises(SelectionError, match=r"may make a row follow the batch.*uncovered='torch'"):
            REFUSED[name]()
        with bid.aten_overrides(plan, uncovered="torch"):
            assert REFUSED[name]() is not None
        with pytest.raises(SelectionError):
            REFUSED[name]()


def test_the_context_inside_is_the_one_that_refuses(plan):
    with bid.aten_overrides(plan, uncovered="torch"):
        assert torch.equal(X.cumsum(0), torch.cumsum(X, 0))
        with bid.aten_overrides(plan), pytest.raises(SelectionError, match=r"aten\.cumsum\.default\(float32\[6, 8\]\)"):
            X.cumsum(0)


def test_integers_random_numbers_empty_tensors_and_torchs_own_errors(plan):
    with torch.no_grad(), bid.aten_overrides(plan):
        counts = torch.arange(6).view(2, 3)
        assert torch.equal(counts @ counts.T, torch.tensor([[5, 14], [14, 50]]))
        assert torch.equal((X > 0).sum(-1), torch.full((6,), 8))
        assert torch.cumsum(counts, 1).tolist() == [[0, 1, 3], [3, 7, 12]]
        assert torch.nn.functional.dropout(X, 0.5).shape == torch.rand(6, 8).shape
        assert X[:0].cumsum(0).shape == (0, 8)
        assert torch.ones(2, 3, device="meta").cumsum(0).shape == (2, 3)
        with pytest.raises(RuntimeError, match=r"reduction dim|shapes cannot be multiplied"):
            torch.mm(X, X)
        with pytest.raises(IndexError, match="Dimension out of range"):
            X.cumsum(5)


def test_the_page_names_every_function_that_is_served():
    page = (Path(__file__).parents[2] / "docs" / "pytorch.md").read_text()
    names = {function.__name__.strip("_") for function in OVERRIDDEN if function not in elementwise.OVERRIDDEN}
    names = {name.removeprefix("linalg_").removeprefix("special_") for name in names} - {"rmatmul"}
    assert len(names) > 40
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_another_word_for_uncovered_is_a_usage_error(plan):
    with pytest.raises(UsageError, match=r"'refuse' or 'torch', not 'refuses' .did you mean 'refuse'"):
        bid.aten_overrides(plan, uncovered="refuses")


def test_a_sum_below_torchs_functions_is_seen_by_the_guard_and_by_an_audit(plan):
    """cosine_similarity is one function in C; its norms and its sum are the plan's."""
    with torch.no_grad(), Trace() as trace, bid.aten_overrides(plan):
        torch.cosine_similarity(X, X.flip(0))
    found = {entry.op.split(".")[1] for entry in trace.entries}
    assert "aten_reduce" in found
    assert not {"sum", "linalg_vector_norm"} & found
    assert [entry.op for entry in trace.entries if entry.verdict == UNCOVERED] == []

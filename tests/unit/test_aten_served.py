"""What `aten_overrides` makes of torch's other functions and modules: torch's results, rows free of the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bidispatch as bid
from bidispatch.verify.compare import bits


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(one, other):
    return torch.equal(bits(one.detach()), bits(other.detach()))


def built(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture(scope="module")
def plan():
    return bid.plan("cpu")


W, HEADS, V, U = draw(48, 128, seed=1), draw(6, 24, 128, seed=2), draw(48, seed=3), draw(128, seed=4)
ATTENTION = built(lambda: torch.nn.MultiheadAttention(16, 4, batch_first=True))
APART = built(lambda: torch.nn.MultiheadAttention(16, 4, batch_first=True, kdim=8, vdim=8))
ENCODER = built(lambda: torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
DECODER = built(lambda: torch.nn.TransformerDecoderLayer(16, 4, 32, batch_first=True))
GRU, CELL = built(lambda: torch.nn.GRU(16, 8, batch_first=True)), built(lambda: torch.nn.GRUCell(128, 8))
BATCH_NORM = built(lambda: torch.nn.BatchNorm1d(128))
PADDING = torch.tensor([False] * 6 + [True] * 2)

CALLS = {
    "einsum": lambda x: torch.einsum("bi,oi->bo", x, W),
    "einsum, batch on the right": lambda x: torch.einsum("oi,bi->bo", W, x),
    "einsum, heads": lambda x: torch.einsum("bi,hoi->bho", x, HEADS),
    "einsum, three": lambda x: torch.einsum("bi,oi,zo->bz", x, W, W[:5, :48]),
    "einsum, dots": lambda x: torch.einsum("...i,oi->...o", x, W),
    "einsum, batched": lambda x: torch.einsum("bhd,bkd->bhk", x.view(-1, 8, 16), x.view(-1, 8, 16)),
    "einsum, no sum": lambda x: torch.einsum("bi,bj->bij", x, x[:, :3]),
    "einsum, implicit": lambda x: torch.einsum("bi,ij", x, W.T),
    "einsum, diagonal": lambda x: torch.einsum("bii->bi", x[:, :64].view(-1, 8, 8)),
    "tensordot": lambda x: torch.tensordot(x, W, ([1], [1])),
    "inner": lambda x: torch.inner(x, W),
    "addmv": lambda x: torch.addmv(V[0], x, U, beta=0.5),
    "addbmm": lambda x: torch.addbmm(V, x[None].expand(2, -1, -1), W.T.expand(2, -1, -1)),
    "multi_dot": lambda x: torch.linalg.multi_dot([x, W.T, W]),
    "vecdot": lambda x: torch.linalg.vecdot(x, U.expand_as(x)),
    "bilinear": lambda x: F.bilinear(x, x[:, :4], HEADS[:, :4].mT, None),
    "linear, 1-d weight": lambda x: F.linear(x, U),
    "linear, bias of one": lambda x: F.linear(x, W, V[:1]),
    "linear, bias without axes": lambda x: F.linear(x, W, V[0]),
    "rms_norm": lambda x: F.rms_norm(x, (128,), U),
    "rms_norm, no weight": lambda x: F.rms_norm(x, (128,)),
    "layer_norm": lambda x: F.layer_norm(x, (128,), U, U),
    "layer_norm of two axes": lambda x: F.layer_norm(x.view(-1, 8, 16), (8, 16)),
    "group_norm": lambda x: F.group_norm(x.view(-1, 8, 16), 4),
    "batch_norm": lambda x: BATCH_NORM(x),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "norm": lambda x: x.norm(dim=-1),
    "linalg.norm": lambda x: torch.linalg.norm(x, ord=1, dim=-1),
    "var": lambda x: x.var(-1),
    "std": lambda x: torch.std(x, 1, correction=0, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(-1),
    "cross_entropy": lambda x: F.cross_entropy(x, x.argmin(-1), reduction="none"),
    "nll_loss": lambda x: F.nll_loss(x, x.argmin(-1), reduction="none"),
    "cosine_similarity": lambda x: torch.cosine_similarity(x, U.expand_as(x)),
    "softmax, axis": lambda x: torch.softmax(x, axis=-1),
    "mean, axis": lambda x: torch.mean(x, axis=-1, keepdims=True),
    "sum, axis": lambda x: x.sum(axis=1),
    "an aten op": lambda x: torch.ops.aten.addmm(V, x, W.T),
    "an overload": lambda x: torch.ops.aten._softmax.default(x, -1, False),
    "addcmul": lambda x: torch.addcmul(x, x, U, value=0.3),
    "lerp_": lambda x: x.clone().lerp_(x * x, 0.3),
    "elu": F.elu,
    "glu": F.glu,
    "MultiheadAttention": lambda x: ATTENTION(*[x.view(-1, 8, 16)] * 3)[0],
    "its weights": lambda x: ATTENTION(*[x.view(-1, 8, 16)] * 3)[1],
    "without them": lambda x: ATTENTION(*[x.view(-1, 8, 16)] * 3, need_weights=False)[0],
    "with padding": lambda x: ATTENTION(
        *[x.view(-1, 8, 16)] * 3, key_padding_mask=PADDING.expand(len(x), 8), need_weights=False
    )[0],
    "keys of another width": lambda x: APART(x.view(-1, 8, 16), *[x.view(-1, 16, 8)] * 2)[0],
    "TransformerEncoderLayer": lambda x: ENCODER(x.view(-1, 8, 16)),
    "TransformerDecoderLayer": lambda x: DECODER(x.view(-1, 8, 16), x.view(-1, 8, 16)),
    "GRU": lambda x: GRU(x.view(-1, 8, 16))[0],
    "GRUCell": lambda x: CELL(x),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", CALLS)
def test_a_row_alone_is_the_row_of_a_batch(plan, name, grad):
    call, x = CALLS[name], draw(21, 128).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        wanted = call(x)
        with bid.aten_overrides(plan):
            whole = call(x)
            for rows in (slice(0, 1), slice(20, 21), slice(3, 6), slice(0, 16)):
                if name != "addbmm" or rows.start == 0:
                    assert same(call(x[rows].clone()), whole[rows]), rows
    assert (whole.shape, whole.dtype) == (wanted.shape, wanted.dtype)
    torch.testing.assert_close(whole, wanted, rtol=2e-4, atol=2e-4)
    if grad and wanted.requires_grad:
        ours, torchs = (torch.autograd.grad(result.square().sum(), x)[0] for result in (whole, wanted))
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-3)


def test_stock_einsum_follows_the_batch():
    """Negative control, on this processor."""
    x, w = draw(300, 256), draw(512, 256, seed=1)
    whole = torch.einsum("bi,oi->bo", x, w)
    assert any(not same(torch.einsum("bi,oi->bo", x[:m], w), whole[:m]) for m in (1, 2, 3, 5))


COMPILED = ("einsum, heads", "einsum, three", "tensordot", "multi_dot", "bilinear", "layer_norm", "group_norm", "var")


@pytest.mark.parametrize("name", [*COMPILED, "rms_norm", "cross_entropy", "normalize", "without them", "its weights"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_of_any_batch_holds_the_same(plan, name):
    call, x = CALLS[name], draw(21, 128)
    with torch.no_grad(), bid.aten_overrides(plan):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
        for m in (21, 5):
            assert same(compiled(x[:m]), call(x[:m]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["einsum", "rms_norm", "layer_norm", "linear, bias of one", "cross_entropy", "inner"])
def test_other_dtypes_round_as_torch_does(plan, name, dtype):
    x = draw(9, 128).to(dtype)
    tensors = {"W": W, "U": U, "V": V}
    try:
        globals().update({key: value.to(dtype) for key, value in tensors.items()})
        with torch.no_grad():
            wanted = CALLS[name](x)
            with bid.aten_overrides(plan):
                whole = CALLS[name](x)
                assert same(CALLS[name](x[:1]), whole[:1])
    finally:
        globals().update(tensors)
    assert whole.dtype is wanted.dtype
    torch.testing.assert_close(whole, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["mean", "sum", "softmax", "log_softmax", "layer_norm", "mv", "linear", "einsum"])
def test_autocast_gives_the_dtype_it_gives_torch(plan, name):
    calls = {
        "mean": lambda x, y: x.mean(-1),
        "sum": lambda x, y: x.sum(-1),
        "softmax": lambda x, y: x.softmax(-1),
        "log_softmax": lambda x, y: x.log_softmax(-1),
        "layer_norm": lambda x, y: F.layer_norm(x, (128,)),
        "mv": lambda x, y: torch.mv(y, y[0]),
        "linear": lambda x, y: F.linear(y, W),
        "einsum": lambda x, y: torch.einsum("bi,oi->bo", y, W),
    }
    x, y = draw(5, 128).bfloat16(), draw(5, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = calls[name](x, y).dtype
        with bid.aten_overrides(plan):
            assert calls[name](x, y).dtype is wanted


def test_a_product_does_not_follow_how_its_right_operand_lies(plan):
    a, b = draw(2, 5, 128), draw(2, 128, 96, seed=1)
    transposed = b.mT.contiguous().mT
    with torch.no_grad(), bid.aten_overrides(plan):
        assert same(a @ b, a @ transposed)
        assert same(a[0] @ b[0], a[0] @ transposed[0])
        assert same(a[:1] @ b[:1], (a @ b)[:1])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_may_see_nothing_has_the_gradient_of_torch(plan, kind):
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    if kind == "float":
        mask = torch.zeros(4, 6).masked_fill(~mask, float("-inf"))
    q, k, v = (draw(1, 2, n, 16, seed=n).requires_grad_() for n in (4, 6, 6))
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask).square().sum(), (q, k, v))
    with bid.aten_overrides(plan):
        found = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask).square().sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_refuses_what_it_cannot_serve(plan):
    x = draw(6, 16)
    with torch.no_grad(), bid.aten_overrides(plan):
        for function in (lambda x: x.cumsum(0), lambda x: torch.ops.aten.cumsum(x, 0), lambda x: F.elu(x)):
            with pytest.raises(torch._dynamo.exc.Unsupported, match="is not served in a compiled graph"):
                torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        # torch's own fused layer stands in the graph, where Dynamo asks no mode; it is seen when it runs.
        with pytest.raises(bid.SelectionError, match="set_fastpath_enabled"):
            torch.compile(ENCODER, fullgraph=True, backend="aot_eager")(x.view(2, 3, 16))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            compiled = torch.compile(ENCODER, fullgraph=True, backend="aot_eager")
            assert same(compiled(x.view(2, 3, 16)), ENCODER(x.view(2, 3, 16)))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

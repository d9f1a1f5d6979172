"""`aten_overrides`: torch's functions by the plan's kernels; torch's semantics, rows free of the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bidispatch as bid
from bidispatch.errors import ArgumentError, SelectionError
from bidispatch.verify.compare import bits


@pytest.fixture(scope="module")
def plan():
    return bid.plan("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(one, other):
    return torch.equal(bits(one), bits(other))


CALLS = {
    "linear": lambda x, w, v: F.linear(x, w, v),
    "matmul": lambda x, w, v: x @ w.T,
    "matmul, row-major": lambda x, w, v: x @ w.T.contiguous(),
    "mm": lambda x, w, v: torch.mm(x, w.T),
    "mv": lambda x, w, v: torch.mv(x, w[0]),
    "addmm": lambda x, w, v: torch.addmm(v, x, w.T),
    "addmm, scaled": lambda x, w, v: torch.addmm(v, x, w.T, beta=0.5, alpha=2.0),
    "batched": lambda x, w, v: x[:, None, :] @ w.T,
    "softmax": lambda x, w, v: F.softmax(x, -1),
    "log_softmax": lambda x, w, v: x.log_softmax(dim=1),
    "mean": lambda x, w, v: x.mean(-1, keepdim=True),
    "sum": lambda x, w, v: torch.sum(x, dim=1),
    "sum of several": lambda x, w, v: x.view(-1, 4, 32).sum((1, 2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_torchs_and_its_rows_are_free_of_the_batch(plan, name):
    call = CALLS[name]
    x, w, v = draw(33, 128), draw(48, 128, seed=1), draw(48, seed=2)
    wanted = call(x, w, v)
    with torch.no_grad(), bid.aten_overrides(plan):
        whole = call(x, w, v)
        for rows in ([0], [32], [3, 4, 5], list(range(20))):
            assert same(call(x[rows], w, v), whole[rows]), rows
    assert (whole.shape, whole.dtype) == (wanted.shape, wanted.dtype)
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-4)


def test_stock_rows_follow_the_batch():
    """Negative control: what the overrides are for, on this processor."""
    w = draw(512, 256, seed=1)
    x = draw(300, 256)
    whole = F.linear(x, w)
    assert any(not same(F.linear(x[:m], w), whole[:m]) for m in (1, 2, 3, 5))


def test_batches_of_matrices_and_attention_are_torchs(plan):
    a, b, c = draw(3, 5, 16), draw(3, 16, 7, seed=1), draw(3, 5, 7, seed=2)
    q, k, v = (draw(2, 4, 9, 16, seed=seed) for seed in range(3))
    wanted = torch.bmm(a, b), torch.baddbmm(c, a, b), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with torch.no_grad(), bid.aten_overrides(plan):
        found = torch.bmm(a, b), torch.baddbmm(c, a, b), F.scaled_dot_product_attention(q, k, v, is_causal=True)
        alone = F.scaled_dot_product_attention(q[1:], k[1:], v[1:], is_causal=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert same(alone[0], found[2][1])


def test_out_is_written(plan):
    a, b = draw(5, 16), draw(16, 7, seed=1)
    with torch.no_grad(), bid.aten_overrides(plan):
        out = torch.empty(5, 7)
        assert torch.mm(a, b, out=out) is out
        assert same(out, torch.mm(a, b))
        rows = torch.empty(5)
        torch.sum(a, 1, out=rows)
        assert same(rows, a.sum(1))


def test_gradients_flow_and_a_bound_kernel_refuses_them(plan):
    linear, x = torch.nn.Linear(32, 8), draw(5, 32)
    with bid.aten_overrides(plan):
        F.log_softmax(linear(x), -1).mean(-1).sum().backward()
    ours = linear.weight.grad.clone()
    linear.zero_grad()
    F.log_softmax(linear(x), -1).mean(-1).sum().backward()
    torch.testing.assert_close(ours, linear.weight.grad, rtol=1e-4, atol=1e-5)
    kernel = plan.select("gemm", dtype="float32", n=8, k=32).bind(max_tokens=8)
    with pytest.raises(ArgumentError, match="requires grad"):
        kernel(x, linear.weight)


def test_contexts_nest_and_an_exception_restores_what_was_there(plan):
    x, w = draw(3, 256), draw(512, 256, seed=1)
    stock = F.linear(x, w)
    with torch.no_grad(), bid.aten_overrides(plan):
        ours = F.linear(x, w)
        with pytest.raises(ZeroDivisionError), bid.aten_overrides(plan):
            raise ZeroDivisionError
        assert same(F.linear(x, w), ours)
    assert same(F.linear(x, w), stock)


def test_integers_are_torchs_and_what_nothing_serves_raises(plan):
    x = draw(3, 4)
    with torch.no_grad(), bid.aten_overrides(plan):
        with pytest.raises(SelectionError, match="cast to float32 first"):
            x.double() @ x.double().T
        assert int(torch.arange(5).sum()) == 10
        with bid.override("gemm=triton.gemm"), pytest.raises(SelectionError, match="forces"):
            F.linear(draw(3, 24), draw(9, 24))


def test_more_rows_than_it_was_bound_for_and_none_at_all(plan):
    w = draw(8, 16, seed=1)
    with torch.no_grad(), bid.aten_overrides(plan, max_tokens=4):
        whole = F.linear(draw(50, 16), w)
        assert same(F.linear(draw(50, 16)[:2], w), whole[:2])
        assert F.linear(draw(0, 16), w).shape == (0, 8)
        assert F.softmax(draw(0, 16), -1).shape == (0, 16)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 32)

    def forward(self, x):
        return F.softmax(self.inner(x), -1).mean(-1)


def test_a_compiled_graph_holds_our_ops_and_chooses_at_run_time(plan):
    net, graphs = Net().eval(), []

    def backend(module, examples):
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    x = draw(40, 64)
    with torch.no_grad(), bid.aten_overrides(plan):
        compiled = torch.compile(net, fullgraph=True, backend=backend, dynamic=True)
        eager = net(x)
        for m in (40, 7, 19):
            assert same(compiled(x[:m]), eager[:m])
    assert len(graphs) <= 2  # Dynamo may look again when M first changes; a rung for each M would be three
    ours = [target for target in graphs[-1] if target.startswith("bidispatch.")]
    assert len(ours) == 3
    assert not [
        target
        for target in graphs[0]
        if any(name in target for name in ("softmax", "mean", "linear")) and target not in ours
    ]

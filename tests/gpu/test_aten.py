"""`aten_overrides` on this GPU: eager, compiled by Inductor, captured in a CUDA graph; rows free of the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bidispatch as bid
from bidispatch.verify.compare import bits


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(512, 2048), torch.nn.Linear(2048, 512)

    def forward(self, x):
        return F.log_softmax(self.down(F.silu(self.up(x))), -1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().to("cuda", torch.bfloat16).eval()


def same(one, other):
    return torch.equal(bits(one), bits(other))


def test_rows_are_free_of_the_batch_in_eager_and_compiled(plan, net):
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), bid.aten_overrides(plan):
        whole = net(x)
        compiled = torch.compile(net, fullgraph=True, dynamic=True)
        for m in (1, 7, 64, 300):
            assert same(net(x[:m]), whole[:m])
            assert same(compiled(x[:m]), compiled(x)[:m])


def test_a_captured_module_replays_the_same_bits(plan, net):
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), bid.aten_overrides(plan):
        wanted = net(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = net(x)
    out.zero_()
    graph.replay()
    assert same(out, wanted)

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


@pytest.mark.filterwarnings("default::DeprecationWarning")  # Inductor's own
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


OTHERS = {
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "rms_norm": lambda x, w: F.rms_norm(x, (512,), w[0]),
    "layer_norm": lambda x, w: F.layer_norm(x, (512,), w[0], w[1]),
    "cross_entropy": lambda x, w: F.cross_entropy(x, x.argmin(-1), reduction="none"),
    "normalize": lambda x, w: F.normalize(x, dim=-1),
    "var": lambda x, w: x.var(-1),
    "row-major": lambda x, w: x @ w.T.contiguous(),
    "elementwise": lambda x, w: F.elu(torch.addcmul(x, x, w[0], value=0.3)),
    "an aten op": lambda x, w: torch.ops.aten.addmm(w[:, 0], x, w.T),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_torchs_and_free_of_the_batch(plan, name):
    call = OTHERS[name]
    x, w = (torch.randn(n, 512, device="cuda", dtype=torch.bfloat16) for n in (300, 256))
    with torch.no_grad():
        wanted = call(x, w)
        with bid.aten_overrides(plan):
            whole = call(x, w)
            for m in (1, 7, 64):
                assert same(call(x[:m], w), whole[:m])
    torch.testing.assert_close(whole, wanted, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_of_torch_is_free_of_the_batch(plan, batch_first):
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=batch_first, device="cuda").eval()
    x = torch.randn(6, 9, 64, device="cuda")
    batch = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    with torch.no_grad(), bid.aten_overrides(plan):
        whole = batch(layer(batch(x)))
        assert same(batch(layer(batch(x[:1]))), whole[:1])


def test_what_nothing_serves_raises_on_this_gpu(plan):
    x = torch.randn(4, 3, 16, device="cuda")
    lstm, convolution = torch.nn.LSTM(16, 8, batch_first=True).cuda(), torch.nn.Conv1d(3, 2, 1).cuda()
    with torch.no_grad(), bid.aten_overrides(plan):
        for call in (lambda: x.cumsum(0), lambda: convolution(x), lambda: lstm(x), lambda: x.double().sum()):
            with pytest.raises(bid.SelectionError, match="may make a row follow the batch"):
                call()


@pytest.mark.parametrize("name", ["sum", "mean", "softmax", "layer_norm", "rms_norm", "mv", "linear"])
def test_autocast_gives_the_dtype_it_gives_torch(plan, name):
    calls = {
        "sum": lambda x: x.sum(-1),
        "mean": lambda x: x.mean(-1),
        "softmax": lambda x: x.softmax(-1),
        "layer_norm": lambda x: F.layer_norm(x, (512,)),
        "rms_norm": lambda x: F.rms_norm(x, (512,), x[0]),
        "mv": lambda x: torch.mv(x.float(), x[0].float()),
        "linear": lambda x: F.linear(x.float(), x.float()),
    }
    x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        wanted = calls[name](x).dtype
        with bid.aten_overrides(plan):
            assert calls[name](x).dtype is wanted

"""`aten_overrides` under Inductor, elementwise functions on a processor, and attention's masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

import bidispatch as bid
from bidispatch.verify.compare import bits


@pytest.fixture(scope="module")
def plan():
    return bid.plan("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(one, other):
    return torch.equal(bits(one), bits(other))


# Inductor imports torch.jit, which torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_runs_our_ops_and_no_reduction_of_its_own(plan):
    linear = torch.nn.Linear(64, 32)
    x = draw(40, 64)

    def net(x):
        return F.softmax(linear(x), -1).mean(-1)

    with torch.no_grad(), bid.aten_overrides(plan):
        compiled = torch.compile(net, fullgraph=True, dynamic=True)
        result, (code,) = run_and_get_code(compiled, x)
        assert same(result, net(x))
        assert same(compiled(x[:7]), net(x)[:7])
    for op in ("aten_linear", "aten_softmax", "aten_reduce"):
        assert f"torch.ops.bidispatch.{op}.default(" in code
    assert "extern_kernels." not in code
    assert "cpp_fused" not in code


ELEMENTWISE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "exp_": lambda x: x.clone().exp_(),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "cos": lambda x: x.cos(),
    "pow": lambda x: x.abs().pow(1.7),
    "**": lambda x: x**2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_element_has_its_bits_wherever_it_lies(plan, name, dtype):
    function, x = ELEMENTWISE[name], draw(5003).to(dtype)
    with torch.no_grad():
        wanted = function(x)
        with bid.aten_overrides(plan):
            whole = function(x)
            for part in (slice(0, 1), slice(4999, 5003), slice(17, 50), slice(5002, 5003)):
                assert same(function(x[part]), whole[part])
    assert (whole.dtype, whole.shape) == (wanted.dtype, wanted.shape)
    torch.testing.assert_close(whole, wanted)


def test_elementwise_gradients_are_torchs_in_eager_and_compiled(plan):
    def loss(x):
        return (F.silu(x) * torch.rsqrt(x.square() + 1)).sum()

    x = draw(7, 33).requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x), x)
    with bid.aten_overrides(plan):
        (eager,) = torch.autograd.grad(loss(x), x)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        (traced,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(eager, wanted)
    torch.testing.assert_close(traced, wanted)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(6, 9), (6, 1), (1, 9), (2, 1, 6, 9), (2, 1, 1, 9)])
def test_masks_of_attention_broadcast(plan, shape, kind):
    q, k, v = draw(2, 4, 6, 16), draw(2, 4, 9, 16, seed=1), draw(2, 4, 9, 16, seed=2)
    mask = draw(*shape, seed=3)
    mask = mask > -0.5 if kind == "bool" else mask
    wanted = F.scaled_dot_product_attention(q, k, v, mask)
    with torch.no_grad(), bid.aten_overrides(plan):
        result = F.scaled_dot_product_attention(q, k, v, mask)
        one = F.scaled_dot_product_attention(q[1:], k[1:], v[1:], mask[1:] if mask.dim() == 4 else mask)
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
    assert same(one, result[1:])


def test_the_scores_of_a_growing_context_share_kernels(plan):
    """Also right where both sizes are padded."""
    with torch.no_grad(), bid.aten_overrides(plan):
        for n in (3, 130, 131, 200):
            a, b = draw(2, 5, n), draw(2, n, n, seed=1)
            torch.testing.assert_close(torch.bmm(a, b), torch.einsum("zmk,zkn->zmn", a, b), rtol=1e-4, atol=1e-4)

"""attention against the formula in float64."""
import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.ops import AttentionSpec, attention

SPEC = AttentionSpec()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens, keys", [(5, 5), (1, 9), (7, 3)])
@pytest.mark.parametrize("scale", [None, 0.2, -0.2, 0.0])
def test_softmax_of_q_k_times_v(tokens, keys, dtype, scale):
    q, k, v = (torch.randn(2, 3, t, 8).to(dtype) for t in (tokens, keys, keys))
    exact = (q.double() @ k.double().mT * (8**-0.5 if scale is None else scale)).softmax(-1) @ v.double()
    out = attention(q, k, v, AttentionSpec(scale=scale))
    assert out.dtype == dtype and out.is_contiguous()
    off = (2**-7 if dtype == torch.bfloat16 else 1e-5) * v.abs().max()
    assert ((out.double() - exact).abs() <= off).all()


@pytest.mark.parametrize("products", ["auto", "fp8", "16bit"])
def test_the_formula_knows_no_products(products):
    q, k, v = (torch.randn(1, 2, t, 8) for t in (5, 7, 7))
    assert torch.equal(attention(q, k, v, AttentionSpec(products)), attention(q, k, v, SPEC))


def test_o_lies_as_q_does():
    """Also where no token or only one makes strides ambiguous."""
    for batch, tokens, heads in ((2, 5, 3), (1, 1, 3), (2, 1, 1), (0, 5, 3), (2, 0, 3)):
        kept = torch.randn(batch, tokens, heads, 8).transpose(1, 2)
        keys = torch.randn(batch, 4, heads, 8).transpose(1, 2)
        for q in (kept, kept.contiguous()):
            o = attention(q, keys, keys, SPEC)
            assert o.shape == q.shape and (o if q is not kept else o.transpose(1, 2)).is_contiguous()
            with torch._subclasses.FakeTensorMode() as mode:
                fake = attention.torch_op(*map(mode.from_tensor, (q, keys, keys)), SPEC.token)
            assert fake.stride() == o.stride()


@pytest.mark.parametrize("shapes, sentence", [
    ([(3, 5, 8)] * 3, "q: expected .batch, heads, tokens, head dim., got .3, 5, 8."),
    ([(1, 3, 5, 8), (1, 2, 5, 8), (1, 3, 5, 8)], r"k: expected .* = \(1, 3, 5, 8\)"),
    ([(1, 3, 5, 8), (1, 3, 6, 8), (1, 3, 5, 8)], r"v: expected .* = \(1, 3, 6, 8\)"),
])
def test_errors(shapes, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        attention(*(torch.zeros(shape) for shape in shapes), SPEC)


def test_dtypes_must_agree():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(NunchakuError, match="k: expected .* float32, got .* float16"):
        attention(q, q.half(), q, SPEC)

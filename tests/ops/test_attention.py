"""attention against the formula in float64."""
import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.ops import attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens, keys", [(5, 5), (1, 9), (7, 3)])
def test_softmax_of_q_k_times_v(tokens, keys, dtype):
    q, k, v = (torch.randn(2, 3, t, 8).to(dtype) for t in (tokens, keys, keys))
    exact = (q.double() @ k.double().mT / 8**0.5).softmax(-1) @ v.double()
    out = attention(q, k, v)
    assert out.dtype == dtype and out.is_contiguous()
    assert ((out.double() - exact).abs() <= (2**-7 if dtype == torch.bfloat16 else 1e-5)).all()


@pytest.mark.parametrize("shapes, sentence", [
    ([(3, 5, 8)] * 3, "q: expected .batch, heads, tokens, head dim., got .3, 5, 8."),
    ([(1, 3, 5, 8), (1, 2, 5, 8), (1, 3, 5, 8)], r"k: expected .* = \(1, 3, 5, 8\)"),
    ([(1, 3, 5, 8), (1, 3, 6, 8), (1, 3, 5, 8)], r"v: expected .* = \(1, 3, 6, 8\)"),
])
def test_errors(shapes, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        attention(*(torch.zeros(shape) for shape in shapes))


def test_dtypes_must_agree():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(NunchakuError, match="k: expected .* float32, got .* float16"):
        attention(q, q.half(), q)

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.linear import QuantLinear
from nunchaku_py.methods.error import output_error, run
from nunchaku_py.methods.export import export
from nunchaku_py.recipes import RECIPES
from tests.methods.layers import CTX, small


def modules(work, biases):
    for tensors, bias, rows in zip(export(work, CTX), biases, work.rows, strict=True):
        if bias is not None:
            tensors.bias = bias if tensors.bias is None else bias + tensors.bias
        has_bias = bias is not None or bool(work.site.shift)
        module = QuantLinear(work.site, work.weight.shape[1], rows, has_bias, torch.bfloat16)
        module.set_tensors(tensors, "site")
        yield module.float()


@pytest.mark.parametrize("mode", ["a4", "a8", "a16"])
@pytest.mark.parametrize("fmt, gelu", [("int4", False), ("int4", True), ("nvfp4", False), ("nvfp4", True)])
def test_the_module_computes_what_the_error_was_measured_on(fmt, gelu, mode):
    """Linear and module agree on the shift, the branch, the split into members and every rounding."""
    work, x = small(fmt, gelu)
    run(RECIPES[f"svdquant-{fmt}"].steps, work, CTX)
    y = x @ work.weight.T
    bias = torch.randn(work.rows[1], generator=torch.Generator().manual_seed(5))
    first, second = modules(work, [None, bias])
    for module in (first, second):
        module.set_mode(mode)
    found = torch.cat([first(x), second(x) - bias], 1)
    assert ((found - y).norm() / y.norm()).item() == pytest.approx(output_error(work, CTX, mode, x), rel=0.01)


def test_members_share_smooth_and_down_and_own_their_memory():
    work, _ = small()
    run(RECIPES["svdquant-int4"].steps, work, CTX)
    a, b = export(work, CTX)
    assert torch.equal(a.down, b.down) and torch.equal(a.smooth, b.smooth) and a.bias is None
    assert a.weight.shape == (32, 160) and b.weight.shape == (64, 160)
    assert a.weight.codes.untyped_storage().nbytes() == a.weight.codes.nbytes
    assert torch.equal(torch.cat([a.up, b.up]).float(), work.up)


def test_without_codes_there_is_nothing_to_export():
    with pytest.raises(NunchakuError, match="no step of the recipe has made codes"):
        export(small()[0], CTX)

"""QuantLinear, its convolution twin and the K-split linear, against the dense weights they stand for."""

import copy
import io

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from nunchaku_py.conv import QuantConv1x1
from nunchaku_py.errors import NunchakuError
from nunchaku_py.formats import format_of
from nunchaku_py.linear import QuantLinear
from nunchaku_py.site import MODES, Site, SiteTensors, auto_mode, shift_correction
from nunchaku_py.split_linear import SplitLinear
from nunchaku_py.tensor import QTensor

N, K, R = 48, 80, 4  # K is no multiple of the INT4 group
GELU_SHIFT = 0.171875


def site(format: str = "int4", kind: str = "w4a4", rank: int = R, shifted: bool = False) -> Site:
    return Site(kind, format, format_of(format).group, rank, GELU_SHIFT if shifted else 0.0, shifted)


def tensors(the: Site, n: int = N, k: int = K, bias: bool = True, seed: int = 0) -> SiteTensors:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    weight = QTensor.quantize(randn(n, k), the.weight_format)
    smooth = (randn(k).abs() + 0.5).bfloat16() if the.has_smooth else None
    down, up = (randn(the.rank, k).bfloat16(), randn(n, the.rank).bfloat16()) if the.rank else (None, None)
    return SiteTensors(weight, smooth, down, up, randn(n).bfloat16() if bias else None)


def linear(the: Site, mode: str = "auto", dtype: torch.dtype = torch.float32, **kwargs: object) -> QuantLinear:
    made = tensors(the, **kwargs)
    module = QuantLinear(the, made.weight.k, made.weight.codes.shape[0], made.bias is not None, torch.bfloat16)
    module.set_tensors(made)
    module.compute_dtype = dtype
    module.set_mode(mode)
    return module


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("mode", MODES)
def test_forward_is_the_effective_weight_up_to_activation_rounding(format: str, mode: str) -> None:
    module = linear(site(format), mode)
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
    expected = x @ module.effective_weight().T + module.bias.float()
    # one rounding of a gaussian: 4 bit by group about 10 %, 8 bit per token and the folded weight 1 %, 16 bit none
    assert rel(module(x), expected) < {"a4": 0.15, "a8": 0.03, "a16": 1e-5}[mode]
    if mode != "a16":
        assert rel(module(x), expected) > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_shifted_site_gives_the_same_function_in_every_mode(mode: str) -> None:
    the = site(shifted=True)
    made = tensors(the)
    plain = made.bias.float()
    made.bias = (plain - shift_correction(made.weight, made.smooth, GELU_SHIFT)).to(torch.float32)
    module = QuantLinear(the, K, N, True, torch.bfloat16)
    module.set_tensors(made)
    module.set_mode(mode)
    x = torch.nn.functional.gelu(torch.randn(64, K, generator=torch.Generator().manual_seed(1)))
    expected = x @ module.effective_weight().T + plain
    assert rel(module(x), expected) < {"a4": 0.15, "a8": 0.03, "a16": 1e-5}[mode]
    assert torch.allclose(module.effective_bias(), plain, atol=1e-5)


def test_modulation_site_is_decoded_weights_times_sixteen_bit_input() -> None:
    module = linear(site(kind="w4a16", rank=0))
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(1))
    assert module.mode == "a16"
    assert rel(module(x), x @ module.effective_weight().T + module.bias.float()) < 1e-5


def test_split_linear_is_the_sum_of_its_parts() -> None:
    sites = (site(), site(shifted=True))
    module = SplitLinear(sites, ((0, 16), (16, K)), N, True, torch.bfloat16)
    for part, the, k in zip(module.parts, sites, (16, K - 16), strict=True):
        part.set_tensors(tensors(the, k=k, bias=False))
        part.compute_dtype = torch.float32
        part.set_mode("a16")
    module.set_tensor("bias", torch.randn(N, generator=torch.Generator().manual_seed(3)).bfloat16())
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(1))
    dense = module.dense()
    assert rel(module(x), dense(x)) < 1e-5
    assert (module.in_features, module.out_features, tuple(module.weight.shape)) == (K, N, (N, K))


def test_split_linear_refuses_ranges_with_gaps() -> None:
    with pytest.raises(NunchakuError, match="k_range must tile the input from 0 without gaps"):
        SplitLinear((site(), site()), ((0, 16), (17, K)), N, True, torch.bfloat16)


def test_convolution_is_a_linear_over_channels() -> None:
    the = site()
    made = tensors(the)
    conv = QuantConv1x1(the, K, N, True, torch.bfloat16)
    conv.set_tensors(made)
    x = torch.randn(2, K, 3, 5, generator=torch.Generator().manual_seed(1))
    same = linear(the)
    assert torch.equal(conv(x), same(x.movedim(1, -1)).movedim(-1, 1))
    assert isinstance(conv, nn.Conv2d) and tuple(conv.weight.shape) == (N, K, 1, 1)
    conv.set_mode("a16")
    assert rel(conv.dense().float()(x), conv(x)) < 0.01  # the dense twin holds 16-bit weights


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_any_number_of_rows(rows: int) -> None:
    module = linear(site())
    assert module(torch.randn(2, rows, K)).shape == (2, rows, N)


def test_non_contiguous_input_gives_the_same_bits() -> None:
    module = linear(site())
    x = torch.randn(K, 9, generator=torch.Generator().manual_seed(1)).T
    assert torch.equal(module(x), module(x.contiguous()))


def test_looks_like_a_linear() -> None:
    module = linear(site(), dtype=torch.bfloat16)
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (K, N)
    assert module.weight.shape == (N, K) and module.weight.dtype == torch.bfloat16
    assert module.weight.isnan().all(), "whoever multiplies by the shim must notice"
    assert "w4a4 int4 g64, rank=4, mode=a8" in repr(module)


def test_casting_keeps_the_stored_bits() -> None:
    module = linear(site("nvfp4"))
    before = copy.deepcopy(module.state_dict())
    module.half().float().to(torch.float8_e4m3fn)
    after = module.state_dict()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    assert module.compute_dtype == torch.float32, "a dtype nobody computes in does not become the compute dtype"
    assert module.half().weight.dtype == torch.float16


def test_state_dict_is_canonical_and_round_trips() -> None:
    module = linear(site("nvfp4"), "a8")
    assert set(module.state_dict()) == {"codes", "scales", "channel_scale", "smooth", "down", "up", "bias"}
    other = linear(site("nvfp4"), "a8", seed=5)
    x = torch.randn(4, K)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x)), "packed tensors follow a load"


def test_load_state_dict_refuses_another_dtype() -> None:
    module = linear(site())
    state = module.state_dict()
    state["scales"] = state["scales"].half()
    with pytest.raises(RuntimeError, match="scales: expected bfloat16, got float16"):
        module.load_state_dict(state)


def test_copies_and_pickles() -> None:
    module = linear(site())
    x = torch.randn(4, K)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), module(x))


def test_meta_module_says_that_it_has_no_weights() -> None:
    module = QuantLinear(site(), K, N, True, torch.bfloat16)
    assert module.weight.is_meta
    with pytest.raises(NunchakuError, match="has no weights yet"):
        module(torch.randn(1, K))


def test_wrong_input_and_wrong_tensors_are_named() -> None:
    module = linear(site())
    with pytest.raises(NunchakuError, match=r"input: expected \(…, 80\), got \(2, 79\)"):
        module(torch.randn(2, 79))
    with pytest.raises(NunchakuError, match=r"x.codes: expected \(48, 40\) uint8, got \(48, 80\) int8"):
        module.set_tensor("codes", torch.zeros(N, K, dtype=torch.int8), "x.codes")
    with pytest.raises(NunchakuError, match="mode: expected 'auto', 'a4', 'a8' or 'a16', got 'a3'"):
        module.set_mode("a3")


def test_fullgraph_compile_gives_the_eager_bits() -> None:
    module = linear(site())
    x = torch.randn(4, K)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


def test_auto_mode_on_the_cpu() -> None:
    assert auto_mode(site(), torch.device("cpu")) == "a8"
    assert auto_mode(site(kind="w4a16", rank=0), torch.device("cpu")) == "a16"


def test_site_json_round_trip_and_refusals() -> None:
    the = site(shifted=True)
    assert Site.from_json(the.to_json()) == the
    assert "shift" not in site().to_json()
    with pytest.raises(NunchakuError, match=r"unknown fields \['colour'\]"):
        Site.from_json({**the.to_json(), "colour": 1})
    with pytest.raises(NunchakuError, match=r"missing fields \['group'\]"):
        Site.from_json({"kind": "w4a4", "format": "int4"})
    with pytest.raises(NunchakuError, match="format is 'int4', 'uint4' or 'nvfp4', not 'int8'"):
        Site("w4a4", "int8", 64)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_computes_in_its_dtype_and_not_inside_our_arithmetic(mode: str) -> None:
    module = linear(site(), mode)
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, module(x.bfloat16()))


def test_packing_follows_moves_and_is_kept_where_nothing_changes() -> None:
    module = linear(site(), "a8")
    folded = module.folded_scales
    module.set_mode("a8")
    assert module.folded_scales is folded is not None, "nothing to do"
    module.to("meta")
    assert module.packed is None and module.folded_scales is None
    with pytest.raises(NunchakuError, match="has no weights yet"):
        module(torch.randn(1, K))


def test_a_mode_set_while_the_tensors_are_away_counts_when_they_are_back() -> None:
    module = linear(site(), "a8")
    cpu_offload(module, execution_device=torch.device("cpu"), offload_buffers=True)
    x = torch.randn(4, K)
    module(x)
    assert module.folded_codes is None, "INT8 weights would stay on the device that offloading is to free"
    module.set_mode("a16")
    assert torch.equal(module(x), linear(site(), "a16")(x))

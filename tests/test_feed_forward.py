"""Feed-forwards as two calls: right for every activation and mode, in place of what they replace, and not elsewhere."""
from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
from torch import Tensor, nn

import nunchaku_py as nq
from nunchaku_py import feed_forward, ops
from nunchaku_py.linear import LINEAR_OPS, QuantLinear
from nunchaku_py.ops.linear import multiply_decoded
from tests.checks import relative, run, same_bits
from tests.fused import MODES, RECIPES, SIXTEEN_BIT, counted, endings, unfused, wide
from tests.tiny import MODELS
from tests.tiny_models import randomise

DIM = 64
KINDS = {
    "gelu-approximate": lambda: FeedForward(DIM, activation_fn="gelu-approximate"),
    "gelu": lambda: FeedForward(DIM, activation_fn="gelu", bias=False),
    "geglu": lambda: FeedForward(DIM, activation_fn="geglu", final_dropout=True),
    "swiglu": lambda: FeedForward(DIM, activation_fn="swiglu", inner_dim=96, dropout=0.1),
    "linear-silu": lambda: FeedForward(DIM, dim_out=96, activation_fn="linear-silu"),
    "flux2": lambda: Flux2FeedForward(DIM),
}
# In fp32, written out once more: what stands between the two linears.
FORMULAS = {
    "gelu-approximate": lambda y: nn.functional.gelu(y, approximate="tanh"),
    "gelu": nn.functional.gelu,
    "geglu": lambda y: y.chunk(2, -1)[0] * nn.functional.gelu(y.chunk(2, -1)[1]),
    "swiglu": lambda y: y.chunk(2, -1)[0] * nn.functional.silu(y.chunk(2, -1)[1]),
    "linear-silu": nn.functional.silu,
    "flux2": lambda y: nn.functional.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
}


class Blocks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([KINDS[kind]()])


def made(kind: str, recipe: str = "rtn-int4", mode: str = "auto") -> nn.Module:
    model = randomise(Blocks(kind))
    nq.quantize(model, recipe, mode=mode)
    return model.blocks[0]


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, DIM).to(dtype)


def unrounded(linear: QuantLinear, x: Tensor) -> Tensor:
    """y (M,N) in fp32, from the input quantized as it is."""
    qx, sx, h = linear.quantize_input(x)
    qw, sw, aux, up, bias = linear.operands(x.dtype)
    spec = linear.linear_spec
    if spec.act.format == "none":
        return multiply_decoded(qx.float(), qw, sw, aux, spec, x.dtype) + h @ up.float().T + bias.float()
    return LINEAR_OPS[spec.act.format](qx, sx, qw, sw, aux, h, up.float(), bias, spec)


@torch.no_grad()
@pytest.mark.parametrize("dtype", (*SIXTEEN_BIT, torch.float32), ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_value_between_is_rounded_once(kind: str, recipe: str, mode: str, dtype: torch.dtype) -> None:
    """On the reference bit for bit: second(round(act(first x))), first x not rounded."""
    module, x = made(kind, recipe, mode), rows(2, 7, dtype=dtype)
    (_, first), _, (_, second), *_ = feed_forward.members(module)
    with ops.backend("torch"), counted() as calls:
        y = module(x)
        assert sum(endings(calls).values()) == 1 and sum(calls.values()) == 3
        expected = second(FORMULAS[kind](unrounded(first, x.flatten(0, 1))).to(dtype))
    assert same_bits(y, expected.unflatten(0, (2, 7)))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_closer_to_fp32_than_the_modules_one_by_one(recipe: str, mode: str) -> None:
    """They round first x, and a GLU its gate, before what both round. The sum over all kinds, 16-bit dtypes and 257
    rows evens out which codes happen to flip."""
    fused = apart = 0.0
    for kind in KINDS:
        module = made(kind, recipe, mode)
        for dtype in SIXTEEN_BIT:
            x = rows(257, dtype=dtype)
            exact = wide(module)(x.float())
            fused += relative(module(x), exact)
            apart += relative(unfused(module)(x), exact)
    assert fused < apart


@torch.no_grad()
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_apart_by_what_rounding_explains(kind: str, dtype: torch.dtype) -> None:
    """In a16, elementwise. With u the relative error of a rounding and c ≥ |act'|, |act(g)| ≤ |g|: one by one, the
    value between is off by at most u·(c·|y| + 2|z|) for an activation and u·((1+c)·|v||g| + 3|z|) for a gated one,
    fused by u·|z|; both then go through the second linear, which rounds x̂ and its result."""
    module, x = made(kind, "svdquant-int4", "a16"), rows(33, dtype=dtype)
    (_, first), _, (_, second), *_ = feed_forward.members(module)
    u, c = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype], 1.13
    y = unrounded(first, x).double()
    z, steep = FORMULAS[kind](y).abs(), c * y.abs()
    if z.shape != y.shape:
        steep = (1 + c) * y.chunk(2, -1)[0].abs() * y.chunk(2, -1)[1].abs()
    off = u * (steep + 4 * z) * 1.01 + 1e-7  # …, and fp32 sums; fp16 has steps of 6e-8 near zero
    residual = (second.qtensor().dequantize().double() / second.smooth.double()).abs()
    branch = second.down.double().abs().T @ second.up.double().abs().T
    got, expected = module(x), unfused(module)(x)
    bound = off @ residual.T + 2 * u * z @ residual.T * 1.01 + off @ branch + 2 * u * got.double().abs() * 1.01 + 1e-5
    assert ((got.double() - expected.double()).abs() <= bound).all()
    assert not torch.equal(got, expected), "nothing was fused"


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 1)])
@torch.no_grad()
def test_shapes(shape: tuple[int, ...]) -> None:
    module, x = made("geglu"), rows(*shape)
    assert module(x).shape == (*shape, DIM)
    assert torch.equal(module(x.transpose(0, -2).contiguous().transpose(0, -2)), module(x)), "not contiguous"
    with pytest.raises(nq.NunchakuError, match=r"input: expected \(…, 64\)"):
        module(torch.cat([x, x], -1))


@torch.no_grad()
def test_modes_of_both_linears_are_free() -> None:
    module, x = made("gelu"), rows(5)
    (_, first), _, (_, second), *_ = feed_forward.members(module)
    for one in MODES:
        for other in MODES:
            first.set_mode(one), second.set_mode(other)
            with ops.backend("torch"), counted() as calls:
                y = module(x)
                expected = second(FORMULAS["gelu"](unrounded(first, x)).to(x.dtype))
            assert endings(calls) == {"gelu_quantize": 1} and same_bits(y, expected), (one, other)


@torch.no_grad()
def test_weight_only_linears() -> None:
    """The first may be weight-only; the second must quantize an input."""
    model = randomise(Blocks("gelu"))
    nq.quantize(model, "rtn-int4", rules={"*net.0*": "w4a16"})
    with counted() as calls:
        model.blocks[0](rows(4))
    assert calls == {"linear_w4a16_gelu_quantize": 1, "linear_w4a8": 1}
    model = randomise(Blocks("gelu"))
    nq.quantize(model, "rtn-int4", rules={"*net.2": "w4a16"})
    assert feed_forward.refuses(model.blocks[0]) == "net.2 does not quantize its input"


def kept_in_16_bit() -> nn.Module:
    model = randomise(Blocks("gelu"))
    nq.quantize(model, "rtn-int4", rules={"*net.0*": "keep"})
    return model.blocks[0]


def changed(kind: str, change: Callable[[nn.Module], object]) -> nn.Module:
    module = made(kind)
    change(module)
    return module


def unknown_activation(module: nn.Module) -> None:
    other = FeedForward(DIM, activation_fn="geglu-approximate").net[0]
    other.proj = module.net[0].proj
    module.net[0] = other


def forward_of_the_user(module: nn.Module) -> None:
    module.net[0].forward = lambda x: 2 * module.net[0].proj(x)


def subclass(module: nn.Module) -> None:
    module.net[2].__class__ = type("Mine", (QuantLinear,), {})


def without_dropout(module: nn.Module) -> None:
    del module.net[1]


def without_projection(module: nn.Module) -> None:
    module.net[0] = nn.Sequential(module.net[0].proj, nn.GELU())


def observed(path: str) -> Callable[[nn.Module], object]:
    return lambda module: module.get_submodule(path).register_forward_hook(lambda *_: None)


def replaced(path: str, other: nn.Module) -> Callable[[nn.Module], object]:
    return lambda module: module.set_submodule(path, other)


REFUSED = {
    "net.0.proj is not a quantized linear, but torch.nn": kept_in_16_bit,
    "no op computes what net.0 does .*ApproximateGELU": lambda: changed("gelu", unknown_activation),
    "net.1 is not idle: Dropout": lambda: changed("swiglu", nn.Module.train),
    "net.2 has a hook": lambda: changed("gelu", observed("net.2")),
    "net.0.proj has a hook": lambda: changed("gelu", observed("net.0.proj")),
    "net.1 has a hook": lambda: changed("gelu", observed("net.1")),
    "net.0 has a hook": lambda: changed("gelu", forward_of_the_user),
    "net.2 is not a quantized linear, but .*Mine": lambda: changed("gelu", subclass),
    "net holds 2 modules": lambda: changed("gelu", without_dropout),
    "net.0.proj is not .*NoneType": lambda: changed("gelu", without_projection),
    "net.0.activation is not a SiLU.*Tanh": lambda: changed("swiglu", replaced("net.0.activation", nn.Tanh())),
    "net.0.activation is not a SiLU.*ReLU": lambda: changed("linear-silu", replaced("net.0.activation", nn.ReLU())),
    "act_fn.gate_fn is not a SiLU.*GELU": lambda: changed("flux2", replaced("act_fn.gate_fn", nn.GELU())),
    "net.0.activation has a hook": lambda: changed("swiglu", observed("net.0.activation")),
    "act_fn.gate_fn has a hook": lambda: changed("flux2", observed("act_fn.gate_fn")),
    "switched off": lambda: changed("gelu", lambda module: nq.set_fusion(module, False)),
}


@torch.no_grad()
@pytest.mark.parametrize("why", REFUSED)
def test_it_steps_aside_and_says_why(why: str) -> None:
    module, x = REFUSED[why](), rows(6)
    assert re.match(why, feed_forward.refuses(module))
    torch.manual_seed(1)
    with counted() as calls:
        y = module(x)
    torch.manual_seed(1)
    assert endings(calls) == {} and torch.equal(y, unfused(module)(x))


@torch.no_grad()
def test_dropout_does_not_matter_in_evaluation() -> None:
    module = made("swiglu")
    assert module.net[1].p > 0 and feed_forward.refuses(module) is None
    assert feed_forward.refuses(changed("gelu", nn.Module.train)) is None, "a dropout of 0 is idle in training too"


def test_an_argument_that_diffusers_warns_of_still_gets_its_warning() -> None:
    with torch.no_grad(), counted() as calls, pytest.warns(FutureWarning, match="`scale` argument is deprecated"):
        made("gelu")(rows(2), scale=1.0)
    assert endings(calls) == {}


@torch.no_grad()
@pytest.mark.parametrize(("kind", "name"), [("gelu", "hidden_states"), ("flux2", "x")])
def test_keywords_are_those_of_the_own_forward(kind: str, name: str) -> None:
    module, x = made(kind), rows(2)
    with counted() as calls:
        assert same_bits(module(**{name: x}), module(x))
    assert sum(endings(calls).values()) == 2
    for wrong in ({"nonsense": x}, {}):
        with pytest.raises(TypeError, match=r"forward\(\)"):
            module(**wrong)


def test_gradients_pass_through_the_modules() -> None:
    module, x = made("geglu"), rows(6)
    wanted = x.clone().requires_grad_()
    with counted() as calls:
        module(wanted).float().square().sum().backward()
    assert endings(calls) == {} and wanted.grad.isfinite().all() and wanted.grad.any()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@torch.no_grad()
def test_autocast(dtype: torch.dtype) -> None:
    module, x = made("geglu"), rows(6, dtype=torch.float32)
    with torch.autocast("cpu", dtype), counted() as calls:
        y = module(x)
        assert endings(calls) == {"glu_quantize": 1}
        assert y.dtype == unfused(module)(x).dtype == dtype
    assert torch.equal(y, module(x.to(dtype)))


@torch.no_grad()
def test_a_member_that_is_replaced_later_is_heeded() -> None:
    module, x = made("gelu"), rows(6)
    dense = module.net[2].dense()
    module.net[2] = dense
    assert torch.equal(module(x), dense(module.net[0](x)))


def with_other_weights(module: nn.Module) -> nn.Module:
    """A deep copy, by whose results it is seen that it ran itself."""
    other = copy.deepcopy(module)
    other.net[2].set_tensor("scales", other.net[2].scales * 2)
    return other


@torch.no_grad()
def test_shallow_copies() -> None:
    """They share the forward of their original, which runs the original's modules; set_fusion gives them their own."""
    first, x = made("gelu"), rows(5)
    second = with_other_weights(first)
    twin, expected = copy.copy(second), second(x)
    del second
    with pytest.raises(nq.NunchakuError, match=r"shallow copy of one that is gone.*nq.set_fusion\(copy, True\)"):
        twin(x)
    nq.set_fusion(twin, True)
    with counted() as calls:
        assert same_bits(twin(x), expected) and endings(calls) == {"gelu_quantize": 1}
    nq.set_fusion(copy.copy(first), False)
    assert feed_forward.refuses(first) is None, "what is done to a copy leaves the original"


@torch.no_grad()
def test_replicas_of_data_parallel_run_their_own_modules_one_by_one() -> None:
    module, x = made("gelu"), rows(5)
    for original in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        replica, expected = original._replicate_for_data_parallel(), original(x)
        assert replica._is_replica and type(replica) is type(original)
        replica.net = with_other_weights(original).net
        with counted() as calls:
            assert same_bits(replica(x), replica.net[2](replica.net[0](x))) and endings(calls) == {}
        assert same_bits(original(x), expected) and feed_forward.refuses(original) is None


# Feed-forwards of diffusers' own class: (how many, which ending)
HELD = {"flux": (4 + 2, "gelu_quantize"), "flux2": (4, "glu_quantize"), "sdxl": (4, "glu_quantize"),
        "sd3": (3 + 2, "gelu_quantize"), "pixart": (2, "gelu_quantize"), "qwen_image": (4, "gelu_quantize"),
        "wan": (2, "gelu_quantize"), "ltx": (2, "gelu_quantize"), "cogvideox": (2, "gelu_quantize"),
        "chroma": (4, "gelu_quantize")}


@pytest.mark.parametrize("case", HELD)
def test_models_use_it(case: str) -> None:
    model, inputs = MODELS[case]()
    nq.quantize(model, "rtn-int4")
    count, ending = HELD[case]
    with counted() as calls:
        y = run(model, inputs)
    assert endings(calls)[ending] == count
    assert relative(y, run(unfused(model), inputs)) < 0.05

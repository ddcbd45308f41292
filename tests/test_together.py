"""Linears that share an input quantize it once, and give the bits they give one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import nn
from torch._dynamo.testing import CompileCounter

import nunchaku_py as nq
from nunchaku_py import ops
from nunchaku_py.together import View, concerns, refuses, shared_input
from tests.checks import run
from tests.fused import unfused
from tests.tiny import MODELS
from tests.tiny_models import flux_config, randomise

# Quantizations of inputs that sharing saves in a tiny model: two for q, k, v of a stream, one for k, v or a gated pair.
SAVED = {
    "flux": 2 * 2 + 2 * 2 + 2 * 2,  # two double-stream blocks with two streams, two single-stream blocks
    "chroma": 2 * 2 + 2 * 2 + 2 * 2,
    "flux2": 2 * 2 + 2 * 2,  # its single-stream blocks have one projection for all
    "sdxl": 4 * 2,  # k and v of cross attention stay 16 bit
    "sd3": 3 * 2 + 3 * 2 + 2,  # one block with a second attention
    "pixart": 2 * 2 + 2 * 1,
    "sana": 2 * 2 + 2 * 1,
    "qwen_image": 2 * 2 + 2 * 2,
    "z_image": (2 + 1 + 1) * 3,
    "wan": 2 * 2 + 2 * 1 + 2 * 1,
    "ltx": 2 * 2 + 2 * 1,
    "cogvideox": 2 * 2,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    dispatch = ops.quantize_act.dispatch
    monkeypatch.setattr(ops.quantize_act, "dispatch", lambda *args: (counted.append(1), dispatch(*args))[1])
    return counted


def attentions_only(model: torch.nn.Module) -> None:
    """Leave of the patterns those of attention and gated pairs."""
    nq.set_fusion(model, False)
    for module in model.modules():
        if concerns(module):
            module.nunchaku_fused.enabled = True


@pytest.mark.parametrize("case", MODELS)
def test_inputs_are_quantized_once_and_the_bits_stay(case: str, calls: list[int]) -> None:
    model, inputs = MODELS[case]()
    nq.quantize(model, "rtn-int4")
    attentions_only(model)
    together, shared = run(model, inputs), len(calls)
    nq.set_fusion(model, False)
    calls.clear()
    assert torch.equal(run(model, inputs), together)
    assert len(calls) - shared == SAVED[case]


@pytest.fixture
def attention() -> nn.Module:
    """Self-attention of SDXL."""
    model, _ = MODELS["sdxl"]()
    nq.quantize(model, "rtn-int4")
    return model.mid_block.attentions[0].transformer_blocks[0].attn1


def tokens(batch: int = 2, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(batch, 9, 128).to(dtype)


def together(attention: nn.Module, x: torch.Tensor, calls: list[int], expected: int, **kwargs: object) -> None:
    """`expected` quantizations, to_out included, and the bits of the modules one by one."""
    apart = unfused(attention)(x, **kwargs)
    calls.clear()
    assert torch.equal(attention(x, **kwargs), apart)
    assert len(calls) == expected


@torch.no_grad()
def test_processors_of_diffusers_keep_sharing(calls: list[int]) -> None:
    """Those that diffusers sets, too: sharing is not a processor that diffusers would not know or would replace."""
    model, inputs = MODELS["sdxl"]()
    nq.quantize(model, "rtn-int4")
    before = {name: type(processor) for name, processor in MODELS["sdxl"]()[0].attn_processors.items()}
    assert {name: type(processor) for name, processor in model.attn_processors.items()} == before
    for change in (lambda m: None, lambda m: m.set_default_attn_processor(), lambda m: m.set_attention_slice("max"),
                   lambda m: m.set_attn_processor(AttnProcessor2_0()), lambda m: m.set_attn_processor(AttnProcessor())):
        change(model)
        calls.clear()
        y, shared = run(model, inputs), len(calls)
        calls.clear()
        nq.set_fusion(model, False)
        apart = run(model, inputs)
        nq.set_fusion(model, True)
        assert len(calls) - shared == SAVED["sdxl"] + 4, "4: the second linears of its feed-forwards"
        assert (y - apart).abs().max() < 0.2 * apart.abs().max()


@torch.no_grad()
def test_arguments_reach_the_processor(attention: nn.Module, calls: list[int]) -> None:
    mask = torch.zeros(2, 1, 9).bfloat16()
    mask[..., 5:] = -10000
    together(attention, tokens(), calls, 2, attention_mask=mask)
    image = tokens().reshape(2, 3, 3, 128).permute(0, 3, 1, 2)
    together(attention, image, calls, 2)
    together(attention, tokens(), calls, 3, encoder_hidden_states=tokens())  # k and v share, q reads another
    attention.set_processor(SlicedAttnProcessor(1))
    together(attention, tokens(), calls, 2)


class Custom(AttnProcessor2_0):
    """Changes its input between two projections, which no processor of diffusers' does."""

    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        first = attn.to_q(hidden_states)
        return torch.cat([first, attn.to_q(hidden_states.mul_(2))])


@torch.no_grad()
def test_other_processors_get_the_module_itself(attention: nn.Module) -> None:
    attention.set_processor(Custom())
    assert refuses(attention) == f"its attention processor {__name__}.Custom is not diffusers' own"
    first, second = attention(tokens()).chunk(2)
    assert not torch.equal(first, second)


def hook(attention: nn.Module) -> None:
    attention.to_k.register_forward_hook(lambda *_: None)


def another_mode(attention: nn.Module) -> None:
    attention.to_v.set_mode("a16")


def another_smooth(attention: nn.Module) -> None:
    attention.to_v.set_tensor("smooth", attention.to_v.smooth.data * 2)


def dense(attention: nn.Module) -> None:
    attention.to_q = attention.to_q.dense()


@torch.no_grad()
@pytest.mark.parametrize(("change", "left"), [(hook, 3), (another_mode, 3), (another_smooth, 3), (dense, 2)])
def test_the_others_share_when_one_differs(attention: nn.Module, calls: list[int], left: int, change: Callable) -> None:
    projections = [attention.to_q, attention.to_k, attention.to_v]
    assert shared_input(projections)
    change(attention)
    assert not shared_input([attention.to_q, attention.to_k, attention.to_v])
    together(attention, tokens(), calls, left)


def test_a_hooked_projection_is_called_as_a_module(attention: nn.Module) -> None:
    seen: list[str] = []
    handle = attention.to_k.register_forward_hook(lambda *_: seen.append("to_k"))
    attention(tokens())
    assert seen == ["to_k"]
    handle.remove()
    assert shared_input([attention.to_q, attention.to_k, attention.to_v])


@torch.no_grad()
def test_a_change_in_place_between_projections_is_noticed(attention: nn.Module, calls: list[int]) -> None:
    view, x = View(attention), tokens()
    view.to_q(x)
    x.mul_(-2)
    assert torch.equal(view.to_k(x), attention.to_k(x))
    with torch.inference_mode():  # whose tensors count no versions
        calls.clear()
        attention(tokens())
    assert len(calls) == 2


def test_gradients(attention: nn.Module) -> None:
    x = tokens().requires_grad_()
    attention(x).float().square().sum().backward()
    other = x.detach().clone().requires_grad_()
    unfused(attention)(other).float().square().sum().backward()
    assert torch.equal(x.grad, other.grad) and x.grad.any()


@torch.no_grad()
def test_autocast(attention: nn.Module, calls: list[int]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        together(attention, tokens(dtype=torch.float32), calls, 2)


def test_classes_that_cannot_run_on_a_view_are_not_concerned(attention: nn.Module) -> None:
    """super() wants the module itself, and of a class that is not diffusers' own nobody knows what it wants."""

    class Inherits(Attention):
        def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
            return super().forward(*args, **kwargs)

    assert concerns(attention)
    attention.__class__ = Inherits
    assert not concerns(attention)
    Inherits.__module__ = "diffusers.elsewhere"
    assert not concerns(attention)
    Inherits.forward = Attention.forward
    assert concerns(attention)


@torch.no_grad()
def test_blocks_share_a_graph() -> None:
    """Of a model compiled block by block, more blocks than a compiler makes graphs of one code for. Each has its own
    smooth and down."""
    model = randomise(FluxTransformer2DModel(**flux_config(num_single_layers=10)))
    _, inputs = MODELS["flux"]()
    nq.quantize(model, "svdquant-int4", rank=4, progress=False)
    want = model(**inputs)[0]
    counted = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counted)
    assert torch.equal(model(**inputs)[0], want)
    assert counted.frame_count <= 4
    torch._dynamo.reset()

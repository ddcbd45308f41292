"""The blocks of FLUX.1 with patterns beside themselves without: closer to fp32, and stepping aside when they must."""
from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor, nn

import nunchaku_py as nq
from nunchaku_py import feed_forward, ops
from nunchaku_py.models import flux_blocks
from nunchaku_py.models.flux_blocks import double_refuses, single_refuses
from tests.checks import cast, relative, run, same_bits
from tests.fused import MODES, RECIPES, SIXTEEN_BIT, counted, endings, unfused, wide
from tests.tiny import MODELS
from tests.tiny_models import DIM, flux, flux_controlnet

BLOCKS = {"transformer_blocks": double_refuses, "single_transformer_blocks": single_refuses}
EXPECTED = {  # endings of one block
    "transformer_blocks": {"norm_modulate_quantize": 4, "gelu_quantize": 2, "gate_residual": 4},
    "single_transformer_blocks": {"norm_modulate_quantize": 1, "gelu_quantize": 1},
}


@pytest.fixture(scope="module", params=RECIPES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    model, _ = MODELS["flux"]()
    nq.quantize(model, request.param)
    return model


@pytest.fixture(params=BLOCKS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def block(model: nn.Module, kind: str) -> nn.Module:
    return copy.deepcopy(getattr(model, kind)[0])


def arguments(batch: int = 2, image: int = 37, text: int = 5, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """hidden_states, encoder_hidden_states, temb."""
    return tuple(torch.randn(shape).to(dtype) for shape in ((batch, image, DIM), (batch, text, DIM), (batch, DIM)))


def call(block: nn.Module, *args: object, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return torch.cat(block(*args, **kwargs), 1)


@pytest.mark.parametrize("mode", MODES)
def test_equal_in_fp32(block: nn.Module, kind: str, mode: str) -> None:
    """The modules one by one round nothing there, and the reference's order of operations is theirs."""
    nq.set_mode(block, mode)
    block, args = wide(block), arguments(dtype=torch.float32)
    with ops.backend("torch"):
        with counted() as calls:
            y = call(block, *args)
        assert endings(calls) == EXPECTED[kind]
        assert same_bits(y, call(unfused(block), *args))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_closer_to_fp32_than_the_modules_one_by_one(block: nn.Module, mode: str, dtype: torch.dtype) -> None:
    """They round after norm, 1+scale, product, sum, first linear, activation, second, gate; the pattern at the end."""
    nq.set_mode(block, mode)
    args = arguments(2, 301, 51, dtype)
    exact = call(unfused(wide(block)), *(x.float() for x in args))
    assert relative(call(block, *args), exact) < relative(call(unfused(block), *args), exact)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 5), (1, 64, 16), (2, 5, 1)])
def test_sizes(block: nn.Module, sizes: tuple[int, int, int]) -> None:
    args = arguments(*sizes)
    image, text = block(*args)[::-1]
    assert image.shape == args[0].shape and text.shape == args[1].shape
    one_by_one = [call(block, *(x[i : i + 1] for x in args)) for i in range(sizes[0])]
    assert relative(torch.cat(one_by_one), torch.cat([text, image], 1)) < 0.02, "samples do not see each other"


def test_fp16_is_kept_in_range(block: nn.Module) -> None:
    """Where the residual overflows in the last step (earlier, norms of it are NaN, as they are one by one)."""
    image, text, temb = arguments(dtype=torch.float16)
    args = (image * 60000).clip(-65504, 65504), (text * 60000).clip(-65504, 65504), 4 * temb
    for each in (block, unfused(block)):
        y = call(each, *args)[:, : text.shape[1]]
        assert (y.abs() == torch.finfo(torch.float16).max).sum() > 10 and not y.isinf().any()


def rotary(block: nn.Module) -> dict[str, object]:
    angle = torch.rand(42, block.attn.head_dim)
    return {"image_rotary_emb": (angle.cos(), angle.sin())}


def test_positions_and_keywords_reach_the_attention(block: nn.Module) -> None:
    image, text, temb = arguments()
    turned = rotary(block)
    with counted() as calls:
        y = call(block, hidden_states=image, encoder_hidden_states=text, temb=temb, **turned)
    assert calls["norm_modulate_quantize"]
    assert relative(y, call(unfused(block), image, text, temb, **turned)) < 0.15
    assert relative(y, call(block, image, text, temb)) > 0.001


@pytest.mark.parametrize("mode", ["a4", "a8"])
def test_one_tensor_as_image_and_text(block: nn.Module, mode: str) -> None:
    nq.set_mode(block, mode)
    image, _, temb = arguments()
    with counted() as calls:
        y = call(block, image, image, temb)
    assert calls["norm_modulate_quantize"] and same_bits(y, call(block, image, image.clone(), temb))


def set_modes(block: nn.Module) -> None:
    block.attn.to_k.set_mode("a16")


def custom_processor(block: nn.Module) -> None:
    block.attn.set_processor(type("Custom", (FluxAttnProcessor,), {})())


def replace(path: str) -> Callable[[nn.Module], None]:
    """The module at `path` becomes a 16-bit one."""
    def change(block: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(block.get_submodule(parent), leaf, block.get_submodule(path).dense())

    return change


def hook(path: str) -> Callable[[nn.Module], None]:
    return lambda block: block.get_submodule(path).register_forward_hook(lambda *_: None) and None


BOTH = {"the attention processor is a .*Custom": custom_processor, "q, k, v and what else .* alike": set_modes,
        "q, k, v and what .* alike": hook("attn.to_v"), "q, k, v and .* alike": replace("attn.to_q"),
        "attn has a hook": hook("attn"), "switched off": lambda block: nq.set_fusion(block, False)}
ONLY = {
    "transformer_blocks": {
        "attn.to_out.0 is a torch.nn": replace("attn.to_out.0"), "norm1 has a hook": hook("norm1"),
        "attn.to_add_out has a hook": hook("attn.to_add_out"), "norm2 has a hook": hook("norm2"),
        "ff has a hook": hook("ff"), "ff: net.2 has a hook": hook("ff.net.2"),
        "attn.to_out.1 has a hook": hook("attn.to_out.1"),
        "ff_context: net.0.proj is not a quantized linear": replace("ff_context.net.0.proj")},
    "single_transformer_blocks": {
        "proj_out is a torch.nn": replace("proj_out"), "proj_out has a hook": hook("proj_out"),
        "proj_out.parts.1 has a hook": hook("proj_out.parts.1"), "act_mlp has a hook": hook("act_mlp"),
        "norm.norm has a hook": hook("norm.norm"), "q, k, v a.* alike": replace("proj_mlp"),
        "act_mlp is a .*SiLU": lambda block: setattr(block, "act_mlp", nn.SiLU())},
}


@pytest.mark.parametrize("model", ["rtn-int4"], indirect=True)
def test_it_steps_aside_and_says_why(model: nn.Module, kind: str) -> None:
    args = arguments()
    for why, change in (BOTH | ONLY[kind]).items():
        block = copy.deepcopy(getattr(model, kind)[0])
        change(block)
        assert re.match(why, BLOCKS[kind](block) or "it does not refuse"), (why, BLOCKS[kind](block))
        with counted() as calls:
            y = call(block, *args)
        assert not calls["norm_modulate_quantize"], why
        # What is left of patterns in it (a feed-forward, say) rounds differently; else the bits are those of modules.
        assert same_bits(y, call(unfused(block), *args)) or endings(calls), why


@pytest.mark.parametrize("model", ["rtn-int4"], indirect=True)
def test_calls_that_it_leaves_to_the_modules(block: nn.Module) -> None:
    args = arguments()
    apart = unfused(block)
    processor = FluxIPAdapterAttnProcessor(DIM, DIM).bfloat16()

    def leaves(*args: Tensor, **kwargs: object) -> None:
        with counted() as calls:
            torch.cat(block(*args, **kwargs), 1).float()
        assert not calls["norm_modulate_quantize"] and not calls["linear_w4a8_gate_residual"]

    with torch.no_grad():
        leaves(args[0].float(), *args[1:])
        with torch.autocast("cpu", torch.bfloat16):
            leaves(*(x.float() for x in args))
            assert call(block, *(x.float() for x in args)).dtype == call(apart, *(x.float() for x in args)).dtype
        leaves(*args, joint_attention_kwargs={"attention_mask": None})
        leaves(*(x[:1] for x in args[:2]), args[2])
        leaves(*(x[:0] for x in args))
        assert same_bits(call(block, *args[:2], args[2][:1]), call(block, *args[:2], args[2][:1].expand(2, -1)))
    leaves(args[0].clone().requires_grad_(), *args[1:])
    leaves(*args)  # norm_q of attention has weights that may be trained
    block.requires_grad_(False)
    with counted() as calls:
        block(*args)
    assert calls["norm_modulate_quantize"]
    block.attn.set_processor(processor)
    with torch.no_grad():
        leaves(*args) if block.attn.added_kv_proj_dim is None else leaves(
            *args, joint_attention_kwargs={"ip_hidden_states": [torch.randn(2, 4, DIM).bfloat16()]})


@pytest.mark.parametrize("case", ["flux", "chroma"])
def test_only_blocks_of_flux_itself_are_concerned(case: str) -> None:
    model, inputs = MODELS[case]()
    nq.quantize(model, "rtn-int4")
    with counted() as calls:
        run(model, inputs)
    assert endings(calls) == ({"gelu_quantize": 4} if case == "chroma" else
                              {"norm_modulate_quantize": 10, "gelu_quantize": 6, "gate_residual": 8})


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_whole_models(batch: int, mode: str) -> None:
    """In fp32 to the bit; in fp16 as far from fp32 as one by one, but for which codes happen to flip: one in ten."""
    model, inputs = flux(batch)
    nq.quantize(model, "rtn-int4", mode=mode)
    with ops.backend("torch"):
        exact = run(unfused(wide(model)), cast(inputs, torch.float32))
        assert same_bits(run(wide(model), cast(inputs, torch.float32)), exact)
    model = nn.Module.to(model, torch.float16)
    fused, apart = (relative(run(m, cast(inputs, torch.float16)), exact) for m in (model, unfused(model)))
    assert fused < 1.1 * apart


def test_controlnet_residuals() -> None:
    """They are added between the blocks, and its own blocks are FLUX's."""
    (controlnet, control), (model, inputs) = flux_controlnet(), MODELS["flux"]()
    for each in (controlnet, model):
        nq.quantize(each, "rtn-int4")
    answers = []
    for each, base in ((controlnet, model), (unfused(controlnet), unfused(model))):
        with torch.no_grad(), counted() as calls:
            double, single = each(**control)
        assert bool(calls["norm_modulate_quantize"]) == (each is controlnet)
        residuals = dict(controlnet_block_samples=double, controlnet_single_block_samples=single)
        answers.append(run(base, inputs | residuals))
    assert relative(*answers) < 0.05 and relative(answers[0], run(model, inputs)) > 0.1


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_outputs_of_projections_do_not_outlive_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = MODELS["flux"]()
    nq.quantize(model, "rtn-int4", progress=False)
    made, alive = [], []
    keep = flux_blocks._Given.__init__
    monkeypatch.setattr(flux_blocks._Given, "__init__", lambda self, y: (made.append(weakref.ref(y)), keep(self, y))[1])
    between = feed_forward.between if kind == "transformer_blocks" else flux_blocks.between
    where = feed_forward if kind == "transformer_blocks" else flux_blocks
    monkeypatch.setattr(where, "between", lambda *args: (alive.extend(one() is not None for one in made),
                                                         between(*args))[1])
    call(getattr(model, kind)[0], *arguments())
    assert alive and not any(alive)

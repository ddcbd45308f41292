"""One LoRA, saved as every trainer saves it, is read to the same bits."""

from __future__ import annotations

import functools

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.lora.formats import Target, read
from nunchaku_py.lora.names_unet import unet_names
from tests.lora.writers import (
    FLUX2_FUSED,
    FLUX_FUSED,
    KOHYA,
    PEFT,
    SD3_FUSED,
    WAN_FUSED,
    XLABS,
    Z_IMAGE_FUSED,
    assert_same,
    blocks,
    flattened,
    lora_of,
    normal,
    prefixed,
    random_lora,
    target_of,
    write,
    write_fused,
)
from tests.tiny import MODELS

OWN = {
    "PEFT": (prefixed("transformer."), PEFT),
    "PEFT, bare": (prefixed(""), PEFT),
    "PEFT, of a training script": (prefixed("base_model.model."), PEFT),
    "PEFT, with the adapter's name": (prefixed("unet."), (".lora_A.default.weight", ".lora_B.default.weight")),
    "diffusers, old": (prefixed("unet."), (".lora.down.weight", ".lora.up.weight")),
    "diffusers, older": (prefixed(""), (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    "ComfyUI": (prefixed("diffusion_model."), KOHYA),
    "kohya": (flattened("lora_unet_"), KOHYA),
    "OneTrainer": (flattened("lora_transformer_"), KOHYA),
    "LyCORIS": (flattened("lycoris_"), KOHYA),
}
FUSED = {
    "kohya": (flattened("lora_unet_"), KOHYA),
    "ComfyUI": (prefixed("diffusion_model."), KOHYA),
    "ai-toolkit": (prefixed("diffusion_model."), PEFT),
    "fal Kontext": (prefixed("base_model.model."), PEFT),
    "bare": (prefixed(""), PEFT),
}
TABLES = {"flux": FLUX_FUSED, "chroma": FLUX_FUSED, "flux2": FLUX2_FUSED, "sd3": SD3_FUSED, "z_image": Z_IMAGE_FUSED,
          "wan": WAN_FUSED}


@functools.cache
def tiny(name: str) -> Target:
    return target_of(MODELS[name]()[0])


@pytest.mark.parametrize("model", ["flux", "flux2", "chroma", "sdxl", "sd3", "pixart", "sana", "qwen_image", "z_image",
                                   "wan", "ltx"])
def test_own_names(model: str) -> None:
    lora = random_lora(tiny(model).shapes)
    for name, parts in OWN.values():
        reading = read(write(lora, name, parts), {"transformer": tiny(model)})
        assert_same(reading.deltas["transformer"], lora)
        assert (reading.unread, reading.notes) == ([], [])
        assert list(reading.deltas["transformer"]) == list(tiny(model).shapes)


@pytest.mark.parametrize("model", TABLES)
def test_names_of_the_authors(model: str) -> None:
    table = blocks(TABLES[model], tiny(model))
    lora = lora_of(table, tiny(model))
    for name, parts in FUSED.values():
        reading = read(write_fused(lora, table, name, parts), {"transformer": tiny(model)})
        assert_same(reading.deltas["transformer"], lora)
        assert reading.unread == []


def test_parts_of_a_fused_weight_share_one_down() -> None:
    table = blocks({"double_blocks.{}.img_attn.qkv": FLUX_FUSED["double_blocks.{}.img_attn.qkv"]}, tiny("flux"), 1)
    state = write_fused(lora_of(table, tiny("flux")), table, prefixed("diffusion_model."))
    deltas = read(state, {"transformer": tiny("flux")}).deltas["transformer"]
    down = state["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"]
    assert len(deltas) == 3 and all(delta.down is down for delta in deltas.values())


def test_xlabs() -> None:
    table = blocks(XLABS, tiny("flux"))
    lora = lora_of(table, tiny("flux"))
    state = write_fused(lora, table, prefixed(""), (".down.weight", ".up.weight"))
    reading = read(state, {"transformer": tiny("flux")})
    assert_same(reading.deltas["transformer"], lora)
    assert reading.format == "XLabs (BFL names)" and reading.unread == []


@pytest.mark.parametrize("model", ["flux", "flux2", "sd3"])
def test_the_last_modulation_is_given_shift_first(model: str) -> None:
    lora = random_lora({"norm_out.linear": tiny(model).shapes["norm_out.linear"]})
    state = write_fused(lora, {"final_layer.adaLN_modulation.1": ["norm_out.linear"]}, prefixed("diffusion_model."))
    got = read(state, {"transformer": tiny(model)}).deltas["transformer"]["norm_out.linear"]
    shift, scale = lora["norm_out.linear"].up.chunk(2)
    assert torch.equal(got.up, torch.cat([scale, shift]))


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), (2, 5, 1, 3)])
def test_joined_loras_come_apart(ranks: tuple[int, ...]) -> None:
    """As kohya's scripts join q, k, v and mlp: up is block diagonal over all rows of down."""
    modules = [name.format(0) for name in FLUX_FUSED["single_blocks.{}.linear1"]]
    shapes = tiny("flux").shapes
    downs = [normal(n, rank, shapes[name][1]) for n, (name, rank) in enumerate(zip(modules, ranks, strict=True))]
    ups = [normal(9 + n, shapes[name][0], rank) for n, (name, rank) in enumerate(zip(modules, ranks, strict=True))]
    stem = "lora_unet_single_blocks_0_linear1"
    state = {f"{stem}.lora_down.weight": torch.cat(downs), f"{stem}.lora_up.weight": torch.block_diag(*ups),
             f"{stem}.alpha": torch.tensor(2.0 * sum(ranks))}
    deltas = read(state, {"transformer": tiny("flux")}).deltas["transformer"]
    for name, down, up, rank in zip(modules, downs, ups, ranks, strict=True):
        got = deltas[name]
        assert torch.equal(got.down, down) and torch.equal(got.up, up) and got.alpha == 2.0 * rank


def test_ranks_and_alphas_of_their_own() -> None:
    lora = {name: random_lora({name: shape}, rank=1 + n % 7, alpha=1.0 + n)[name]
            for n, (name, shape) in enumerate(tiny("wan").shapes.items())}
    assert_same(read(write(lora, prefixed("transformer.")), {"transformer": tiny("wan")}).deltas["transformer"], lora)


def test_no_alpha_means_the_rank() -> None:
    state = write(random_lora(tiny("pixart").shapes, rank=3), prefixed("transformer."), alpha=None)
    deltas = read(state, {"transformer": tiny("pixart")}).deltas["transformer"]
    assert {delta.alpha for delta in deltas.values()} == {3.0}


# ------------------------------------------------------------------------------------------------- UNets, text encoders
CLIP = {f"encoder.layers.0.{name}": (8, 8) for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")}


def sdxl_foreign(name: str) -> str:
    """LDM's names of the tiny UNet's modules: two blocks of one layer down, of two layers up."""
    for own, foreign in {
        "down_blocks.0.resnets.0.": "input_blocks.1.0.", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0.": "input_blocks.3.0.", "down_blocks.1.attentions.0.": "input_blocks.3.1.",
        "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.", "up_blocks.0.resnets.0.": "output_blocks.0.0.",
        "up_blocks.0.attentions.0.": "output_blocks.0.1.", "up_blocks.0.resnets.1.": "output_blocks.1.0.",
        "up_blocks.0.attentions.1.": "output_blocks.1.1.", "up_blocks.0.upsamplers.0.": "output_blocks.1.2.",
        "up_blocks.1.resnets.0.": "output_blocks.2.0.", "up_blocks.1.resnets.1.": "output_blocks.3.0.",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_out": "out.2", ".conv1": ".in_layers.2", ".conv2": ".out_layers.3",
        ".time_emb_proj": ".emb_layers.1", ".conv_shortcut": ".skip_connection",
    }.items():
        name = name.replace(own, foreign)
    return "lora_unet_" + name.replace(".", "_")


def test_sdxl_with_ldm_names() -> None:
    lora = random_lora(tiny("sdxl").shapes)
    reading = read(write(lora, sdxl_foreign, KOHYA), {"unet": tiny("sdxl")})
    assert_same(reading.deltas["unet"], lora)
    assert reading.format == "kohya (LDM names)" and reading.unread == []


def layers(down: list[tuple[int, int]], up: list[tuple[int, int]]) -> list[str]:
    """One module of every layer of a UNet, whose blocks have so many (resnets, attentions)."""
    names = [f"{side}_blocks.{n}.{kind}.{place}.{leaf}"
             for side, counts in (("down", down), ("up", up)) for n, block in enumerate(counts)
             for kind, count, leaf in zip(("resnets", "attentions"), block, ("conv1", "proj_in"), strict=True)
             for place in range(count)]
    names += [f"down_blocks.{n}.downsamplers.0.conv" for n in range(len(down) - 1)]
    return names + [f"up_blocks.{n}.upsamplers.0.conv" for n in range(len(up) - 1)]


@pytest.mark.parametrize(("modules", "known"), [
    (layers([(2, 0), (2, 2), (2, 2)], [(3, 3), (3, 3), (3, 0)]), {  # SDXL
        "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.4.1.proj_in": "down_blocks.1.attentions.0.proj_in",
        "input_blocks.8.1.proj_in": "down_blocks.2.attentions.1.proj_in",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.5.1.proj_in": "up_blocks.1.attentions.2.proj_in",
        "output_blocks.8.0.in_layers.2": "up_blocks.2.resnets.2.conv1"}),
    (layers([(2, 2), (2, 2), (2, 2), (2, 0)], [(3, 0), (3, 3), (3, 3), (3, 3)]), {  # Stable Diffusion 1
        "input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
        "input_blocks.9.0.op": "down_blocks.2.downsamplers.0.conv",
        "input_blocks.11.0.in_layers.2": "down_blocks.3.resnets.1.conv1",
        "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.3.1.proj_in": "up_blocks.1.attentions.0.proj_in",
        "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks.11.1.proj_in": "up_blocks.3.attentions.2.proj_in"}),
])
def test_ldm_numbers_of_real_unets(modules: list[str], known: dict[str, str]) -> None:
    names = dict(unet_names(modules))
    assert len(names) == len(modules) and {foreign: names[foreign] for foreign in known} == known


def test_convolutions_of_one_pixel_have_their_axes_or_not() -> None:
    shapes = {"linear": (6, 5), "conv": (6, 5, 1, 1)}
    lora = random_lora(shapes)
    state = write(lora, prefixed(""), KOHYA)
    for key in [key for key in state if "weight" in key]:
        state[key] = state[key][..., None, None] if key.startswith("linear") else state[key].flatten(1)
    assert_same(read(state, {"unet": Target("UNet2DConditionModel", shapes)}).deltas["unet"], lora)


@pytest.mark.parametrize("inside", ["", "text_model."])
def test_text_encoders(inside: str) -> None:
    encoder = Target("CLIPTextModel", {inside + name: shape for name, shape in CLIP.items()})
    targets = {"unet": tiny("sdxl"), "text_encoder": encoder, "text_encoder_2": encoder}
    for component, prefixes in {"text_encoder": ("lora_te1_", "lora_te_"), "text_encoder_2": ("lora_te2_",)}.items():
        for written in ("", "text_model."):
            lora = random_lora({written + name: shape for name, shape in CLIP.items()})
            states = [write(lora, flattened(prefix), KOHYA) for prefix in prefixes]
            states += [write(lora, prefixed(f"{component}.")),
                       write(lora, prefixed(f"{component}."), (".lora_linear_layer.down.weight",
                                                               ".lora_linear_layer.up.weight"))]
            for state in states:
                reading = read(state, targets)
                assert_same(reading.deltas[component],
                            {inside + name.removeprefix("text_model."): delta for name, delta in lora.items()})
                assert set(reading.deltas) == {component} and reading.unread == []
                assert read(state, {"unet": tiny("sdxl")}).unread == sorted(state)


def test_old_attention_processors() -> None:
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    modules = {f"{block}.to_{n}": f"{block}.processor.to_{n}_lora" for n in "qkv"}
    modules[f"{block}.to_out.0"] = f"{block}.processor.to_out_lora"
    lora = random_lora({name: tiny("sdxl").shapes[name] for name in modules})
    state = write(lora, lambda name: "unet." + modules[name], (".down.weight", ".up.weight"))
    assert_same(read(state, {"unet": tiny("sdxl")}).deltas["unet"], lora)
    lora = random_lora(CLIP)
    old = {name: name.replace("q_proj", "to_q_lora").replace("k_proj", "to_k_lora").replace("v_proj", "to_v_lora")
           .replace("out_proj", "to_out_lora") for name in CLIP if "self_attn" in name}
    lora = {name: lora[name] for name in old}
    state = write(lora, lambda name: "text_encoder.text_model." + old[name], (".down.weight", ".up.weight"), None)
    targets = {"unet": tiny("sdxl"), "text_encoder": Target("CLIPTextModel", CLIP)}
    deltas = read(state, targets).deltas["text_encoder"]
    assert all(torch.equal(deltas[name].up, delta.up) for name, delta in lora.items()) and len(deltas) == 4


# --------------------------------------------------------------------------------------------------- values and vectors
LINEAR = Target("Any", {"block.linear": (6, 5), "block.other": (5, 6)})
PAIR = {"block.linear.lora_A.weight": normal(1, 2, 5), "block.linear.lora_B.weight": normal(2, 6, 2)}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_read_exactly(dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in PAIR.items()}
    delta = read(state, {"": LINEAR}).deltas[""]["block.linear"]
    assert delta.down.dtype == torch.bfloat16
    assert torch.equal(delta.down.float(), state["block.linear.lora_A.weight"].float())
    scaled = read(state | {"block.linear.lora_A.scale_weight": torch.tensor(0.5)}, {"": LINEAR})
    assert torch.equal(scaled.deltas[""]["block.linear"].down, delta.down.float() / 2) and scaled.unread == []


def test_bias() -> None:
    bias = normal(3, 6)
    delta = read(PAIR | {"block.linear.lora_B.bias": bias}, {"": LINEAR}).deltas[""]["block.linear"]
    assert torch.equal(delta.bias, bias)


def test_a_difference_of_the_bias_is_kept_where_it_stays_exact() -> None:
    more = PAIR | {"block.linear.diff_b": normal(3, 6), "block.linear.alpha": torch.tensor(0.5)}
    delta = read(more, {"": LINEAR}).deltas[""]["block.linear"]
    assert torch.equal(delta.alpha / delta.rank * delta.bias, more["block.linear.diff_b"])
    reading = read(more | {"block.linear.alpha": torch.tensor(0.7)}, {"": LINEAR})
    assert reading.unread == ["block.linear.diff_b"] and reading.deltas[""]["block.linear"].bias is None


def test_what_no_module_is_found_for_is_named() -> None:
    others = {"block.norm.diff": normal(3, 6), "block.norm.lora_A.weight": normal(1, 2, 5), "step": torch.tensor(3),
              "block.other.alpha": torch.tensor(1.0), "block.other.diff_b": normal(3, 5),
              "block.other.oft_blocks": normal(3, 5)}
    assert read(PAIR | others, {"": LINEAR}).unread == sorted(others)


@pytest.mark.parametrize(("key", "shape"), [("dora_scale", (6, 1)), ("dora_scale", (1, 6)), ("dora_scale", (6,)),
                                            ("lora_magnitude_vector", (6,)), ("lora_magnitude_vector.weight", (6,)),
                                            ("lora_magnitude_vector.default.weight", (6,))])
def test_dora(key: str, shape: tuple[int, ...]) -> None:
    magnitude = normal(4, 6)
    reading = read(PAIR | {f"block.linear.{key}": magnitude.reshape(shape)}, {"": LINEAR})
    assert torch.equal(reading.deltas[""]["block.linear"].magnitude, magnitude)


def test_dora_of_a_fused_weight_is_split_by_rows() -> None:
    stem, magnitude = "diffusion_model.double_blocks.0.img_attn.qkv", normal(4, 384, 1)
    state = {f"{stem}.lora_A.weight": normal(1, 2, 128), f"{stem}.lora_B.weight": torch.zeros(384, 2),
             f"{stem}.dora_scale": magnitude}
    deltas = read(state, {"transformer": tiny("flux")}).deltas["transformer"]
    assert torch.equal(torch.cat([delta.magnitude for delta in deltas.values()]), magnitude.flatten())


def test_equal_doubles_are_taken_once() -> None:
    reading = read(PAIR | {"transformer." + key: tensor.clone() for key, tensor in PAIR.items()}, {"": LINEAR})
    assert len(reading.deltas[""]) == 1 and reading.unread == []


def test_control_loras_are_recognised_and_left() -> None:
    state = {"double_blocks.0.img_attn.norm.query_norm.scale": normal(1, 4), "img_in.lora_A.weight": normal(1, 2, 64)}
    reading = read(state, {"transformer": tiny("flux")})
    assert (reading.format, reading.deltas, reading.unread) == ("BFL FLUX control", {}, sorted(state))


# ------------------------------------------------------------------------------------------------------------- refusals
def changed(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return PAIR | {f"block.linear.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}


NAN = torch.full((2, 5), float("nan"))
REFUSED = {
    "no key is one of a LoRA": {},
    "among 1 keys: weight": {"weight": normal(1, 2)},
    "half of a pair is missing: no up beside block.linear.lora_A.weight": {
        "block.linear.lora_A.weight": normal(1, 2, 5)},
    r"lora_B.weight: expected \(N, r\) for a down of \(2, 5\), got \(6, 3\)": changed(lora_B__weight=normal(1, 6, 3)),
    r"lora_A.weight: expected \(r, 5\) for block.linear, got \(2, 4\)": changed(lora_A__weight=normal(1, 2, 4)),
    r"lora_B.weight: expected \(6, 2\) for block.linear, got \(7, 2\)": changed(lora_B__weight=normal(1, 7, 2)),
    "lora_A.weight: holds NaN or infinite values": changed(lora_A__weight=NAN),
    "lora_A.weight: expected floating point numbers, got int64": changed(lora_A__weight=torch.ones(2, 5).long()),
    "has no values": changed(lora_A__weight=torch.ones(0, 5), lora_B__weight=torch.ones(6, 0)),
    "alpha: expected a finite number that is not negative, got nan": changed(alpha=torch.tensor(float("nan"))),
    "alpha: expected a finite number that is not negative, got -1": changed(alpha=torch.tensor(-1.0)),
    r"alpha: expected one number, got shape \(2,\)": changed(alpha=torch.ones(2)),
    "lora_A.weight and block.linear.lora_down.weight are for the same thing": changed(
        lora_down__weight=normal(5, 2, 5)),
    "expected one kind of change, got LoRA and diff": changed(diff=normal(5, 6, 5)),
    r"lora_B.bias: expected \(6,\)": changed(lora_B__bias=normal(5, 5)),
    "DoRA by columns": changed(dora_scale=normal(5, 1, 5)),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refusals(sentence: str) -> None:
    with pytest.raises(NunchakuError, match=sentence):
        read(REFUSED[sentence], {"": LINEAR})


def test_a_lora_of_another_model_is_told_so() -> None:
    state = write(random_lora({name: (shape[0] + 1, *shape[1:]) for name, shape in tiny("flux").shapes.items()}),
                  prefixed("transformer."))
    with pytest.raises(NunchakuError, match="for another model: 50 of 50 changes have shapes that do not fit"):
        read(state, {"transformer": tiny("flux")})


def test_names_that_may_mean_two_modules_are_refused() -> None:
    target = Target("Any", {"a.b_c": (6, 5), "a_b.c": (6, 5)})
    state = {"lora_unet_a_b_c.lora_down.weight": normal(1, 2, 5), "lora_unet_a_b_c.lora_up.weight": normal(1, 6, 2)}
    with pytest.raises(NunchakuError, match="may name several modules of the model: a.b_c, a_b.c"):
        read(state, {"": target})


def test_a_module_that_two_weights_change_is_refused() -> None:
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    state = {f"{stem}.lora_A.weight": normal(1, 2, 128), f"{stem}.lora_B.weight": normal(2, 384, 2),
             "transformer_blocks.0.attn.to_q.lora_A.weight": normal(3, 2, 128),
             "transformer_blocks.0.attn.to_q.lora_B.weight": normal(4, 128, 2)}
    with pytest.raises(NunchakuError, match="attn.to_q: changed twice"):
        read(state, {"transformer": tiny("flux")})


def test_a_pipeline_without_the_model_leaves_everything() -> None:
    assert read(PAIR, {"text_encoder": Target("T5", {}), "text_encoder_2": Target("T5", {})}).unread == sorted(PAIR)

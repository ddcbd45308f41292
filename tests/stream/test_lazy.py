"""Tensors that are not read yet: what torch and diffusers' converters do with them has the bits of doing it at once."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nunchaku_py.errors import NunchakuError
from nunchaku_py.stream.lazy import evaluate, lazy, names_in

DATA = torch.arange(60.0).reshape(12, 5)
Rows = tuple[int, int] | None


class Reader:
    """Reads `tensors`, and remembers what was asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.asked = tensors, []

    def __call__(self, name: str, rows: Rows) -> Tensor:
        self.asked.append((name, rows))
        return self.tensors[name].clone() if rows is None else self.tensors[name][rows[0]:rows[1]].clone()


@pytest.mark.parametrize(("do", "asked"), [
    (lambda a: a, [None]),
    (lambda a: a.chunk(3)[1], [(4, 8)]),
    (lambda a: torch.split(a, (3, 4, 5))[2], [(7, 12)]),
    (lambda a: torch.split(a, 5, dim=-2)[2], [(10, 12)]),
    (lambda a: a[2:][1:4], [(3, 6)]),
    (lambda a: a[-3:], [(9, 12)]),
    (lambda a: a[-30:4], [(0, 4)]),
    (lambda a: a.narrow(0, 2, 3), [(2, 5)]),
    (lambda a: torch.cat(a.chunk(2)[::-1]), [(6, 12), (0, 6)]),
    (lambda a: torch.cat([a.chunk(3)[0]]), [(0, 4)]),
    (lambda a: a[::2], [None]),
    (lambda a: a[:, 1:3], [None]),
    (lambda a: a[:, 1], [None]),
    (lambda a: a.split(2, dim=1)[1], [None]),
    (lambda a: a.reshape(6, -1).t(), [None]),
    (lambda a: a.view(3, 4, 5).permute(2, 0, 1).contiguous(), [None]),
    (lambda a: a.unflatten(0, (2, 3, 2)).unbind(1)[2].flatten(0, 1), [None]),
    (lambda a: (a + 1) * 2 - a, [None]),
    (lambda a: torch.stack([a, a.clone()]), [None]),
    (lambda a: a[[1, 3]], [None]),
    (lambda a: a.to(torch.bfloat16).to("cpu").float(), [None]),
    (lambda a: torch.zeros(3) + a[:3, :3], [(0, 3)]),
    (lambda a: torch.nn.functional.pad(a, (1, 2)), [None]),
    (lambda a: torch.roll(a, 3, 0), [None]),
])
def test_what_is_recorded_is_what_torch_does(do: Callable[[Tensor], Tensor], asked: list[Rows]) -> None:
    read = Reader({"a": DATA})
    made, wanted = do(lazy("a", (12, 5), torch.float32)), do(DATA.clone())
    assert made.shape == wanted.shape and made.dtype == wanted.dtype and read.asked == []
    found = evaluate(made, read)
    assert type(found) is Tensor and torch.equal(found, wanted)
    assert found.is_contiguous() and found.untyped_storage().nbytes() == found.nbytes
    assert sorted(map(str, {rows for _, rows in read.asked})) == sorted(map(str, set(asked)))
    assert set(names_in(made)) == {"a"}


@pytest.mark.parametrize("do", [
    lambda a: a.sum().item(), lambda a: bool((a == 0).all()), lambda a: a.add_(1), lambda a: a.__setitem__(0, 1.0),
    lambda a: torch.equal(a, a),
])
def test_what_needs_or_changes_numbers_is_refused(do: Callable[[Tensor], Any]) -> None:
    with pytest.raises(NunchakuError, match="needs or changes numbers, which are not read yet"):
        do(lazy("a", (12, 5), torch.float32))


def test_tensors_without_axes_or_values() -> None:
    read = Reader({"a": torch.tensor(3.0), "b": torch.empty(0, 4)})
    assert evaluate(lazy("a", (), torch.float32), read) == 3 and evaluate(lazy("b", (0, 4), torch.float32), read).shape
    assert evaluate(lazy("b", (0, 4), torch.float32)[0:0], read).shape == (0, 4)


# ------------------------------------------------------------------------------------------------ diffusers' converters
class Wanted(dict):
    """A checkpoint that has every tensor it is asked for. `seeds`: names by which a converter counts blocks."""

    def __init__(self, seeds: list[str], rows: dict[str, int]) -> None:
        self.rows = rows
        super().__init__({name: self.made(name) for name in seeds})
        self.asked = dict(self)

    def made(self, name: str) -> Tensor:
        rows = next((count for part, count in self.rows.items() if part in name), 12)
        shape = (rows, 3) if name.endswith("weight") else (rows,)
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + sum(map(ord, name))))

    def pop(self, name: str, *default: Any) -> Tensor:
        if name not in self:
            self[name] = self.asked[name] = self.made(name)
        return super().pop(name)

    def __missing__(self, name: str) -> Tensor:
        self[name] = self.asked[name] = self.made(name)
        return self[name]


WIDE = {"linear1": 7 * 3072, "qkv.weight": 3840}
ATTENTION = [f"attn.{part}" for part in ("qkv.weight", "qkv.bias", "proj.weight", "ln_q.weight", "ln_k.weight")]
NAMES: dict[str, list[str]] = {  # of those that rename what is there, some of each kind; of others, what they count by
    "FluxTransformer2DModel": ["double_blocks.1.img_attn.qkv.weight", "single_blocks.1.linear1.bias",
                               "guidance_in.in_layer.bias"],
    "ChromaTransformer2DModel": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.bias",
                                 "distilled_guidance_layer.layers.1.in_layer.bias"],
    "SD3Transformer2DModel": ["context_embedder.weight", *(
        f"joint_blocks.{i}.x_block.{part}" for i in (0, 1) for part in ATTENTION),
        "joint_blocks.0.x_block.attn2.qkv.weight"],
    "SanaTransformer2DModel": ["blocks.1.attn.qkv.weight"],
    "MochiTransformer3DModel": [],
    "AuraFlowTransformer2DModel": ["double_layers.0.attn.w1q.weight", "single_layers.0.attn.w1q.weight"],
    "HunyuanVideoTransformer3DModel": [
        "img_in.proj.weight", "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight",
        "txt_in.c_embedder.a.bias", "double_blocks.0.img_attn_qkv.weight", "double_blocks.0.txt_attn_qkv.bias",
        "double_blocks.0.img_mlp.fc1.weight",
        "single_blocks.0.linear1.weight", "single_blocks.0.linear1.bias", "single_blocks.0.linear2.weight",
        "final_layer.adaLN_modulation.1.weight", "final_layer.linear.bias"],
    "Flux2Transformer2DModel": [
        "img_in.weight", "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.txt_attn.qkv.weight",
        "double_blocks.0.img_mlp.0.weight", "single_blocks.0.linear1.weight", "single_blocks.0.norm.key_norm.scale",
        "final_layer.adaLN_modulation.1.weight"],
    "Flux3Transformer2DModel": ["emb_in.image.weight", "single_blocks.0.q_proj.weight", "repa_projectors.0.weight",
                                "final_layer.image.adaLN_modulation.1.weight"],
    "ZImageTransformer2DModel": ["layers.0.attention.qkv.weight", "layers.0.attention.out.weight", "norm_final.weight",
                                 "x_embedder.weight"],
    "Lumina2Transformer2DModel": ["layers.0.attention.qkv.weight", "cap_embedder.0.weight", "norm_final.weight",
                                  "layers.0.attention_norm1.weight"],
    "WanTransformer3DModel": ["patch_embedding.weight", "blocks.0.self_attn.q.weight", "blocks.0.norm3.bias",
                              "blocks.0.modulation", "head.modulation", "img_emb.proj.1.weight"],
    "WanAnimateTransformer3DModel": ["face_adapter.fuser_blocks.0.linear1_kv.weight", "blocks.0.self_attn.q.weight",
                                     "motion_encoder.enc.net_app.convs.0.0.weight"],
    "WanAnimate2Transformer3DModel": ["blocks.0.block.self_attn.q.weight", "blocks.0.norm3.bias"],
    "LTXVideoTransformer3DModel": ["patchify_proj.weight", "adaln_single.linear.bias", "blocks.0.attn1.q_norm.weight"],
    "LTX2VideoTransformer3DModel": ["patchify_proj.weight", "adaln_single.linear.bias", "audio_adaln_single.a.weight",
                                    "video_embeddings_connector.a.weight"],
    "CosmosTransformer3DModel": ["net.blocks.0.self_attn.q_proj.weight", "net.x_embedder.proj.1.weight",
                                 "net.pos_embedder.seq"],
    "QwenImageTransformer2DModel": ["transformer_blocks.0.attn.to_q.weight"],
    "QwenImage21Transformer2DModel": ["transformer_blocks.0.img_mlp.gate_up.weight", "img_in.weight"],
    "Krea2Transformer2DModel": ["first.weight", "blocks.0.attn.wq.weight", "blocks.0.mod.lin", "last.modulation.lin"],
    "MiniMaxH3Transformer3DModel": ["blocks.0.attn.qkv_proj.weight", "blocks.0.mlp.fc1.weight", "rope.inv_freq"],
    "HiDreamImageTransformer2DModel": ["double_stream_blocks.0.block.a.weight"],
    "ErnieImageTransformer2DModel": ["layers.0.a.weight"],
    "StableCascadeUNet": ["clip_txt_mapper.weight", "down_blocks.0.0.attn.in_proj_weight", "a.attn.out_proj.bias"],
}


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_converters_give_the_same_bits(name: str) -> None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CLASSES

    if name not in CLASSES:
        pytest.skip(f"this diffusers has no {name}")
    convert = CLASSES[name]["checkpoint_mapping_fn"]
    checkpoint = Wanted(NAMES[name], WIDE)
    wanted = convert(checkpoint=checkpoint, config={})
    source = checkpoint.asked
    assert source and set(NAMES[name]) <= set(source)
    made = convert(checkpoint={key: lazy(key, tuple(tensor.shape), tensor.dtype) for key, tensor in source.items()},
                   config={})
    assert set(made) == set(wanted)
    read = Reader(source)
    for key, tensor in wanted.items():
        assert made[key].shape == tensor.shape and torch.equal(evaluate(made[key], read), tensor), key


def test_every_denoiser_that_diffusers_converts_is_tried() -> None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CLASSES

    functions = {CLASSES[name]["checkpoint_mapping_fn"].__name__ for name in NAMES if name in CLASSES}
    tried = functions | {"convert_ldm_unet_checkpoint", "<lambda>"}  # the UNet's needs a real one: test_single_file.py
    others = {name for name in CLASSES if "Autoencoder" in name or "ControlNet" in name or "Motion" in name}
    assert {name for name, row in CLASSES.items() if row["checkpoint_mapping_fn"].__name__ not in tried} <= others

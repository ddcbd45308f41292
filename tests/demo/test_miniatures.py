"""The pipelines that are shipped: what they are, how large, and that they draw."""

from pathlib import Path

import diffusers
import pytest
import torch

import nunchaku_py as nq
from nunchaku_py.demo import checker, shipped
from nunchaku_py.demo.measure import paint
from nunchaku_py.demo.scenes import described

PIPELINE_BYTES = 12e6
REPOSITORY_WEIGHTS = 28e6  # both pipelines, the checker and the LoRAs
CAPTIONS = ["a large red circle on a white background", "a small blue square above a large green cross"]


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module", params=shipped.CALLS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(name: str):
    return shipped.pipeline(name)


def denoiser(name: str, pipe) -> torch.nn.Module:
    return getattr(pipe, shipped.DENOISERS[name])


def test_sizes(name: str, pipe):
    assert bytes_of(shipped.folder(name)) <= PIPELINE_BYTES
    assert 3e6 <= sum(weight.numel() for weight in denoiser(name, pipe).parameters()) <= 6e6
    assert bytes_of(shipped.WEIGHTS) + checker.WEIGHTS.stat().st_size <= REPOSITORY_WEIGHTS


def test_weights_are_16_bit_and_readable(name: str):
    from safetensors import safe_open

    files = list(shipped.folder(name).rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert file.stat().st_mode & 0o044
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"BF16"}


def test_what_they_are(name: str, pipe):
    model = denoiser(name, pipe)
    if name == "tiny-flux":
        assert type(pipe) is diffusers.FluxPipeline and type(model) is diffusers.FluxTransformer2DModel
        assert model.config.attention_head_dim == 128 and model.inner_dim >= 256
        assert len(model.transformer_blocks) >= 1 and len(model.single_transformer_blocks) >= 1
    else:
        assert type(pipe) is diffusers.StableDiffusionXLPipeline and type(model) is diffusers.UNet2DConditionModel
        assert model.config.addition_embed_type == "text_time"
        assert type(pipe.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    assert type(pipe.vae) is diffusers.AutoencoderKL


def test_pictures_are_the_same_whatever_they_are_painted_with(name: str, pipe):
    call = {**shipped.CALLS[name], "num_inference_steps": 4}
    both = paint(pipe, CAPTIONS, 0, call)
    again = paint(pipe, CAPTIONS, 0, call)
    assert torch.equal(both, again)
    alone = paint(pipe, CAPTIONS[:1], 0, call)
    torch.testing.assert_close(alone, both[:1], atol=0.1, rtol=0)  # 16 bit sums in another order
    assert both.shape == (2, 3, 64, 64) and both.isfinite().all() and both.std() > 0.05


def test_they_draw_what_held_out_captions_say(name: str, pipe):
    captions = described(32, 77, held_out=True)[1]
    pictures = paint(pipe, captions, 0, shipped.CALLS[name])
    assert sum(checker.agreement(checker.load_checker(), pictures, captions)) >= 0.85 * len(captions)


def test_the_autoencoder_gives_back_what_it_is_given(pipe):
    import random

    from nunchaku_py.demo.measure import psnr
    from nunchaku_py.demo.render import render
    from nunchaku_py.demo.scenes import draw

    pictures = render([draw(random.Random(seed), held_out=True) for seed in range(16)])
    with torch.no_grad():
        latents = pipe.vae.encode((pictures * 2 - 1).to(pipe.vae.dtype)).latent_dist.mean
        made = pipe.vae.decode(latents).sample.float().clamp(-1, 1) * 0.5 + 0.5
    assert psnr(made, pictures).mean() > 30
    scaled = (latents.float() - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.2 and 0.8 < scaled.std() < 1.2


def test_most_linears_of_blocks_are_quantized(name: str):
    report = nq.quantize(shipped.pipeline(name), "svdquant-int4", rank=16, progress=False)
    quantized = [row for row in report.rows if row.kind == "w4a4"]
    assert len(quantized) >= 14

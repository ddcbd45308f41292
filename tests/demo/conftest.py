"""Pipelines of random weights where the shipped ones lie: what is tested here does not depend on training."""

from pathlib import Path

import pytest
import torch

from nunchaku_py.demo import shipped
from tests import tiny_text
from tests.tiny_models import TEXT_DIM, randomise
from tests.tiny_pipelines import flux_prompt, sdxl_pipeline


def small_vae() -> torch.nn.Module:
    """A latent for 4 × 4 pixels, as in the shipped ones: 64 image tokens."""
    from diffusers import AutoencoderKL

    return randomise(AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=16, norm_num_groups=2, shift_factor=0.1, scaling_factor=0.5,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    flux = flux_prompt()[0]
    flux.register_modules(vae=small_vae())
    flux.save_pretrained(folder / "tiny-flux")
    text = dict(text_encoder=tiny_text.clip_model(width=TEXT_DIM // 2), tokenizer=tiny_text.clip_tokenizer(),
                tokenizer_2=tiny_text.clip_tokenizer())
    sdxl_pipeline(**text).to(torch.bfloat16).save_pretrained(folder / "tiny-sdxl")
    return folder


@pytest.fixture
def stand_in(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "WEIGHTS", weights)
    return weights

"""Good files, as small as they can be, to be damaged at random (fuzz_files.py)."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nunchaku_py as nq


def ours_diffusers(folder: Path) -> Path:
    """The smallest PixArt that has quantized linears."""
    from diffusers import PixArtTransformer2DModel

    from tests.checks import QUICK
    from tests.tiny_models import randomise

    model = randomise(PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=1, cross_attention_dim=64, sample_size=4,
        caption_channels=32, use_additional_conditions=False))
    nq.quantize(model, QUICK)
    return nq.save(model, folder / "ours.safetensors")


def ours_text(folder: Path) -> Path:
    """A text encoder, whose file names tensors that are shared."""
    from transformers import T5Config, T5EncoderModel

    from tests.tiny_models import randomise

    model = randomise(T5EncoderModel(T5Config(vocab_size=16, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)))
    nq.quantize(model, "w4a16-int4")
    return nq.save(model, folder / "text.safetensors")


def peer_flux(folder: Path) -> Path:
    """Nunchaku's INT4: packed q/k/v, modulations, linears in two parts."""
    from diffusers import FluxTransformer2DModel

    from tests.checks import QUICK
    from tests.tiny_models import flux_config, randomise

    model = randomise(FluxTransformer2DModel(**flux_config(num_layers=1, num_single_layers=1)))
    nq.quantize(model, QUICK)
    nq.export(model, folder / "svdq-int4.safetensors", "nunchaku")
    return folder / "svdq-int4.safetensors"


def peer_qwen(folder: Path) -> Path:
    """Nunchaku's NVFP4, with the longer names; and nothing in it is of us."""
    from diffusers import QwenImageTransformer2DModel

    from nunchaku_py.checkpoint.tensor_file import TensorFile, layout_of, write_tensors
    from tests.checks import QUICK_NVFP4
    from tests.tiny_models import AXES, randomise

    model = randomise(QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=64, axes_dims_rope=tuple(AXES)))
    nq.quantize(model, QUICK_NVFP4)
    nq.export(model, folder / "ours.safetensors", "nunchaku")
    with TensorFile(folder / "ours.safetensors") as file:
        tensors = {name: file.read(name) for name in file.names()}
        metadata = {key: value for key, value in file.metadata.items() if key != "nunchaku_py"}
    write_tensors(folder / "svdq-fp4.safetensors", layout_of(tensors), tensors.items(), metadata)
    return folder / "svdq-fp4.safetensors"


def peer_text(folder: Path) -> Path:
    """Nunchaku's text encoder: groups of 128."""
    from transformers import T5Config, T5EncoderModel

    from tests.tiny_models import randomise

    model = randomise(T5EncoderModel(T5Config(vocab_size=16, d_model=128, d_kv=64, d_ff=128, num_layers=1,
                                              num_heads=2)))
    nq.quantize(model, "w4a16-int4")
    nq.export(model, folder / "awq-int4.safetensors", "nunchaku")
    return folder / "awq-int4.safetensors"


# Name → writes a good file.
SEEDS: dict[str, Callable[[Path], Path]] = {
    "ours": ours_diffusers, "text": ours_text, "peer-flux": peer_flux, "peer-qwen": peer_qwen, "peer-text": peer_text}

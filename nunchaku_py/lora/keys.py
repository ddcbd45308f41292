"""The grammar of keys: (container) (module path) (part). Every trainer's spelling of these three is a row here."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# A part is what one tensor is of a module's change. The first row that matches the end of a key counts.
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"  # PEFT's name of the adapter, which only some savers take out
_SUFFIXES: tuple[tuple[str, str, str], ...] = (
    # (ending, part, style)
    (rf"\.lora_A{_ADAPTER}\.weight", "down", "PEFT"),
    (rf"\.lora_B{_ADAPTER}\.weight", "up", "PEFT"),
    (rf"\.lora_B{_ADAPTER}\.bias", "bias", "PEFT"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude", "PEFT"),
    (r"\.lora_down\.weight", "down", "kohya"),
    (r"\.lora_mid\.weight", "mid", "kohya"),
    (r"\.lora_up\.weight", "up", "kohya"),
    (r"\.lora_up\.bias", "bias", "kohya"),
    (r"\.dora_scale", "dora_scale", ""),
    (r"\.lora_(?:down|A)\.(?:scale_weight|weight_scale)", "down_scale", ""),
    (r"\.lora_(?:up|B)\.(?:scale_weight|weight_scale)", "up_scale", ""),
    (r"\.lora(?:_linear_layer)?\.down\.weight", "down", "diffusers, old"),
    (r"\.lora(?:_linear_layer)?\.up\.weight", "up", "diffusers, old"),
    (r"(?:\.lora(?:_linear_layer)?)?\.alpha", "alpha", ""),
    (r"\.(?P<part>hada_(?:w[12]_[ab]|t[12]))", "", "LoHa"),
    (r"\.(?P<part>lokr_(?:w[12]|w[12]_[ab]|t2))", "", "LoKr"),
    (r"\.diff", "diff", "full differences"),
    (r"\.diff_b", "diff_b", ""),
    # Methods whose change is no low-rank product: known as adapters, and left unread.
    (r"\.(?P<part>oft_\w+|[ab][12]\.weight|on_input|[wb]_norm|reshape_weight|set_weight|boft_\w+)", "", "another"),
)
_ENDINGS = [(re.compile(f"(?:{ending})$"), part, style) for ending, part, style in _SUFFIXES]
# `to_q_lora.down.weight` of old attention processors, and XLabs' `qkv_lora1.down.weight`: the path is `to_q`, `qkv1`.
_PROCESSOR = re.compile(r"^(.+)_lora([12]?)\.(down|up|alpha)(?:\.weight)?$")

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_DENOISER = ("",)
_T5 = ("text_encoder_3", "text_encoder_2")
# Container → the components it may stand for, of which the first that the pipeline has counts; "" is the denoiser.
_CONTAINERS: dict[str, tuple[str, ...]] = {
    "base_model.model.": _DENOISER,
    "model.diffusion_model.": _DENOISER,
    "diffusion_model.": _DENOISER,
    "transformer.": _DENOISER,
    "transformer_2.": ("transformer_2",),
    "unet.": _DENOISER,
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": _T5,
    "lora_unet_": _DENOISER,
    "lora_transformer_": _DENOISER,
    "lycoris_": _DENOISER,
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": _T5,
}


@dataclass(frozen=True)
class Key:
    """style is who writes keys like it, or the method they are of."""

    text: str
    part: str
    style: str
    stem: str  # container and module path, as they stand in the key

    def places(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """(components, module path), with one container after the other taken off: text encoders have modules named
        `transformer` and `model` too, so the caller takes the first reading that names a module."""
        components, path = _DENOISER, self.stem
        yield components, path
        while (name := next((name for name in _CONTAINERS if path.startswith(name)), None)) is not None:
            components = _CONTAINERS[name] if components == _DENOISER else components
            path = path[len(name):]
            yield components, path


def parse(key: str) -> Key | None:
    """None where the key is no part of an adapter."""
    processor = _PROCESSOR.match(key)
    if processor is not None:
        stem, number, part = processor.groups()
        style = "XLabs" if re.search(r"\.(?:qkv|proj)$", stem) else "diffusers, old"
        return Key(key, part, style, stem + number)
    for ending, part, style in _ENDINGS:
        found = ending.search(key)
        if found is not None and found.start() > 0:
            return Key(key, part or found["part"], style, key[:found.start()])
    return None

"""UNets of the Stable Diffusion family: transformer blocks between convolutions. The convolutions stay 16 bit."""

from __future__ import annotations

from .pattern import GENERIC

TEXT_ONLY = "reads only the text (77 rows): next to nothing to gain, and CLIP's outlier channels would cost accuracy"

SDXL = GENERIC.extend(
    classes=("UNet2DConditionModel", "ControlNetModel", "ControlNetUnionModel"),
    order=("down_blocks.*", "mid_block.*", "up_blocks.*"),  # mid_block is registered last
    keep=(("attn2.to_[kv]", TEXT_ONLY),),
)

"""The exact plans of the architectures that have a file of their own."""

from __future__ import annotations

import pytest
from torch import nn

from nunchaku_py.models import Unit, pattern_of, plan
from nunchaku_py.models.flux import FLUX
from nunchaku_py.models.sdxl import SDXL, TEXT_ONLY
from tests.tiny import MODELS

Row = tuple[tuple[str, ...], str, bool, tuple[int, int] | None]

DOUBLE: list[Row] = [
    (("norm1.linear",), "w4a16", False, None),
    (("norm1_context.linear",), "w4a16", False, None),
    (("attn.to_q", "attn.to_k", "attn.to_v"), "w4a4", False, None),
    (("attn.to_out.0",), "w4a4", False, None),
    (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "w4a4", False, None),
    (("attn.to_add_out",), "w4a4", False, None),
    (("ff.net.0.proj",), "w4a4", False, None),
    (("ff.net.2",), "w4a4", True, None),
    (("ff_context.net.0.proj",), "w4a4", False, None),
    (("ff_context.net.2",), "w4a4", True, None),
]
SINGLE: list[Row] = [
    (("norm.linear",), "w4a16", False, None),
    (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "w4a4", False, None),
    (("proj_out",), "w4a4", False, (0, 128)),  # attention
    (("proj_out",), "w4a4", True, (128, 640)),  # MLP
]
TRANSFORMER: list[Row] = [
    (("attn1.to_q", "attn1.to_k", "attn1.to_v"), "w4a4", False, None),
    (("attn1.to_out.0",), "w4a4", False, None),
    (("attn2.to_q",), "w4a4", False, None),
    (("attn2.to_out.0",), "w4a4", False, None),
    (("ff.net.0.proj",), "w4a4", False, None),
    (("ff.net.2",), "w4a4", False, None),  # GEGLU: the product has no lower bound
]
FLUX_OUTSIDE = [
    *(f"time_text_embed.{part}_embedder.linear_{i}" for part in ("timestep", "guidance", "text") for i in (1, 2)),
    "context_embedder",
    "x_embedder",
    "norm_out.linear",
    "proj_out",
]
SDXL_BLOCKS = [
    "down_blocks.1.attentions.0.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
    "up_blocks.0.attentions.0.transformer_blocks.0",
    "up_blocks.0.attentions.1.transformer_blocks.0",
]


def unit(block: str, row: Row) -> Unit:
    names, kind, gelu, k_range = row
    return Unit(tuple(f"{block}.{name}" for name in names), kind, gelu, block, k_range)


def test_flux() -> None:
    got = plan(MODELS["flux"]()[0])
    double = [unit(f"transformer_blocks.{i}", row) for i in range(2) for row in DOUBLE]
    single = [unit(f"single_transformer_blocks.{i}", row) for i in range(2) for row in SINGLE]
    assert got.units == double + single
    assert list(got.kept) == FLUX_OUTSIDE


def test_chroma_is_flux_without_modulation() -> None:
    got = plan(MODELS["chroma"]()[0])
    rows = [row for row in SINGLE if row[1] == "w4a4"]
    assert got.of_block("single_transformer_blocks.0") == [unit("single_transformer_blocks.0", row) for row in rows]


def test_sdxl() -> None:
    got = plan(MODELS["sdxl"]()[0])
    assert got.units == [unit(block, row) for block in SDXL_BLOCKS for row in TRANSFORMER]
    text = {name for name, reason in got.kept.items() if reason == TEXT_ONLY}
    assert text == {f"{block}.attn2.{name}" for block in SDXL_BLOCKS for name in ("to_k", "to_v")}


def test_proj_out_without_gelu_stays_whole() -> None:
    block = nn.ModuleDict({"proj_mlp": nn.Linear(64, 128), "act_mlp": nn.SiLU(), "proj_out": nn.Linear(128, 64)})
    ((_, split),) = FLUX.parts
    assert split(block["proj_out"], block) is None


@pytest.mark.parametrize(("case", "pattern"), [("flux", FLUX), ("chroma", FLUX), ("sdxl", SDXL)])
def test_pattern_of(case: str, pattern: object) -> None:
    assert pattern_of(MODELS[case]()[0]) is pattern


def test_pattern_of_a_subclass() -> None:
    from diffusers import FluxTransformer2DModel

    class Mine(FluxTransformer2DModel):
        pass

    with_nothing = Mine.__new__(Mine)
    assert pattern_of(with_nothing) is FLUX

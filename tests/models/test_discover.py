"""Discovery by rule, also in models that no file here names."""

from __future__ import annotations

import pytest
from torch import nn

from nunchaku_py.models import GENERIC, blocks_of, pattern_of, plan
from nunchaku_py.models.discover import after_gelu, is_linear, shared_inputs
from tests.tiny import MODELS, TEXT_ENCODERS
from tests.tiny_models import flux_controlnet, sdxl_controlnet


class NobodysBlock(nn.Module):
    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("to_q", "to_k", "to_v", "out")})
        self.cross_attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("to_q", "to_k", "to_v")})
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Dropout(), nn.Linear(2 * dim, dim)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.point = nn.Conv2d(dim, dim, 1)
        self.depth = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


class NobodysModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 64)
        self.stages = nn.ModuleList(
            [nn.ModuleList([NobodysBlock() for _ in range(2)]), nn.ModuleList([NobodysBlock()])]
        )


def test_a_model_that_nobody_named() -> None:
    model = NobodysModel()
    got = plan(model)
    assert pattern_of(model) is GENERIC
    assert got.kept == {"embed": "outside the repeated blocks"}
    inside = [(unit.names, unit.kind, unit.gelu) for unit in got.of_block(got.blocks[0])]
    block = got.blocks[0]
    assert got.blocks == ("stages.0.0", "stages.0.1", "stages.1.0")
    assert [(tuple(n[len(block) + 1 :] for n in names), kind, gelu) for names, kind, gelu in inside][:8] == [
        (("self_attn.to_q", "self_attn.to_k", "self_attn.to_v"), "w4a4", False),
        (("self_attn.out",), "w4a4", False),
        (("cross_attn.to_q",), "w4a4", False),
        (("cross_attn.to_k", "cross_attn.to_v"), "w4a4", False),
        (("mlp.0",), "w4a4", False),
        (("mlp.3",), "w4a4", True),
        (("adaLN_modulation.1",), "w4a16", False),
        (("point",), "w4a4", False),
    ]


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("flux", [f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in range(2)]),
        # not patch_embed, which _no_split_modules names too
        ("sana", ["transformer_blocks.0", "transformer_blocks.1"]),
        ("cogvideox", ["transformer_blocks.0", "transformer_blocks.1"]),
        ("wan", ["blocks.0", "blocks.1"]),
        ("z_image", ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"]),
        ("t5", ["encoder.block.0", "encoder.block.1"]),
        ("clip", ["encoder.layers.0", "encoder.layers.1"]),
    ],
)
def test_blocks(case: str, names: list[str]) -> None:
    assert list(blocks_of((MODELS | TEXT_ENCODERS)[case]()[0])) == names


def test_unet_blocks_come_in_order_of_execution() -> None:
    model = MODELS["sdxl"]()[0]
    stages = [name.partition(".")[0] for name in blocks_of(model, pattern_of(model))]
    assert stages == sorted(stages, key=["down_blocks", "mid_block", "up_blocks"].index)
    assert set(stages) == {"down_blocks", "mid_block", "up_blocks"}


def test_controlnets_declare_no_blocks_and_are_found_still() -> None:
    flux = blocks_of(flux_controlnet()[0])
    assert list(flux) == ["transformer_blocks.0", "single_transformer_blocks.0"]  # not the zero projections
    assert all(name.endswith("transformer_blocks.0") for name in blocks_of(sdxl_controlnet()[0]))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(4, 4), True),
        (nn.Conv2d(4, 4, 1), True),
        (nn.Conv2d(4, 4, 3, padding=1), False),
        (nn.Conv2d(4, 4, 1, stride=2), False),
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.Conv2d(4, 4, 1, padding=1), False),
        (nn.Conv1d(4, 4, 1), False),
        (nn.MultiheadAttention(4, 1).out_proj, False),
    ],
)
def test_is_linear(module: nn.Module, expected: bool) -> None:
    assert is_linear(module) is expected


def test_members_of_different_width_share_nothing() -> None:
    block = nn.ModuleDict({"to_q": nn.Linear(64, 64), "to_k": nn.Linear(32, 64), "to_v": nn.Linear(32, 64)})
    assert shared_inputs(block, GENERIC) == [("to_k", "to_v")]


@pytest.mark.parametrize(
    ("children", "found"),
    [
        ({"act": nn.GELU(), "fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}, {"fc2"}),
        ({"act": nn.SiLU(), "fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}, set()),
        ({"act": nn.GELU(), "fc1": nn.Linear(4, 16), "fc2": nn.Linear(8, 4)}, set()),  # gated
        ({"act": nn.GELU(), "fc1": nn.Linear(4, 8), "norm": nn.LayerNorm(8), "fc2": nn.Linear(8, 4)}, set()),
    ],
)
def test_after_gelu(children: dict[str, nn.Module], found: set[str]) -> None:
    assert after_gelu(nn.ModuleDict(children), GENERIC) == found

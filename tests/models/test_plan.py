"""The plan: what every architecture's linears become, rules, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nunchaku_py.errors import NunchakuError
from nunchaku_py.models import plan
from nunchaku_py.models.plan import OUTSIDE
from tests.tiny import MODELS, TEXT_ENCODERS
from tests.tiny_pipelines import flux_ip_adapter

# Share of the weights inside blocks that must become w4a4; and w4a4 or w4a16. Much the same in the real models.
COVERAGE = {
    "flux": (0.7, 1.0),
    "flux2": (1.0, 1.0),
    "chroma": (1.0, 1.0),
    "sdxl": (0.9, 0.9),  # attn2.to_k and to_v stay
    "sd3": (0.65, 1.0),
    "pixart": (1.0, 1.0),
    "sana": (1.0, 1.0),
    "qwen_image": (0.65, 1.0),
    "z_image": (0.7, 1.0),
    "wan": (1.0, 1.0),
    "ltx": (1.0, 1.0),
    "cogvideox": (0.65, 1.0),
    "clip": (1.0, 1.0),
    "clip_with_projection": (1.0, 1.0),
    "t5": (1.0, 1.0),
}


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return MODELS["flux"]()[0]


@pytest.mark.parametrize("case", COVERAGE)
def test_coverage_inside_blocks(case: str) -> None:
    model, _ = (MODELS | TEXT_ENCODERS)[case]()
    got = plan(model)
    inside = sum(n for name, n in got.weights.items() if got.kept.get(name) != OUTSIDE)
    total = sum(got.weights.values())
    w4a4, quantized = (got.share(*kinds) * total / inside for kinds in (("w4a4",), ("w4a4", "w4a16")))
    least_w4a4, least = COVERAGE[case]
    assert w4a4 > least_w4a4 - 1e-9 and quantized > least - 1e-9


@pytest.mark.parametrize("case", MODELS)
def test_every_linear_is_planned_or_kept_with_a_reason(case: str) -> None:
    model, _ = MODELS[case]()
    got = plan(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears <= set(got.choices) | set(got.kept) == set(got.weights)
    assert not set(got.choices) & set(got.kept)
    assert all(got.kept.values())
    full = [unit for unit in got.units if unit.k_range is None]
    assert sum(len(unit.names) for unit in full) == len({name for unit in full for name in unit.names})


def test_rules_override_in_order(flux: nn.Module) -> None:
    got = plan(flux, rules={"*.norm1.linear": "keep", "*.0.norm1.linear": "w4a4", "x_embedder": "w4a16"})
    assert got.kept["transformer_blocks.1.norm1.linear"] == "rule '*.norm1.linear'"
    assert got.choices["transformer_blocks.0.norm1.linear"] == "w4a4"
    assert got.units[-1].names == ("x_embedder",) and got.units[-1].block == ""


def test_a_group_splits_where_its_members_differ(flux: nn.Module) -> None:
    got = plan(flux, rules={"transformer_blocks.0.attn.to_v": "keep", "*.1.attn.to_v": "w4a16"})
    names = [unit.names for unit in got.units if unit.block == "transformer_blocks.0"]
    assert ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k") in names
    kinds = {unit.names: unit.kind for unit in got.of_block("transformer_blocks.1")}
    assert kinds["transformer_blocks.1.attn.to_v",] == "w4a16"


def test_weight_only_plan_has_no_shift_and_no_parts(flux: nn.Module) -> None:
    got = plan(flux, "w4a16")
    assert {unit.kind for unit in got.units} == {"w4a16"}
    assert not any(unit.gelu or unit.k_range for unit in got.units)


def test_plan_works_on_the_meta_device() -> None:
    model = MODELS["qwen_image"]()[0]
    assert plan(model.to("meta")).share("w4a4") > 0.5


@pytest.mark.parametrize(
    ("name", "w4a4", "w4a16"),  # shares of all weights of linears
    [
        ("FluxTransformer2DModel", 0.72, 0.27),
        ("QwenImageTransformer2DModel", 0.66, 0.33),
        ("WanTransformer3DModel", 0.98, 0.0),
        ("HunyuanVideoTransformer3DModel", 0.72, 0.26),
        ("Lumina2Transformer2DModel", 0.89, 0.1),
    ],
)
def test_coverage_of_real_sizes(name: str, w4a4: float, w4a16: float) -> None:
    import diffusers

    with torch.device("meta"):
        got = plan(getattr(diffusers, name)())
    assert got.share("w4a4") > w4a4 and got.share("w4a16") >= w4a16


def test_ip_adapter_weights_stay(flux: nn.Module) -> None:
    pipe, _ = flux_ip_adapter()
    got = plan(pipe.transformer)
    added = {name for name in got.kept if "_ip." in name}
    assert len(added) == 4 and all("IP-Adapter" in got.kept[name] for name in added)
    assert got.choices == plan(flux).choices


def test_small_and_special_linears_stay() -> None:
    block = nn.ModuleDict(
        {"small": nn.Linear(16, 64), "attention": nn.MultiheadAttention(64, 2), "big": nn.Linear(64, 64)}
    )
    got = plan(nn.ModuleDict({"blocks": nn.ModuleList([block])}))
    assert set(got.choices) == {"blocks.0.big"}
    assert got.kept["blocks.0.small"].startswith("small")
    assert "NonDynamicallyQuantizableLinear" in got.kept["blocks.0.attention.out_proj"]


def test_table_counts(flux: nn.Module) -> None:
    rows = plan(flux).table().splitlines()
    assert [row.split()[0] for row in rows] == ["linears", "6", "34", "10"]
    assert rows[-1].endswith(OUTSIDE)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"*.to_quux": "keep"}, r"\*\.to_quux"),
        ({"*.to_q": "w3a3"}, "w3a3"),
        ({"norm_out.norm": "keep"}, "norm_out.norm"),
    ],
)
def test_wrong_rules_are_errors(flux: nn.Module, rules: dict[str, str], words: str) -> None:
    with pytest.raises(NunchakuError, match=words):
        plan(flux, rules=rules)


def test_wrong_kind_is_an_error(flux: nn.Module) -> None:
    with pytest.raises(NunchakuError, match="w8a8"):
        plan(flux, "w8a8")


def test_a_model_without_linears_is_an_error() -> None:
    with pytest.raises(NunchakuError, match="no linear"):
        plan(nn.Conv2d(8, 8, 3))


def _marked(attribute: str, value: object) -> nn.Module:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(64, 64)})])})
    setattr(model["blocks"][0]["to_q"], attribute, value)
    return model


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("is_nunchaku_quantized", True, "already quantized"),
        ("lora_A", torch.nn.ModuleDict(), "carries a LoRA"),
        ("fused_projections", True, "unfuse_qkv_projections"),
    ],
)
def test_states_that_cannot_be_quantized_are_errors(attribute: str, value: object, words: str) -> None:
    with pytest.raises(NunchakuError, match=rf"blocks\.0\.to_q .*{words}"):
        plan(_marked(attribute, value))


def test_a_loaded_lora_is_an_error(flux: nn.Module) -> None:
    from peft import LoraConfig

    model = MODELS["flux"]()[0]
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(NunchakuError, match="LoRA"):
        plan(model)


def test_a_linear_of_two_names_is_reported_under_both() -> None:
    block = lambda: nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})  # noqa: E731
    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})
    model["blocks"][1]["a"] = model["blocks"][0]["a"]
    got = plan(model)
    assert "blocks.0.a" in got.choices
    assert got.kept["blocks.1.a"] == "is the same module as blocks.0.a, under which it is quantized"

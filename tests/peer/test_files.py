"""Files that were not written by this package, made from the format's description: what they say is read to the bit,
the models they make give what the weights they stand for give, and they are written again as they were.

What cannot come back as it was, because a file does not say which of two ways it was written in:
- the names of a file with the other suffixes: those of its architecture are written;
- wtscale and wcscales: one number for a linear of one module whose rows have one in common, else one a row;
- that a folder was two files, and tensors that nothing reads (SANA's pag_to_v).
"""
from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import nunchaku_py as nq
from nunchaku_py.linear import QuantizedSite
from nunchaku_py.split_linear import SplitLinear
from nunchaku_py.swap import quantized_modules
from tests.checks import bits, relative, run, same_bits
from tests.peer.files import SHIFT, Part, PeerFile, Recipe, make, write
from tests.peer.names import LONG, SHORT, packed_linears

BF16, FP16 = torch.bfloat16, torch.float16
PLAIN = [Recipe(family, precision, dtype, rank) for family, rank in
         (("flux", 32), ("qwen_image", 48), ("z_image", 32), ("sdxl", 16), ("sana", 32))
         for precision, dtype in (("int4", BF16), ("nvfp4", FP16))]
PLAIN += [Recipe("flux", "int4", FP16, 48, heads=3), Recipe("flux", "nvfp4", BF16, 16, heads=3, seed=1),
          Recipe("sana", "int4", FP16, 16), Recipe("z_image", "nvfp4", BF16, 48), Recipe("t5", "int4", BF16),
          Recipe("t5", "int4", FP16)]
VARIANTS = [
    Recipe("flux", "int4", BF16, 16, other_suffixes=True), Recipe("qwen_image", "nvfp4", BF16, other_suffixes=True),
    Recipe("flux", "int4", BF16, legacy=True), Recipe("flux", "nvfp4", FP16, 16, legacy=True),
    Recipe("flux", "nvfp4", BF16, second_scale="wtscale"), Recipe("flux", "nvfp4", FP16, second_scale="wcscales"),
    Recipe("z_image", "nvfp4", BF16, second_scale="both"), Recipe("sana", "nvfp4", BF16, second_scale="wcscales"),
    Recipe("flux", "int4", BF16, zeros=-8.0), Recipe("qwen_image", "int4", FP16, zeros=None),
    Recipe("z_image", "int4", BF16, dense_refiners=True), Recipe("sana", "int4", BF16, pag=True),
]
FUSED = [Recipe("flux", "int4", BF16, fused=True), Recipe("flux", "nvfp4", FP16, fused=True),
         Recipe("qwen_image", "int4", BF16, fused=True)]
RECIPES = [pytest.param(recipe, id=str(recipe)) for recipe in PLAIN + VARIANTS + FUSED]


@pytest.fixture(scope="module", params=RECIPES)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeerFile:
    return write(make(request.param), tmp_path_factory.mktemp("peer"))


@pytest.fixture(scope="module")
def loaded(peer: PeerFile) -> nn.Module:
    return nq.load(peer.path)


def sites_of(module: nn.Module) -> list[QuantizedSite]:
    return list(module.parts) if isinstance(module, SplitLinear) else [module]


def bias_of(module: nn.Module) -> Tensor | None:
    """fp64, without the shift's correction."""
    if module.bias is None:
        return None
    return module.bias.double() + sum(site.correction().double() for site in sites_of(module) if site.site.shift)


# ------------------------------------------------------------------------------------------------------- what is read
def test_the_class_is_diffusers_and_every_linear_is_quantized(peer: PeerFile, loaded: nn.Module) -> None:
    assert type(loaded) is type(peer.model)
    assert set(quantized_modules(loaded)) == set(peer.truths)


def test_weights_smoothing_and_branches_are_the_files(peer: PeerFile, loaded: nn.Module) -> None:
    for name, module in quantized_modules(loaded).items():
        truth, sites = peer.truths[name], sites_of(module)
        assert len(sites) == len(truth.parts), name
        for site, part in zip(sites, truth.parts, strict=True):
            assert torch.equal(site.qtensor().dequantize(), part.residual), name  # e2m1 has a -0, which is 0
            assert site.site.has_smooth == (part.smooth is not None), name
            if part.smooth is not None:
                _check_w4a4(name, site, part, peer.recipe)


def _check_w4a4(name: str, site: QuantizedSite, part: Part, recipe: Recipe) -> None:
    assert same_bits(site.smooth.data, part.smooth), name
    assert same_bits(site.down.data, part.down) and same_bits(site.up.data, part.up), name
    assert (site.site.rank, site.site.format) == (recipe.rank, recipe.precision), name
    assert (site.site.divided == "input") == (part.divisor is not None), name
    if part.divisor is not None:
        assert same_bits(site.divisor.data, part.divisor), name


def test_what_a_fused_smoothing_divides_says_so(peer: PeerFile, loaded: nn.Module) -> None:
    """The values of attentions, and nothing else."""
    values = {name for name, module in quantized_modules(loaded).items()
              if "output" in [site.site.divided for site in sites_of(module)]}
    assert values == {name for name in peer.truths if peer.recipe.fused and name.endswith(("to_v", "add_v_proj"))}
    for name in values:
        blocks = [part.divisor for other, truth in peer.truths.items() for part in truth.parts
                  if part.divisor is not None and other.split(".")[:2] == name.split(".")[:2]]
        assert same_bits(quantized_modules(loaded)[name].divisor.data, blocks[0]), name


def test_biases_are_what_the_network_adds(peer: PeerFile, loaded: nn.Module) -> None:
    """Exact, but where the shift's correction is a sum: K fp32 additions and a division each."""
    for name, module in quantized_modules(loaded).items():
        found, wanted = bias_of(module), peer.truths[name].bias
        if wanted is None:
            assert found is None, name
            continue
        bound = torch.zeros(1, dtype=torch.float64)
        for part in peer.truths[name].parts:
            if part.shifted:
                terms = (part.residual.double() / part.smooth.double()).abs().sum(1)
                bound = bound + SHIFT * terms * (part.residual.shape[1] + 2) * 2.0**-24
        assert ((found - wanted).abs() <= bound).all(), name


def test_what_follows_a_gelu_in_int4_is_shifted(peer: PeerFile, loaded: nn.Module) -> None:
    gelu = {(item.modules[0], item.columns) for item in packed_linears(peer.recipe.family, peer.recipe.dense_refiners)
            if item.after_gelu and peer.recipe.precision == "int4"}
    assert bool(gelu) == (peer.recipe.family in ("flux", "qwen_image") and peer.recipe.precision == "int4")
    for name, module in quantized_modules(loaded).items():
        columns = ("attention", "mlp") if isinstance(module, SplitLinear) else ("",)
        for site, which in zip(sites_of(module), columns, strict=True):
            wanted = (SHIFT, True) if (name, which) in gelu else (0.0, False)
            assert (site.site.shift, site.site.unsigned_act) == wanted, (name, which)


def test_what_stays_in_16_bit_is_the_files(peer: PeerFile, loaded: nn.Module) -> None:
    packed, state = tuple(f"{name}." for name in peer.truths), loaded.state_dict()
    for name, tensor in peer.model.state_dict().items():
        if not name.startswith(packed):
            assert same_bits(state[name], tensor), name


# --------------------------------------------------------------------------------------------------- what is computed
def as_fp32(value: object) -> object:
    if isinstance(value, list):
        return [as_fp32(inner) for inner in value]
    return value.float() if isinstance(value, Tensor) and value.dtype == BF16 else value


def test_the_model_gives_what_its_weights_give(peer: PeerFile) -> None:
    """In fp32, mode a16: a linear of K inputs sums K products and as many ranks, each rounded at 2^-24, and what one
    linear errs the next ones pass on. A row out of order, a shift or a 1 forgotten change everything."""
    model = nq.load(peer.path, mode="a16", dtype=torch.float32)
    kept = {tensor.dtype for name, tensor in model.named_parameters()
            if not name.startswith(tuple(f"{name}." for name in peer.truths))}
    assert kept == {torch.float32}
    if peer.recipe.family == "t5":  # it asks its linears for their dtype; diffusers' models refuse to be cast
        model = model.to(torch.float32)
    inputs = {key: as_fp32(value) for key, value in peer.inputs.items()}
    wanted, found = run(peer.dense(), inputs), run(model, inputs)
    longest = max(part.residual.shape[1] for truth in peer.truths.values() for part in truth.parts)
    assert found.isfinite().all() and wanted.std() > 0.1
    assert relative(found, wanted) < math.sqrt(len(peer.truths)) * (longest + peer.recipe.rank) * 2.0**-24


def test_a_row_out_of_order_would_be_seen() -> None:
    """The bound above is far below what the smallest mistake changes."""
    peer = make(PLAIN[0])
    inputs = {key: as_fp32(value) for key, value in peer.inputs.items()}
    wanted = run(peer.dense(), inputs)
    for name in ("transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.proj_mlp"):
        changed = replace(peer, truths=dict(peer.truths))
        truth = peer.truths[name]
        residual = truth.parts[0].residual.clone()
        residual[[2, 3]] = residual[[3, 2]]
        changed.truths[name] = replace(truth, parts=[replace(truth.parts[0], residual=residual)])
        assert relative(run(changed.dense(), inputs), wanted) > 1e-3


# ---------------------------------------------------------------------------------------------------- written again
def expected(peer: PeerFile) -> dict[str, Tensor]:
    """The tensors of the file, under the names that are written."""
    tensors = dict(peer.tensors)
    if peer.recipe.other_suffixes:
        usual = replace(peer.recipe, other_suffixes=False).suffixes
        other = LONG if usual is SHORT else SHORT
        names = {other[key]: usual[key] for key in usual}
        tensors = {".".join((name.rpartition(".")[0], names.get(name.rpartition(".")[2], name.rpartition(".")[2]))):
                   tensor for name, tensor in tensors.items()}
    if peer.recipe.second_scale in ("wtscale", "both"):
        for item in packed_linears(peer.recipe.family):
            if item.kind == "w4a4" and (peer.recipe.second_scale == "both" or len(item.modules) > 1):
                tensors[f"{item.name}.wcscales"] = _in_channels(tensors, item.name)
                del tensors[f"{item.name}.wtscale"]
    return {name: tensor for name, tensor in tensors.items() if ".pag_to_v." not in name}


def _in_channels(tensors: dict[str, Tensor], name: str) -> Tensor:
    """wtscale · wcscales, a power of two times a number; what pads stays 1."""
    rows = tensors[f"{name}.wscales"].shape[1]
    whole, channels = tensors[f"{name}.wtscale"], tensors.get(f"{name}.wcscales")
    return whole.expand(rows) if channels is None else torch.where(channels == 1, channels, channels * whole)


def check_same(path: Path, peer: PeerFile) -> None:
    found, wanted = load_file(path), expected(peer)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def check_metadata(path: Path, peer: PeerFile) -> None:
    with safe_open(path, "pt") as file:
        found = file.metadata()
    config, wanted = json.loads(found["config"]), json.loads(peer.metadata["config"])
    wanted = {key: value for key, value in wanted.items() if key != "_name_or_path"}
    assert "quantization_config" not in config
    assert {key: config.get(key) for key in wanted if key not in ("architectures", "dtype")} == \
        {key: value for key, value in wanted.items() if key not in ("architectures", "dtype")}
    assert found["model_class"] == peer.metadata["model_class"]
    if not peer.recipe.legacy and peer.recipe.family != "t5":  # the folder has none
        assert json.loads(found["quantization_config"]) == json.loads(peer.metadata["quantization_config"])
    if peer.recipe.family == "flux" and not peer.recipe.legacy:
        assert json.loads(found["comfy_config"]) == json.loads(peer.metadata["comfy_config"])


def test_exporting_gives_the_file_again(peer: PeerFile, loaded: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "again.safetensors"
    notes = nq.export(loaded, path, "nunchaku")
    check_same(path, peer)
    check_metadata(path, peer)
    assert not notes.changes


@pytest.mark.parametrize("ours", ["folder", "model.safetensors"])
def test_our_own_format_keeps_all_that_the_file_needs(peer: PeerFile, loaded: nn.Module, tmp_path: Path, ours: str
                                                      ) -> None:
    nq.save(loaded, tmp_path / ours)
    path = tmp_path / "again.safetensors"
    nq.export(nq.load(tmp_path / ours), path, "nunchaku")
    check_same(path, peer)
    check_metadata(path, peer)


def test_a_file_that_was_exported_is_exported_to_the_same_bytes(tmp_path: Path) -> None:
    peer = write(make(PLAIN[0]), tmp_path)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    nq.export(nq.load(peer.path), first, "nunchaku")
    nq.export(nq.load(first), second, "nunchaku")
    assert first.read_bytes() == second.read_bytes()


def test_scales_that_are_missing_are_one(tmp_path: Path) -> None:
    file = make(Recipe("flux", "nvfp4"))
    name, module = "transformer_blocks.0.mlp_fc1", "transformer_blocks.0.ff.net.0.proj"
    scale = file.tensors.pop(f"{name}.wtscale").float()
    found = quantized_modules(nq.load(write(file, tmp_path).path))[module]
    assert (found.channel_scale == 1).all()
    assert torch.equal(found.qtensor().dequantize() * scale, file.truths[module].parts[0].residual)

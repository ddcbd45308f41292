"""nunchaku_lite folders: what is read from handmade ones, and what is written and read back."""
from __future__ import annotations

import copy
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import nunchaku_py as nq
from nunchaku_py.checkpoint.lite_write import write_lite
from nunchaku_py.errors import NunchakuError
from nunchaku_py.linear import QuantizedSite
from nunchaku_py.site import Site
from nunchaku_py.split_linear import SplitLinear
from nunchaku_py.swap import quantized_modules, quantized_sites
from tests import lite_files
from tests.checks import QUICK, QUICK_NVFP4, differences, relative, run, same_bits
from tests.lite_files import FILE, Handmade, awq_section, edit_config, edit_tensors, section, shard, write_by_hand
from tests.tiny import MODELS

TO_Q, PROJ_OUT = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.{}.proj_out"
MODULATION = "transformer_blocks.0.norm1.linear"
SPLIT = {"type": "split_linear", "module": "single_transformer_blocks.*.proj_out", "args": {"splits": ["out_features"]}}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return MODELS["flux"]()[0]


@pytest.fixture(scope="module")
def written(quantized: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder, what was noted) of `quantized`."""
    folder = tmp_path_factory.mktemp("lite")
    return folder, write_lite(quantized[0], folder)


@pytest.fixture
def handmade(dense: nn.Module, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    return write_by_hand(dense, tmp_path, {TO_Q: lite_files.w4a4(128, 128, "nvfp4", 16)},
                         svdq_w4a4=section([TO_Q], "nvfp4"))


def weight_of(module: nn.Module) -> torch.Tensor:
    sites = module.parts if isinstance(module, SplitLinear) else [module]
    if not isinstance(sites[0], QuantizedSite):
        return module.weight.data.float()
    return torch.cat([site.effective_weight() for site in sites], 1)


# --------------------------------------------------------------------------------------------------- handmade folders
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_reads_what_formulas_packed(dense: nn.Module, tmp_path: Path, fmt: str) -> None:
    made = {TO_Q: lite_files.w4a4(128, 128, fmt, 32), "transformer_blocks.0.ff.net.0.proj":
            lite_files.w4a4(512, 128, fmt, 32), "transformer_blocks.1.ff.net.2": lite_files.w4a4(128, 512, fmt, 32),
            MODULATION: lite_files.w4a16(768, 128)}
    w4a4 = [name for name in made if name != MODULATION]
    write_by_hand(dense, tmp_path, made, svdq_w4a4=section(w4a4, fmt, 32), awq_w4a16=awq_section([MODULATION]))
    model = nq.load(tmp_path)
    assert set(quantized_modules(model)) == set(made)
    for name, expected in made.items():
        module = model.get_submodule(name)
        torch.testing.assert_close(weight_of(module), expected.weight, rtol=1e-6, atol=1e-6)
        assert same_bits(module.bias, expected.bias)
    assert model.get_submodule(TO_Q).site.rank == 32
    rest = dict(dense.named_parameters())
    assert all(same_bits(tensor, rest[name]) for name, tensor in model.named_parameters() if name in rest
               and name.rpartition(".")[0] not in made)


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
@pytest.mark.parametrize("size", ["out_features", 256])
def test_reads_linears_in_parts(dense: nn.Module, tmp_path: Path, fmt: str, size: Any) -> None:
    first = 128 if size == "out_features" else size
    made: dict[str, Handmade] = {}
    for block in (0, 1):
        for part, k in enumerate((first, 640 - first)):
            made[f"{PROJ_OUT.format(block)}.linears.{part}"] = one = lite_files.w4a4(128, k, fmt, 16)
            if not part:
                del one.tensors["bias"]
    patch = {**SPLIT, "args": {"splits": [size]}}
    write_by_hand(dense, tmp_path, made, svdq_w4a4=section(list(made), fmt), patches=[patch])
    model = nq.load(tmp_path)
    for block in (0, 1):
        module, parts = model.get_submodule(PROJ_OUT.format(block)), list(made.values())[2 * block:2 * block + 2]
        assert module.ranges == ((0, first), (first, 640))
        expected = torch.cat([part.weight for part in parts], 1)
        torch.testing.assert_close(weight_of(module), expected, rtol=1e-6, atol=1e-6)
        assert same_bits(module.bias, parts[1].bias)


def test_what_belongs_together_may_lie_in_several_files(handmade: Path) -> None:
    whole = nq.load(handmade)
    shard(handmade)
    assert differences(whole.state_dict(), nq.load(handmade).state_dict()) == []


@pytest.mark.parametrize("leaf", ["wcscales", "wtscale"])
def test_one_second_scale_does(handmade: Path, leaf: str) -> None:
    before = nq.load(handmade).get_submodule(TO_Q).channel_scale
    gone = load_file(handmade / FILE)[f"{TO_Q}.{leaf}"]
    edit_tensors(handmade, lambda state: state.pop(f"{TO_Q}.{leaf}"))
    after = nq.load(handmade).get_submodule(TO_Q).channel_scale
    if leaf == "wtscale":
        assert torch.equal(after * gone.float(), before)
    else:
        assert after.unique().tolist() == [torch.tensor(0.37).bfloat16().item()]


def test_rank_0_has_no_branch(dense: nn.Module, tmp_path: Path) -> None:
    made = lite_files.w4a4(128, 128, "int4", 0)
    write_by_hand(dense, tmp_path, {TO_Q: made}, svdq_w4a4=section([TO_Q], "int4", 0))
    module = nq.load(tmp_path).get_submodule(TO_Q)
    assert module.site.rank == 0 and set(module.state_dict()) == {"codes", "scales", "smooth", "bias"}
    torch.testing.assert_close(weight_of(module), made.weight, rtol=1e-6, atol=1e-6)


def test_float16_tensors_stay_float16_whatever_is_asked(dense: nn.Module, tmp_path: Path) -> None:
    made = lite_files.w4a4(128, 128, "int4", 16)
    made.tensors = {leaf: tensor.half() if tensor.is_floating_point() else tensor
                    for leaf, tensor in made.tensors.items()}
    write_by_hand(dense, tmp_path, {TO_Q: made}, svdq_w4a4=section([TO_Q], "int4"))
    for dtype in (None, torch.bfloat16, torch.float32):
        model = nq.load(tmp_path, dtype=dtype)
        module = model.get_submodule(TO_Q)
        assert module.scales.dtype == torch.float16 and module.compute_dtype == (dtype or torch.bfloat16)
        assert model.x_embedder.weight.dtype == (dtype or torch.bfloat16)
        torch.testing.assert_close(module.scales.float().T, made_rows(made), rtol=0, atol=0)


def made_rows(made: Handmade) -> torch.Tensor:
    """Scales (G, N) in the order of rows."""
    order = lite_files.vector(torch.arange(128))
    return made.tensors["wscales"].float()[:, order.argsort()]


# ------------------------------------------------------------------------------------------------------------ refusals
def _without(key: str):
    return lambda folder: edit_tensors(folder, lambda state: state.pop(key))


def _with(key: str, make: Any):
    return lambda folder: edit_tensors(folder, lambda state: state.update({key: make(state)}))


def _config(**changes: Any):
    return lambda folder: edit_config(folder, lambda config: config["quantization_config"].update(changes))


def _section(**changes: Any):
    return lambda folder: edit_config(folder, lambda config: config["quantization_config"]["svdq_w4a4"].update(changes))


REFUSED = {
    "a tensor is missing": (_without(f"{TO_Q}.wscales"), rf"{FILE}: 1 tensors are missing: {TO_Q}.wscales"),
    "both second scales are": (lambda folder: [_without(f"{TO_Q}.{leaf}")(folder) for leaf in ("wcscales", "wtscale")],
                               f"missing: {TO_Q}.wcscales"),
    "the bias is": (_without(f"{TO_Q}.bias"), f"missing: {TO_Q}.bias"),
    "a dense tensor is": (_without("x_embedder.bias"), "missing: x_embedder.bias"),
    "one too many": (_with(f"{TO_Q}.smooth_factor_orig", lambda state: torch.ones(128)),
                     f"1 tensors are unexpected: {TO_Q}.smooth_factor_orig"),
    "a shape": (_with(f"{TO_Q}.qweight", lambda state: torch.zeros(128, 32, dtype=torch.int8)),
                rf"{FILE}: {TO_Q}.qweight: expected \(128, 64\) int8, got \(128, 32\) int8"),
    "a dtype": (_with(f"{TO_Q}.wscales", lambda state: state[f"{TO_Q}.wscales"].bfloat16()),
                rf"{TO_Q}.wscales: expected \(8, 128\) float8_e4m3fn, got \(8, 128\) bfloat16"),
    "more than 16 bit": (_with(f"{TO_Q}.proj_up", lambda state: torch.full((128, 16), 0.1)),
                         f"{TO_Q}.proj_up: is float32 among tensors in bfloat16"),
    "NaN": (_with(f"{TO_Q}.wtscale", lambda state: torch.tensor([float("nan")]).bfloat16()),
            f"{TO_Q}.channel_scale: holds NaN"),
    "no such target": (_section(targets=["transformer_blocks.7.attn.to_q"]),
                       "'transformer_blocks.7.attn.to_q': FluxTransformer2DModel has no linear"),
    "no linear": (_section(targets=["transformer_blocks.0.norm1"]), "has no linear transformer_blocks.0.norm1"),
    "a size": (_section(targets=["x_embedder"]), "'x_embedder': has 64 inputs and 128 outputs; such files hold"),
    "a target twice": (_section(targets=[TO_Q, TO_Q]), f"target '{TO_Q}' is named twice"),
    "a rank": (_section(rank=24), "rank: expected a multiple of 16, or 0, got 24"),
    "unsigned": (_section(act_unsigned=True), "act_unsigned is True"),
    "a patch": (_config(patches=[{"type": "fused_gelu_mlp"}]), "patches: 'fused_gelu_mlp' is unknown"),
    "a patch of nothing": (_config(patches=[SPLIT]), r"single_transformer_blocks\.0\.proj_out is held in parts, of "),
    "a cut": (_config(patches=[{**SPLIT, "args": {"splits": [0]}}]), "split_linear: expected a 'module' and 'args'"),
    "ranks": (_config(nunchaku_py={"ranks": {TO_Q: 99}}), "ranks: expected a table of whole numbers from 0 to 16"),
    "too small a rank": (_config(nunchaku_py={"ranks": {TO_Q: 8}}), f"{TO_Q}.proj_.*: has more than the rank 8"),
    "a dtype to compute in": (_config(compute_dtype="int8"), "compute_dtype is 'int8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_a_sentence(handmade: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(handmade)
    with pytest.raises(NunchakuError, match=message) as error:
        nq.load(handmade)
    assert str(handmade) in str(error.value)


@pytest.mark.parametrize("targets, splits, message", [
    ([0, 1], [700], "cannot be cut as split_linear says"),
    ([0], ["out_features"], "is held in 2 parts, and the targets name .*linears.0; only"),
])
def test_refuses_parts_that_do_not_fit(dense: nn.Module, tmp_path: Path, targets: list[int], splits: list[Any],
                                       message: str) -> None:
    made = {f"{PROJ_OUT.format(0)}.linears.{part}": lite_files.w4a4(128, 128 + 384 * part, "int4", 16)
            for part in targets}
    patch = {"type": "split_linear", "module": PROJ_OUT.format(0), "args": {"splits": splits}}
    write_by_hand(dense, tmp_path, made, svdq_w4a4=section(list(made), "int4"), patches=[patch])
    with pytest.raises(NunchakuError, match=message):
        nq.load(tmp_path)


# -------------------------------------------------------------------------------------------------- written, read back
def check_read_back(model: nn.Module, loaded: nn.Module) -> list[str]:
    """The weights are the same bit for bit; gives the names of linears that are in 16 bit now."""
    dense = []
    for name, module in quantized_modules(model).items():
        other = loaded.get_submodule(name)
        found, expected = weight_of(other), weight_of(module)
        if not getattr(other, "is_nunchaku_quantized", False):
            dense.append(name)
            expected = expected.bfloat16().float().reshape(found.shape)
        assert torch.equal(found, expected), name
        bias = module.effective_bias() if isinstance(module, QuantizedSite) else module.dense().bias
        if other.bias is not None:
            torch.testing.assert_close(other.bias.float(), bias.float(), rtol=0.01, atol=1e-6)
    return dense


def test_written_and_read_back(quantized: tuple, written: tuple) -> None:
    model, inputs, _ = quantized
    loaded = nq.load(written[0])
    dense = check_read_back(model, loaded)
    floats = next(quantized_sites(model)).site.format == "nvfp4" or "nvfp4" in str(model.config.quantization_config)
    assert dense == ([PROJ_OUT.format(block) for block in (0, 1)] if floats else [])
    assert ("2 NVFP4 linears in parts" in str(written[1])) == floats
    assert ("6 linears whose inputs were shifted before they became 4 bit" in str(written[1])) != floats
    sites = [site for site in quantized_sites(loaded) if site.site.has_smooth]
    assert sites and not any(site.site.shift or site.site.unsigned_act for site in sites)
    assert {site.site.format for site in quantized_sites(loaded) if not site.site.has_smooth} == {"uint4"}
    assert {site.site.rank for site in sites} == ({8} if floats else {8, 16})  # 16: two parts, as one
    assert relative(run(loaded, inputs), run(model, inputs)) < 0.02  # 8-bit inputs have one scale for both parts
    for one in (model, loaded):
        nq.set_mode(one, "a16")
    assert relative(run(loaded, inputs), run(model, inputs)) < 2**-7  # bfloat16 rounds in other places
    nq.set_mode(model, "auto")


def test_nothing_is_padded_beyond_what_is_said(written: tuple) -> None:
    config = json.loads((written[0] / "config.json").read_text())["quantization_config"]
    rank = config["svdq_w4a4"]["rank"]
    assert rank == 16 and config["compute_dtype"] == "bfloat16" and TO_Q in config["nunchaku_py"]["ranks"]
    with safe_open(written[0] / FILE, framework="pt") as file:
        assert file.get_slice(f"{TO_Q}.proj_up").get_shape() == [128, rank]


def test_folder_without_our_entry_has_padded_ranks(quantized: tuple, written: tuple, tmp_path: Path) -> None:
    for name in ("config.json", FILE):
        (tmp_path / name).write_bytes((written[0] / name).read_bytes())
    edit_config(tmp_path, lambda config: config["quantization_config"].pop("nunchaku_py"))
    loaded = nq.load(tmp_path)
    assert {site.site.rank for site in quantized_sites(loaded) if site.site.has_smooth} == {16}
    check_read_back(quantized[0], loaded)


def test_second_writing_gives_the_same_tensors(written: tuple, tmp_path: Path) -> None:
    notes = write_lite(nq.load(written[0]), tmp_path)
    assert str(notes) == "every tensor was kept bit for bit"
    assert differences(load_file(written[0] / FILE), load_file(tmp_path / FILE)) == []
    assert (tmp_path / "config.json").read_text() == (written[0] / "config.json").read_text()


@pytest.mark.parametrize("name", ["qwen_image", "sana"])
def test_other_architectures(tmp_path: Path, name: str) -> None:
    model, inputs = MODELS[name]()
    nq.quantize(model, QUICK)
    notes = write_lite(model, tmp_path)
    loaded = nq.load(tmp_path)
    dense = check_read_back(model, loaded)
    assert len(quantized_modules(loaded)) == len(quantized_modules(model)) - len(dense) > 10
    assert ("1×1 convolutions" in str(notes)) == (name == "sana") == any("conv" in one for one in dense)
    assert relative(run(loaded, inputs), run(model, inputs)) < 0.02


def test_a_common_second_scale_keeps_float16_in_range(tmp_path: Path) -> None:
    model, _ = MODELS["flux"]()
    nq.quantize(model.half(), QUICK_NVFP4)
    for site in quantized_sites(model):
        if site.site.format == "nvfp4":
            site.channel_scale.data *= 2.0**-6
    write_lite(model, tmp_path)
    found, expected = (one.get_submodule(TO_Q) for one in (nq.load(tmp_path), model))
    assert found.file_dtype == torch.float16
    torch.testing.assert_close(found.channel_scale, expected.channel_scale, rtol=1e-3, atol=0)


def test_w4a16_in_other_groups_is_rounded_again(tmp_path: Path) -> None:
    model, _ = MODELS["flux"]()
    nq.quantize(model, replace(nq.RECIPES["w4a16-int4"], name="w4a16-g32", group=32))
    assert model.get_submodule(MODULATION).site.group == 32
    notes = write_lite(model, tmp_path).changes
    loaded = nq.load(tmp_path)
    found, expected = (weight_of(one.get_submodule(MODULATION)) for one in (loaded, model))
    assert loaded.get_submodule(MODULATION).site == Site("w4a16", "uint4", 64)
    error = relative(found, expected)
    count, largest = notes["weights of W4A16 linears in int4, rounded again to int4 (relative)"]
    assert 0.01 < error <= largest < 0.15 and count == len(quantized_modules(loaded))
    json_config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "svdq_w4a4" not in json_config and len(json_config["awq_w4a16"]["targets"]) == count


def test_parts_with_equal_channel_scales_become_one(quantized: tuple, tmp_path: Path) -> None:
    model = copy.deepcopy(quantized[0])
    if model.get_submodule(PROJ_OUT.format(0)).parts[0].site.format != "nvfp4":
        pytest.skip("INT4 has no channel scales")
    for block in (0, 1):
        parts = model.get_submodule(PROJ_OUT.format(block)).parts
        parts[1].channel_scale.data.copy_(parts[0].channel_scale.data)
    write_lite(model, tmp_path)
    loaded = nq.load(tmp_path)
    assert check_read_back(model, loaded) == []
    assert loaded.get_submodule(PROJ_OUT.format(0)).site.rank == 16


def test_what_cannot_be_written_is_refused(quantized: tuple, tmp_path: Path) -> None:
    with pytest.raises(NunchakuError, match="holds no quantized linears"):
        write_lite(MODELS["flux"]()[0], tmp_path)
    small, _ = MODELS["z_image"]()
    nq.quantize(small, nq.RECIPES["rtn-int4"])
    with pytest.raises(NunchakuError, match="none of its quantized linears has a size and format"):
        write_lite(small, tmp_path)
    mixed = MODELS["flux"]()[0]
    nq.quantize(mixed, nq.RECIPES["rtn-int4"], rules={"transformer_blocks.1.*": "keep"})
    other = MODELS["flux"]()[0]
    nq.quantize(other, nq.RECIPES["rtn-nvfp4"])
    name = "transformer_blocks.1.attn.to_q"
    mixed.get_submodule("transformer_blocks.1.attn").to_q = other.get_submodule(name)
    with pytest.raises(NunchakuError, match="linears are in int4 and in nvfp4"):
        write_lite(mixed, tmp_path)
    with pytest.raises(NunchakuError, match="nunchaku_lite folders are of diffusers' models"):
        write_lite(nn.Linear(2, 2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_refused(fresh: tuple, tmp_path: Path) -> None:
    from peft import LoraConfig

    fresh[0].add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(NunchakuError, match="carries an adapter"):
        write_lite(fresh[0], tmp_path)


def test_a_bias_that_the_architecture_lacks_is_refused(tmp_path: Path) -> None:
    model, _ = MODELS["sana"]()
    nq.quantize(model, QUICK)
    name = "transformer_blocks.0.attn1.to_q"
    write_lite(model, tmp_path / "good")
    module = model.get_submodule(name)
    module.bias = nn.Parameter(torch.ones(module.rows_out).bfloat16(), requires_grad=False)
    with pytest.raises(NunchakuError, match=f"{name}: has a bias, and that of"):
        write_lite(model, tmp_path / "bad")


# -------------------------------------------------------------------------------------------- as diffusers reads them
@pytest.fixture
def their_utils(monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers' module classes; the kernels they would fetch are not there."""
    import importlib

    from diffusers.utils import constants

    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *args, **kwargs: types.SimpleNamespace(ops=None)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    name = "diffusers.quantizers.nunchaku.utils"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_holds_what_diffusers_own_modules_want(written: tuple, their_utils: Any) -> None:
    from diffusers import FluxTransformer2DModel
    from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig

    quantization = json.loads((written[0] / "config.json").read_text())["quantization_config"]
    config = NunchakuLiteQuantizationConfig.from_dict(quantization)
    model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(written[0]))
    their_utils.replace_with_nunchaku_linear(model.bfloat16(), config.to_dict(), config.compute_dtype)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in load_file(written[0] / FILE).items()}
    assert found == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    their_utils.check_strict_state_dict_match(model, found)

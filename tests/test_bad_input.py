"""Models, options, data and disks that are wrong: said in a sentence, and nothing is left half done."""
from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nunchaku_py as nq
from nunchaku_py.swap import quantized_modules
from tests.checks import QUICK, differences, files_in, relative, run, state_of
from tests.tiny import MODELS

FORMS = ["folder", "single file"]


def pixart() -> nn.Module:
    return MODELS["pixart"]()[0]


# ----------------------------------------------------------------------------------------- what cannot be quantized
def unchanged(model: nn.Module, *words: str, **options: Any) -> None:
    """nq.quantize refuses with a sentence of these words and leaves the model as it was."""
    before, kinds = state_of(model), [type(module) for module in model.modules()]
    with pytest.raises(nq.NunchakuError) as caught:
        nq.quantize(model, **options)
    text = str(caught.value)
    assert all(word in text for word in words) and len(text) < 600, text
    assert differences(before, model.state_dict()) == []
    assert [type(module) for module in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_weights_that_are_not_finite(value: float, leaf: str, calibrated: bool) -> None:
    model, inputs = MODELS["pixart"]()
    name = "transformer_blocks.1.ff.net.2"  # the last job: all others come before it
    getattr(model.get_submodule(name), leaf).data.view(-1)[3] = value
    unchanged(model, f"{name}.{leaf}", "NaN", data=[inputs] if calibrated else None)


OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "rule that matches nothing": (dict(rules={"*.to_qq": "keep"}), ("*.to_qq",)),
    "rule with an unknown choice": (dict(rules={"*.to_q": "w2a2"}), ("w2a2", "keep")),
    "unknown recipe": (dict(recipe="svdquant-int3"), ("svdquant-int3", "svdquant-int4")),
    "recipe of no kind": (dict(recipe=4), ("recipe",)),
    "unknown mode": (dict(mode="a5"), ("a5", "a16")),
    "rank above the matrix": (dict(rank=129), ("129", "128")),
    "negative rank": (dict(rank=-1), ("rank",)),
    "rank of a recipe without a branch": (dict(recipe="rtn-int4", rank=16), ("rank", "rtn-int4", "16")),
    "components of a model": (dict(components=["transformer"]), ("components",)),
    "no data": (dict(data=[]), ("calibration",)),
    "data that does nothing": (dict(data=lambda model: None), ("calibration",)),
    "data of another kind": (dict(data=7), ("calibration", "int")),
    "forward kwargs of another model": (dict(data=[dict(pixels=1)]), ("calibration item 0", "hidden_states")),
    "prompts without a pipeline": (dict(data=["a red cube"]), ("pipeline",)),
    "no states": (dict(data=[{}], states=0), ("states",)),
    "everything kept": (dict(rules={"*": "keep"}), ("keep",)),
}


@pytest.mark.parametrize("wrong", OPTIONS)
def test_wrong_option(wrong: str) -> None:
    options, words = OPTIONS[wrong]
    unchanged(pixart(), *words, **options)


def test_wrong_mode_of_a_quantized_model(saved) -> None:
    model = nq.load(saved["folder"])
    before = state_of(model)
    for call in (lambda: nq.set_mode(model, "a5"), lambda: nq.load(saved["folder"], mode="a5"),
                 lambda: nq.load(saved["single file"], mode="a5")):
        with pytest.raises(nq.NunchakuError, match="a5.*a16|a16.*a5"):
            call()
    assert differences(before, model.state_dict()) == []


def test_quantizing_twice(saved) -> None:
    unchanged(nq.load(saved["folder"]), "already quantized")


def test_quantizing_while_loading_what_is_quantized(saved) -> None:
    """diffusers itself warns and takes the file's config: what comes is the stored model."""
    from diffusers import PixArtTransformer2DModel

    loaded = PixArtTransformer2DModel.from_pretrained(saved["folder"], torch_dtype=torch.bfloat16,
                                                      quantization_config=nq.SVDQuantConfig(recipe="rtn-nvfp4"))
    assert differences(nq.load(saved["folder"]).state_dict(), loaded.state_dict()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_calibration_data_that_is_not_finite(value: float) -> None:
    model, inputs = MODELS["pixart"]()
    inputs["hidden_states"] = inputs["hidden_states"].clone()
    inputs["hidden_states"].view(-1)[0] = value
    unchanged(model, "calibration", data=[inputs])


def test_calibration_that_fails_in_the_middle() -> None:
    """The error is the user's own, and the model is as it was."""
    model, inputs = MODELS["pixart"]()
    before = state_of(model)

    def forward(_: nn.Module) -> None:
        model(**inputs)
        raise RuntimeError("the camera is off")

    with pytest.raises(RuntimeError, match="camera"):
        nq.quantize(model, QUICK, forward)
    assert differences(before, model.state_dict()) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_model_on_the_meta_device() -> None:
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(**{k: v for k, v in pixart().config.items() if not k.startswith("_")})
    for data in (None, [MODELS["pixart"]()[1]]):
        with pytest.raises(nq.NunchakuError, match="transformer_blocks.0.*(no data|meta)"):
            nq.quantize(model, data=data)
    assert not quantized_modules(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_weights_of_a_dtype_that_is_not_understood(dtype: torch.dtype) -> None:
    model = pixart()
    nn.Module.to(model, dtype)
    unchanged(model, str(dtype)[6:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_one_linear_of_a_dtype_that_is_not_understood(dtype: torch.dtype) -> None:
    """As layerwise casting leaves them, for instance."""
    model = pixart()
    name = "transformer_blocks.1.ff.net.2"
    nn.Module.to(model.get_submodule(name), dtype)
    unchanged(model, f"{name}.weight", str(dtype)[6:])


@pytest.mark.parametrize("target", [None, "transformer", torch.zeros(3), nn.Linear])
def test_target_that_is_no_model(target: object) -> None:
    with pytest.raises(nq.NunchakuError):
        nq.quantize(target)


def test_model_without_linears() -> None:
    unchanged(nn.Sequential(nn.ReLU()), "no linear")


# ----------------------------------------------------------------------------------------------- sizes that must work
class Net(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(k, n) for k, n in zip(sizes, sizes[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("recipe", ["svdquant-int4", "svdquant-nvfp4", "rtn-int4", "w4a16-int4"])
@pytest.mark.parametrize("k", [33, 63, 65, 100, 127])
def test_inputs_that_fill_no_group(recipe: str, k: int) -> None:
    """Odd widths and short last groups."""
    net, x = Net(k, 48, k), torch.randn(20, k)
    dense = run(net, {"x": x})
    rules = {"blocks.*": "w4a16" if recipe == "w4a16-int4" else "w4a4"}
    nq.quantize(net, recipe, rules=rules)
    assert len(quantized_modules(net)) == 2
    for mode in ("a4", "a8", "a16"):
        nq.set_mode(net, mode)
        assert 0 < relative(run(net, {"x": x}), dense) < 0.35  # two layers of weights and inputs, 11 % each


@pytest.mark.parametrize("rank", [0, 1, 48])
def test_rank(rank: int) -> None:
    net, x = Net(64, 48), torch.randn(20, 64)
    dense = run(net, {"x": x})
    nq.quantize(net, QUICK, rank=rank, rules={"*": "w4a4"})
    (module,) = quantized_modules(net).values()
    assert module.site.rank == rank and ("down" in module.state_dict()) == (rank > 0)
    error = relative(run(net, {"x": x}), dense)
    assert 0 < error < (0.03 if rank == 48 else 0.2)  # of full rank the branch is all there is, in 16 bit


# ------------------------------------------------------------------------------------------------------------- saving
def test_saving_what_is_not_quantized(tmp_path) -> None:
    for path in (tmp_path / "m", tmp_path / "m.safetensors"):
        with pytest.raises(nq.NunchakuError, match="no quantized linears"):
            nq.save(pixart(), path)
    assert files_in(tmp_path) == []


def test_saving_a_pipeline_to_one_file(tmp_path) -> None:
    from tests.tiny_pipelines import flux_pipeline

    with pytest.raises(nq.NunchakuError, match="folder"):
        nq.save(flux_pipeline(), tmp_path / "pipe.safetensors")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("form", FORMS)
def test_saving_where_a_file_stands_in_the_way(saved, tmp_path, form: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(nq.NunchakuError, match="file"):
        nq.save(nq.load(saved[form]), tmp_path / "file" / saved[form].name)
    assert files_in(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stands", [False, True], ids=["new", "over an earlier one"])
def test_disk_full(saved, tmp_path, monkeypatch, form: str, stands: bool) -> None:
    """What stood under the name before still stands there, whole."""
    model = nq.load(saved[form])
    path = tmp_path / saved[form].name
    if stands:
        nq.save(model, path)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path) if (tmp_path / name).is_file()}
    names = files_in(tmp_path)
    _fill_disk(monkeypatch)
    with pytest.raises(nq.NunchakuError, match="model.*No space left"):
        nq.save(model, path)
    assert files_in(tmp_path) == names
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())


def _fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every writer of safetensors files leaves a part of one and then meets a full disk."""
    import diffusers.models.modeling_utils
    import safetensors.torch

    import nunchaku_py.checkpoint.own

    def fail(tensors: Mapping[str, Tensor], filename: str | os.PathLike[str], metadata: Any = None) -> None:
        Path(filename).write_bytes(b"a part")
        raise OSError(28, "No space left on device", str(filename))

    monkeypatch.setattr(nunchaku_py.checkpoint.own, "write_tensors", lambda path, *_: fail({}, path))
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    monkeypatch.setattr(diffusers.models.modeling_utils, "safetensors", safetensors, raising=False)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("form", FORMS)
def test_disk_that_is_really_full(saved, small_disk, form: str) -> None:
    with pytest.raises(nq.NunchakuError, match="model"):
        nq.save(nq.load(saved[form]), small_disk / saved[form].name)
    assert files_in(small_disk) == []


def test_work_dir_on_a_full_disk(small_disk) -> None:
    unchanged(pixart(), "small", recipe=QUICK, work_dir=small_disk / "work")


def test_work_dir_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    unchanged(pixart(), "file", recipe=QUICK, work_dir=tmp_path / "file" / "work")


@pytest.mark.parametrize("form", FORMS)
def test_names_that_are_awkward(saved, tmp_path, form: str) -> None:
    """Spaces, dots, letters beyond ASCII."""
    path = tmp_path / "mein Modell v1.0 – größer" / saved[form].name
    nq.save(nq.load(saved[form]), path)
    assert differences(nq.load(saved[form]).state_dict(), nq.load(str(path)).state_dict()) == []

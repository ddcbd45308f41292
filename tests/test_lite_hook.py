"""diffusers loads nunchaku_lite folders through us where it would refuse them, or where it is told to."""
from __future__ import annotations

import logging
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.quantizers import auto
from diffusers.quantizers.nunchaku import nunchaku_quantizer
from diffusers.utils import constants

import nunchaku_py as nq
from nunchaku_py import lite_choice, lite_hook
from nunchaku_py.checkpoint.lite_write import write_lite
from nunchaku_py.diffusers_hook import SVDQuantConfig, SVDQuantizer
from nunchaku_py.errors import NunchakuError
from nunchaku_py.lite_hook import LiteQuantizer
from tests.checks import differences, quantized_state, run
from tests.lite_files import section, shard
from tests.tiny import PIPELINES

THEIRS = nunchaku_quantizer.NunchakuLiteQuantizer
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def unchosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite_choice, "_chosen", [])
    monkeypatch.setattr(lite_choice, "_told", set())
    monkeypatch.delenv("NUNCHAKU_PY_LITE", raising=False)


@pytest.fixture(scope="module")
def folder(quantized: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lite")
    write_lite(quantized[0], path)
    return path


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine on which diffusers would load such models, of a capability that can be set."""
    def set_capability(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nunchaku_quantizer, "is_kernels_available", lambda: True)
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    set_capability(12, 0)
    return set_capability


def config_of(fmt: str = "int4", **more: Any) -> Any:
    fields = {"quant_method": "nunchaku_lite", "svdq_w4a4": section(["x"], fmt), **more}
    return auto.DiffusersAutoQuantizer.from_dict(fields)


def chosen(fmt: str = "int4", **more: Any) -> Any:
    return auto.DiffusersAutoQuantizer.from_config(config_of(fmt, **more), pre_quantized=True)


# ----------------------------------------------------------------------------------------------------------- the choice
def test_diffusers_own_where_it_would_load(able: Any) -> None:
    for fmt in ("int4", "nvfp4"):
        assert type(chosen(fmt)) is THEIRS
    able(8, 9)
    assert type(chosen("int4")) is THEIRS


@pytest.mark.parametrize("fmt, capability, why", [
    ("int4", (9, 0), "Hopper"), ("nvfp4", (8, 9), "Blackwell"), ("int4", (7, 0), "Turing")])
def test_ours_on_gpus_that_it_refuses(able: Any, fmt: str, capability: tuple[int, int], why: str) -> None:
    able(*capability)
    quantizer = chosen(fmt)
    assert type(quantizer) is LiteQuantizer and why in quantizer.why
    lite_choice.set_nunchaku_lite("never")
    assert type(chosen(fmt)) is THEIRS


def test_ours_without_cuda_without_its_package_and_without_trust(able: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", False)
    assert "DIFFUSERS_TRUST_REMOTE_KERNELS" in chosen().why
    monkeypatch.setattr(nunchaku_quantizer, "is_kernels_available", lambda: False)
    assert "`kernels` package" in chosen().why
    monkeypatch.setattr(nunchaku_quantizer, "is_kernels_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA-capable" in chosen().why


def test_ours_where_the_folder_has_patches(able: Any) -> None:
    patch = {"type": "split_linear", "module": "x", "args": {"splits": [64]}}
    assert "patches" in chosen(patches=[patch]).why
    assert type(chosen(patches=[])) is THEIRS


def test_always_and_never_by_call_and_by_environment(able: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUNCHAKU_PY_LITE", "always")
    assert chosen().why == "it was asked for: always"
    nq.set_nunchaku_lite("auto")
    assert type(chosen()) is THEIRS
    nq.set_nunchaku_lite("always")
    assert type(chosen()) is LiteQuantizer
    able(9, 0)
    nq.set_nunchaku_lite("never")
    assert type(chosen()) is THEIRS
    with lite_choice.always_ours():
        assert type(chosen()) is LiteQuantizer


def test_bad_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NunchakuError, match="set_nunchaku_lite: expected 'auto', 'always' or 'never', got 'yes'"):
        nq.set_nunchaku_lite("yes")
    monkeypatch.setenv("NUNCHAKU_PY_LITE", "1")
    with pytest.raises(NunchakuError, match="NUNCHAKU_PY_LITE: expected 'auto', 'always' or 'never', got '1'"):
        chosen()


def test_the_reason_is_logged_once(able: Any, caplog: pytest.LogCaptureFixture) -> None:
    able(9, 0)
    with caplog.at_level(logging.INFO, "nunchaku_py"):
        chosen()
        chosen()
    assert [("Hopper" in line) for line in caplog.messages] == [True]


def test_older_diffusers_that_knows_no_such_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    for table in tables:
        monkeypatch.delitem(table, "nunchaku_lite")
    lite_hook.enter(*tables)
    try:
        model = FluxTransformer2DModel.from_pretrained(folder)
        assert model.hf_quantizer.why == "it knows no such models"
        nq.set_nunchaku_lite("never")
        with pytest.raises(NunchakuError, match="this diffusers knows no such models, and ours are not wanted"):
            FluxTransformer2DModel.from_pretrained(folder)
        with pytest.raises(NunchakuError, match="compute_dtype is 'complex64'"):
            config_of(compute_dtype="complex64")
    finally:
        for table in tables:
            table.pop("nunchaku_lite", None)


# -------------------------------------------------------------------------------------------------------------- loading
def test_every_way_to_load_gives_the_same(folder: Path, quantized: tuple, tmp_path: Path) -> None:
    loaded = FluxTransformer2DModel.from_pretrained(folder)
    assert type(loaded.hf_quantizer) is LiteQuantizer and not loaded.training
    ways = [nq.load(folder), FluxTransformer2DModel.from_pretrained(folder.parent, subfolder=folder.name),
            FluxTransformer2DModel.from_pretrained(folder, device_map="cpu")]
    for other in ways:
        assert differences(loaded.state_dict(), other.state_dict()) == []
        assert torch.equal(run(other, quantized[1]), run(loaded, quantized[1]))


def test_sharded(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard(tmp_path)
    expected = FluxTransformer2DModel.from_pretrained(folder).state_dict()
    assert differences(expected, FluxTransformer2DModel.from_pretrained(tmp_path).state_dict()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_dtype_changes_what_is_stored(folder: Path, dtype: torch.dtype) -> None:
    loaded = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    assert differences(quantized_state(FluxTransformer2DModel.from_pretrained(folder)), quantized_state(loaded)) == []
    assert loaded.dtype == dtype and loaded.config.quantization_config.model_dtype == str(dtype).split(".")[1]


def test_nothing_is_warned_of(folder: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    FluxTransformer2DModel.from_pretrained(folder)
    assert "not used" not in capfd.readouterr().err + caplog.text and "newly initialized" not in caplog.text


def test_loaded_model_is_one_of_ours(folder: Path, quantized: tuple, tmp_path: Path) -> None:
    inputs = quantized[1]
    model = FluxTransformer2DModel.from_pretrained(folder)
    assert isinstance(model.hf_quantizer, SVDQuantizer) and model.hf_quantizer.is_serializable
    assert isinstance(model.config.quantization_config, SVDQuantConfig) and model.is_quantized
    assert model.quantization_method == "nunchaku_py" and "CUDA" in model.hf_quantizer.why
    assert model.config.quantization_config.report == {"source": {"format": "nunchaku_lite"}}
    plain = run(model, inputs)
    model.save_pretrained(tmp_path / "one")
    nq.save(model, tmp_path / "two.safetensors")
    for path in ("one", "two.safetensors"):
        again = nq.load(tmp_path / path)
        assert type(again.hf_quantizer) is SVDQuantizer
        assert differences(model.state_dict(), again.state_dict()) == [] and torch.equal(run(again, inputs), plain)
    nq.set_mode(model, "a16")
    assert not torch.equal(run(model, inputs), plain)
    assert "linear_w4a16" in str(nq.explain(model))
    dense = nq.dequantize(model)
    assert not getattr(dense, "is_quantized", False) and type(dense.proj_out) is torch.nn.Linear


def test_adapters_work(folder: Path, quantized: tuple) -> None:
    from peft import LoraConfig

    model = FluxTransformer2DModel.from_pretrained(folder)
    plain = run(model, quantized[1])
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    assert not torch.equal(run(model, quantized[1]), plain)
    model.disable_adapters()
    assert torch.equal(run(model, quantized[1]), plain)


def test_pipelines(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = PIPELINES["flux_prompt"]()
    pipe.save_pretrained(tmp_path)
    for file in (tmp_path / "transformer").iterdir():
        file.unlink()
    for file in folder.iterdir():
        (tmp_path / "transformer" / file.name).write_bytes(file.read_bytes())
    pipes = [DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=BF16)]
    nq.set_nunchaku_lite("never")
    with pytest.raises(ValueError, match="CUDA"):
        FluxPipeline.from_pretrained(tmp_path, torch_dtype=BF16)
    pipes.append(nq.load(tmp_path, "a8"))
    images = []
    for one in pipes:
        assert type(one.transformer.hf_quantizer) is LiteQuantizer and one.vae.dtype == BF16
        one.set_progress_bar_config(disable=True)
        images.append(one(**{**arguments, "generator": torch.Generator().manual_seed(0)}).images)
    assert torch.equal(*images) and images[0].isfinite().all()


def test_diffusers_own_quantizer_still_loads(folder: Path, able: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it fetches its kernels with is not there; what it would run them on is not either."""
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *args, **kwargs: types.SimpleNamespace(ops=None)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.delitem(sys.modules, "diffusers.quantizers.nunchaku.utils", raising=False)
    try:
        model = FluxTransformer2DModel.from_pretrained(folder)
    finally:
        sys.modules.pop("diffusers.quantizers.nunchaku.utils", None)
    assert type(model.hf_quantizer) is THEIRS
    again = pickle.loads(pickle.dumps(model.config.quantization_config))
    assert again.to_dict() == model.config.quantization_config.to_dict()
    assert type(model.transformer_blocks[0].attn.to_q).__name__ == "SVDQW4A4Linear"
    assert type(model.transformer_blocks[0].norm1.linear).__name__ == "AWQW4A16Linear"


def test_configurations_made_with_the_class_of_diffusers(able: Any) -> None:
    """They lack what ours keeps, and pipelines take them where they took them before."""
    from diffusers import GGUFQuantizationConfig, PipelineQuantizationConfig
    from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig

    theirs = NunchakuLiteQuantizationConfig(svdq_w4a4=section(["a"], "int4"))
    able(12, 0)
    assert type(auto.DiffusersAutoQuantizer.from_config(theirs, pre_quantized=True)) is THEIRS
    PipelineQuantizationConfig(quant_mapping={"transformer": theirs})
    assert isinstance(theirs, lite_hook.NunchakuLiteConfig)
    assert not isinstance(GGUFQuantizationConfig(), lite_hook.NunchakuLiteConfig)

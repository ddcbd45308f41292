"""Pipelines with several models to quantize: all of them or none; and what stands around a model."""

import copy

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py.linear import QuantizedSite
from nunchaku_py.quantize import Run
from nunchaku_py.swap import quantized_sites
from tests.checks import differences, state_of
from tests.tiny import MODELS, PIPELINES


@pytest.fixture
def pipe():
    """A text-to-image pipeline with prompts as strings, and a second denoiser as Wan 2.2 has it."""
    pipe, call = PIPELINES["flux_prompt"]()
    return pipe, call


def modes(model: nn.Module) -> set[str]:
    return {site.mode for site in quantized_sites(model) if site.site.kind == "w4a4"}


def test_modes_reach_every_quantized_model_of_a_pipeline(pipe) -> None:
    pipe, _ = pipe
    nq.quantize(pipe, "rtn-int4", components=["transformer", "text_encoder_2"])
    nq.set_mode(pipe, "a16")
    assert modes(pipe.transformer) == modes(pipe.text_encoder_2) == {"a16"}
    assert {"linear_w4a16"} <= {explanation.op for explanation in nq.explain(pipe)}
    with pytest.raises(nq.NunchakuError, match="dequantize takes a model"):
        nq.dequantize(pipe)


def test_a_failure_in_the_second_component_restores_the_first(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = pipe
    before = {name: state_of(getattr(pipe, name)) for name in ("transformer", "text_encoder")}
    finish = Run.finish

    def second_fails(run: Run, *args: object) -> object:
        if run.model is pipe.text_encoder:
            raise KeyboardInterrupt
        return finish(run, *args)

    monkeypatch.setattr(Run, "finish", second_fails)
    with pytest.raises(KeyboardInterrupt):
        nq.quantize(pipe, "rtn-int4", components=["transformer", "text_encoder"])
    for name, state in before.items():
        assert differences(state, getattr(pipe, name).state_dict()) == []
    assert not any(isinstance(module, QuantizedSite) for module in pipe.transformer.modules())
    assert "quantization_config" not in pipe.transformer.config and not pipe.transformer.is_quantized


def test_calibration_data_serves_every_component(pipe) -> None:
    pipe, _ = pipe
    report = nq.quantize(pipe, "w4a16-int4", ["a red cube", "a blue ball"], components=["transformer", "text_encoder"],
                         states=2)
    assert {row.data for row in report.rows} == {"calibrated"}


def test_a_rule_may_concern_one_component_but_not_none(pipe) -> None:
    pipe, _ = pipe
    chosen = ["transformer", "text_encoder"]
    with pytest.raises(nq.NunchakuError, match="rule 'nothing': no linear .* of transformer, text_encoder has"):
        nq.quantize(pipe, "rtn-int4", components=chosen, rules={"nothing": "keep"})
    report = nq.quantize(pipe, "rtn-int4", components=chosen, rules={"single_transformer_blocks.*": "keep"})
    assert not any(row.name.startswith("transformer.single") for row in report.rows)


def test_saving_with_a_lora_or_an_ip_adapter_is_refused(tmp_path) -> None:
    from peft import LoraConfig

    model, _ = MODELS["flux"]()
    nq.quantize(model, "rtn-int4")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for save in (lambda: nq.save(model, tmp_path / "m"), lambda: model.save_pretrained(tmp_path / "n")):
        with pytest.raises(nq.NunchakuError, match="carries an adapter"):
            save()
    assert not (tmp_path / "m").exists()
    pipe, _ = PIPELINES["flux_ip_adapter"]()
    nq.quantize(pipe, "rtn-int4")
    with pytest.raises(nq.NunchakuError, match="belongs to an IP-Adapter"):
        nq.save(pipe.transformer, tmp_path / "ip")


def test_hooks_of_the_user_stay_on_the_linear() -> None:
    model, inputs = MODELS["pixart"]()
    seen: list[str] = []
    handle = model.transformer_blocks[0].ff.net[2].register_forward_hook(lambda *_: seen.append("called"))
    nq.quantize(model, "rtn-int4")
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        model(**inputs)
    assert seen == ["called"]


def test_quantizing_and_running_under_autocast() -> None:
    model, inputs = MODELS["pixart"]()
    plain = copy.deepcopy(model)
    nq.quantize(plain, "svdquant-int4", [inputs])
    with torch.autocast("cpu", torch.bfloat16):
        nq.quantize(model, "svdquant-int4", [inputs])
        with torch.no_grad():
            y = model(**inputs)[0]
    assert torch.isfinite(y).all()
    with torch.no_grad():
        reference = plain(**inputs)[0]
    assert ((y - reference).float().norm() / reference.float().norm()).item() < 0.1


def test_a_default_device_does_not_reach_the_quantizer() -> None:
    model, _ = MODELS["pixart"]()
    twin = copy.deepcopy(model)
    nq.quantize(model)
    with torch.device("meta"):
        nq.quantize(twin)
    assert differences(state_of(model), twin.state_dict()) == []

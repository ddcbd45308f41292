"""diffusers' own calls on quantized models: load, weigh, switch off and on, fuse, delete, unload."""
from __future__ import annotations

import copy

import pytest
import torch

import nunchaku_py as nq
from tests.checks import relative, run
from tests.lora.toys import dense, quantized, toy
from tests.tiny import MODELS

NAMES = ("flux", "flux2", "sdxl", "sd3", "qwen_image", "z_image", "sana", "pixart", "wan", "chroma")


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest) -> tuple:
    """(16-bit model, quantized model, inputs)."""
    model, inputs = MODELS[request.param]()
    sixteen = copy.deepcopy(model)
    nq.quantize(model, "rtn-int4")
    return sixteen, model, inputs


@pytest.fixture
def model(made: tuple) -> torch.nn.Module:
    return copy.deepcopy(made[1])


def test_every_call_is_exact(made: tuple, model: torch.nn.Module) -> None:
    inputs = made[2]
    names = quantized(model)
    before = run(model, inputs)
    report = model.load_lora_adapter(toy(model, names), prefix=None, adapter_name="style")
    assert report.modules and sum(report.modules.values()) == len(names)
    style = run(model, inputs)
    assert relative(style, before) > 0.01
    model.load_lora_adapter(toy(model, names, rank=8, seed=1), prefix=None, adapter_name="other")
    model.set_adapters(["style", "other"], [0.5, 1.0])
    both = run(model, inputs)
    assert relative(both, style) > 0.01
    model.disable_lora()
    assert torch.equal(run(model, inputs), before)
    model.enable_lora()
    assert torch.equal(run(model, inputs), both)
    model.fuse_lora()
    assert torch.equal(run(model, inputs), both)
    model.unfuse_lora()
    assert torch.equal(run(model, inputs), both)
    model.set_adapters(["style", "other"], [0.0, 0.0])
    assert torch.equal(run(model, inputs), before)
    model.set_adapters("style", 1.0)
    assert torch.equal(run(model, inputs), style)
    model.delete_adapters("style")
    model.delete_adapters("other")
    assert torch.equal(run(model, inputs), before)
    model.unload_lora()
    assert torch.equal(run(model, inputs), before)
    assert quantized(model) == names and not any("lora" in name for name in model.state_dict())


def test_as_on_16_bit(made: tuple, model: torch.nn.Module) -> None:
    """Quantized + LoRA is off from 16 bit + LoRA by as much as without one."""
    sixteen, _, inputs = made
    sixteen, names = copy.deepcopy(sixteen), quantized(model) + dense(model)[:2]
    plain = relative(run(model, inputs), run(sixteen, inputs))
    for one in (model, sixteen):
        one.load_lora_adapter(toy(model, names), prefix=None, adapter_name="style")
        one.set_adapters("style", 0.7)
    adapted = relative(run(model, inputs), run(sixteen, inputs))
    assert adapted < 1.3 * plain + 0.01

"""Pipelines: quantized in place, called as before, with a picture as near to the 16-bit one as 4 bits allow."""
from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import nunchaku_py as nq
from tests.checks import QUICK, differences, first, noisy, quantized_state, relative
from tests.tiny import PIPELINES
from tests.tiny_models import TEXT
from tests.tiny_pipelines import SIZE

# As in test_architectures; but the weights err the same way in both denoising steps, where the noise is drawn anew:
# errors add up where noise adds in squares, which is √2 at most.
LEAST, MOST = 0.2, 2**0.5
MORE = {"flux_controlnet": ("transformer", "controlnet"), "sdxl_controlnet": ("unet", "controlnet")}
PROMPTS = ["a red cube", "two green cats, sitting", "the sea"]


def denoiser(name: str) -> str:
    return "unet" if name.startswith("sdxl") else "transformer"


def picture(pipe: Any, arguments: Mapping[str, Any], **more: Any) -> torch.Tensor:
    return first(pipe(**{**arguments, "generator": torch.Generator().manual_seed(0), "return_dict": False, **more}))


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_in_place(name: str) -> None:
    (pipe, arguments), (plain, _) = PIPELINES[name](), PIPELINES[name]()
    dense = picture(plain, arguments)
    model, kind = getattr(pipe, denoiser(name)), type(pipe)
    parts = MORE.get(name, (denoiser(name),))
    reports = {part: nq.quantize(pipe, QUICK, components=[part]) for part in parts}
    assert getattr(pipe, denoiser(name)) is model and type(pipe) is kind
    for mode in ("a4", "a8"):
        with ExitStack() as stack:
            for part, report in reports.items():
                nq.set_mode(getattr(pipe, part), mode)
                stack.enter_context(noisy(getattr(plain, part), report.rows, mode == "a4"))
            expected = relative(picture(plain, arguments), dense)
        found = picture(pipe, arguments)
        assert found.isfinite().all() and found.shape == dense.shape and found.dtype == dense.dtype
        assert LEAST * expected < relative(found, dense) < MOST * expected, mode


def test_ip_adapter_stays_16_bit_and_works() -> None:
    pipe, arguments = PIPELINES["flux_ip_adapter"]()
    report = nq.quantize(pipe, QUICK, mode="a16")
    adapter = [name for name in report.kept if ".processor." in name]
    assert len(adapter) == 2 * len(pipe.transformer.transformer_blocks)
    with_adapter = picture(pipe, arguments)
    pipe.set_ip_adapter_scale(0.0)
    assert relative(picture(pipe, arguments), with_adapter) > 0.01


def test_adapter_loaded_after_quantization_gives_the_same() -> None:
    from tests.tiny_pipelines import flux_pipeline, ip_adapter_weights

    before, arguments = PIPELINES["flux_ip_adapter"]()
    nq.quantize(before, QUICK)
    after = flux_pipeline()
    nq.quantize(after, QUICK)
    after.transformer._load_ip_adapter_weights(ip_adapter_weights(after.transformer), low_cpu_mem_usage=False)
    for parameter_name, parameter in after.transformer.named_parameters():
        if ".processor." in parameter_name or parameter_name.startswith("encoder_hid_proj"):
            parameter.data = parameter.data.bfloat16()
    assert differences(quantized_state(before.transformer), quantized_state(after.transformer)) == []
    assert torch.equal(picture(before, arguments), picture(after, arguments))


def test_images_come_out() -> None:
    pipe, arguments = PIPELINES["flux"]()
    nq.quantize(pipe, QUICK)
    assert pipe(**{**arguments, "output_type": "pil"}).images[0].size == (SIZE, SIZE)


def test_controlnet_changes_the_picture_of_a_quantized_pipeline() -> None:
    pipe, arguments = PIPELINES["flux_controlnet"]()
    nq.quantize(pipe, QUICK, components=["transformer", "controlnet"])
    weak, strong = (picture(pipe, arguments, controlnet_conditioning_scale=scale) for scale in (0.0, 0.7))
    assert relative(strong, weak) > 0.01


# -------------------------------------------------------------------------------------------------------- calibration
@pytest.mark.parametrize("more", [{}, {"max_sequence_length": TEXT}], ids=["strings", "arguments"])
def test_prompts(more: dict) -> None:
    """A string gets 512 tokens of text, most of them padding and unlike those of the picture that is judged."""
    (pipe, arguments), (plain, _) = PIPELINES["flux_prompt"](), PIPELINES["flux_prompt"]()
    dense = picture(plain, arguments)
    pipe.default_sample_size = SIZE  # what a prompt without a size gets
    data = [{"prompt": prompt, **more} for prompt in PROMPTS] if more else PROMPTS
    report = nq.quantize(pipe, QUICK, data=data, states=4, mode="a4")
    assert {row.data for row in report.rows} == {"calibrated"} and not report.notes
    with noisy(plain.transformer, report.rows, True):
        expected = relative(picture(plain, arguments), dense)
    assert LEAST * expected < relative(picture(pipe, arguments), dense) < MOST * expected


def test_prompts_as_arguments_forwards_and_callables_agree() -> None:
    """The three ways to name the same forwards give the same bits."""
    pipes = [PIPELINES["flux"]() for _ in range(3)]
    calls: list[dict] = []
    handle = pipes[0][0].transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(dict(kwargs)),
                                                               with_kwargs=True)
    picture(*pipes[0])
    handle.remove()
    assert len(calls) == 2

    def arguments() -> dict:
        return {**pipes[0][1], "generator": torch.Generator().manual_seed(0)}

    data = [[arguments()], calls, lambda _: pipes[2][0](**arguments())]
    states = []
    for (pipe, _), what in zip(pipes, data, strict=True):
        nq.quantize(pipe, QUICK, data=what, states=2)
        states.append(quantized_state(pipe.transformer))
    for other in states[1:]:
        assert differences(states[0], other) == []


def test_text_encoder_beside_the_denoiser() -> None:
    pipe, arguments = PIPELINES["flux_prompt"]()
    report = nq.quantize(pipe, components={"transformer": QUICK, "text_encoder_2": "w4a16-int4"})
    assert {row.name.split(".")[0] for row in report.rows} == {"transformer", "text_encoder_2"}
    assert {row.kind for row in report.rows if row.name.startswith("text_encoder_2")} == {"w4a16"}
    assert picture(pipe, arguments).isfinite().all()

"""Pipelines whose denoiser is streamed and whose other models come when they are called; and streaming on a GPU."""
from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from nunchaku_py.offload.guests import Guests
from tests.checks import QUICK, differences, run, same_bits, state_of
from tests.lora.toys import quantized as quantized_names
from tests.lora.toys import toy
from tests.offloading import least, picture
from tests.tiny import PIPELINES


class Logged(nn.Linear):
    """A component that notes where it is sent instead of going there."""

    def __init__(self, log: list, name: str) -> None:
        super().__init__(4, 4)
        self.log, self.label = log, name

    def to(self, device: Any) -> nn.Module:
        self.log.append((self.label, str(device)))
        self.weight = nn.Parameter(torch.empty(4, 4, device=device))
        return self

    def forward(self) -> None:
        self.log.append(self.label)

    decode = encode = forward


@pytest.mark.parametrize("more", [80, 79])  # bytes that are free beside the denoiser; a guest takes 80
def test_guests_come_when_they_are_called(more: int) -> None:
    log: list = []
    parts = {name: Logged(log, name) for name in ("text_encoder", "text_encoder_2", "vae", "controlnet", "transformer")}
    denoiser = SimpleNamespace(model=parts["transformer"], device=torch.device("meta"), budget=100 + more,
                               plan=SimpleNamespace(nbytes=100), make_room=lambda: log.append("make room"),
                               come_back=lambda: log.append("come back"))
    guests = Guests(SimpleNamespace(components=parts), [denoiser])
    assert log == [("text_encoder", "cpu"), ("text_encoder_2", "cpu"), ("vae", "cpu"), ("controlnet", "meta")]
    log.clear()
    for name in ("text_encoder", "text_encoder_2", "text_encoder", "transformer", "transformer"):
        parts[name]()
    parts["vae"].decode()
    room = ["make room"] if more < 80 else []
    assert log == [*room, ("text_encoder", "meta"), "text_encoder", *room, ("text_encoder_2", "meta"), "text_encoder_2",
                   "text_encoder", ("text_encoder", "cpu"), ("text_encoder_2", "cpu"), "come back", "transformer",
                   "come back", "transformer", *room, ("vae", "meta"), "vae", ("vae", "cpu")]
    log.clear()
    guests.undo()
    assert {part: str(device) for part, device in log} == dict.fromkeys(list(parts)[:4], "cpu")
    log.clear()
    for part in parts.values():
        part()
    parts["vae"].encode()
    assert log == [*parts, "vae"]


def test_a_pipeline_gives_the_same_pictures() -> None:
    pipe, call = PIPELINES["flux_prompt"]()
    nq.quantize(pipe, components={"transformer": QUICK, "text_encoder_2": "w4a16-int4"})
    call["output_type"] = "np"
    expected = picture(pipe, call)
    nq.offload(pipe, vram=least(pipe.transformer) + 300_000, device="cpu")
    streaming = vars(pipe.transformer)["nunchaku_offload"]
    assert streaming.plan.resident and len(streaming.plan.streamed) > 2
    streaming.budget = streaming.plan.nbytes  # no guest fits beside it
    parked: list[bool] = []
    for part in (pipe.text_encoder_2, pipe.transformer.transformer_blocks[0]):
        part.register_forward_hook(lambda *_: parked.append(streaming.parked))
    for _ in range(2):
        assert (picture(pipe, call) == expected).all() and streaming.parked  # by the VAE
        assert parked == [True, False, False]
        parked.clear()
    assert "blocks stay on cpu" in str(nq.explain(pipe)) and not streaming.parked
    pipe.to("cpu")
    nq.offload(pipe, None)
    assert (picture(pipe, call) == expected).all()
    assert not any("decode" in vars(part) or part._forward_pre_hooks for part in pipe.components.values()
                   if isinstance(part, nn.Module))


def test_diffusers_own_offloading_of_a_pipeline_is_as_before() -> None:
    pipe, call = PIPELINES["flux_prompt"]()
    nq.quantize(pipe, QUICK)
    expected = picture(pipe, call)
    nq.offload(pipe, vram=least(pipe.transformer), device="cpu")
    nq.offload(pipe, None)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(picture(pipe, call), expected)
    with pytest.raises(NunchakuError, match="offload hook of accelerate's"):
        nq.offload(pipe, vram="1GB", device="cpu")
    pipe.remove_all_hooks()
    nq.offload(pipe, vram=least(pipe.transformer), device="cpu")
    assert torch.equal(picture(pipe, call), expected)


# -------------------------------------------------------------------------------------------------------------- on GPUs
SLACK = 2**22  # bytes: workspaces of libraries that come with a first call


def wide(blocks: int = 6) -> tuple[nn.Module, dict]:
    """A quantized FLUX whose blocks weigh some megabytes, on the CPU."""
    from benchmarks.flux_size import meta_model, step_inputs

    model = meta_model(blocks // 3, blocks - blocks // 3, num_attention_heads=8, joint_attention_dim=256,
                       pooled_projection_dim=64)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    nq.quantize(model, QUICK)
    return model.eval(), step_inputs(model, 256, 64)


def on_gpu(inputs: dict) -> dict:
    return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", "a4", "a8", "a16"])
def test_on_a_gpu(mode: str) -> None:
    model, inputs = wide()
    inputs, state = on_gpu(inputs), state_of(model)
    nq.set_mode(model, mode)
    expected = run(model.cuda(), inputs)
    model.cpu()
    small = least(model, "cuda")
    for more in (0, small // 4):
        before = torch.cuda.memory_allocated()
        nq.offload(model, vram=small + more)
        assert torch.cuda.memory_allocated() <= before + small + more + SLACK
        assert model.device.type == "cuda"
        for _ in range(4):
            assert same_bits(run(model, inputs), expected)
        nq.offload(model, None)
        assert torch.cuda.memory_allocated() <= before + SLACK
    assert {p.device.type for p in model.parameters()} == {"cpu"} and differences(state, model.state_dict()) == []
    assert same_bits(run(model.cuda(), inputs), expected)


@pytest.mark.gpu
def test_on_a_gpu_in_less_memory() -> None:
    model, inputs = wide(12)
    inputs = on_gpu(inputs)
    nq.set_weights(model, "int4")  # as streamed ones are, whatever the GPU

    def peak() -> int:
        run(model, inputs)
        torch.cuda.reset_peak_memory_stats()
        run(model, inputs)
        return torch.cuda.max_memory_allocated()

    model.cuda()
    whole = peak()
    model.cpu()
    small = least(model, "cuda")
    weights = sum(tensor.nbytes for tensor in model.parameters())
    nq.offload(model, vram=small)
    assert peak() < whole - (weights - small) + SLACK


@pytest.mark.gpu
def test_on_a_gpu_with_adapters_on_another_stream() -> None:
    model, inputs = wide()
    twin, inputs = copy.deepcopy(model).cuda(), on_gpu(inputs)
    nq.offload(model, vram=least(model, "cuda"))
    lora = toy(twin, quantized_names(twin), rank=16)
    for one in (model, twin):
        one.load_lora_adapter(dict(lora), prefix=None, adapter_name="style")
    for scale in (1.0, 0.3):
        for one in (model, twin):
            one.set_adapters("style", scale)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [run(model, inputs) for _ in range(3)]
        torch.cuda.synchronize()
        expected = run(twin, inputs)
        assert all(same_bits(one, expected) for one in found)


@pytest.mark.gpu
def test_a_pipeline_on_a_gpu() -> None:
    pipe, call = PIPELINES["flux_prompt"]()
    nq.quantize(pipe, components={"transformer": QUICK, "text_encoder_2": "w4a16-int4"})
    pipe.to("cuda")
    expected = picture(pipe, call)
    pipe.to("cpu")
    nq.offload(pipe, vram=least(pipe.transformer, "cuda"))
    for _ in range(2):
        assert torch.equal(picture(pipe, call), expected)
        assert pipe.text_encoder_2.device.type == "cpu"
    assert np.isfinite(picture(pipe, {**call, "output_type": "np"})).all() and pipe.vae.device.type == "cpu"
    nq.offload(pipe, None)
    assert pipe.transformer.device.type == "cpu"

"""The shipped models, plain or stressed, with their trajectories and pictures, and what quantizing makes of them."""
from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.quality.peer_layers import Peer, stored_bytes
from benchmarks.quality.picture_cells import EXACT, FREE, SIXTEEN, Build, Extent, recipe_of
from benchmarks.quality.stress import Hardness, hardness, stress
from nunchaku_py import quantize
from nunchaku_py.calibrate import State, evenly
from nunchaku_py.demo import shipped
from nunchaku_py.demo.measure import outputs, paint
from nunchaku_py.demo.scenes import described
from nunchaku_py.models.plan import plan
from nunchaku_py.swap import quantized_modules, replace_module

TRAJECTORY = 8  # prompts whose trajectories are followed, all in one batch
CALIBRATION, CALIBRATION_STEPS = 8, 8
HELD_OUT_SEED, CALIBRATION_SEED, STRESS_SEED = 5000, 7000, 9000  # of captions and noise; a calibration adds its own


@dataclass
class Quantized:
    model: nn.Module
    bytes: int | str = ""
    seconds: float | str = ""


class Subject:
    """A pipeline in bf16 and what its 16-bit denoiser does."""

    def __init__(self, name: str, stressed: bool, extent: Extent) -> None:
        self.name, self.stressed, self.extent, self.call = name, stressed, extent, shipped.CALLS[name]
        self.pipe = shipped.pipeline(name)
        if stressed:
            self._stress()
        self.weights = fingerprint(self.denoiser)
        self._calibrations: dict[int, list[State]] = {}

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, shipped.DENOISERS[self.name])

    def with_denoiser(self, model: nn.Module) -> Any:
        """The pipeline around another denoiser; its own settings stay, which components alone would not say."""
        made = copy.copy(self.pipe)
        made.register_modules(**{shipped.DENOISERS[self.name]: model})
        return made

    def _stress(self) -> None:
        """In fp32, on a few forwards that serve for nothing else; then rounded like the plain one."""
        states = self.trajectory(described(CALIBRATION, STRESS_SEED)[1], STRESS_SEED, CALIBRATION_STEPS)
        wide = self.exact()
        stress(wide, [in_fp32(state) for state in states])
        self.pipe = self.with_denoiser(wide.to(torch.bfloat16))

    def exact(self) -> nn.Module:
        """A copy in fp32."""
        return copy.deepcopy(self.denoiser).float()

    def trajectory(self, prompts: Sequence[str], seed: int, steps: int) -> list[State]:
        """The inputs of the denoiser at some steps, evenly spread, one batch of all prompts each."""
        calls: list[State] = []
        hook = self.denoiser.register_forward_pre_hook(
            lambda _model, args, kwargs: calls.append(State.of(args, kwargs)), with_kwargs=True)
        try:
            paint(self.pipe, prompts, seed, self.call)
        finally:
            hook.remove()
        of_step = len(calls) // self.call["num_inference_steps"]  # more than one where guidance is a call of its own
        return [call for step in evenly(self.call["num_inference_steps"], steps)
                for call in calls[step * of_step:(step + 1) * of_step]]

    # ------------------------------------------------------------------------------------- what it is measured on
    @cached_property
    def prompts(self) -> list[str]:
        return described(self.extent.prompts, HELD_OUT_SEED, held_out=True)[1]

    @cached_property
    def states(self) -> list[State]:
        return self.trajectory(self.prompts[:TRAJECTORY], HELD_OUT_SEED, self.extent.steps)

    @cached_property
    def expected(self) -> Tensor:
        return outputs(self.denoiser, self.states)

    @cached_property
    def pictures(self) -> Tensor:
        return self.painted(self.denoiser)

    def painted(self, model: nn.Module) -> Tensor:
        return paint(self.with_denoiser(model), self.prompts, HELD_OUT_SEED, self.call)

    def measured(self, model: nn.Module) -> Tensor:
        """Its outputs along the 16-bit trajectory."""
        wide = next(model.parameters()).dtype == torch.float32
        return outputs(model, map(in_fp32, self.states) if wide else self.states)

    def hardness(self) -> list[Hardness]:
        return hardness(self.denoiser, self.states)

    # ------------------------------------------------------------------------------------------ what is made of it
    def calibration(self, seed: int) -> list[State]:
        if seed not in self._calibrations:
            start = CALIBRATION_SEED + 100 * seed
            self._calibrations[seed] = self.trajectory(described(CALIBRATION, start)[1], start, CALIBRATION_STEPS)
        return self._calibrations[seed]

    def quantized(self, build: Build) -> Quantized:
        if build.method in (SIXTEEN, EXACT):
            return Quantized(self.denoiser if build.method == SIXTEEN else self.exact())
        states = None if build.peer or build.method == FREE else self.calibration(build.seed)
        model, started = copy.deepcopy(self.denoiser), time.perf_counter()
        if build.peer:
            size = quantize_by(build.peer, model)
        else:
            quantize(model, recipe_of(build.method, build.format), states, "a4", rank=build.rank,
                     states=len(states or ()), seed=build.seed, progress=False)
            size = sum(parameter.nbytes for module in quantized_modules(model).values()
                       for name, parameter in module.named_parameters() if not name.endswith("bias"))
        return Quantized(model, size, time.perf_counter() - started)


@torch.no_grad()
def quantize_by(peer: Peer, model: nn.Module) -> int:
    """Replace the linears that we would quantize by the peer's; returns what these store."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # it would compile for minutes; the values are the same
    size = 0
    for name in plan(model).choices:
        made = peer.build(copy.deepcopy(model.get_submodule(name)))
        size += stored_bytes(made)
        replace_module(model, name, made)
    return size


def in_fp32(state: State) -> State:
    def widened(x: Tensor) -> Tensor:
        return x.float() if x.is_floating_point() else x
    return State(*tree_map_only(Tensor, widened, (state.args, state.kwargs)))


def fingerprint(model: nn.Module) -> str:
    """Of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]

"""What the demonstration measures of a denoiser: time of a step, error against 16 bit, and images."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import State

REPEATS = 3


def outputs(model: nn.Module, states: Iterable[State]) -> Tensor:
    """The model's predictions for some inputs, stacked, fp32."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for state in states:
            args, kwargs = state.on(device)
            found.append(model(*args, **{**kwargs, "return_dict": False})[0].float().cpu())
    return torch.stack(found)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖"""
    return ((found - expected).norm() / expected.norm()).item()


def step_seconds(model: nn.Module, state: State) -> float:
    """The median time of one forward, after one that is not counted."""
    outputs(model, [state])
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        outputs(model, [state])
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def image(pipe: Any, prompt: str, seed: int, **call: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return pipe(prompt, generator=generator, **call).images[0]


def psnr(found: Any, expected: Any) -> float:
    """Peak signal-to-noise ratio of two PIL images in dB: 10·log₁₀(255² / mean squared difference)."""
    import numpy

    a, b = (numpy.asarray(picture, dtype=numpy.float64) for picture in (found, expected))
    error = float(((a - b) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def same_bits(first: nn.Module, second: nn.Module, states: Iterable[State]) -> bool:
    """The same tensors, and the same predictions to the last bit."""
    one, two = first.state_dict(), second.state_dict()
    alike = one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(_bits(one[name]), _bits(two[name])) for name in one)
    return alike and all(torch.equal(outputs(first, [state]), outputs(second, [state])) for state in states)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)

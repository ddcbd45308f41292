"""What the demonstration measures: pictures of a pipeline, and time, memory and error of its denoiser."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibrate import State
from ..errors import NunchakuError

REPEATS = 5
BATCH = 32  # pictures at a time
WINDOW, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2  # of structural similarity, for values in [0, 1]


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


def paint(pipe: Any, prompts: Sequence[str], seed: int, call: dict[str, Any],
          step_done: Callable[[int], None] = lambda pictures: None) -> Tensor:
    """(B, 3, H, W) in [0, 1]; the noise of picture i is drawn from seed + i. `step_done` hears of so many pictures."""
    made = []
    for start in range(0, len(prompts), BATCH):
        some = list(prompts[start : start + BATCH])
        arguments = {**call, "prompt": some, "output_type": "pt",
                     "generator": [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]}
        if isinstance(call.get("negative_prompt"), str):  # FLUX does not repeat it for each prompt
            arguments["negative_prompt"] = [call["negative_prompt"]] * len(some)

        def told(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Tensor], count: int = len(some)) -> dict:
            step_done(count)
            return tensors

        with torch.no_grad():
            made.append(pipe(**arguments, callback_on_step_end=told).images.float().clamp(0, 1))
    return torch.cat(made)


def psnr(found: Tensor, expected: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures (B, C, H, W) in [0, 1]: (B,) dB, −10·log₁₀(mean squared difference)."""
    _check_pictures(found, expected)
    return -10 * (found.double() - expected.double()).square().mean((1, 2, 3)).log10()


def ssim(found: Tensor, expected: Tensor) -> Tensor:
    """Structural similarity of pictures (B, C, H, W) in [0, 1], (B,), as Wang et al. 2004 measure it of each channel:
    the mean of (2·μxμy + c1)(2·σxy + c2) / ((μx² + μy² + c1)(σx² + σy² + c2)) over all windows inside the picture.
    """
    _check_pictures(found, expected, WINDOW)
    x, y = found.double(), expected.double()
    mean_x, mean_y = _blurred(x), _blurred(y)
    spread_x, spread_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    together = _blurred(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + C1) * (2 * together + C2)
    bottom = (mean_x**2 + mean_y**2 + C1) * (spread_x + spread_y + C2)
    return (top / bottom).mean((1, 2, 3))


def _blurred(x: Tensor) -> Tensor:
    """The Gaussian mean around each pixel whose window lies inside the picture."""
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (at / SIGMA) ** 2)
    weights = (weights / weights.sum()).repeat(x.shape[1], 1, 1, 1)
    rows = F.conv2d(x, weights, groups=x.shape[1])
    return F.conv2d(rows, weights.transpose(2, 3), groups=x.shape[1])


def _check_pictures(found: Tensor, expected: Tensor, least: int = 1) -> None:
    if found.ndim != 4 or found.shape != expected.shape or min(found.shape[2:]) < least:
        raise NunchakuError(f"pictures: expected two of one shape (B, C, H, W) of at least {least}x{least} pixels, "
                            f"got {tuple(found.shape)} and {tuple(expected.shape)}")


def same_bits(first: nn.Module, second: nn.Module, states: Iterable[State]) -> bool:
    """The same tensors, and the same predictions to the last bit."""
    one, two = first.state_dict(), second.state_dict()
    alike = one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(_bits(one[name]), _bits(two[name])) for name in one)
    return alike and all(torch.equal(outputs(first, [state]), outputs(second, [state])) for state in states)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)

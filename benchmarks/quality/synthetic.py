"""Synthetic layers with what makes real ones hard: heavy-tailed weights, correlated inputs, and 1 % of the input
channels 30 times larger than the rest."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nunchaku_py.methods.work import Stats

OUTLIER_GAIN = 30.0
SAMPLE = 512


class Layer(NamedTuple):
    weight: Tensor  # (N,K)
    calibration: Tensor  # (T,K)
    held_out: Tensor  # (T',K): what errors are measured on, never shown to a method


def layer(n: int, k: int, seed: int, gelu: bool = False, rows: int = 4096, held_out: int = 1024) -> Layer:
    """Student-t (4 degrees) weights; inputs with a 1/√i spectrum and log-normal channel gains, or the GELU of such."""
    g = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, k, generator=g)
    weight = 0.02 * gaussian / (torch.randn(4, n, k, generator=g).square().mean(0)).sqrt_()
    mix = torch.randn(k, k, generator=g) * (torch.arange(1, k + 1) ** -0.5)[:, None]
    mix /= mix.square().sum(0).mean().sqrt()
    gain = torch.exp(0.5 * torch.randn(k, generator=g))
    gain[torch.randperm(k, generator=g)[: max(1, k // 100)]] *= OUTLIER_GAIN
    x = torch.randn(rows + held_out, k, generator=g) @ mix
    x = x.add_(torch.randn(x.shape, generator=g), alpha=0.5).mul_(gain)
    x = torch.nn.functional.gelu(x, approximate="tanh") if gelu else x
    return Layer(weight, x[:rows], x[rows:])


def stats_of(x: Tensor) -> Stats:
    """The statistics a calibration collects of rows x (T,K)."""
    picked = torch.linspace(0, len(x) - 1, min(SAMPLE, len(x))).long()
    return Stats(x.abs().amax(0), x.square().mean(0), x.mean(0), x[picked].bfloat16(), x.T @ x / len(x), len(x))

"""How far pictures are from the 16-bit model's, by the eyes of the checker's network, and whether they are right.

    feature distance   mean over places and taps of ‖f̂ − ĝ‖², f̂ = f/‖f‖ over the channels   (as LPIPS, without weights)
    Fréchet distance   ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of the last tap's means over a picture
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nunchaku_py.demo.checker import Checker, agreement
from nunchaku_py.demo.measure import psnr, ssim

BATCH = 64


@dataclass(frozen=True)
class Looks:
    """Of one set of pictures against another of the same prompts and noise, means over the pictures."""

    psnr: float
    ssim: float
    feature: float
    frechet: float
    agreement: float  # part of the pictures that show what their prompts say


def compare(checker: Checker, found: Tensor, expected: Tensor, prompts: Sequence[str]) -> Looks:
    """Pictures (B, 3, 64, 64) in [0, 1]."""
    seen, wanted = features(checker, found), features(checker, expected)
    right = agreement(checker, found, prompts)
    return Looks(psnr(found, expected).mean().item(), ssim(found, expected).mean().item(),
                 feature_distance(seen, wanted).mean().item(), frechet(pooled(seen), pooled(wanted)),
                 sum(right) / len(right))


@torch.no_grad()
def features(checker: Checker, pictures: Tensor) -> list[Tensor]:
    """(B, C, h, w) of each tap."""
    parts = [checker.features(some) for some in pictures.split(BATCH)]
    return [torch.cat(tap) for tap in zip(*parts, strict=True)]


def feature_distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """(B,)"""
    taps = [(_unit(f) - _unit(g)).square().sum(1).mean((1, 2)) for f, g in zip(found, expected, strict=True)]
    return torch.stack(taps).mean(0)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-10)


def pooled(taps: Sequence[Tensor]) -> Tensor:
    """(B, C) of the last tap: what the answers about the whole picture are read from."""
    return taps[-1].mean((2, 3))


def frechet(found: Tensor, expected: Tensor) -> float:
    """Of two sets (B, C), taken as samples of normal distributions."""
    (mean, spread), (other, wanted) = (_normal(x.double()) for x in (found, expected))
    root = _root(spread)
    both = torch.linalg.eigvalsh(root @ wanted @ root).clamp_min(0).sqrt().sum()  # tr (Σ₁Σ₂)^½
    return max(0.0, ((mean - other).square().sum() + spread.trace() + wanted.trace() - 2 * both).item())


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C) and covariance (C, C)."""
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

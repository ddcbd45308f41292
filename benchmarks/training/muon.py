"""Muon: steps of orthogonal matrices (Jordan et al., 2024), for matrices and for convolutions taken as matrices.

torch's own takes matrices only, and convolutions learn from it as much: an autoencoder's error fell in 200 steps as far
as in 500 with AdamW.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import together

MOMENTUM, ROUNDS = 0.95, 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # lifts singular values to about 1 in five rounds
LIKE_ADAM = 0.2  # the root mean square of a step, in learning rates: what AdamW's steps have


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[Tensor], rate: float, decay: float):
        super().__init__(parameters, {"lr": rate, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            towards = [self._wanted(parameter) for parameter in parameters]
            directions = together.divided(orthogonal, towards)  # the dear part: each process does some of them
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.mul_(1 - group["lr"] * group["decay"])
                size = group["lr"] * LIKE_ADAM * max(direction.shape) ** 0.5
                parameter.add_(direction.reshape(parameter.shape), alpha=-size)

    def _wanted(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(momentum, MOMENTUM).flatten(1)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose singular values are all 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    found = (matrix.T if tall else matrix).bfloat16()
    found = found / (found.norm() + 1e-7)
    first, third, fifth = QUINTIC
    for _ in range(ROUNDS):
        square = found @ found.T
        found = first * found + (third * square + fifth * square @ square) @ found
    return (found.T if tall else found).to(matrix.dtype)

"""Several processes train one model: each takes a batch of its own, all take the same step.

    torchrun --nproc-per-node 2 -m benchmarks.training.flux --threads 1

Two processes of one thread are nearly twice as fast as one of two threads: these models are too small to share a layer.
"""
from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def join() -> None:
    """Where torchrun started this process, meet the others."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("gloo")


def part() -> int:
    """Which of the processes this is; 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def shared_gradients(parameters: Iterable[Tensor], stopping: bool) -> bool:
    """Every process has the mean of all gradients afterwards. True: one of them was asked to stop, so all do."""
    if count() == 1:
        return stopping
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([float(stopping)])])
    distributed.all_reduce(flat)
    *means, asked = flat.split([*(gradient.numel() for gradient in gradients), 1])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient) / count())
    return bool(asked > 0)

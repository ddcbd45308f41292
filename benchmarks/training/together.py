"""Several processes train one model: each takes a batch of its own, all take the same step.

    torchrun --nproc-per-node 2 -m benchmarks.training.flux --threads 1

Two processes of one thread are nearly twice as fast as one of two threads: these models are too small to share a layer.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed


def join() -> None:
    """Where torchrun started this process, meet the others."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("gloo")


def run(main: Callable[[], None]) -> None:
    """main(), as a process that may be one of several: those end without tearing the interpreter down.

    PyTorch keeps gloo's threads beyond destroy_process_group, and one that hears the other process close its
    connection just then calls std::terminate: of processes that end together, one in twenty."""
    code: int | str | None = None
    try:
        main()
    except SystemExit as end:
        code = end.code
    if not distributed.is_initialized():
        sys.exit(code)
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


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
    *sums, asked = _summed([*gradients, torch.tensor([float(stopping)])])
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.copy_(total / count())
    return bool(asked > 0)


def divided(work: Callable[[Tensor], Tensor], given: list[Tensor]) -> list[Tensor]:
    """[work(one) for one in given], of the same shapes; each process does a part of it."""
    if count() == 1:
        return [work(one) for one in given]
    return _summed([work(one) if i % count() == part() else torch.zeros_like(one) for i, one in enumerate(given)])


def _summed(parts: list[Tensor]) -> list[Tensor]:
    """Of all processes, in one message."""
    flat = torch.cat([one.flatten() for one in parts])
    distributed.all_reduce(flat)
    return [found.view_as(one) for found, one in zip(flat.split([one.numel() for one in parts]), parts, strict=True)]

"""The loop every training script here uses: seeded, resumable, logged.

A run lives in a folder: `state.pt` (weights, optimizer, step; written to a temporary name, then renamed) and `log.csv`.
Step n draws its data from a generator seeded by (seed, n), so a run that was stopped and resumed sees what it would
have seen. Ctrl-C, or a polite kill, saves before it leaves.
"""
from __future__ import annotations

import argparse
import csv
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import together
from .muon import Muon

OUT = Path(os.environ.get("NUNCHAKU_PY_TRAINING", "outputs/training"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOG_EVERY, SAVE_EVERY = 50, 250


@dataclass(frozen=True)
class Plan:
    """How long and how fast: a linear warm-up, a plateau, a linear fall to nothing over the last part, `fall`."""

    steps: int
    batch: int  # of each process
    rate: float
    warmup: int = 200
    fall: float = 0.4
    decay: float = 0.01
    average: float = 0.999
    seed: int = 0

    def rate_at(self, step: int) -> float:
        rise = (step + 1) / self.warmup
        left = (self.steps - step) / max(1, self.fall * self.steps)
        return self.rate * max(0.0, min(1.0, rise, left))

    def generator(self, step: int) -> torch.Generator:
        # A CPU generator hears the lower 32 bits of its seed only.
        return torch.Generator(DEVICE).manual_seed(together.part() * 10**9 + self.seed * 10**7 + step)


def parser(description: str | None, plan: Plan) -> argparse.ArgumentParser:
    """What every training script is asked."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--steps", type=int, default=plan.steps)
    found.add_argument("--batch", type=int, default=plan.batch)
    found.add_argument("--rate", type=float, default=plan.rate, help="highest learning rate")
    found.add_argument("--threads", type=int, default=2)
    return found


def prepared(arguments: argparse.Namespace, plan: Plan) -> Plan:
    """The plan as asked for. Everything made from here on lies on a GPU where there is one, and random weights are the
    same every time."""
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(DEVICE)
    together.join()
    torch.manual_seed(plan.seed)
    return replace(plan, steps=arguments.steps, batch=arguments.batch, rate=arguments.rate)


def low_precision() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


Loss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]


@dataclass
class Run:
    """One training: `module` holds all that is trained; `averaged`, a moving average of it, is what is kept."""

    name: str
    module: nn.Module
    plan: Plan
    step: int = 0
    averaged: dict[str, Tensor] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.averaged = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.optimizers = _optimizers(self.module, self.plan)
        if self._state.exists():
            self._resume(torch.load(self._state, map_location=DEVICE, weights_only=True))

    @property
    def folder(self) -> Path:
        return OUT / self.name

    @property
    def _state(self) -> Path:
        return state_of(self.name)

    def train(self, loss: Loss) -> None:
        """To the plan's end, or until somebody asks to stop: then the step is finished and everything saved."""
        with _asked_to_stop() as asked:
            self._train(loss, asked)
        self.save()
        if self.step < self.plan.steps:
            sys.exit(f"\nstopped at step {self.step} of {self.plan.steps}; the same command goes on from there")

    def _train(self, loss: Loss, asked: threading.Event) -> None:
        self.module.train()
        heard: dict[str, list[float]] = {}
        started, since = time.monotonic(), self.step
        stopping = False
        while self.step < self.plan.steps and not stopping:
            found, values = loss(self.step, self.plan.generator(self.step))
            found.backward()
            stopping = together.shared_gradients(self.module.parameters(), asked.is_set())
            self._update()
            self.step += 1
            for name, value in {"loss": found.item(), **values}.items():
                heard.setdefault(name, []).append(value)
            if self.step % LOG_EVERY == 0:
                seconds = (time.monotonic() - started) / (self.step - since)
                means = {name: sum(values) / len(values) for name, values in heard.items()}
                self._log({**means, "samples_per_second": together.count() * self.plan.batch / seconds})
                heard = {}
                started, since = time.monotonic(), self.step
            if self.step % SAVE_EVERY == 0:
                self.save()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.rate_at(self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weight = 1 - min(self.plan.average, (self.step + 1) / (self.step + 10))
        for name, value in self.module.state_dict().items():
            kept = self.averaged[name]
            if value.is_floating_point():
                kept.lerp_(value.detach(), weight)
            else:
                kept.copy_(value)

    def save(self) -> None:
        if together.part() > 0:
            return
        parts = {"step": self.step, "module": self.module.state_dict(), "averaged": self.averaged,
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        save_whole(parts, self._state)

    def _resume(self, parts: dict[str, Any]) -> None:
        if "module" not in parts:
            raise SystemExit(f"{self._state}: was made from shipped weights, which are not all that this training "
                             "needs; delete the folder to begin anew")
        self.step = parts["step"]
        self.module.load_state_dict(parts["module"])
        self.averaged = parts["averaged"]
        if "optimizers" in parts:
            for optimizer, state in zip(self.optimizers, parts["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        print(f"{self.name}: going on from step {self.step}", flush=True)

    def _log(self, values: dict[str, float]) -> None:
        if together.part() > 0:
            return
        row = {"step": self.step, **{name: f"{value:.5g}" for name, value in values.items()}}
        path = self.folder / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        left = (self.plan.steps - self.step) * self.plan.batch * together.count() / values["samples_per_second"]
        print(f"{self.name} " + "  ".join(f"{name} {value}" for name, value in row.items())
              + f"  of {self.plan.steps}, {left / 60:.0f} min left", file=sys.stderr, flush=True)


def state_of(name: str) -> Path:
    return OUT / name / "state.pt"


def started_from(module: nn.Module) -> dict[str, Any]:
    """The state of a run that starts with these weights."""
    return {"step": 0, "module": module.state_dict(), "averaged": module.state_dict()}


def save_whole(what: Any, path: Path) -> None:
    """A file that is there is complete, also for another process that waits for it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(what, draft)
    os.replace(draft, path)


def averaged(name: str) -> dict[str, Tensor]:
    """The weights a finished or interrupted run has to give."""
    return torch.load(state_of(name), map_location=DEVICE, weights_only=True)["averaged"]


def _optimizers(module: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions inside, AdamW for what reads and writes them, for norms and biases."""
    inner, others = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (inner if _is_inner(name, parameter) else others).append(parameter)
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, plan.rate, (0.9, 0.98), weight_decay=0.0)]
    if inner:
        found.append(Muon(inner, plan.rate, plan.decay))
    return found


def _is_inner(name: str, parameter: Tensor) -> bool:
    if any(part in name for part in ("embed", "shared", "conv_in", "conv_out")):
        return False
    return parameter.ndim == 4 or parameter.ndim == 2 and min(parameter.shape) >= 64


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by Ctrl-C or a polite kill. A second one ends at once, with what was saved before."""
    asked = threading.Event()

    def ask(number: int, _frame: object) -> None:
        asked.set()
        signal.signal(number, signal.SIG_DFL)

    # Set for SIGINT too: a shell's background jobs start with it ignored.
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

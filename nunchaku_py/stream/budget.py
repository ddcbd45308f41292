"""What quantizing from files takes in memory, known before it begins: a budget is kept or refused, not broken."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..calibrate import State
from ..engine import Job, unit_weight
from ..errors import NunchakuError
from ..sizes import shown
from .residence import Streamed
from .run import StreamedRun

PROGRAM = 650_000_000  # of a process on a CPU that has imported torch, diffusers and transformers
SQUARES = 3  # matrices (K,K) that solving for the codes of a linear holds beside the statistics
SHOWN = 3


@dataclass(frozen=True)
class Need:
    what: str
    nbytes: int


def check(run: StreamedRun, states: Sequence[State] | None, budget: int) -> None:
    """Refuse a budget below what this run takes."""
    less = states is not None and _total(needs_of(run, None)) <= budget
    remedy = "; without prompts to calibrate on it would do" if less else ""
    _refuse_above(budget, needs_of(run, states), f"quantizing {type(run.model).__name__}", remedy)


def check_running(homes: Mapping[str, Streamed], budget: int) -> None:
    """Refuse a budget below what a pipeline takes that runs block by block."""
    needs = [Need(f"for what lies outside the blocks of {name}", nbytes(home, "")) for name, home in homes.items()]
    needs.append(Need("for a block", max(nbytes(home, block) for home in homes.values() for block in home.names)))
    if next(iter(homes.values())).device.type == "cpu":
        needs.append(Need("for the program itself", PROGRAM))
    _refuse_above(budget, needs, "running the pipeline on prompts", "; without prompts it takes less")


def _refuse_above(budget: int, needs: Sequence[Need], what: str, remedy: str) -> None:
    if _total(needs) > budget:
        most = sorted(needs, key=lambda need: -need.nbytes)[:SHOWN]
        shares = ", ".join(f"{shown(need.nbytes)} {need.what}" for need in most)
        raise NunchakuError(f"budget of {shown(budget)}: {what} takes about {shown(_total(needs))} ({shares}, …)"
                            f"{remedy}")


def _total(needs: Iterable[Need]) -> int:
    return sum(need.nbytes for need in needs)


def needs_of(run: StreamedRun, states: Sequence[State] | None) -> list[Need]:
    """Of the device that computes. states: None without calibration; empty while they are not known yet."""
    home, blocks = run.residence, run.blocks
    largest = max(nbytes(home, block) for block in home.blocks)
    found = [Need("for a block in 16 and 4 bits", largest + largest // 3),
             Need("for the weights that are quantized together", max(map(_job_bytes, _jobs(run))))]
    if home.device.type == "cpu":
        found.append(Need("for the program itself", PROGRAM))
    if states is None:
        return found
    found.append(Need("for what lies outside the blocks", nbytes(home, "")))
    if run.engine.recipe.needs_gram:
        found += [Need("for the statistics of a block", max(_statistics(run, jobs) for jobs in blocks.values())),
                  Need("to solve for the codes of a linear", max(map(_solving, _units(run))))]
    return [*found, *_of_states(run, states)]


def nbytes(home: Streamed, part: str) -> int:
    """Of a block, or ("") of what lies outside of all, as it is held."""
    state = home.model.state_dict(keep_vars=True)
    return sum(state[name].numel() * state[name].element_size() for name in home.names[part])


def _jobs(run: StreamedRun) -> Iterable[list[Tensor]]:
    for job in run.jobs:
        yield [run.model.get_submodule(name).weight for name in job.names]


def _job_bytes(weights: list[Tensor]) -> int:
    """The weights stacked, and the codes that are made of them."""
    return sum(weight.numel() * (2 + 1) for weight in weights)


def _units(run: StreamedRun, jobs: Iterable[Job] | None = None) -> Iterable[tuple[int, int]]:
    """(N,K) of what is quantized with statistics."""
    for job in run.jobs if jobs is None else jobs:
        for unit in job.units:
            weights = [unit_weight(run.model.get_submodule(name), unit) for name in unit.names]
            yield sum(weight.shape[0] for weight in weights), weights[0].shape[1]


def _statistics(run: StreamedRun, jobs: Iterable[Job]) -> int:
    return sum(4 * k * k for _, k in _units(run, jobs))


def _solving(shape: tuple[int, int]) -> int:
    n, k = shape
    return 4 * SQUARES * k * k + 8 * n * k


def _of_states(run: StreamedRun, states: Sequence[State]) -> list[Need]:
    """The forwards that are held at a block, and the one that is on its way through it."""
    widths = [k for _, k in _units(run)]
    rows = [_rows(state) for state in states]
    return [Need("for the calibration states", sum(map(_bytes, states)) + sum(rows) * 3 * 2 * min(widths)),
            Need("for a forward through a block", max(rows, default=0) * 8 * 2 * max(widths))]


def _bytes(state: State) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves((state.args, state.kwargs)) if isinstance(leaf, Tensor))


def _rows(state: State) -> int:
    """Tokens, or positions of an image."""
    tensors = [leaf for leaf in tree_leaves((state.args, state.kwargs)) if isinstance(leaf, Tensor)]
    return sum(t.shape[0] * (t.shape[1] if t.dim() == 3 else t.shape[2:].numel()) for t in tensors if t.dim() > 2)


def keep_within(budget: int, device: torch.device) -> None:
    """On a GPU what would exceed the budget is an error of its own, whatever was estimated."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)

"""Who takes part, how much memory each needs, and who is measured beside whom."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .job import DENSE, OURS, WRITE, Job
from .machine import installed
from .peers import PEERS
from .rows import gigabytes
from .subject import Subject

# Beside a model: what imports take, and what a step computes.
OVERHEAD = 1_500_000_000
PEER_SHARE = 0.6  # of 16 bit, that the largest of the peers takes
SHARED = ("does not fit in the {left} that are free: in its step the blocks of each kind share one block's weights, "
          "its memory is computed")
NO_ROOM = "does not fit: needs about {needs}, {left} are free"


@dataclass
class Contender:
    """weights: bytes that those of its denoiser take, about; beside: what else must fit. `note`: why it is not
    measured, or what to know of its figures. computed: bytes that were not measured."""

    job: Job
    package: str
    weights: int
    beside: int
    note: str = ""
    out: bool = False
    computed: int | None = None
    steps: list[float] = field(default_factory=list)
    images: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> int:
        return self.weights + self.beside

    @property
    def label(self) -> str:
        return f"{self.job.kind} {self.job.mode}" if self.job.kind == OURS else self.job.kind

    @property
    def is_dense(self) -> bool:
        return self.job.kind == DENSE

    def leave(self, why: str) -> None:
        self.note, self.out = why, True


def contenders(subject: Subject, probe: dict[str, Any], job: Job, modes: Sequence[str], peers: bool) -> list[Contender]:
    """16 bit, ours in each mode, the peers. `job` holds what is the same for all."""
    left, rest = probe["memory_left"], subject.rest + OVERHEAD
    found = [_dense(subject, probe, job, left, rest)]
    named = dict.fromkeys(probe["mode"] if mode == "auto" else mode for mode in modes)
    found += [Contender(replace(job, kind=OURS, mode=mode, denoiser=subject.quantized),
                        f"nunchaku-py {probe['version']}", probe["quantized"], rest) for mode in named]
    for peer in PEERS if peers else ():
        made = Contender(replace(job, kind=peer.label), f"{peer.package} {installed(peer.package)}",
                         int(PEER_SHARE * probe["dense"]), rest)
        found.append(made)
        if peer.missing:
            made.leave(peer.missing)
    for one in found:
        if not one.out and one.needs > left:
            one.leave(NO_ROOM.format(needs=gigabytes(one.needs), left=gigabytes(left)))
    return found


def _dense(subject: Subject, probe: dict[str, Any], job: Job, left: int, rest: int) -> Contender:
    package, own = f"torch {probe['torch']}", replace(job, kind=DENSE, mode="", denoiser=subject.dense)
    if probe["dense"] + rest <= left:
        return Contender(own, package, probe["dense"], rest)
    return Contender(replace(own, denoiser="", share=True), package, probe["shared"], rest,
                     SHARED.format(left=gigabytes(left)), computed=probe["dense"])


def checkpoints(found: Sequence[Contender]) -> dict[str, Job]:
    """Kind → what writes the checkpoint that it is loaded from, for those that have no folder and can have one."""
    kinds = {one.job.kind: one.job for one in found
             if one.job.kind in (DENSE, OURS) and not (one.out or one.job.denoiser or one.job.share)}
    return {kind: replace(job, task=WRITE, pipeline="", device="cpu") for kind, job in kinds.items()}


def load_from(found: Sequence[Contender], kind: str, folder: str) -> None:
    for one in found:
        if one.job.kind == kind and not one.job.share:
            one.job = replace(one.job, denoiser=folder)


def groups(found: Sequence[Contender], left: int) -> list[list[Contender]]:
    """Who is in memory at once: as many as fit beside 16 bit, which takes part in each group. Whoever does not fit
    beside it is alone."""
    dense, others = found[0], [one for one in found[1:] if not one.out]
    if dense.out:
        return [[one] for one in others]
    made: list[list[Contender]] = [[dense]]
    alone: list[list[Contender]] = []
    for one in others:
        if sum(member.needs for member in made[-1]) + one.needs <= left:
            made[-1].append(one)
        elif dense.needs + one.needs <= left:
            made.append([dense, one])
        else:
            alone.append([one])
    return made + alone

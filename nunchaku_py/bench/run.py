"""The benchmark: a process for each contender, turns A B A B …, rows, and what is written of them."""
from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import NunchakuError
from .contenders import Contender, checkpoints, contenders, groups, load_from
from .job import BESIDE, MEASURE, OURS, PROBE, STEPS, Job
from .parts import DECODER, PARTS, TEXT
from .process import Failed, Process, result_of
from .rows import Row, gigabytes, seconds
from .spread import Spread
from .subject import Subject

SIDE = {"cpu": 512}  # pixels of an image unless told otherwise; on GPUs, what the model was made for
ROUNDS = {"cpu": 3}
GPU_ROUNDS = 10
QUICK_SIDE, QUICK_STEPS = 128, 2
INTERRUPTED = "interrupted before its turn"
DISK = 1.05  # of the weights, that checkpoints take
Told = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """None: what suits the device and the model."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    rounds: int | None = None
    modes: Sequence[str] = ("auto",)
    format: str = "int4"
    rules: Mapping[str, str] = field(default_factory=dict)
    peers: bool = True
    load: bool = True
    end_to_end: bool = False
    device: str = "auto"
    threads: int = 0
    quick: bool = False
    verbose: bool = False


def run_bench(subject: Subject, options: Options, out: Path, told: Told) -> tuple[list[Row], bool]:
    """A row for each contender, and whether all rounds were run. `out` is there; checkpoints lie in it while they are
    needed."""
    subject.check_size(options.width, options.height)
    if options.end_to_end and not subject.pipeline and subject.name not in PARTS:
        raise NunchakuError(f"--end-to-end: what is beside the denoiser of {subject.about} is not known; name the "
                            f"folder of its pipeline, or one of {', '.join(PARTS)}")
    job = Job(PROBE, "", subject.about, subject.config, 0, 0, options.device, options.threads,
              format=options.format, rules=dict(options.rules), verbose=options.verbose)
    probe = result_of(job, "known", told)
    if not (subject.pipeline or probe["inputs"]):
        raise NunchakuError(f"{subject.about}: what a step of it is called with is not known; name the folder of a "
                            "pipeline with it")
    job = shared_job(subject, options, probe, job)
    found = contenders(subject, probe, job, options.modes, options.peers)
    told(heading(subject, probe, job))
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=out) as scratch:
        if options.load and not options.quick:
            write_checkpoints(found, Path(scratch), told)
        rounds = options.rounds or (1 if options.quick else ROUNDS.get(probe["device"], GPU_ROUNDS))
        finished = measure_all(found, probe["memory_left"], rounds, told)
    for one in found[1:]:
        compare(one, found[0])
    wanted = options.end_to_end and not subject.pipeline and finished
    beside = parts_beside(replace(job, name=subject.name), told) if wanted else {}
    return [row_of(one, found[0], subject, probe, beside) for one in found], finished


def shared_job(subject: Subject, options: Options, probe: dict[str, Any], job: Job) -> Job:
    """What is the same for all contenders."""
    known, call = subject.known, dict(subject.call)
    side = QUICK_SIDE if options.quick else SIDE.get(probe["device"], known.side)
    width, height = (given or call.get(name) or (side if known.side else 0) for name, given in
                     (("width", options.width), ("height", options.height)))
    if subject.pipeline:
        call |= {name: value for name, value in (("width", width), ("height", height)) if value}
        call |= {STEPS: QUICK_STEPS} if options.quick and options.steps is None else {}
    return replace(job, task=MEASURE, device=probe["device"], threads=probe["threads"], width=width,
                   height=height, text=known.text, batch=known.batch, calls=known.calls, pipeline=subject.pipeline,
                   component=subject.component, call=call)


def heading(subject: Subject, probe: dict[str, Any], job: Job) -> str:
    what = "images of a pipeline" if subject.pipeline else "single steps"
    size = f"{job.width}x{job.height}" if job.width else "the pipeline's own size"
    return (f"{subject.about}: {probe['parameters'] / 1e9:.3g} billion weights in the denoiser, {what} at {size}, on "
            f"{probe['device_name']} ({probe['kernels']}), {job.threads} CPU threads, "
            f"{gigabytes(probe['memory_left'])} free")


# --------------------------------------------------------------------------------------------------------- checkpoints
def write_checkpoints(found: Sequence[Contender], folder: Path, told: Told) -> None:
    """Of random weights, at their real size, so that loading them is what loading is; where the disk has room."""
    wanted = checkpoints(found)
    sizes = {one.job.kind: one.weights for one in found}
    for kind, job in wanted.items():
        needs, free = int(DISK * sizes[kind]), shutil.disk_usage(folder).free
        if needs > free:
            told(f"{kind}: no checkpoint is written, so loading is not measured: {gigabytes(needs)} of disk are "
                 f"needed, {gigabytes(free)} are free")
            continue
        target = folder / kind.replace(" ", "-")
        started = time.monotonic()
        try:
            result_of(replace(job, write_to=str(target)), "written", lambda what, kind=kind: told(f"{kind}: {what}"))
        except Failed as why:
            told(f"{kind}: no checkpoint could be written, so loading is not measured: {why}")
            continue
        told(f"{kind}: checkpoint written in {seconds(time.monotonic() - started)}")
        load_from(found, kind, str(target))


# ------------------------------------------------------------------------------------------------------------ measuring
def measure_all(found: Sequence[Contender], left: int, rounds: int, told: Told) -> bool:
    """False if somebody interrupted it after at least one round; before, there is nothing to keep."""
    try:
        for group in groups(found, left):
            measure(group, rounds, told)
    except KeyboardInterrupt:
        if not any(one.steps for one in found):
            raise
        for one in found:
            if not (one.out or one.steps):
                one.leave(INTERRUPTED)
        return False
    return True


def measure(group: Sequence[Contender], rounds: int, told: Told) -> None:
    """Everybody ready, a turn that does not count, then rounds of turns."""
    with ExitStack() as stack:
        running: dict[str, tuple[Contender, Process]] = {}
        for one in group:
            attempt(one, running, lambda one=one: start(one, stack, running, told), told)
        once = turns(running, told)
        if once:
            told(f"warm-up: {spoken(once)}; {rounds} round{'s' if rounds > 1 else ''} of that, about "
                 f"{seconds(rounds * sum(took['image_s'] or took['step_s'] for took in once.values()))}")
        for number in range(rounds):
            took = turns(running, told)
            keep(took, running, group[0])
            told(f"round {number + 1} of {rounds}: {spoken(took)}")


def attempt(one: Contender, running: dict[str, tuple[Contender, Process]], action: Callable[[], object], told: Told
            ) -> None:
    """What goes wrong is the contender's answer, and nobody else's."""
    try:
        action()
    except Failed as why:
        running.pop(one.label, None)
        if one.steps:
            one.note = f"failed after {len(one.steps)} rounds: {why}"
        else:
            one.leave(str(why))
        told(f"{one.label}: {why}")


def start(one: Contender, stack: ExitStack, running: dict[str, tuple[Contender, Process]], told: Told) -> None:
    process = stack.enter_context(Process(one.job, lambda what: told(f"{one.label}: {what}")))
    facts = process.answer("ready")
    one.facts.update(facts)
    running[one.label] = one, process
    loaded = "" if facts["load_s"] is None else f" in {seconds(facts['load_s'])}"
    told(f"{one.label}: ready{loaded}, holds {gigabytes(facts['denoiser_bytes'])}")


def turns(running: dict[str, tuple[Contender, Process]], told: Told) -> dict[str, dict[str, Any]]:
    """Label → what its turn took."""
    took: dict[str, dict[str, Any]] = {}
    for label, (one, process) in list(running.items()):
        attempt(one, running, lambda label=label, process=process: took.update({label: process.turn()}), told)
    return took


def keep(took: dict[str, dict[str, Any]], running: dict[str, tuple[Contender, Process]], first: Contender) -> None:
    """The times; and beside 16 bit, how many times as fast a step is in this very round."""
    dense = took.get(first.label) if first.is_dense else None
    for label, found in took.items():
        one = running[label][0]
        one.facts.update(found)
        one.steps.append(found["step_s"])
        one.images += [] if found["image_s"] is None else [found["image_s"]]
        if dense is not None and one is not first:
            one.ratios.append(dense["step_s"] / found["step_s"])


def parts_beside(job: Job, told: Told) -> dict[str, float]:
    """Seconds of text encoders and decoder, the same for all; nothing, where they do not fit."""
    try:
        found = result_of(replace(job, task=BESIDE), "measured", lambda what: told(f"{BESIDE}: {what}"))
    except Failed as why:
        told(f"text encoders and decoder are not measured: {why}")
        return {}
    told(f"text encoders {seconds(found[TEXT])}, decoder {seconds(found[DECODER])}")
    return {name: found[name] for name in (TEXT, DECODER)}


def spoken(took: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{label} {seconds(found['image_s'] or found['step_s'])}" for label, found in took.items())


def compare(one: Contender, dense: Contender) -> None:
    """With 16 bit that ran at another time: by medians."""
    if one.steps and not one.ratios and dense.steps:
        one.facts["apart"] = Spread.of(dense.steps).median / Spread.of(one.steps).median


# ----------------------------------------------------------------------------------------------------------------- rows
def row_of(one: Contender, dense: Contender, subject: Subject, probe: dict[str, Any], beside: dict[str, float]) -> Row:
    job, facts = one.job, one.facts
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    plain = not subject.pipeline
    given = "".join(f", {glob}={choice}" for glob, choice in job.rules.items())
    row = Row(now, subject.about, subject.weights, probe["device_name"], probe["cpu"], job.threads, probe["kernels"],
              probe["versions"], job.width, job.height, job.text if plain else "", job.batch if plain else "",
              int(facts.get("steps") or job.call.get(STEPS) or subject.known.steps), job.kind, one.package,
              mode=job.mode if job.kind == OURS else "",
              format="" if job.kind != OURS or subject.quantized else f"{job.format}{given}",
              backends=facts.get("explained", ""), note=one.note)
    if one.out:
        return row
    row.denoiser_bytes = facts["denoiser_bytes"] if one.computed is None else one.computed
    row.memory_is = "measured" if one.computed is None else "computed"
    row.text_s, row.decoder_s = beside.get(TEXT, ""), beside.get(DECODER, "")
    row.fill_times(one.steps, one.images)
    row.load_s = "" if facts["load_s"] is None else facts["load_s"]
    row.imports_bytes, row.device_peak_bytes = facts["imports_bytes"], facts.get("device_peak_bytes", "")
    row.peak_bytes = facts["peak_bytes"] if one.computed is None else ""
    held = dense.computed or dense.facts.get("denoiser_bytes")
    if one is not dense and held:
        row.times_less = held / row.denoiser_bytes
    if one.ratios or "apart" in facts:
        row.fill_speedup(one.ratios or [facts["apart"]], bool(one.ratios))
    return row

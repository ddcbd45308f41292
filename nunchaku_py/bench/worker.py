"""The process of one contender: makes or loads its model, and takes a turn whenever it is asked to.

Alone in its process, its memory is its own, and a peer that crashes takes nobody with it. It reads lines from stdin,
and ends where there are no more, so that it never outlives who started it. It answers on what was its stdout; whatever
others print there goes to stderr.
"""
from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .job import BESIDE, DENSE, OURS, PROBE, STEPS, WRITE, Job


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    say = Say(out)
    try:
        job = Job.of(sys.stdin.readline())
        run(job, say)
    except KeyboardInterrupt:
        return
    except BaseException as error:
        if not isinstance(error, Exception):
            raise
        text = " ".join(str(error).split())
        say("failed", sentence=(text[:400] or type(error).__name__), error=type(error).__name__)


class Say:
    """Answers: a line each."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def __call__(self, what: str, **values: Any) -> None:
        self.out.write(json.dumps({"what": what, **values}) + "\n")
        self.out.flush()


def run(job: Job, say: Say) -> None:
    import torch

    from ..commands.sources import quiet_libraries

    if job.threads:
        torch.set_num_threads(job.threads)
    if job.task != PROBE and job.device != "cpu":
        torch.cuda.set_device(job.device)  # what is waited for, and whose memory is asked
    quiet_libraries(job.verbose)
    if job.task == PROBE:
        from .probe import probe

        say("known", **probe(job))
        return

    def told(what: str) -> None:
        say("doing", sentence=what)

    if job.task == BESIDE:
        from .parts import measure_parts

        say("measured", **measure_parts(job, told))
        return
    subject = Subject(job, told)
    if job.task == WRITE:
        subject.write()
        say("written")
        return
    measure(subject, say)


def measure(subject: Subject, say: Say) -> None:
    """Loads, then a turn for each line that asks for one."""
    from .machine import memory

    subject.import_all()
    imports = memory()["VmRSS"]
    loaded = subject.load()
    say("ready", load_s=loaded, denoiser_bytes=subject.held(), imports_bytes=imports, explained=subject.explained(),
        steps=subject.steps)
    for _ in sys.stdin:
        step, image = subject.turn()
        say("turned", step_s=step, image_s=image, peak_bytes=memory()["VmHWM"], **subject.device_peak())


@dataclass
class Subject:
    """What is measured: a denoiser, or a pipeline with it."""

    job: Job
    told: Callable[[str], None]
    model: Any = None
    pipe: Any = None
    call: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    calls_s: list[float] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.job.device.startswith("cuda")

    # ------------------------------------------------------------------------------------------------------- making
    def import_all(self) -> None:
        """What loading would import, so that it is no part of it."""
        import diffusers

        from ..checkpoint import load  # noqa: F401
        from ..checkpoint.build import model_class
        from ..folders import read_json

        model_class(self.job.config, self.job.name)
        if self.job.pipeline:
            named = read_json(Path(self.job.pipeline) / "model_index.json")
            getattr(diffusers, str(named.get("_class_name")), None)

    def random(self) -> Any:
        from .peers import BY_LABEL
        from .quick import CHOICES
        from .random_models import meta_model, random_converted, random_model, random_quantized

        job, empty = self.job, meta_model(self.job.config, self.job.name)
        if job.kind == DENSE:
            self.told("drawing random weights")
            return random_model(empty, 1, job.device, job.share)
        if job.kind == OURS:
            return random_quantized(empty, CHOICES[f"quick-{job.format}"], job.mode, job.device, self.told, job.rules)
        peer = BY_LABEL[job.kind]
        return random_converted(empty, peer.convert, int(peer.copies), job.device, self.told)

    def write(self) -> None:
        from ..checkpoint import save

        model = self.random()
        self.told(f"writing {self.job.write_to}")
        model.save_pretrained(self.job.write_to) if self.job.kind == DENSE else save(model, Path(self.job.write_to))

    def load(self) -> float | None:
        """Seconds of loading from disk to where it runs; None where the denoiser was made here."""
        from .held import read_all
        from .machine import forget_peak

        random = not self.job.denoiser
        if random:
            self.model = self.random()
            gc.collect()
            forget_peak()  # what making it took is nothing that a user meets
        self.told("loading")
        started = time.perf_counter()
        if not random:
            self.model = self.from_disk()
        self.open_pipeline() if self.job.pipeline else self.open_model()
        read_all(self.model)
        self.start_peak()
        return None if random else self.now() - started

    def from_disk(self) -> Any:
        from ..checkpoint import load
        from ..commands.sources import load_model

        job = self.job
        if job.kind == OURS:
            return load(job.denoiser, job.mode)
        return load_model(Path(job.denoiser), "bf16")

    def open_model(self) -> None:
        from .inputs import inputs_of

        job = self.job
        self.model = self.model.to(job.device).eval().requires_grad_(False)
        self.inputs = inputs_of(self.model, job.width, job.height, job.text, job.batch, job.device)

    def open_pipeline(self) -> None:
        from ..commands.sources import load_pipeline

        job = self.job
        self.pipe = load_pipeline(Path(job.pipeline), "bf16", **{job.component: self.model}).to(job.device)
        self.model = getattr(self.pipe, job.component).eval().requires_grad_(False)
        self.call = self.arguments()
        self.model.register_forward_pre_hook(lambda *_: self.calls_s.append(-self.now()))
        self.model.register_forward_hook(lambda *_: self.called())

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call; one that it does not take is refused."""
        import inspect

        import torch

        from ..commands.generate import longest_prompt
        from ..errors import NunchakuError

        known = inspect.signature(self.pipe.__call__).parameters
        for name in self.job.call:
            if name not in known:
                raise NunchakuError(f"{type(self.pipe).__name__} takes no {name}")
        usual = {STEPS: known[STEPS].default} if STEPS in known else {}
        seeded = {"generator": torch.Generator().manual_seed(0)} if "generator" in known else {}
        return {**usual, **seeded, **longest_prompt(self.pipe, known), **self.job.call}

    def called(self) -> None:
        self.calls_s[-1] += self.now()

    # ---------------------------------------------------------------------------------------------------- measuring
    def now(self) -> float:
        self.wait()
        return time.perf_counter()

    def wait(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def turn(self) -> tuple[float, float | None]:
        """Seconds of one step; of one image, where a pipeline makes it."""
        import torch

        with torch.no_grad():
            if self.pipe is None:
                started = self.now()
                for _ in range(self.job.calls):
                    self.model(**self.inputs)
                return self.now() - started, None
            self.calls_s.clear()
            started = self.now()
            self.pipe(**self.call)
            return sum(self.calls_s) / self.steps, self.now() - started

    @property
    def steps(self) -> int:
        """Of an image, as the pipeline is called; 0 where there is none."""
        return int(self.call.get(STEPS, 0))

    def held(self) -> int:
        from .held import held_bytes

        return held_bytes(self.model)

    def explained(self) -> str:
        """Which operators of ours run where. Of one linear of each kind: explaining reads its weights."""
        if self.job.kind != OURS:
            return ""
        from ..explain import explain
        from ..swap import quantized_sites

        kinds = {site.linear_spec.token: site for site in quantized_sites(self.model)}
        found = (f"{line.op} on {line.backend}" for site in kinds.values() for line in explain(site))
        return ", ".join(dict.fromkeys(found))

    def start_peak(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def device_peak(self) -> dict[str, int]:
        if not self.on_gpu:
            return {}
        import torch

        return {"device_peak_bytes": torch.cuda.max_memory_allocated()}

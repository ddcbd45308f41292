"""Calibration states of a pipeline that does not fit in memory: all prompts go through every block together, while the
block is there. Text encoders come first, and their memory goes to the denoiser."""
from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..calibrate import PromptRun, State, Thinned, prompt_runs
from ..errors import NunchakuError
from ..folders import DENOISERS
from ..lanes import Gate, Lane, closed, stopped_at_the_end
from ..progress import Progress
from .residence import Streamed


class StreamedPipeline:
    """A pipeline object over empty models: `homes` are those whose weights are streamed, by component."""

    def __init__(self, pipe: Any, homes: Mapping[str, Streamed], device: torch.device | str) -> None:
        self.pipe, self.homes, self.device = _on_device(pipe, torch.device(device)), homes, torch.device(device)

    def states(self, names: list[str], prompts: list[Any], states: int, seed: int, show: bool | None = None
               ) -> dict[str, list[State]]:
        """At most so many inputs of the forward of each of these components, as `capture_states` would find them."""
        runs = prompt_runs(self.pipe, prompts, states, seed, {})
        recorder = _Recorder(runs, {name: self.homes[name].model for name in names})
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(recorder)
            bar = stack.enter_context(Progress(self._cost(runs), "collect", show))
            gates = {(name, block): Gate(home.model, f"{name}/{block}", home.model.get_submodule(block))
                     for name, home in self.homes.items() for block in home.blocks}
            stack.enter_context(closed({gate.name: gate for gate in gates.values()}))
            lanes = [Lane(recorder.running(run, _with_own_state(self.pipe)), self.device) for run in runs]
            stack.enter_context(stopped_at_the_end(lanes))
            homes = stack.enter_context(_Homes(self.homes, self.denoisers))
            with sentence_of(type(self.pipe).__name__):
                _Together(lanes, {gate.name: key for key, gate in gates.items()}, homes, bar).run()
        return {name: recorder.states(name) for name in names}

    @property
    def denoisers(self) -> list[str]:
        return [name for name in DENOISERS if name in self.homes]

    def _cost(self, runs: list[PromptRun]) -> float:
        """Calls of blocks of the denoiser, if each step calls it once."""
        blocks = max((len(self.homes[name].blocks) for name in self.denoisers), default=1)
        return sum(run.arguments.get("num_inference_steps", 1) for run in runs) * blocks


class _Homes:
    """What lies outside the blocks of all models is in memory until one of `last` begins; then only that of `last`."""

    def __init__(self, homes: Mapping[str, Streamed], last: list[str]) -> None:
        self.homes, self.last, self.there = homes, last, []

    def __enter__(self) -> _Homes:
        for name, home in self.homes.items():
            self.there.append(name)
            home.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        while self.there:
            self.homes[self.there.pop()].__exit__()

    def leave_for(self, name: str) -> None:
        if name in self.last:
            for other in [other for other in self.there if other not in self.last]:
                self.there.remove(other)
                self.homes[other].__exit__()


class _Together:
    """Drives the lanes: the block at which the least advanced ones are held comes next, and they all run it. A denoiser
    begins when no lane is held at a text encoder any more, whose memory it takes."""

    def __init__(self, lanes: list[Lane], places: Mapping[str, tuple[str, str]], homes: _Homes, bar: Progress) -> None:
        self.lanes, self.places, self.homes, self.bar = lanes, places, homes, bar
        self.visits: Counter[tuple[Lane, bool]] = Counter()  # of text encoders, and (True) of denoisers

    def run(self) -> None:
        for number, lane in enumerate(self.lanes, 1):
            self.bar.say(f"prompt {number} of {len(self.lanes)}")
            lane.go()
        while held := [lane for lane in self.lanes if lane.at is not None]:
            first = min(held, key=self.advance)
            self.visit([lane for lane in held if lane.at == first.at and self.advance(lane) == self.advance(first)])

    def advance(self, lane: Lane) -> tuple[bool, int]:
        denoising = self.places[lane.at][0] in self.homes.last
        return denoising, self.visits[lane, denoising]

    def visit(self, lanes: list[Lane]) -> None:
        name, block = self.places[lanes[0].at]
        self.homes.leave_for(name)
        with self.homes.homes[name].of(block):
            for lane in lanes:
                self.bar.say(f"{name}: {block}, {len(lanes)} prompts")
                lane.go()  # through the block
        for lane in lanes:
            denoising, _ = self.advance(lane)
            self.visits[lane, denoising] += 1
            if denoising:
                self.bar.advance(1)
            lane.go()  # to the next


class _Recorder:
    """Keeps, of each run and component, inputs of the component's forward."""

    def __init__(self, runs: list[PromptRun], models: Mapping[str, nn.Module]) -> None:
        self.runs, self.models = runs, models
        self.kept: dict[tuple[int, str], Thinned] = {
            (run.index, name): run.thinned() for run in runs for name in models}
        self.local, self.handles = threading.local(), []

    def running(self, run: PromptRun, pipe: Any) -> Callable[[], None]:
        def work() -> None:
            self.local.run = run
            run(pipe)

        return work

    def __enter__(self) -> _Recorder:
        for name, model in self.models.items():
            self.handles.append(model.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
        def hook(_model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.kept[self.local.run.index, name].offer(lambda: State.of(args, kwargs))

        return hook

    def states(self, name: str) -> list[State]:
        found = [state for run in self.runs for state in run.pick(self.kept[run.index, name])]
        if not found:
            raise NunchakuError(f"calibration data: no prompt led to a forward of {name}")
        return found


def _with_own_state(pipe: Any) -> Any:
    """The same models and tokenizers; schedulers and guiders, which change in the course of a call, are its own."""
    from diffusers import ConfigMixin

    own = copy.copy(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, ConfigMixin) and not isinstance(part, nn.Module):
            setattr(own, name, copy.deepcopy(part))
    return own


def _on_device(pipe: Any, device: torch.device) -> Any:
    """Empty models say that they are on the meta device; the pipeline makes its tensors where they are computed."""
    cls, here = type(pipe), property(lambda self: device)
    more = {"device": here, "_execution_device": here, "__module__": cls.__module__}
    pipe.__class__ = type(cls.__name__, (cls,), more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def sentence_of(what: str) -> Iterator[None]:
    """An empty model that is called outside its forward says so in torch's words."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        raise NunchakuError(f"{what}: calls a part of a model that is not in memory ({error}); quantize it by "
                            f"--in-memory") from error

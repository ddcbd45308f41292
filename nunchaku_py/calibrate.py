"""Calibration states: the inputs of a few forwards of a model, evenly over prompts and denoising steps."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import NunchakuError
from .progress import Progress

STEPS = 8  # denoising steps of a calibration image: its states need to be typical, not the image good
CALLS_KEPT = 64  # of one prompt at a time, on the CPU, before the few states of this prompt are picked from them


@dataclass(frozen=True)
class State:
    """One forward of a model: what it was called with, tensors detached and cloned to the CPU."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping[str, Any]) -> "State":
        with torch.inference_mode(False):  # a clone made in inference mode could not be used outside it
            return cls(*_each_tensor(lambda x: x.detach().to("cpu", copy=True), (tuple(args), dict(kwargs))))

    def on(self, device: torch.device) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) in new containers and new tensors, so that a forward may change them."""
        return _each_tensor(lambda x: x.to(device, copy=True), (self.args, self.kwargs))


def _each_tensor(convert: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    return tree_map_only(torch.Tensor, convert, tree)


def capture_states(
    target: Any, model: nn.Module, data: Any, states: int = 16, *, seed: int = 0, show: bool | None = None, **call: Any
) -> list[State]:
    """At most `states` inputs of `model`'s forward.

    data: prompts (strings, or dicts of arguments of the pipeline `target`; `call` holds arguments common to all) which
    are run through the pipeline; or forward kwargs of the model (an iterable of dicts), used as they are; or a callable
    that takes the model and runs it. Whatever there is too much of is thinned evenly, and the same way every time.
    """
    if states < 1:
        raise NunchakuError(f"states: expected a number of calibration states above 0, got {states}")
    if callable(data):
        found = _from_callable(model, data, states)
    else:
        found = _from_items(target, model, _checked_items(data, states), states, seed, show, call)
    if not found:
        raise NunchakuError(
            f"calibration data: it led to no forward of {type(model).__name__}; pass prompts, forward kwargs or a "
            "callable that runs the model, or data=None to quantize without data"
        )
    return found


class Thinned:
    """A list of at most `limit` to 2·`limit` of the items offered, evenly spread, without knowing how many will come.

    It holds every stride-th item; once 2·limit are held, every second is dropped and the stride doubles.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.stride, self.offered, self.held = limit, 1, 0, []

    def offer(self, make: Callable[[], Any]) -> None:
        if self.offered % self.stride == 0:
            self.held.append(make())
        self.offered += 1
        if len(self.held) > 2 * self.limit:
            self.held = self.held[::2]
            self.stride *= 2

    def pick(self, count: int, phase: float = 0.5) -> list[Any]:
        return [self.held[i] for i in evenly(len(self.held), count, phase)]


def evenly(available: int, wanted: int, phase: float = 0.5) -> list[int]:
    """Indices of one item in each of `wanted` equal stretches of `available`, `phase` in [0, 1) of the way in."""
    count = min(available, wanted)
    return [int((i + phase) * available / count) for i in range(count)]


def _checked_items(data: Any, states: int) -> list[Any]:
    if isinstance(data, (str, Mapping)):
        data = [data]
    if not isinstance(data, Iterable):
        raise NunchakuError(
            "calibration data: expected prompts, an iterable of forward kwargs or a callable, "
            f"got {type(data).__name__}"
        )
    if isinstance(data, (list, tuple)):
        return list(data)
    kept = Thinned(states)
    for item in data:
        kept.offer(lambda item=item: item)
    return kept.pick(states)


def _from_items(
    target: Any, model: nn.Module, items: list[Any], states: int, seed: int, show: bool | None, call: dict[str, Any]
) -> list[State]:
    pipeline = None if target is model or isinstance(target, nn.Module) else target
    prompts = [item for item in items if _is_prompt(pipeline, item)]
    if not prompts:
        return [_given(model, items[i], i, pipeline) for i in evenly(len(items), states)]
    if len(prompts) != len(items):
        raise NunchakuError("calibration data: expected either prompts or forward kwargs throughout, got a mixture")
    if pipeline is None:
        raise NunchakuError(
            f"calibration data: prompts need a pipeline; a {type(model).__name__} takes forward kwargs or a callable"
        )
    return _from_prompts(pipeline, model, prompts, states, seed, show, call)


def _is_prompt(pipeline: Any, item: Any) -> bool:
    """A string, or a dict of which the pipeline knows every key (no pipeline takes what its denoiser takes)."""
    if isinstance(item, str):
        return True
    return pipeline is not None and isinstance(item, Mapping) and set(item) <= set(_parameters(pipeline.__call__))


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _given(model: nn.Module, item: Any, index: int, pipeline: Any) -> State:
    if isinstance(item, State):
        return item
    if not isinstance(item, Mapping):
        raise NunchakuError(
            f"calibration item {index}: expected a dict of forward kwargs, got {type(item).__name__}"
        )
    try:
        inspect.signature(model.forward).bind(**item)
    except TypeError as error:
        raise NunchakuError(_refusal(model, item, index, pipeline, error)) from error
    return State.of((), item)


def _refusal(model: nn.Module, item: Mapping[str, Any], index: int, pipeline: Any, error: TypeError) -> str:
    takes = ", ".join(_parameters(model.forward))
    said = f"calibration item {index}: {type(model).__name__}.forward refuses it: {error}; it takes {takes}"
    if pipeline is None:
        return said
    unknown = ", ".join(key for key in item if key not in _parameters(pipeline.__call__))
    return f"{said}; nor is it an argument list of {type(pipeline).__name__}, which does not know {unknown}"


def _from_callable(model: nn.Module, run: Callable[[nn.Module], Any], states: int) -> list[State]:
    kept = Thinned(states)
    with _recorded(model, kept), torch.no_grad():
        run(model)
    return kept.pick(states)


@contextmanager
def _recorded(model: nn.Module, kept: Thinned) -> Iterator[None]:
    handle = model.register_forward_pre_hook(
        lambda _model, args, kwargs: kept.offer(lambda: State.of(args, kwargs)), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _from_prompts(
    pipeline: Any, model: nn.Module, prompts: list[Any], states: int, seed: int, show: bool | None, call: dict[str, Any]
) -> list[State]:
    found = []
    runs = prompt_runs(pipeline, prompts, states, seed, call)
    with Progress(len(runs), "collect", show) as progress, _quiet(pipeline), torch.no_grad():
        for run in runs:
            kept = run.thinned()
            with _recorded(model, kept):
                run(pipeline)
            found += run.pick(kept)
            progress.advance(1)
    return found


@dataclass(frozen=True)
class PromptRun:
    """One call of a pipeline, of whose denoiser's forwards `share` become states."""

    index: int
    arguments: dict[str, Any]
    share: int
    phase: float

    def __call__(self, pipeline: Any) -> None:
        try:
            pipeline(**self.arguments)
        except NunchakuError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise NunchakuError(f"calibration prompt {self.index + 1}: {type(pipeline).__name__} refuses it: "
                                f"{error}") from error

    def thinned(self) -> Thinned:
        return Thinned(max(CALLS_KEPT, self.share))

    def pick(self, kept: Thinned) -> list[State]:
        return kept.pick(self.share, self.phase)


def prompt_runs(pipeline: Any, prompts: list[Any], states: int, seed: int, call: dict[str, Any]) -> list[PromptRun]:
    """The q states of prompt i of P are taken at (j + (i + ½)/P)/q of its way, j < q: together they cover all steps."""
    prompts = [prompts[i] for i in evenly(len(prompts), states)]
    count, runs = len(prompts), []
    for i, prompt in enumerate(prompts):
        share = states * (i + 1) // count - states * i // count
        asked = {"prompt": prompt} if isinstance(prompt, str) else prompt
        arguments = {**_defaults(pipeline, max(STEPS, share), seed + i), **call, **asked}
        runs.append(PromptRun(i, arguments, share, (i + 0.5) / count))
    return runs


def _defaults(pipeline: Any, steps: int, seed: int) -> dict[str, Any]:
    """Arguments of ours, as far as the pipeline knows them: latents are all that is needed of the image."""
    generator = torch.Generator().manual_seed(seed)
    ours = {"num_inference_steps": steps, "output_type": "latent", "generator": generator}
    return {name: value for name, value in ours.items() if name in _parameters(pipeline.__call__)}


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar per prompt."""
    if not hasattr(pipeline, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)

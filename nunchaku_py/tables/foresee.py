"""All steps of a schedule at its first step: their timesteps, what the modulation linears read then, and their outputs.

The scheduler of the pipeline knows the timesteps. What a linear reads at one of them the model itself tells: it is
called with that timestep, and left as soon as it reaches its first modulation linear, so that only its embeddings are
computed. Then each linear is visited once, for all steps. Whatever is guessed wrong here is never looked up.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .host import visiting
from .pages import give_back, mapped_files

UNRELATED = "what the linears read, or their weights, change with more than the timestep"
NAMES = ("timestep", "t")  # of the argument, in diffusers' models
# timesteps of the scheduler, dtype of the argument, training steps → what a pipeline passes
GUESSES: tuple[Callable[[Tensor, torch.dtype, int], Tensor], ...] = (
    lambda t, dtype, steps: t.to(dtype) / steps,
    lambda t, dtype, steps: (t / steps).to(dtype),
    lambda t, dtype, steps: t.to(dtype),
    lambda t, dtype, steps: (steps - t.to(dtype)) / steps,
    lambda t, dtype, steps: ((steps - t) / steps).to(dtype),
    lambda t, dtype, steps: (1 - t / steps).to(dtype),
)


class Reached(BaseException):
    """Ends a call of the model that was made to learn what its first modulation linear reads. No Exception, so that no
    model mistakes it for an error of its own."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class ModelCall:
    """A call of the model that is under way."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.leaders: dict[Any, Any] = {}  # input → the table that was asked for it first

    def meets(self, table: Any, key: Any) -> bool:
        """Note which linears read the same; whether this one is the first of those."""
        before = table.leader
        table.leader = self.leaders.setdefault(key, table)
        return table.leader is table and (before is table or len(self.leaders) == 1)

    def bound(self) -> inspect.BoundArguments:
        return inspect.signature(type(self.model).forward).bind(self.model, *self.args, **self.kwargs)

    def timestep(self) -> Any:
        arguments = self.bound().arguments
        return next((arguments[name] for name in NAMES if name in arguments), None)

    def at(self, value: Tensor) -> None:
        """Run the model with another timestep, and without the strength of LoRAs in a call, which is set already."""
        bound = self.bound()
        for name, given in bound.arguments.items():
            if name in NAMES:
                bound.arguments[name] = torch.full_like(given, value.item())
            elif name.endswith("attention_kwargs") and given:
                bound.arguments[name] = {key: one for key, one in given.items() if key != "scale"}
        with torch.inference_mode(False), torch.no_grad():
            self.model.forward(*bound.args[1:], **bound.kwargs)


class Foresight:
    """What has been learned about a schedule: which guess holds for it. Where a later step finds that nothing computed
    ahead has come, the guess is given up; or, if it has held before, nothing more is computed ahead in this run."""

    def __init__(self) -> None:
        self.schedule: Tensor | None = None
        self.guesses: list[Callable] = []
        self.tried: dict[Callable, int] = {}  # guess → the step at which rows were computed ahead by it last
        self.came_true = self.proven = False  # whether one has been asked for: since then; of this schedule ever
        self.why_not = "no pipeline has run yet"

    def came(self) -> None:
        self.came_true = self.proven = True

    def fill(self, tables: Any, call: ModelCall, table: Any, x: Tensor) -> bool:
        """Compute what a linear, and all that read the same, will be asked for; False where it cannot be known. Before
        the model has run that are all of as many inputs."""
        steps = self._steps(tables, call, x)
        if steps is None:
            return False
        rows = _rows_of(tables, table, call, steps, x)
        if rows is None:
            self.why_not, self.guesses = "the model runs another way when called with another timestep", []
            return False
        keys = {tables.key_of(row): row for row in rows}
        files, tables.given_back = mapped_files() if tables.host and x.device.type == "cpu" else [], 0
        for site, other in tables_of(call.model):
            if other.leader is table or (other.leader is None and site.rows_in == x.shape[-1]):
                with visiting(site, x.device):
                    tables.counts.foreseen += _fill(tables, other, site, keys)
                tables.given_back += give_back(site.parameters(), files)
        tables.counts.schedules += 1
        return True

    def _steps(self, tables: Any, call: ModelCall, x: Tensor) -> list[Tensor] | None:
        """The timesteps that come after this call's, as the pipeline will pass them; None: they are not known."""
        scheduler = getattr(tables.pipeline and tables.pipeline(), "scheduler", None)
        schedule, given = getattr(scheduler, "timesteps", None), call.timestep()
        self.why_not = _unforeseeable(call.model, schedule, given)
        if self.why_not:
            return None
        now, total = given.detach().flatten()[:1].cpu(), int(getattr(scheduler.config, "num_train_timesteps", 1000))
        self._note(schedule.detach().cpu())
        for guess in list(self.guesses):
            values = guess(self.schedule, now.dtype, total)
            if values.dtype == now.dtype and bool((values == now).any()):
                first = int((values == now).nonzero()[0])
                if not self._is_in_vain(guess, first):
                    return list(values[first + 1:].unique_consecutive())[:_room(tables, call.model, x)]
                if self.proven:
                    break
        self.why_not = self.why_not or (UNRELATED if len(self.guesses) < len(GUESSES) else
                                        "the timestep that the model is called with is none of the scheduler's")
        return None

    def _note(self, schedule: Tensor) -> None:
        if self.schedule is None or not torch.equal(self.schedule, schedule):
            self.schedule, self.guesses, self.tried, self.proven = schedule, list(GUESSES), {}, False

    def _is_in_vain(self, guess: Callable, step: int) -> bool:
        """Whether nothing computed ahead by this guess has come. Else it is taken at its word once more."""
        before = self.tried.get(guess, step)
        if self.came_true or before == step or (self.proven and step < before):  # a prompt more, or another run
            self.tried[guess], self.came_true = step, False
            return False
        self.why_not = UNRELATED
        if not self.proven:
            self.guesses.remove(guess)
        return True


def _fill(tables: Any, table: Any, site: Any, keys: dict[Any, Tensor]) -> int:
    """Compute what a linear lacks of these rows; how many."""
    new = [key for key in keys if table.find(site, key) is None]
    for key in new:
        tables.keep(table, site, key, keys[key], ahead=key != next(iter(keys)))
    return len(new)


def tables_of(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The linears of a model that have a table, and these."""
    return ((module, module.table) for module in model.modules() if getattr(module, "table", None) is not None)


def _unforeseeable(model: nn.Module, schedule: Any, given: Any) -> str:
    """Why the steps that come cannot be known, or their rows not be learned; "" if they can."""
    if not isinstance(schedule, Tensor):
        return "no scheduler is known: give the pipeline to nq.cache_modulation, not the model"
    if not isinstance(given, Tensor) or not given.numel() or bool((given != given.flatten()[0]).any()):
        return "the model was not called with one timestep"
    if model.training:
        return "the model is in training"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "every module has a hook, which must see no calls but those of the pipeline"
    seen = next((name or "the model" for name, module in model.named_modules() if _is_watched(module, model)), None)
    return "" if seen is None else f"{seen} has a hook, which must see no calls but those of the pipeline"


def _is_watched(module: nn.Module, model: nn.Module) -> bool:
    """Hooks of the user's, of diffusers' caches and of its offloading count calls. accelerate's of the whole model does
    not, and ours on it are known."""
    if getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
        return True
    return module is not model and bool(module._forward_hooks or module._forward_pre_hooks or
                                        hasattr(module, "_hf_hook"))


def _rows_of(tables: Any, table: Any, call: ModelCall, steps: list[Tensor], x: Tensor) -> list[Tensor] | None:
    """x, and what is read in its place at each of the steps."""
    rows = [x.detach().clone()]
    for value in steps:
        row = _row_at(tables, table, call, value)
        if row is None or row.shape != x.shape or row.dtype != x.dtype:
            return None
        rows.append(row.detach().clone())
    return rows


def _row_at(tables: Any, table: Any, call: ModelCall, value: Tensor) -> Tensor | None:
    tables.now.sought = table
    try:
        call.at(value)
    except Reached as reached:
        return reached.x
    finally:
        tables.now.sought = None
    return None


def _room(tables: Any, model: nn.Module, x: Tensor) -> int:
    """For how many more steps there is room: in half of the limit, as with guidance there may be a second prompt."""
    step = sum(site.rows_out for site, _ in tables_of(model)) * x.nbytes // x.shape[-1]
    return max(0, tables.limit // (2 * max(1, step)) - 1)

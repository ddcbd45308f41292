"""Quantizing models straight from their files: opens them, finds calibration states, runs, and knows how to write."""
from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibrate import State
from ..checkpoint.build import model_class
from ..checkpoint.own import dtype_argument, write_then_rename
from ..errors import NunchakuError
from ..folders import DENOISERS, read_json
from ..quantize import Settings, runs_of
from ..recipes import Recipe
from ..report import Report, merged
from .budget import check, check_running, keep_within
from .fused import fuse
from .model import described, streamed
from .pipeline import StreamedPipeline
from .residence import Streamed
from .run import StreamedRun, streamed_run
from .sources import open_source
from .write import write_file, write_folder

_STATES = "states.pt"


class NotStreamable(Exception):  # noqa: N818 (a reason, not an error: there is another way)
    """Why a model cannot be quantized block by block from its files, in a sentence."""


@dataclass(frozen=True)
class Calibration:
    """Prompts that a pipeline runs on. folder: of the pipeline, for its tokenizers and scheduler, and for models that
    cannot be streamed, in `dtype`."""

    folder: Path
    dtype: torch.dtype
    prompts: Sequence[Any]
    states: int = 16
    feedback: bool = True


@dataclass(frozen=True)
class Opening:
    """How models are opened. config: for files, the folder of a model of the same kind. loras: (file, strength), fused
    into the denoisers."""

    dtype: torch.dtype
    device: str = "cpu"
    config: Path | None = None
    loras: Sequence[tuple[Path, float]] = ()
    whole: bool = True  # whether a model that only runs beside them may be read as a whole, where it cannot be streamed
    say: Callable[[str], None] = lambda note: None

    def all(self, paths: Mapping[str, Path], quantized: Iterable[str], beside: Iterable[str]) -> dict[str, Streamed]:
        """Those of a pipeline's models that are quantized, and of those that only run beside them what can be streamed:
        the pipeline itself loads the others."""
        homes = {name: self.one(name, paths[name]) for name in quantized}
        for name in beside:
            try:
                homes[name] = self.one(name, paths[name])
            except (NotStreamable, NunchakuError) as reason:
                if not self.whole:
                    raise NunchakuError(f"{reason}, so it would be read as a whole, for which there is no --budget"
                                        ) from reason
                self.say(f"note: {reason}: it is read into memory as a whole")
        return homes

    def one(self, name: str, path: Path) -> Streamed:
        """The model of a folder or file, empty, and where its weights are. name: of the component, "" for a model
        alone."""
        if path.is_dir() and not any(path.glob("*.safetensors")):
            raise NotStreamable(f"{path}: its weights are not in safetensors files")
        config, weights = open_source(path, None if path.is_dir() else self.config)
        if self.loras and name in ("", *DENOISERS):
            weights = fuse(weights, config, self.loras)
        for note in weights.notes:
            self.say(note)
        home = streamed(described(config, weights, self.dtype), weights, self.device)
        if home is None:
            raise NotStreamable(f"{path}: its tensors have names that only "
                                f"{model_class(config, str(path)).__name__} itself understands")
        return home


def quantize_files(homes: Mapping[str, Streamed], recipes: Mapping[str, Recipe], settings: Settings,
                   work_dir: Path, calibration: Calibration | None = None, budget: int | None = None,
                   progress: bool | None = None) -> tuple[dict[str, StreamedRun], Report]:
    """Quantize those of `homes` that have a recipe, one after the other; the finished blocks lie in `work_dir`.

    With prompts the pipeline runs on all of `homes`. What is done is found again by the same call with `work_dir`.
    budget: bytes that this may take, of the GPU's memory if one computes, else of the process."""
    runs = runs_of({name: (homes[name].model, recipe) for name, recipe in recipes.items()}, settings,
                   lambda name, _model, recipe, own: streamed_run(homes[name], recipe, own))
    if calibration is not None and budget is not None:
        check_running(homes, budget)
    check_budget(runs, dict.fromkeys(runs, () if calibration else None), budget)
    states: dict[str, list[State] | None] = dict.fromkeys(runs)
    if calibration is not None:
        states |= _states(homes, list(runs), settings, calibration, work_dir, progress)
    check_budget(runs, states, budget)
    reports = {}
    for name, run in runs.items():
        folder = work_dir / name if len(runs) > 1 else work_dir
        feedback = calibration is None or calibration.feedback
        reports[name] = run.run(states[name], feedback, folder, progress)
    return runs, merged(reports)


def check_budget(runs: Mapping[str, StreamedRun], states: Mapping[str, Sequence[State] | None], budget: int | None
                 ) -> None:
    for name, run in runs.items() if budget is not None else ():
        check(run, states[name], budget)
        keep_within(budget, run.residence.device)


def write(run: StreamedRun, path: Path) -> None:
    """A folder, or a file if its name says so."""
    (write_file if path.suffix.lower() == ".safetensors" else write_folder)(run, path)


# -------------------------------------------------------------------------------------------------------- calibration
def _states(homes: Mapping[str, Streamed], names: list[str], settings: Settings, calibration: Calibration,
            work_dir: Path, progress: bool | None) -> dict[str, list[State]]:
    """Found by running the pipeline, or by an earlier run of the same command."""
    kept = work_dir / _STATES
    if kept.exists() and (found := _read(kept, names)) is not None:
        return found
    device = homes[names[0]].device
    pipe = StreamedPipeline(_pipeline(calibration, homes, device), homes, device)
    states = pipe.states(names, list(calibration.prompts), calibration.states, settings.seed, progress)
    _keep(states, kept)
    return states


def _pipeline(calibration: Calibration, homes: Mapping[str, Streamed], device: torch.device) -> Any:
    """The pipeline's own class over empty models; whatever else belongs to it is loaded."""
    import diffusers

    folder, empty = calibration.folder, {name: home.model for name, home in homes.items()}
    named = read_json(folder / "model_index.json").get("_class_name")
    # the base class would not hear of models that are optional in the pipeline's own, and load them
    cls = getattr(diffusers, str(named), diffusers.DiffusionPipeline)
    try:
        pipe = cls.from_pretrained(folder, **empty, **dtype_argument(calibration.dtype), local_files_only=True)
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and name not in homes:
                part.to(device)
        return pipe
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise NunchakuError(f"{folder}: cannot be loaded: {' '.join(str(error).split())}") from error


def _keep(states: Mapping[str, list[State]], path: Path) -> None:
    """For the same command after an interruption. States with arguments that cannot be pickled are not kept."""
    held = {name: [(state.args, state.kwargs) for state in found] for name, found in states.items()}
    try:
        write_then_rename(path, lambda partial: torch.save(held, partial))
    except RuntimeError as error:  # what torch makes of a full disk
        raise NunchakuError(f"{path}: cannot be written: {error}") from error
    except (pickle.PicklingError, AttributeError, TypeError):
        return


def _read(path: Path, names: list[str]) -> dict[str, list[State]] | None:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        return {name: [State(tuple(args), kwargs) for args, kwargs in held[name]] for name in names}
    except Exception:  # cut short, or of values that torch does not read back: they are found again
        path.unlink(missing_ok=True)
        return None

"""What was measured, on disk: which configuration is the fastest for a problem on this GPU.

One JSON file for each GPU, version of Triton and state of the kernels, in the user's cache folder. Calls read it once a
process, and only `nunchaku-py tune` writes it. A file that cannot be understood is said once, and the model of costs
chooses. Nothing here needs Triton or a GPU.
"""
from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nunchaku_py.errors import NunchakuError

if TYPE_CHECKING:  # config.py imports this module
    from .config import Choices, Config, Gpu, Problem

ENVIRONMENT, FOLDER = "NUNCHAKU_PY_TUNING", "NUNCHAKU_PY_CACHE"
FORMAT = 1
# They decide what is measured and what is taken where nothing was; how fast a configuration is, they do not change.
READABLE = 0o644
NO_KERNELS = ("config.py", "costs.py", "gpu.py", "tuning.py", "tuner.py", "tuning_cases.py")
_logger = logging.getLogger("nunchaku_py")
Key = tuple[str, tuple]


class Origin(NamedTuple):
    """Where measurements come from, and only hold there. kernels: tells one state of their sources from others."""

    gpu: str
    capability: tuple[int, int]
    triton: str
    kernels: str

    @staticmethod
    def of(gpu: Gpu) -> Origin:
        return Origin(gpu.name, gpu.capability, triton_version(), kernels_version())

    @property
    def path(self) -> Path:
        name = re.sub(r"\W+", "-", self.gpu).strip("-")
        return folder() / "{}-{}.{}-triton-{}-{}.json".format(name, *self.capability, self.triton, self.kernels)

    def __str__(self) -> str:
        return "{} ({}.{}), Triton {}, kernels {}".format(
            self.gpu, *self.capability, self.triton, self.kernels)


class Measured(NamedTuple):
    """The fastest configuration of a problem, beside the one that the model of costs would take; label: the problem
    for people, with the sizes that were timed."""

    kernel: str
    problem: Problem
    config: tuple[int, ...]
    seconds: float
    default: tuple[int, ...]
    default_seconds: float | None  # None: it does not run
    label: str

    @property
    def key(self) -> Key:
        return self.kernel, self.problem

    @staticmethod
    def from_json(data: dict[str, Any]) -> Measured:
        found = Measured(**data)
        numbers = (*found.config, *found.default, found.seconds, found.default_seconds or 0.0)
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError(f"a number was expected, found {numbers}")
        if not all(isinstance(part, str | int) for part in (found.kernel, found.label, *found.problem)):
            raise ValueError(f"sizes and names were expected, found {found.problem}")
        return found._replace(problem=tuple(found.problem), config=tuple(found.config), default=tuple(found.default))


# ------------------------------------------------------------------------------------------------------------- choosing
def choice(choices: Choices, problem: Problem, gpu: Gpu) -> Config | None:
    """The configuration measured for this problem, if there is one that still exists and fits."""
    found = _known(gpu).get((choices.kernel, choices.alike(problem))) if enabled() else None
    config = next((config for config in choices.configs if found and config == found.config), None)
    return config if config and math.isfinite(choices.cost(problem, config, gpu)) else None


def enabled() -> bool:
    value = os.environ.get(ENVIRONMENT, "1")
    if value not in ("0", "1"):
        raise NunchakuError(f"{ENVIRONMENT}: expected 0 or 1, got {value!r}")
    return value == "1"


@cache
def _known(gpu: Gpu) -> dict[Key, Measured]:
    try:
        folder()
    except NunchakuError:  # only who measures needs to hear of it
        return {}
    return read(Origin.of(gpu))


def forget() -> None:
    _known.cache_clear()


# ------------------------------------------------------------------------------------------------------------- the file
def folder() -> Path:
    if named := os.environ.get(FOLDER):
        return Path(named) / "tuning"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nunchaku_py" / "tuning"
    except RuntimeError as error:
        raise NunchakuError(f"this user has no home folder to keep measurements in; name one by {FOLDER}") from error


def files() -> list[Path]:
    return sorted(folder().glob("*.json"))


def read(origin: Origin) -> dict[Key, Measured]:
    """What was measured there; nothing, and a warning, where the file is damaged or of something else."""
    try:
        if not origin.path.exists():
            return {}
        named, found = parsed(origin.path)
        if named == origin:
            return {one.key: one for one in found}
        why = f"{origin.path}: was measured on {named}, not on {origin}"
    except (OSError, NunchakuError) as error:
        why = str(error)
    _logger.warning("%s; the model of costs chooses instead, until `nunchaku-py tune` has measured anew", why)
    return {}


def parsed(path: Path) -> tuple[Origin, list[Measured]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise NunchakuError(f"{path}: its format is {data['format']!r}, this release reads {FORMAT}")
        origin = Origin(**data["origin"])
        found = [Measured.from_json(entry) for entry in data["measured"]]
        return origin._replace(capability=tuple(origin.capability)), found
    except NunchakuError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise NunchakuError(f"{path}: holds no measurements that can be understood ({said})") from error


def record(gpu: Gpu, found: Iterable[Measured]) -> Path:
    """Adds to what the file holds now, another process's included, and puts the whole in its place at once. Whoever
    calls this calls config.forget(), too."""
    origin = Origin.of(gpu)
    merged = {**read(origin), **{one.key: one for one in found}}
    data = {"format": FORMAT, "origin": origin._asdict(), "measured": [one._asdict() for one in merged.values()]}
    origin.path.parent.mkdir(parents=True, exist_ok=True)
    _replace(origin.path, json.dumps(data, indent=1) + "\n")
    return origin.path


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    try:
        os.chmod(file.name, READABLE)  # a folder may be shared
        os.replace(file.name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        raise


# ------------------------------------------------------------------------------------------------------------- versions
@cache
def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def kernels_version() -> str:
    """Of the sources: another kernel is as fast in another configuration."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.name not in NO_KERNELS:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]

"""What is to be measured: a model known by name, or what lies in a folder. Without torch."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..commands.sources import Source, model_path, quantization_of, weight_bytes
from ..errors import NunchakuError
from ..folders import DENOISERS, read_json
from .job import STEPS
from .known import KNOWN, Known, known_by_class

OURS_METHODS = ("nunchaku_py", "nunchaku_lite")  # what `quantization_config` calls what we run
UNKNOWN = Known("", "", {}, 0.0, 1, 0, unit=1, side=0)


@dataclass(frozen=True)
class Subject:
    """`dense`, `quantized`: folders of the denoiser in 16 bit and quantized, where there are such; of the others the
    weights are random. pipeline: the folder of the pipeline, whose images are then measured. rest: bytes of its other
    models. call: its arguments."""

    name: str
    about: str
    config: dict[str, Any]
    known: Known
    dense: str = ""
    quantized: str = ""
    pipeline: str = ""
    component: str = ""
    rest: int = 0
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        if self.dense or self.quantized:
            return f"{'16 bit' if self.dense else '4 bit'} from the folder, else random"
        return "random"

    def check_size(self, width: int | None, height: int | None) -> None:
        unit = self.known.unit
        for name, value in (("--width", width), ("--height", height)):
            if value is not None and value % unit:
                raise NunchakuError(f"{name} {value}: images of {self.about} have sides that are multiples of {unit}")


def subject_of(text: str, prompt: str, steps: int | None) -> Subject:
    """A folder of this name comes first, where a model or pipeline lies in it."""
    path, wanted = model_path(text), {} if steps is None else {STEPS: steps}
    taken = any((path / name).is_file() for name in ("model_index.json", "config.json"))
    if text.lower() in KNOWN and not taken:
        known = KNOWN[text.lower()]
        return Subject(text.lower(), known.about, {"_class_name": known.cls, **known.config}, known, call=wanted)
    if not path.exists():
        raise NunchakuError(f"{text}: neither a folder nor a model known by name; known are {', '.join(KNOWN)}")
    source = Source.of(path)
    if source.index is None:
        return _of_denoiser(path, path.name, {"call": wanted})
    component = next((name for name in DENOISERS if name in source.models), None)
    if component is None:
        raise NunchakuError(f"{path}: holds no {' or '.join(DENOISERS)} to measure")
    rest = sum(weight_bytes(folder) for name, folder in source.models.items() if name != component)
    source.check([component])
    call = {**source.call, "prompt": prompt, **wanted}
    return _of_denoiser(source.components[component], path.name,
                        {"pipeline": str(path), "component": component, "rest": rest, "call": call})


def _of_denoiser(folder: Path, name: str, more: Mapping[str, Any]) -> Subject:
    config = read_json(folder / "config.json")
    method = quantization_of(config).get("quant_method")
    if method not in (None, *OURS_METHODS):
        raise NunchakuError(f"{folder}: is quantized by {method!r}, and is compared neither in 16 bit nor in 4 bit of "
                            "ours; name the 16-bit folder")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    known = known_by_class(str(config.get("_class_name"))) or UNKNOWN
    place = {"quantized" if method else "dense": str(folder)}
    return Subject(name, f"{name} ({config.get('_class_name')})", plain, known, **place, **more)

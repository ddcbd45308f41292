"""What model folders look like. Without torch, so that looking into one is quick."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import NunchakuError

DENOISERS = ("transformer", "transformer_2", "unet")  # the components of a pipeline that are quantized unasked
CALL = "generate.json"  # in a pipeline's folder: what `nunchaku-py` calls it with, unless told otherwise
WHOLE = ("height", "width", "num_inference_steps", "max_sequence_length", "num_images_per_prompt")
NUMBERS = ("guidance_scale", "true_cfg_scale")
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is refused in a sentence."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NunchakuError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise NunchakuError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_call(folder: Path) -> dict[str, Any]:
    """The arguments that a pipeline's folder recommends; none, if it says nothing of them."""
    path = folder / CALL
    return checked_call(read_json(path), str(path)) if path.is_file() else {}


def checked_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """`call`, read from a file: a value that no pipeline can take is refused in a sentence."""
    for name, value in call.items():
        expected = _missed(name, value)
        if expected:
            raise NunchakuError(f"{where}: {name}: expected {expected}, got {json.dumps(value)}")
    return call


def _missed(name: str, value: Any) -> str:
    """What a value should have been, or nothing; of arguments that few pipelines take, their pipeline judges."""
    kind = type(value)  # not isinstance: true is no number
    if name in WHOLE and (kind is not int or value < 1):
        return "a whole number above 0"
    if name in NUMBERS and kind not in (int, float):
        return "a number"
    if name in TEXTS and kind is not str:
        return "a text"
    return ""


def write_call(folder: Path, call: dict[str, Any]) -> None:
    (folder / CALL).write_text(json.dumps(call, indent=1) + "\n", encoding="utf-8")

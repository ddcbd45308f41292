"""What model folders look like. Without torch, so that looking into one is quick."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import NunchakuError

DENOISERS = ("transformer", "transformer_2", "unet")  # the components of a pipeline that are quantized unasked
CALL = "generate.json"  # in a pipeline's folder: what `nunchaku-py` calls it with, unless told otherwise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is refused in a sentence."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NunchakuError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise NunchakuError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_call(folder: Path) -> dict[str, Any]:
    """The arguments that a pipeline's folder recommends; none, if it says nothing of them."""
    return read_json(folder / CALL) if (folder / CALL).is_file() else {}


def write_call(folder: Path, call: dict[str, Any]) -> None:
    (folder / CALL).write_text(json.dumps(call, indent=1) + "\n", encoding="utf-8")

"""What model folders look like. Without torch, so that looking into one is quick."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import NunchakuError

DENOISERS = ("transformer", "transformer_2", "unet")  # the components of a pipeline that are quantized unasked


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is refused in a sentence."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NunchakuError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise NunchakuError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data

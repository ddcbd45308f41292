"""Writing a quantized model in any of the formats that hold one."""
from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..errors import NunchakuError
from ..swap import quantized_models
from .lite_write import write_lite
from .notes import Notes
from .nunchaku.write import write
from .own import check_state, save, write_then_rename

FORMS = ("nunchaku_py", "nunchaku", "nunchaku_lite")


def export(model: nn.Module, path: str | os.PathLike[str], form: str = "nunchaku_py") -> Notes:
    """Write the model to `path`: "nunchaku_py", ours; "nunchaku", one file for that engine; "nunchaku_lite", a folder
    that diffusers reads with other kernels. Says what could not be kept bit for bit."""
    path = Path(os.path.abspath(path))
    if form not in FORMS:
        raise NunchakuError(f"export: expected one of {', '.join(FORMS)}, got {form!r}")
    if form == "nunchaku_py":
        save(model, path)
        return Notes()
    if not isinstance(model, nn.Module):
        raise NunchakuError(f"{path}: {form} holds a model, not a {type(model).__name__}; name its component")
    quantized_models(model)
    check_state(model.state_dict())
    if (path.suffix.lower() == ".safetensors") != (form == "nunchaku"):
        what = "one file, ending in .safetensors" if form == "nunchaku" else "a folder"
        raise NunchakuError(f"{path}: {form} is {what}")
    return write_then_rename(path, lambda to: (write if form == "nunchaku" else write_lite)(model, to))

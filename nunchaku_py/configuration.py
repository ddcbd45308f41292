"""The quantization config that diffusers and transformers hand around: a wish, or the description of a stored model."""
from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from .checkpoint.manifest import QUANT_METHOD, Manifest


class Method(str, Enum):  # diffusers reads `quant_method.value`
    NUNCHAKU_PY = QUANT_METHOD


@dataclass
class ConfigFields:
    """What a user says (recipe, rank, rules, mode) or what a file says (the manifest's fields)."""

    recipe: Any = "svdquant-int4"
    rank: int | None = None
    rules: dict[str, str] | None = None
    mode: str = "auto"
    format_version: int | None = None
    compute_dtype: str | None = None
    model_dtype: str | None = None
    sites: dict[str, Any] | None = None
    groups: list[list[str]] | None = None
    report: dict[str, Any] | None = None
    quant_method: Any = field(default=Method.NUNCHAKU_PY)

    def __post_init__(self) -> None:
        self.quant_method = Method.NUNCHAKU_PY

    @property
    def is_stored(self) -> bool:
        """Whether this describes quantized tensors, rather than asking for quantization."""
        return self.sites is not None or self.format_version is not None

    def manifest(self) -> Manifest:
        return Manifest.from_json(self.to_dict())

    def describe(self, manifest: Manifest, model_dtype: torch.dtype | None) -> None:
        """Become the description of a quantized model."""
        for name, value in manifest.to_json().items():
            setattr(self, name, value)
        self.model_dtype = str(model_dtype).removeprefix("torch.") if model_dtype is not None else None
        self.rank = self.rules = None
        self.quant_method = Method.NUNCHAKU_PY

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; a stored model's mode is the loader's choice and is not written."""
        skip = {"mode"} if self.is_stored else set()
        out = {key: value for key, value in vars(self).items() if value is not None and key not in skip}
        return {**out, "recipe": getattr(self.recipe, "name", self.recipe), "quant_method": QUANT_METHOD}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items() if k != 'sites')})"

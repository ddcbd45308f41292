"""Where the 16-bit tensors of a model come from."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..checkpoint.headers import TensorHeader
from ..checkpoint.tensor_file import TensorFile


class Weights(Protocol):
    """The 16-bit tensors of one model, by the names diffusers gives them, read one at a time."""

    label: str  # for sentences: the file or folder
    tensors: Mapping[str, TensorHeader]

    def read(self, name: str) -> torch.Tensor: ...  # in memory of its own, on the CPU

    def close(self) -> None: ...


class FolderWeights(TensorFile):
    """Those of a model folder of diffusers or transformers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(sorted(folder.glob("*.safetensors")))
        self.label = str(folder)

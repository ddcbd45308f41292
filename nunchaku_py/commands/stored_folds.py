"""What mode a8 would change in the weights of a file of ours, read from the file."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import NunchakuError


class StoredFolds:
    """Reads one weight at a time from a .safetensors file, or from all in a folder."""

    def __init__(self, path: Path) -> None:
        from ..checkpoint.tensor_file import TensorFile

        self.file = TensorFile([path] if path.is_file() else sorted(path.glob("*.safetensors")))

    def of(self, site: str, entry: Mapping[str, Any], k: int) -> float | None:
        """fold_error of a site; None where its inputs stay 16 bit, so that nothing is folded."""
        from ..fold_report import fold_error
        from ..formats import format_of
        from ..tensor import QTensor

        if entry["kind"] != "w4a4":
            return None
        found = {leaf: self.file.read(f"{site}.{leaf}")
                 for leaf in ("codes", "scales", "zeros", "channel_scale") if f"{site}.{leaf}" in self.file}
        if "scales" not in found:
            raise NunchakuError(f"{site}.scales: missing in the file")
        try:
            return fold_error(QTensor(format=format_of(entry["format"], entry["group"]), k=k, **found))
        except NunchakuError as error:
            raise NunchakuError(f"{site}: {error}") from error

"""The demonstration's numbers: a row for each variant, as plain text and as CSV."""
from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..commands.tables import size, table

METHODS = {"svdquant": "SVDQuant", "rtn": "rounding"}
HEADER = ("weights", "activations", "PSNR", "SSIM", "as said", "error", "step", "memory", "on disk")


@dataclass(frozen=True)
class Row:
    """One variant. `recipe` and `mode` are empty for 16 bit, which the others are compared with.

    psnr_db, ssim: mean over the pictures; agreement: part of them that show what their prompt says; error: of one call
    of the denoiser, relative to 16 bit; step_ms: of that call; bytes: of the denoiser, in memory and on disk.
    """

    recipe: str
    mode: str
    psnr_db: float
    ssim: float
    agreement: float
    error: float
    step_ms: float
    memory_bytes: int
    disk_bytes: int
    quantize_seconds: float = 0.0

    @property
    def weights(self) -> str:
        method, _, kind = self.recipe.partition("-")
        return f"{METHODS[method]} {kind.upper()}" if self.recipe else "16 bit"

    @property
    def activations(self) -> str:
        return self.mode or "16 bit"

    def cells(self, dense: Row) -> list[str]:
        """What people read, in the order of HEADER; sizes stand beside how much smaller than 16 bit they are."""
        compared = [f"{self.psnr_db:.1f} dB", f"{self.ssim:.3f}"] if self.recipe else ["", ""]
        error = f"{100 * self.error:.2f} %" if self.recipe else ""
        return [self.weights, self.activations, *compared, f"{100 * self.agreement:.0f} %", error,
                f"{self.step_ms:.1f} ms", _smaller(self.memory_bytes, dense.memory_bytes),
                _smaller(self.disk_bytes, dense.disk_bytes)]


def _smaller(count: int, dense: int) -> str:
    return f"{size(count)}, {dense / count:.1f}x" if count != dense else size(count)


def text(rows: Sequence[Row]) -> str:
    return table(HEADER, [row.cells(rows[0]) for row in rows])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))

"""Quantizing a model block by block from files: finished blocks go to disk, and their memory to the next."""
from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import NunchakuError
from ..methods.work import Stats
from ..mode_lines import expected_modes
from ..models.plan import Unit
from ..quantize import Run, Settings, attach, planned
from ..recipes import Recipe
from ..report import Report
from ..swap import Quantized, replace_modules
from .residence import Streamed


@dataclass
class StreamedRun(Run):
    """A run over a model whose weights lie in files. It ends with the model described, but empty: the tensors are in
    `finished`."""

    residence: Streamed | None = None

    @property
    def kept_blocks(self) -> list[str]:
        changed = self.blocks
        return [block for block in self.residence.blocks if block not in changed]

    def quantize_block(self, block: str, stats: Mapping[Unit, Stats]) -> dict[str, Quantized]:
        if self.finished is None:
            raise NunchakuError("a streamed run needs a folder for its finished blocks")
        self.engine.check_weights(self.blocks[block], self.model)
        made = super().quantize_block(block, stats)
        self.residence.also(made.values())
        return made

    def finish(self, before: int, started: float) -> Report:
        replace_modules(self.model, self.modules)
        report = self.report(before, time.monotonic() - started)
        attach(self.model, report)
        report.modes = expected_modes(self.model, self.residence.device)
        return report


def streamed_run(home: Streamed, recipe: Recipe, settings: Settings) -> StreamedRun:
    """Decides what becomes of every linear, and refuses what can be refused without its weights."""
    run = StreamedRun(*planned(home.model, recipe, settings), mode=settings.mode)
    run.engine.check_shapes(run.jobs, home.model)
    blocks = dict.fromkeys((*home.blocks, *run.blocks))
    run.residence = Streamed(home.model, blocks, home.weights, home.device, home.renamed)
    return run

"""Where `quantize` writes: a folder or file that appears when it is complete, and the work folder beside it."""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NunchakuError
from ..folders import write_call
from .sources import Source

_COMMAND = "command.json"
# Other forms of the same weights, and what is no part of a pipeline.
_LEFT_BEHIND = ("*.bin", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ckpt", "*.pt", "*.pth")


@dataclass(frozen=True)
class Output:
    """`path` as the user names it; `work` is `path` + ".partial"."""

    path: Path
    work: Path

    @staticmethod
    def at(path: Path, sources: Iterable[Path], overwrite: bool) -> Output:
        """Refuses before any work is done what could not be written at its end."""
        for source in sources:
            if source.resolve().is_relative_to(path.resolve()):
                raise NunchakuError(f"{path}: would replace the model it is made from; name another output")
            if path.resolve().is_relative_to(source.resolve()):
                raise NunchakuError(f"{path}: lies inside {source}; name a folder beside it")
        if path.is_dir() and path.suffix.lower() == ".safetensors":
            raise NunchakuError(f"{path}: is a folder, but its name is that of a file")
        taken = path.is_file() or path.is_dir() and any(path.iterdir())
        if taken and not overwrite:
            raise NunchakuError(f"{path}: exists already; name another output, or replace it with --overwrite")
        if path.is_file() and path.suffix.lower() != ".safetensors":
            raise NunchakuError(f"{path}: is a file; name a folder, or a file ending in .safetensors")
        return Output(path, path.with_name(path.name + ".partial"))

    @property
    def blocks(self) -> Path:
        return self.work / "blocks"

    def open(self, settings: str) -> None:
        """Make the work folder, or go on with it if it is of the same command."""
        known = self.work / _COMMAND
        try:
            if self.work.is_file() or (self.work.is_dir() and any(self.work.iterdir()) and not known.exists()):
                raise NunchakuError(f"{self.work}: exists and is not unfinished work of this command; move it away, or "
                                    "name another output")
            self.work.mkdir(parents=True, exist_ok=True)
            same = known.exists() and known.read_text() == settings
            if not same and (self._finished() or self._has_states()):
                raise NunchakuError(f"{self.work}: holds the unfinished work of another command (other model, prompts "
                                    "or options); finish that one, delete the folder, or name another output")
            if not same:  # a full disk must not take what is known of finished work
                known.write_text(settings)
        except OSError as error:
            raise NunchakuError(f"{self.path}: cannot be written: {error}") from error

    def _finished(self) -> int:
        return sum(1 for _ in self.blocks.rglob("*.safetensors"))

    def interrupted(self) -> str:
        count = self._finished()
        if not count and self._has_states():
            return f"interrupted; the calibration states are kept in {self.work}, the same command goes on from there"
        if not count:
            return "interrupted before a block was finished; the same command starts again"
        kept = "1 finished block is" if count == 1 else f"{count} finished blocks are"
        return f"interrupted; {kept} kept in {self.work}, the same command goes on from there"

    def _has_states(self) -> bool:
        return any(self.blocks.glob("states.*"))

    def tidy(self) -> None:
        """Leave no work folder behind unless there is work in it."""
        if self.work.is_dir() and not self._finished() and not self._has_states():
            shutil.rmtree(self.work, ignore_errors=True)

    def write(self, source: Source, writers: dict[str, Callable[[Path], object]], report: Any) -> None:
        """Everything into the work folder first; then it takes its name, and only then the finished blocks go."""
        from ..checkpoint.own import write_then_rename

        def fill(fresh: Path) -> None:
            for name, write in writers.items():
                write(fresh / name)
            report.save(fresh)

        if self.path.suffix.lower() == ".safetensors":
            write_then_rename(self.path, next(iter(writers.values())))
        else:
            self.write_folder(source, set(writers), fill)
        shutil.rmtree(self.work, ignore_errors=True)

    def write_folder(self, source: Source, changed: set[str], fill: Callable[[Path], None]) -> None:
        """The source's folder, its `changed` components by `fill`, which is given the new folder."""
        fresh = self.work / "output"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir(parents=True)
            _copy_rest(source, fresh, changed)
            fill(fresh)
            self._publish(fresh)
        except OSError as error:
            said = error.args[0][0][-1] if isinstance(error, shutil.Error) else error  # copytree gathers a list
            raise NunchakuError(f"{self.path}: cannot be written: {said}") from error
        except NunchakuError as error:  # it names what nobody asked for, and what is not there any more
            raise NunchakuError(str(error).replace(os.path.abspath(fresh), str(self.path))) from error

    def _publish(self, fresh: Path) -> None:
        old = self.work / "replaced"
        if self.path.exists():
            os.replace(self.path, old)
        try:
            os.replace(fresh, self.path)
        except BaseException:
            if old.exists():
                os.replace(old, self.path)
            raise


def _copy_rest(source: Source, to: Path, quantized: set[str]) -> None:
    """The parts of a pipeline that are not quantized, byte for byte, and what it is called with."""
    if source.index is None:
        return
    shutil.copy2(source.path / "model_index.json", to)
    if source.call:
        write_call(to, source.call)
    for name, folder in source.components.items():
        if name not in quantized:
            has_safetensors = any(folder.glob("*.safetensors"))
            ignore = shutil.ignore_patterns(*_LEFT_BEHIND) if has_safetensors else None
            shutil.copytree(folder, to / name, ignore=ignore)

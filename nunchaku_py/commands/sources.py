"""What lies in a folder: a diffusers pipeline, a model, or neither; read from disk, never from the network."""
from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.headers import Header, read_header
from ..demo import shipped
from ..errors import NunchakuError
from ..folders import DENOISERS, read_call, read_json

WEIGHT_FILES = (".safetensors", ".sft", ".gguf", ".bin", ".ckpt", ".pt", ".pth")  # the pickles are refused by name
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_STORED = {"BF16": "bf16", "F16": "fp16", "F32": "bf16"}  # 32-bit files are run and quantized in 16 bit


def model_path(text: str) -> Path:
    """An argparse type: what lies at this path, or else where the shipped pipeline of this name belongs."""
    path = Path(text)
    return path if text not in shipped.CALLS or path.exists() else shipped.WEIGHTS / text


def lora_path(text: str) -> tuple[Path, float]:
    """An argparse type: FILE or FILE:STRENGTH; of shipped LoRAs the name is enough."""
    name, _, strength = text.rpartition(":")
    try:
        weight = float(strength) if name else 1.0
    except ValueError:
        name, weight = "", 1.0
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"the strength of {text!r} is not a finite number")
    name = name or text
    path = Path(name)
    return (shipped.lora(name) if name in shipped.LORAS and not path.exists() else path), weight


def check_there(path: Path) -> None:
    """Refuse a path where nothing lies, or no shipped pipeline where one belongs."""
    if path.parent == shipped.WEIGHTS and path.name in shipped.CALLS:
        shipped.folder(path.name)  # says what helps
    elif not path.exists():
        raise NunchakuError(f"{path}: no such file or folder")


@dataclass(frozen=True)
class Source:
    """A folder that can be quantized or run. index: model_index.json of a pipeline, None for a model. placed: component
    → the file or folder of a model that stands in place of the pipeline's own, or ("") is all there is."""

    path: Path
    index: dict[str, Any] | None
    placed: dict[str, Path] = field(default_factory=dict)

    @staticmethod
    def of(path: Path) -> Source:
        check_there(path)
        if not path.is_dir():
            hint = "; nunchaku-py convert FILE OUT --into PIPELINE_DIR makes a pipeline of a quantized model"
            raise NunchakuError(f"{path}: expected the folder of a pipeline or model, this is a file{hint}")
        if (path / "model_index.json").is_file():
            return Source(path, read_json(path / "model_index.json"))
        if (path / "config.json").is_file():
            if not class_name(read_json(path / "config.json")):
                raise NunchakuError(f"{path}/config.json: names no model class (_class_name or architectures)")
            return Source(path, None)
        raise NunchakuError(f"{path}: neither a pipeline (model_index.json) nor a model (config.json)")

    @staticmethod
    def of_weights(path: Path, into: Path | None = None) -> Source:
        """The same, or a file of 16-bit weights; into: a pipeline whose denoiser they are to be."""
        if into is not None:
            return Source.of(into)._with(path)
        if path.is_file() and path.suffix.lower() in WEIGHT_FILES:
            return Source(path, None, {"": path})
        return Source.of(path)

    def _with(self, path: Path) -> Source:
        check_there(path)
        if self.index is None:
            raise NunchakuError(f"--into: {self.path} is no pipeline folder (model_index.json)")
        if (path / "model_index.json").is_file():
            raise NunchakuError(f"--into: {path} is a pipeline already; name a model to put into {self.path}")
        names = [name for name in DENOISERS if name in self.components]
        if len(names) != 1:
            raise NunchakuError(f"--into: {self.path} has {len(names)} denoisers ({', '.join(names) or 'none'}), so "
                                f"where {path} belongs does not show")
        return replace(self, placed={names[0]: path})

    @property
    def components(self) -> dict[str, Path]:
        """Name → folder of every part of a pipeline that is there; a model alone has the name ""."""
        if self.index is None:
            return {"": self.path}
        named = [name for name, value in self.index.items() if isinstance(value, list) and value and value[0]]
        return {name: self.path / name for name in named if (self.path / name).is_dir()} | self.placed

    @property
    def models(self) -> dict[str, Path]:
        """The components that hold weights."""
        return {name: folder for name, folder in self.components.items() if any(weight_files(folder))}

    @property
    def call(self) -> dict[str, Any]:
        """What the pipeline is called with, unless the user says otherwise."""
        path = self.path.resolve()
        return dict(shipped.CALLS[path.name]) if path.parent == shipped.WEIGHTS.resolve() else read_call(path)

    def check_class(self, name: str, cls: str) -> None:
        """Refuse a model of another class than the pipeline has there."""
        expected = self.index[name][-1]
        if cls != expected:
            raise NunchakuError(f"--into: the {name} of {self.path} is a {expected}, and {self.placed[name]} a {cls}")

    def check(self, names: Iterator[str] | list[str]) -> None:
        """Refuse truncated or corrupted weights before anything is built from them."""
        for name in names:
            for file in tensor_files(self.components[name]):
                read_header(file)

    def dtype(self, names: list[str]) -> str:
        """The 16-bit type most of the weights are stored in: "bf16" or "fp16"."""
        stored: Counter[str] = Counter()
        for name in names:
            for file in tensor_files(self.components[name]):
                for tensor in read_header(file).tensors.values():
                    stored[tensor.dtype] += tensor.nbytes
        known = [_STORED[dtype] for dtype, _ in stored.most_common() if dtype in _STORED]
        return known[0] if known else "bf16"


def weight_files(path: Path) -> list[Path]:
    """Those of a folder, or the one that it is itself."""
    if path.is_file():
        return [path]
    return [file for suffix in ("safetensors", "bin") for file in sorted(path.glob(f"*.{suffix}"))]


def tensor_files(path: Path) -> list[Path]:
    return [file for file in weight_files(path) if file.suffix in (".safetensors", ".sft")]


def weight_bytes(folder: Path) -> int:
    """Of the safetensors files if there are any, else of the others."""
    files = tensor_files(folder) or weight_files(folder)
    return sum(file.stat().st_size for file in files)


def class_name(config: dict[str, Any]) -> str:
    return config.get("_class_name") or next(iter(config.get("architectures") or []), "")


def quantization_of(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """What diffusers and transformers say of a folder they cannot load becomes a sentence that names it."""
    try:
        yield
    except NunchakuError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        said = " ".join(str(error).split())
        raise NunchakuError(f"{path}: cannot be loaded: {said or type(error).__name__}") from error


def torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, DTYPES[name])


def load_model(folder: Path, dtype: str) -> Any:
    """One model, in eval mode, on the CPU."""
    from ..checkpoint.build import model_class
    from ..checkpoint.own import dtype_argument
    from ..checkpoint.validate import some

    with loading(folder):
        cls = model_class(read_json(folder / "config.json"), str(folder))
        model = cls.from_pretrained(folder, **dtype_argument(torch_dtype(dtype)), local_files_only=True).eval()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:  # which diffusers leaves empty
        raise NunchakuError(f"{folder}: {len(missing)} tensors of {cls.__name__} are missing: {some(missing)}")
    return model


def load_pipeline(folder: Path, dtype: str, **components: Any) -> Any:
    """With these components in place of its own, which are then not read."""
    from diffusers import DiffusionPipeline

    from ..checkpoint.own import dtype_argument

    with loading(folder):
        pipe = DiffusionPipeline.from_pretrained(folder, **dtype_argument(torch_dtype(dtype)), local_files_only=True,
                                                 **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def device_for(wanted: str, nbytes: int) -> str:
    """"auto": the GPU where there is one with room for the weights and half as much again, else the CPU."""
    import torch

    if wanted != "auto":
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            raise NunchakuError(f"--device {wanted}: this PyTorch sees no CUDA device")
        return wanted
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * nbytes:
        return "cuda"
    return "cpu"


def peak_memory() -> str:
    """The most this process held, of the machine's memory and of a GPU's."""
    import torch

    try:
        import resource  # not on Windows
    except ImportError:
        found = []
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found = [f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"]
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        found.append(f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU")
    return ", ".join(found) or "not known here"


def require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise NunchakuError("writing pictures needs Pillow: pip install 'nunchaku-py[pipelines]'") from error


def quiet_libraries(verbose: bool) -> None:
    """Progress bars and notices of the libraries, off unless asked for."""
    if verbose:
        return
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


__all__ = ["DTYPES", "Header", "Source", "check_there", "class_name", "device_for", "load_model", "load_pipeline",
           "loading", "lora_path", "model_path", "peak_memory", "quantization_of", "quiet_libraries", "require_pillow",
           "tensor_files", "torch_dtype", "weight_bytes", "weight_files"]

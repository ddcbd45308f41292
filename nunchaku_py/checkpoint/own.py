"""Our own files: a diffusers model folder, or one safetensors file with the config in its metadata.

Files appear under their final name only when complete.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import NunchakuError
from ..folders import read_json
from ..linear import QuantizedSite
from ..lite_choice import always_ours
from ..site import MODES
from ..swap import quantized_models
from .build import empty_model, model_class, one_line
from .fill import attach_stored, put, set_compute_dtype
from .headers import read_header, shown
from .lite_config import QUANT_METHOD as LITE
from .manifest import QUANT_METHOD, Manifest
from .nunchaku.read import is_nunchaku, read_nunchaku
from .tensor_file import TensorFile, layout_of, write_tensors
from .validate import check_keys, check_loaded, check_state, split_parameter

Result = TypeVar("Result")


def save(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write a quantized model (or pipeline) to a folder, or a model to one `.safetensors` file."""
    path = Path(os.path.abspath(path))
    single = path.suffix.lower() == ".safetensors"
    if isinstance(model, nn.Module) and not (hasattr(model, "config") and hasattr(model, "save_pretrained")):
        raise NunchakuError(f"{type(model).__name__}: only models of diffusers and transformers know how to be saved")
    if single and not isinstance(model, nn.Module):
        raise NunchakuError(f"{path}: a pipeline is saved to a folder; save its model to a single file instead")
    for part in quantized_models(model):
        check_state(part.state_dict())
    write_then_rename(path, lambda to: _write_single(model, to) if single else _write_folder(model, to))
    return path


def load(path: str | os.PathLike[str], mode: str = "auto", dtype: torch.dtype | None = None, mmap: bool = False) -> Any:
    """Read what `save` wrote, a model or pipeline folder or a single file; or one of Nunchaku's. Returns the ordinary
    class of diffusers or transformers. mmap=True: the weights stay in the file, mapped into memory, which must be one
    of ours; `nq.offload(model, ram=…)` then bounds how much of it counts as memory of the process."""
    path = Path(path)
    if mode != "auto" and mode not in MODES:
        raise NunchakuError(f"mode: expected 'auto', 'a4', 'a8' or 'a16', got {mode!r}")
    if not path.exists():
        raise NunchakuError(f"{path}: no such file or folder")
    if mmap:
        from .mapped import load_mapped

        return load_mapped(path, mode, dtype)
    if path.is_file():
        return (read_nunchaku if is_nunchaku(path) else _read_single)(path, mode, dtype)
    for file in sorted(path.rglob("*.safetensors")):
        read_header(file)
    if (path / "model_index.json").is_file():
        return read_pipeline(path, mode, dtype)
    if is_nunchaku(path):
        return read_nunchaku(path, mode, dtype)
    return _read_folder(path, mode, dtype)


# ------------------------------------------------------------------------------------------------------------- reading
def _read_folder(path: Path, mode: str, dtype: torch.dtype | None) -> nn.Module:
    config = folder_config(path)
    with always_ours():
        return _in_mode(_from_pretrained(model_class(config, str(path)), path, dtype), mode)


def folder_config(path: Path) -> dict[str, Any]:
    """The config of a quantized model's folder, which is there with its files."""
    if not (path / "config.json").is_file():
        raise NunchakuError(f"{path}: neither a pipeline (model_index.json) nor a model (config.json)")
    config = read_json(path / "config.json")
    quantization = quantization_in(config)
    if quantization.get("quant_method") not in (QUANT_METHOD, LITE):
        raise NunchakuError(f"{path}/config.json: has no quantization_config of ours "
                            f"(quant_method is {quantization.get('quant_method')!r})")
    if not any(path.glob("*.safetensors")):
        raise NunchakuError(f"{path}: holds no safetensors files, and nothing else is read")
    return config


def read_pipeline(path: Path, mode: str, dtype: torch.dtype | None, **read: nn.Module) -> Any:
    """read: components that have been read."""
    from diffusers import DiffusionPipeline

    with always_ours():
        pipe = _from_pretrained(DiffusionPipeline, path, dtype or _dtype_of_pipeline(path), **read)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            _in_mode(component, mode)
    return pipe


def quantization_in(config: dict[str, Any]) -> dict[str, Any]:
    """Empty where there is none, or what is no table."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _dtype_of_pipeline(path: Path) -> torch.dtype | None:
    """What the quantized model of a pipeline was in; diffusers would load the other models in fp32."""
    for file in sorted(path.glob("*/config.json")):
        quantization = quantization_in(read_json(file))
        field = {QUANT_METHOD: "model_dtype", LITE: "compute_dtype"}.get(str(quantization.get("quant_method")))
        found = getattr(torch, str(quantization.get(field)), None)
        if isinstance(found, torch.dtype):
            return found
    return None


def dtype_argument(dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """from_pretrained's argument, which diffusers renamed in 0.42 (transformers knows both names)."""
    import diffusers

    old = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 42)
    return {} if dtype is None else {"torch_dtype" if old else "dtype": dtype}


def _from_pretrained(cls: Any, path: Path, dtype: torch.dtype | None, **more: Any) -> Any:
    """diffusers' or transformers' own reader; its refusals become sentences that name the folder."""
    try:
        return cls.from_pretrained(path, **dtype_argument(dtype), **more)
    except Exception as error:  # of a damaged config they expect anything to be as they wrote it
        named = isinstance(error, NunchakuError) and str(path) in str(error)
        raise error if named else NunchakuError(f"{path}: {error}") from error


def _in_mode(model: nn.Module, mode: str) -> nn.Module:
    if mode != "auto":
        for module in model.modules():
            if isinstance(module, QuantizedSite):
                module.set_mode(mode)
    return model


def _read_single(path: Path, mode: str, dtype: torch.dtype | None) -> nn.Module:
    with TensorFile(path) as file:
        config = config_of(file.metadata, path)
        return fill_model(config, file, shared_of(file, path), file.read, path, mode, dtype)


def fill_model(config: dict[str, Any], file: TensorFile, shared: dict[str, str] | None,
               read: Callable[[str], torch.Tensor], path: Path, mode: str, dtype: torch.dtype | None) -> nn.Module:
    """The model of a config with the tensors that `read` gives. shared: second name → first name of those that the file
    holds once; None: those that the model itself ties."""
    manifest = Manifest.from_json(config["quantization_config"], str(path))
    stored = sum(tensor.nbytes for tensor in file.tensors.values())
    model = empty_model(config, len(file.tensors) + len(shared or ()), stored, str(path))
    manifest.install(model, file.names(), str(path))
    shared = _tied(model, file) if shared is None else shared
    check_keys(model, [*file.names(), *shared], str(path))
    wanted = set(model.state_dict())  # a model may allow tensors that it does not have
    for name in file.names():
        if name in wanted:
            put(model, name, read(name), dtype, str(path))
    for second, first in shared.items():
        _share(model, first, second, str(path))
    set_compute_dtype(model, dtype)
    check_loaded(model, str(path), mode)
    attach_stored(model, config["quantization_config"], str(path))
    return model.eval()


def _tied(model: nn.Module, file: TensorFile) -> dict[str, str]:
    """Second name → first name of tensors that an empty model holds under both, and the file under the first."""
    if hasattr(model, "tie_weights"):  # transformers'
        model.tie_weights()
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in state.items() if name in file}
    return {name: first[id(tensor)] for name, tensor in state.items() if name not in file and id(tensor) in first}


def config_of(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    config = _json_in(metadata, "config", path)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise NunchakuError(f"{path}: not a file of ours: its metadata holds no 'config' with our quantization_config")
    return config


def shared_of(file: TensorFile, path: Path) -> dict[str, str]:
    """Second name → first name of tensors that the file holds once."""
    shared = _json_in(file.metadata, "shared", path)
    for second, first in shared.items():
        if not isinstance(first, str) or first not in file or second in file:
            raise NunchakuError(f"{path}: damaged: 'shared' in its metadata says that {shown(second)} is "
                                f"{shown(str(first))}")
    return shared


def _json_in(metadata: dict[str, str], key: str, path: Path) -> dict[str, Any]:
    """The JSON object that one metadata value holds; an empty one where there is none."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise NunchakuError(f"{path}: damaged: {key!r} in its metadata is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise NunchakuError(f"{path}: damaged: {key!r} in its metadata is not a table")
    return value


def _share(model: nn.Module, first: str, second: str, source: str) -> None:
    tensor = split_parameter(model, first)
    parent, leaf = split_parameter(model, second)
    old, new = getattr(parent, leaf), getattr(*tensor)
    if old.shape != new.shape or leaf not in parent._parameters or not isinstance(new, nn.Parameter):
        raise NunchakuError(f"{source}: {shown(second)}: is said to be {shown(first)}, which is another kind of tensor")
    parent._parameters[leaf] = new


# ------------------------------------------------------------------------------------------------------------- writing
def _write_folder(model: Any, path: Path) -> None:
    model.save_pretrained(path)
    without_origin(path)


def without_origin(folder: Path) -> None:
    """Where a model was loaded from is nobody's business, and changes the bytes of its config."""
    for file in folder.rglob("config.json"):
        config = read_json(file)
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_single(model: nn.Module, path: Path) -> None:
    tensors, shared = _without_shared(model.state_dict())
    write_tensors(path, layout_of(tensors), tensors.items(), single_metadata(model, shared))


def single_metadata(model: nn.Module, shared: dict[str, str]) -> dict[str, str]:
    """What stands beside the tensors of a single file. shared: second name → first name of tied ones."""
    config = json.loads(model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string())
    config.pop("_name_or_path", None)
    if "_class_name" not in config and not config.get("architectures"):  # transformers sets it when it saves a model
        config["architectures"] = [type(model).__name__]
    metadata = {"format": "pt", "config": json.dumps(config, sort_keys=True)}
    return {**metadata, "shared": json.dumps(shared, sort_keys=True)} if shared else metadata


def _without_shared(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor once, and second name → first name of tied ones (a text encoder's embeddings)."""
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tensor.numel() else (name,)
        if seen.setdefault(key, name) == name:
            tensors[name] = tensor.contiguous()
        else:
            shared[name] = seen[key]
    return tensors, shared


def write_then_rename(path: Path, write: Callable[[Path], Result]) -> Result:
    """What is written appears under its name when it is complete."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = write(partial)
        _publish(partial, path)
        return result
    except OSError as error:
        raise NunchakuError(f"{path}: cannot be written: {error}") from error
    except Exception as error:
        if "No space left" in str(error) or "I/O error" in str(error):  # safetensors wraps the OS's error
            raise NunchakuError(f"{path}: cannot be written: {error}") from error
        raise
    finally:
        _remove(partial)


def _publish(partial: Path, path: Path) -> None:
    """Rename; into a folder that exists already, file by file, and the shards of an earlier save do not linger."""
    if partial.is_file() or not path.exists():
        os.replace(partial, path)
        return
    written = [path / file.relative_to(partial) for file in sorted(partial.rglob("*")) if file.is_file()]
    for target in written:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / target.relative_to(path), target)
    for target in written:
        if target.suffix == ".safetensors":
            _remove_other_shards(target, written)


def _remove_other_shards(target: Path, written: list[Path]) -> None:
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", target.stem)
    ours = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for old in list(target.parent.iterdir()):
        if ours.fullmatch(old.name) and old not in written:
            old.unlink()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()

"""The empty model that a file's config describes, built without belief in it: a damaged number must not make this
process build a million layers or a table of a hundred gigabytes."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import NunchakuError

_FEW_PARTS, _PARTS_PER_TENSOR = 1024, 16  # modules and parameters; the models of diffusers have 2 to 4 for a tensor
_FEW_ELEMENTS = 2**26  # of a table that is computed rather than stored: positions, frequencies
_LARGEST = 2**31  # of whole numbers in a config
_LARGEST_COUNT = 2**20  # of those that count layers, heads, labels


def model_class(config: dict[str, Any], source: str) -> Any:
    """The class of diffusers or transformers that a config names."""
    import diffusers
    import transformers

    named, found = config.get("architectures"), None
    name = config.get("_class_name") or (named[0] if isinstance(named, list) and named else None)
    if isinstance(name, str):
        try:
            found = getattr(diffusers, name, None) or getattr(transformers, name, None)
        except (ImportError, RuntimeError) as error:  # a class whose own requirements are not installed
            raise NunchakuError(f"{source}: model class {name!r} cannot be imported: {one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise NunchakuError(f"{source}: model class {str(name)[:80]!r} is not one that diffusers or transformers has")
    return found


def empty_model(config: dict[str, Any], tensors: int, nbytes: int, source: str) -> nn.Module:
    """The model of a config, parameters on the meta device; `tensors` and `nbytes` are those of its file."""
    from accelerate import init_empty_weights

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    cls = model_class(config, source)
    _check_numbers(plain, "", source)
    try:
        with _bounded(tensors, nbytes), init_empty_weights():
            if hasattr(cls, "from_config"):
                return cls.from_config(plain)
            return cls(cls.config_class.from_dict(plain))
    except Exception as error:  # whatever a constructor does with arguments that it was not written for
        raise NunchakuError(f"{source}: its config does not describe a {cls.__name__}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an exception of others says, short enough for a sentence."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else f"{text[:297]}...") or type(error).__name__


def _check_numbers(value: Any, key: str, source: str) -> None:
    """Refuse numbers that would only be counted to."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, name, source)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, key, source)
    elif isinstance(value, int):
        counts = key.startswith(("num_", "n_")) or key.endswith(("layers", "depth", "per_block"))
        if abs(value) > (_LARGEST_COUNT if counts else _LARGEST):
            raise NunchakuError(f"{source}: its config is damaged: {key[:80]} is {str(value)[:40]}")


@contextmanager
def _bounded(tensors: int, nbytes: int) -> Iterator[None]:
    thread, left = threading.get_ident(), _FEW_PARTS + _PARTS_PER_TENSOR * tensors

    def count(*_: Any) -> None:
        nonlocal left
        if threading.get_ident() == thread:  # the hooks are torch's, for all threads
            left -= 1
            if left < 0:
                raise NunchakuError(f"it has far more parts than the {tensors} tensors of the file can fill")

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        with _TablesBounded(max(_FEW_ELEMENTS, nbytes)):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _TablesBounded(TorchDispatchMode):
    """Asks the meta device how large a result would be, and refuses to compute one of more than `most` elements."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        size = _result_size(func, args, kwargs)
        if size > self.most:
            raise NunchakuError(f"it has a table of {size} elements, far more than the file")
        return func(*args, **kwargs)


def _result_size(func: Any, args: Any, kwargs: Any) -> int:
    """In elements; 0 where nothing is computed, or where the call itself will say what is wrong."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    makes = any(argument.name == "device" for argument in func._schema.arguments)
    empty = func._schema.name.startswith("aten::empty")  # what nobody writes to takes no memory
    if empty or any(tensor.is_meta for tensor in given) or not (given or makes):
        return 0
    args, kwargs = tree_map(_on_meta, (args, dict(kwargs)))
    if makes:
        kwargs["device"] = torch.device("meta")
    try:
        results = tree_leaves(func(*args, **kwargs))
    except Exception:
        return 0
    return max((leaf.numel() for leaf in results if isinstance(leaf, torch.Tensor)), default=0)


def _on_meta(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value

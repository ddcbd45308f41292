"""What `quantization_config` says: one entry per quantized module, by name or by glob."""
from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import NunchakuError
from ..models.discover import is_linear
from ..site import Site
from ..swap import Entry, empty_module, entry_of, quantized_modules, replace_module
from .build import one_line
from .headers import shown

QUANT_METHOD = "nunchaku_py"
FORMAT_VERSION = 1
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Manifest:
    """The static description of a quantized model; the tensors are named after it."""

    compute_dtype: str = "bfloat16"
    sites: dict[str, Entry] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    recipe: str = ""
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.compute_dtype]

    @staticmethod
    def from_json(data: dict[str, Any], source: str = "quantization_config") -> Manifest:
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise NunchakuError(f"{source}: format_version is {reprlib.repr(version)}, "
                                f"this release reads {FORMAT_VERSION}")
        dtype = data.get("compute_dtype", "bfloat16")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise NunchakuError(f"{source}: compute_dtype is {reprlib.repr(dtype)}, expected one of {sorted(_DTYPES)}")
        sites = data.get("sites")
        if not isinstance(sites, dict) or not sites:
            raise NunchakuError(f"{source}: 'sites' must be a non-empty table of module names")
        try:
            entries = {name: entry_from_json(entry) for name, entry in sites.items()}
        except (NunchakuError, TypeError, KeyError, AttributeError) as error:
            raise NunchakuError(f"{source}: bad site entry: {one_line(error)}") from error
        groups = data.get("groups") or []
        if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
            raise NunchakuError(f"{source}: 'groups' must be a list of lists of names, got {reprlib.repr(groups)}")
        return Manifest(dtype, entries, [list(group) for group in groups], data.get("recipe") or "",
                        data.get("report") or {})

    def to_json(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "compute_dtype": self.compute_dtype,
                "sites": {name: entry_to_json(entry) for name, entry in self.sites.items()},
                "groups": self.groups, "recipe": self.recipe, "report": self.report}

    def resolve(self, model: nn.Module, source: str) -> dict[str, Entry]:
        """Exact names first, then globs in order, over the model's linears; one that matches nothing is an error."""
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_linear(module)]
        resolved: dict[str, Entry] = {}
        for pattern in sorted(self.sites, key=lambda text: "*" in text or "?" in text):
            matched = [name for name in linears if name == pattern or fnmatchcase(name, pattern)]
            if not matched:
                raise NunchakuError(f"{source}: site {shown(pattern)!r} matches no linear of {type(model).__name__}")
            for name in matched:
                resolved.setdefault(name, self.sites[pattern])
        return {name: resolved[name] for name in linears if name in resolved}

    def install(self, model: nn.Module, keys: Iterable[str] | None, source: str) -> None:
        """Put empty quantized modules (meta tensors) into `model`; `keys`, where known, tell which have a bias."""
        known = None if keys is None else set(keys)
        for name, entry in self.resolve(model, source).items():
            old = model.get_submodule(name)
            needed = old.bias is not None or is_shifted(entry)
            bias = needed if known is None else f"{name}.bias" in known
            if needed and not bias:
                raise NunchakuError(f"{source}: {name}.bias is missing")
            try:
                replace_module(model, name, empty_module(old, entry, bias, self.dtype))
            except (ValueError, TypeError, RuntimeError) as error:  # torch refuses sizes that are none
                raise NunchakuError(f"{source}: {name}: {one_line(error)}") from error


def manifest_of(model: nn.Module, recipe: str = "", groups: Iterable[Iterable[str]] = (),
                report: dict[str, Any] | None = None) -> Manifest:
    """Describe a quantized model from its modules."""
    modules = quantized_modules(model)
    if not modules:
        raise NunchakuError(f"{type(model).__name__} holds no quantized linears")
    first = next(iter(modules.values()))
    dtype = (first.parts[0] if hasattr(first, "parts") else first).file_dtype
    return Manifest(str(dtype).removeprefix("torch."), {name: entry_of(module) for name, module in modules.items()},
                    [list(group) for group in groups], recipe, report or {})


def is_shifted(entry: Entry) -> bool:
    """Whether the bias holds a shift's correction, so that there must be one."""
    return bool(entry.shift) if isinstance(entry, Site) else any(site.shift for _, site in entry)


def entry_from_json(entry: dict[str, Any]) -> Entry:
    if not isinstance(entry, dict):
        raise NunchakuError(f"expected a table of fields, got {reprlib.repr(entry)}")
    if "parts" not in entry:
        return Site.from_json(entry)
    if set(entry) != {"parts"}:
        raise NunchakuError(f"an entry with parts holds nothing else, got {sorted(entry)}")
    return tuple((_k_range(part), Site.from_json({k: v for k, v in part.items() if k != "k_range"}))
                 for part in entry["parts"])


def _k_range(part: dict[str, Any]) -> tuple[int, int]:
    found = part.get("k_range")
    if not isinstance(found, list | tuple) or len(found) != 2 or any(type(k) is not int for k in found):
        raise NunchakuError(f"k_range: expected two integers, got {reprlib.repr(found)}")
    return found[0], found[1]


def entry_to_json(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Site):
        return entry.to_json()
    return {"parts": [{"k_range": list(k_range), **site.to_json()} for k_range, site in entry]}

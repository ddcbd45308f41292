"""The quantized linears of a file or folder of ours, from its config and headers alone."""
from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.headers import Header, TensorHeader, read_header
from ..errors import NunchakuError

OURS = "nunchaku_py"
LEAVES = ("codes", "scales", "zeros", "channel_scale", "smooth", "down", "up", "bias", "divisor")


class StoredSite(NamedTuple):
    """A site, or K-part of one. name: of its tensors; module: of the linear; entry: what the config says of it."""

    name: str
    module: str
    entry: dict[str, Any]
    n: int
    k: int


def config_in(header: Header) -> dict[str, Any]:
    try:
        config = json.loads(header.metadata["config"])
        return config if isinstance(config, dict) else {}
    except (KeyError, ValueError):
        return {}


def merged(path: Path) -> Header:
    """All shards as one."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise NunchakuError(f"{path}: holds no safetensors file")
    headers = [read_header(file) for file in files]
    return Header({name: tensor for header in headers for name, tensor in header.tensors.items()}, headers[0].metadata)


def owners(header: Header) -> dict[str, str]:
    """Tensor name → the site that it belongs to."""
    return {name: site for name in header.tensors if (site := _owner(name, header.tensors))}


def stored_sites(label: str, sites: dict[str, Any], header: Header) -> list[StoredSite]:
    """In the order of the file. A site whose tensors are missing is refused."""
    names = list(dict.fromkeys(owners(header).values()))
    found = [_stored(label, name, sites, header) for name in names]
    for glob in sites:
        if not any(fnmatchcase(stored.module, glob) for stored in found):
            raise NunchakuError(f"{label}: the config names the site {glob}, but the file holds no such tensors")
    return found


def _stored(label: str, name: str, sites: dict[str, Any], header: Header) -> StoredSite:
    module, _, part = name.partition(".parts.")
    entry = sites.get(module) or next((e for glob, e in sites.items() if fnmatchcase(module, glob)), None)
    if entry is None:
        raise NunchakuError(f"{label}: {name}.codes is in the file, but its config names no such site")
    n, packed = header.tensors[f"{name}.codes"].shape
    smooth = header.tensors.get(f"{name}.smooth")
    return StoredSite(name, module, entry["parts"][int(part)] if part else entry, n,
                      smooth.shape[0] if smooth else 2 * packed)


def _owner(name: str, tensors: dict[str, TensorHeader]) -> str | None:
    site, _, leaf = name.rpartition(".")
    if leaf == "bias" and f"{site}.parts.0.codes" in tensors:
        return f"{site}.parts.0"
    return site if leaf in LEAVES and f"{site}.codes" in tensors else None

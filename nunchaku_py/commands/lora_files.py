"""What `nunchaku-py inspect` says of a LoRA: from its header; and, given a model, which of its modules it changes."""
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..checkpoint.headers import Header, TensorHeader
from ..folders import read_json
from ..lora.keys import parse
from .sources import Source, loading, quiet_libraries
from .tables import table

Parts = dict[str, TensorHeader]
Row = tuple[str, ...]
_LOKR = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a")


def described(path: Path, header: Header, every: bool) -> str:
    """Its trainer's spelling, and a line for each kind of module, or for every module."""
    modules, styles, others = _modules(header)
    kinds = ", ".join(name for name, _ in styles.most_common()) or "names of no known trainer"
    title = f"{path}: adapter weights (LoRA or one of its relatives), {kinds}: {len(modules)} modules"
    rows = [_row(name, parts, _alpha(path, name, parts)) for name, parts in modules.items()]
    columns = ("module", "kind", "rank", "alpha", "N", "K")
    body = table(columns, rows) if every else table(("count", *columns), _alike(rows))
    more = [f"{len(others)} tensors are no part of an adapter: {', '.join(others[:3])}"] if others else []
    return "\n".join([title, "", body, "", *more])


def _modules(header: Header) -> tuple[dict[str, Parts], Counter[str], list[str]]:
    modules: dict[str, Parts] = {}
    styles: Counter[str] = Counter()
    others = []
    for name, tensor in header.tensors.items():
        key = parse(name)
        if key is None:
            others.append(name)
            continue
        modules.setdefault(key.stem, {})[key.part] = tensor
        if key.style:
            styles[key.style] += 1
    return modules, styles, others


def _row(name: str, parts: Parts, alpha: str) -> Row:
    kind, rank, n, k = _measured(parts)
    return name, kind + (" DoRA" if {"magnitude", "dora_scale"} & set(parts) else ""), rank, alpha, n, k


def _measured(parts: Parts) -> Row:
    """(kind, rank, N, K), as far as the shapes tell."""
    if any(len(parts[half].shape) < 2 for half in ("down", "up") if half in parts):
        return "broken", "", "", ""
    if "down" in parts and "up" in parts:
        down, up = parts["down"].shape, parts["up"].shape
        return "LoRA", str(down[0]), str(up[0]), str(down[1])
    if "down" in parts or "up" in parts:
        return "half a LoRA", "", "", ""
    if "hada_w1_a" in parts and "hada_w1_b" in parts:
        a, b = parts["hada_w1_a"].shape, parts["hada_w1_b"].shape
        return "LoHa", str(b[0]), str(a[0]), str(b[-1])
    if any(part in parts for part in _LOKR):
        return "LoKr", "", "", ""
    if "diff" in parts:
        shape = parts["diff"].shape
        return "difference", "full", str(shape[0]), str(shape[-1]) if len(shape) > 1 else ""
    return "another", "", "", ""


def _alpha(path: Path, name: str, parts: Parts) -> str:
    """The number itself stands in the file's data."""
    if "alpha" not in parts:
        return ""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        alpha = file.get_tensor(f"{name}.alpha")
    return f"{alpha.float().item():g}" if alpha.numel() == 1 else "?"


def _alike(rows: list[Row]) -> list[Row]:
    """Rows that differ in the numbers of blocks only are one row with a count."""
    counts = Counter((re.sub(r"(?<=[._])\d+(?=[._])", "*", name), *rest) for name, *rest in rows)
    return [(str(count), *row) for row, count in counts.items()]


def coverage(path: Path, target: Path, verbose: bool) -> str:
    """What loading it into this pipeline or model would find."""
    from safetensors.torch import load_file

    from ..lora.delta import some
    from ..lora.loading import read_for

    quiet_libraries(verbose)
    source = Source.of(target)
    with loading(target):
        models = {name or "transformer": _empty(folder) for name, folder in source.models.items()}
    reading = read_for(load_file(path), models)
    found = ", ".join(f"{len(deltas)} in {name}" for name, deltas in reading.deltas.items() if deltas) or "none"
    lines = [f"on {target} ({reading.format}): modules changed: {found}", *reading.notes]
    if reading.unread:
        lines.append(f"{len(reading.unread)} keys find no module: {some(reading.unread)}")
    return "\n".join(lines)


def _empty(folder: Path) -> Any:
    """The model of a folder, without weights."""
    from accelerate import init_empty_weights

    from ..checkpoint.build import model_class

    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    cls = model_class(config, str(folder))
    with init_empty_weights():
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class.from_dict(config))

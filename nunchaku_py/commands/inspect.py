"""`nunchaku-py inspect`: what is in a checkpoint, from its headers and configs alone."""
from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.headers import Header, TensorHeader, packs_linears, read_header
from ..errors import NunchakuError
from ..folders import read_json
from .inspect_nunchaku import packed_linears, title, totals
from .lora_files import coverage, described
from .sources import check_there, class_name, model_path, quantization_of, weight_bytes
from .stored_folds import StoredFolds
from .stored_sites import OURS, StoredSite, config_in, merged, owners, stored_sites
from .tables import size, table

SUMMARY = "what is in a checkpoint: sites, formats, ranks, sizes"
DESCRIPTION = ("List the quantized linears of a model folder, a pipeline folder or a single file, with format, rank,\n"
               "shape and bytes, what shares an input, and what stayed in 16 bit. Reads headers only, so it takes no\n"
               "longer for a large file, unless --fold asks for more. Of other safetensors files it says what they\n"
               "are, as far as that shows.")
EXAMPLES = ("  nunchaku-py inspect ./FLUX.1-dev-int4\n  nunchaku-py inspect ./transformer-int4.safetensors --all\n"
            "  nunchaku-py inspect ./some-lora.safetensors --for ./FLUX.1-dev-int4\n")

LITE = "nunchaku_lite"  # diffusers' name of such models
ADAPTER = "adapter weights (LoRA or one of its relatives)"
FOLD = "fold %"  # the column of --fold
Row = tuple[str, ...]


class View(NamedTuple):
    """What is shown. every: a line for each site; fold: what is known of the weights when they are read."""

    every: bool
    fold: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=model_path, metavar="FILE_OR_DIR",
                        help="a .safetensors file, a model or a pipeline")
    parser.add_argument("--all", action="store_true", help="a line for every site, not one for all alike")
    parser.add_argument("--fold", action="store_true",
                        help="read the weights, and say what folding them to INT8 (mode a8) changes, relative to them")
    parser.add_argument("--for", dest="target", type=model_path, metavar="MODEL_OR_PIPELINE_DIR",
                        help="of a LoRA: say which modules of this model it would change")


def run(args: argparse.Namespace) -> int:
    path, view = args.path, View(args.all, args.fold)
    check_there(path)
    if args.target is not None and not path.is_file():
        raise NunchakuError(f"--for: {path} is no LoRA file")
    if args.target is not None and _is_model(path):
        raise NunchakuError(f"--for: {path} is a quantized model, no LoRA file")
    said = _shown(path, view)
    print(said)
    if args.fold and FOLD not in said:
        print("--fold: nothing here was quantized by this package, so nothing is folded")
    if args.target is not None:
        print(coverage(path, args.target, args.verbose))
    return 0


def _is_model(path: Path) -> bool:
    return any(name.endswith((".qweight", ".codes")) for name in read_header(path).tensors)


def _shown(path: Path, view: View) -> str:
    if path.is_file():
        return _file(path, view)
    if (path / "model_index.json").is_file():
        return _pipeline(path, view)
    return _model(path, view) if (path / "config.json").is_file() else _folder_of_files(path, view)


def _file(path: Path, view: View) -> str:
    header = read_header(path)
    config = config_in(header)
    if quantization_of(config).get("quant_method") == OURS:
        return _ours(str(path), config, header, view)
    if packs_linears(header):
        return _packed(str(path), config, header, view)
    kind = kind_of(header)
    said = described(path, header, view.every) if kind == ADAPTER else f"{path}: {kind}"
    return f"{said}\n{_stored(header.tensors.values())}"


def _pipeline(path: Path, view: View) -> str:
    index = read_json(path / "model_index.json")
    parts = [f"{path}: {class_name(index) or 'pipeline'}"]
    for name, value in index.items():
        folder = path / name
        if isinstance(value, list) and value and value[0] and folder.is_dir():
            parts.append(_component(name, folder, str(value[1]), view))
    return "\n\n".join(_paragraphs(parts))


def _paragraphs(parts: list[str]) -> Iterable[str]:
    """Components of one line stand together, below the first line."""
    short = [part for part in parts[1:] if "\n" not in part]
    yield "\n".join([parts[0], *short])
    yield from (part for part in parts[1:] if "\n" in part)


def _component(name: str, folder: Path, cls: str, view: View) -> str:
    if not weight_bytes(folder):
        return f"  {name}: {cls}"
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if quantization_of(config).get("quant_method") in (OURS, LITE):
        return _model(folder, view)
    return f"  {name}: {cls}, {size(weight_bytes(folder))}"


def _model(path: Path, view: View) -> str:
    config = read_json(path / "config.json")
    header = merged(path)
    method = quantization_of(config).get("quant_method")
    if method == OURS:
        return _ours(str(path), config, header, view)
    if packs_linears(header):
        return _packed(str(path), config, header, view)
    quantized = f", quantized by {method}" if method else ""
    return f"{path}: {class_name(config) or 'model'}{quantized}\n{_stored(header.tensors.values())}"


def _folder_of_files(path: Path, view: View) -> str:
    files = sorted(path.glob("*.safetensors"))
    if files and packs_linears(merged(path)):
        return _packed(str(path), {}, merged(path), view)
    if not files:
        raise NunchakuError(f"{path}: holds neither a pipeline, nor a model, nor safetensors files")
    return "\n\n".join(_file(file, view) for file in files)


# ------------------------------------------------------------------------------------------------------- our own files
def _ours(label: str, config: dict[str, Any], header: Header, view: View) -> str:
    quantization = quantization_of(config)
    if quantization.get("format_version") != 1:
        raise NunchakuError(f"{label}: format_version is {quantization.get('format_version')!r}, this release reads 1")
    folds = StoredFolds(Path(label)) if view.fold else None
    owner, rows = _site_rows(label, quantization.get("sites") or {}, header, folds)
    recipe = quantization.get("recipe") or "no recipe named"
    first = f"{label}: {class_name(config)}, {recipe}, computes in {quantization.get('compute_dtype')}"
    columns = ("site", "kind", "format", "rank", "N", "K", *((FOLD,) if view.fold else ()), "bytes")
    body = table(columns, rows) if view.every else table(("count", *columns), _alike(rows, view.fold))
    return "\n".join([first, "", body, "", *_totals(quantization, header, owner)])


def _site_rows(label: str, sites: dict[str, Any], header: Header, folds: StoredFolds | None
               ) -> tuple[dict[str, str], list[Row]]:
    """(tensor name → site, a row per site or K-part). A site whose tensors are missing is refused."""
    owner = owners(header)
    nbytes: Counter[str] = Counter()
    for name, site in owner.items():
        nbytes[site] += header.tensors[name].nbytes
    rows: list[Row] = []
    for stored in stored_sites(label, sites, header):
        fold = [] if folds is None else [_percent(folds.of(stored.name, stored.entry, stored.k))]
        rows.append((*_row(stored), *fold, str(nbytes[stored.name])))
    return owner, rows


def _row(stored: StoredSite) -> Row:
    entry = stored.entry
    first, last = entry.get("k_range") or (0, 0)
    label = f"{stored.module}[{first}:{last}]" if last else stored.name
    fmt = f"{entry['format']} g{entry['group']}" + (" shifted" if entry.get("shift") else "")
    return label, entry["kind"], fmt, str(entry.get("rank", 0)), str(stored.n), str(stored.k)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _alike(rows: list[Row], fold: bool) -> list[Row]:
    """Rows that differ in the number of their block only are one row with a count, all bytes and the mean fold."""
    found: dict[Row, list[Row]] = {}
    for row in rows:
        middle = row[1:-2] if fold else row[1:-1]
        found.setdefault((re.sub(r"\.\d+\.", ".*.", row[0], count=1), *middle), []).append(row)
    made = []
    for key, alike in found.items():
        folds = [float(row[-2]) for row in alike if fold and row[-2]]
        cell = [f"{sum(folds) / len(folds):.2f}" if folds else ""] if fold else []
        made.append((str(len(alike)), *key, *cell, str(sum(int(row[-1]) for row in alike))))
    return made


def _totals(quantization: dict[str, Any], header: Header, owner: dict[str, str]) -> list[str]:
    quantized = sum(tensor.nbytes for name, tensor in header.tensors.items() if name in owner)
    others = [tensor for name, tensor in header.tensors.items() if name not in owner]
    kept = sum(tensor.nbytes for tensor in others)
    groups = quantization.get("groups") or []
    sites = {site.partition(".parts.")[0] for site in owner.values()}
    lines = [f"quantized: {len(sites)} linears, {size(quantized)}",
             f"kept as they were: {len(others)} tensors, {size(kept)} ({_dtypes(others)})",
             f"sharing an input: {len(groups)} groups of {sum(map(len, groups))} linears"]
    before = (quantization.get("report") or {}).get("bytes_before")
    smaller = f", {before / (quantized + kept):.2f}x smaller than the {size(before)} before" if before else ""
    return [*lines, f"total: {size(quantized + kept)}{smaller}"]


# --------------------------------------------------------------------------------------------------- Nunchaku's files
def _packed(label: str, config: dict[str, Any], header: Header, view: View) -> str:
    linears = packed_linears(label, header)
    columns, rows = ("linear", "kind", "format", "rank", "N", "K", "bytes"), [linear.row() for linear in linears]
    body = table(columns, rows) if view.every else table(("count", *columns), _alike(rows, False))
    return "\n".join([title(label, header, config), "", body, "", *totals(linears, header)])


# ------------------------------------------------------------------------------------------------------ anybody's files
def kind_of(header: Header) -> str:
    """What a safetensors file is, by the names of its tensors."""
    names = list(header.tensors)
    leaves = {name.rpartition(".")[2] for name in names}
    if any(re.search(r"lora_(A|B|down|up)\b|lora_[AB]\.|\.hada_w1|\.lokr_w1|dora_scale", name) for name in names):
        return ADAPTER
    if "codes" in leaves and "scales" in leaves:
        return "tensors of a nunchaku-py model without its config; inspect the folder it belongs to"
    if leaves & {"qweight", "weight_scale", "quant_state", "absmax", "weight_packed"}:
        return "a model quantized by another tool"
    return "16- or 32-bit weights" if names else "a file without tensors"


def _stored(tensors: Iterable[TensorHeader]) -> str:
    held = list(tensors)
    return f"{len(held)} tensors, {size(sum(tensor.nbytes for tensor in held))} ({_dtypes(held)})"


def _dtypes(tensors: Iterable[TensorHeader]) -> str:
    nbytes: Counter[str] = Counter()
    for tensor in tensors:
        nbytes[tensor.dtype] += tensor.nbytes
    return ", ".join(f"{dtype} {size(count)}" for dtype, count in nbytes.most_common()) or "none"

"""`nunchaku-py convert`: a quantized model from one file format to another, without quantizing it again."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import NunchakuError
from ..folders import read_json
from .output import Output
from .sources import Source, check_there, class_name, model_path, quantization_of, quiet_libraries

FORMS = ("nunchaku_py", "nunchaku", "nunchaku_lite")  # checkpoint.forms.FORMS, without importing torch
SUMMARY = "a quantized model or pipeline into another file format"
DESCRIPTION = """\
Read a quantized model and write it in another format, with the same codes: nothing is quantized again. IN is a file of
Nunchaku's (svdq-….safetensors, or its older folder of two files), a nunchaku_lite folder of diffusers, or a file or
folder of this package; or a pipeline folder that holds such models, whose other parts are copied.

  nunchaku_py     this package's own: a folder, or one file (OUT ends in .safetensors)
  nunchaku        Nunchaku's: one file, for its engine and ComfyUI; FLUX.1, Qwen-Image, Z-Image, SDXL, SANA, T5
  nunchaku_lite   diffusers' own reader of such models: a folder, any architecture

What the other format cannot hold bit for bit is listed at the end."""
EXAMPLES = """\
  nunchaku-py convert ./svdq-int4_r32-flux.1-dev.safetensors ./transformer-int4
  nunchaku-py convert ./svdq-int4_r32-flux.1-dev.safetensors ./FLUX.1-dev-int4 --into ./FLUX.1-dev
  nunchaku-py convert ./FLUX.1-dev-int4/transformer ./svdq-int4-mine.safetensors --to nunchaku
  nunchaku-py convert ./FLUX.1-dev-int4 ./FLUX.1-dev-lite --to nunchaku_lite
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=model_path, metavar="IN", help="a quantized file, model folder or pipeline folder")
    add("out", type=Path, metavar="OUT", help="a new folder, or a new file ending in .safetensors")
    add("--to", default=FORMS[0], choices=FORMS, help="the format of OUT (default: nunchaku_py)")
    add("--into", type=model_path, metavar="PIPELINE_DIR",
        help="make OUT a whole pipeline: this one, with IN in place of its own model of that class")
    add("--overwrite", action="store_true", help="replace OUT if it is there")


def run(args: argparse.Namespace) -> int:
    path, out = args.source, args.out
    check_there(path)
    _check_out(args)
    output = Output.at(out, [path, *filter(None, [args.into])], args.overwrite)
    quiet_libraries(args.verbose)
    whole = Source.of(args.into or path) if args.into or (path / "model_index.json").is_file() else None
    if whole or out.suffix.lower() != ".safetensors":
        said = _folder(args, whole, output)
    else:
        said = [_model(path, out, args.to)]
    print("\n".join([*said, "", f"written: {out}"]))
    return 0


def _check_out(args: argparse.Namespace) -> None:
    single = args.out.suffix.lower() == ".safetensors"
    whole = (args.source / "model_index.json").is_file()
    pipeline = args.into or whole
    if args.into and whole:
        raise NunchakuError(f"--into: {args.source} is a pipeline already; name a model to put into {args.into}")
    if args.into and not (args.into / "model_index.json").is_file():
        raise NunchakuError(f"--into: {args.into} is no pipeline folder (model_index.json)")
    if pipeline and (single or args.to == "nunchaku"):
        raise NunchakuError(f"{args.out}: a pipeline becomes a folder, of nunchaku_py or nunchaku_lite; convert its "
                            "model by itself to get one file")
    if args.to == "nunchaku" and not single:
        raise NunchakuError(f"{args.out}: a model of Nunchaku's is one file; name one that ends in .safetensors")
    if args.to == "nunchaku_lite" and single:
        raise NunchakuError(f"{args.out}: a nunchaku_lite model is a folder, not a file")


def _model(path: Path, out: Path, form: str) -> str:
    from ..checkpoint import export, load

    model = load(path)
    return _said(type(model).__name__, export(model, out, form))


def _said(name: str, notes: Any) -> str:
    return f"{name}: {notes}" if not notes.changes else f"{name}: what changed\n  " + str(notes).replace("\n", "\n  ")


def _folder(args: argparse.Namespace, whole: Source | None, output: Output) -> list[str]:
    """The folder of a model; or a pipeline's, its quantized models in another format or a model in place of its own."""
    from ..checkpoint import export, load

    placed = load(args.source) if args.into else None
    source = whole or Source(args.source, None)
    names = [] if whole is None else _quantized(whole) if placed is None else [_of_class(whole, type(placed).__name__)]
    said: list[str] = []

    def fill(fresh: Path) -> None:
        if whole is None:
            said.append(_model(args.source, fresh, args.to))
        for name in names:
            model = load(source.components[name]) if placed is None else placed
            said.append(_said(name, export(model, fresh / name, args.to)))

    output.open(f"convert {args.source} --to {args.to} --into {args.into}")
    try:
        output.write_folder(source, set(names), fill)
    finally:
        output.tidy()
    return said


def _of_class(source: Source, cls: str) -> str:
    """The component that is a model of this class."""
    found = [name for name, config in _configs(source).items() if class_name(config) == cls]
    if len(found) != 1:
        raise NunchakuError(f"{source.path}: expected one component that is a {cls}, "
                            f"got {', '.join(found) or 'none'}")
    return found[0]


def _quantized(source: Source) -> list[str]:
    found = [name for name, config in _configs(source).items()
             if quantization_of(config).get("quant_method") in ("nunchaku_py", "nunchaku_lite")]
    if not found:
        raise NunchakuError(f"{source.path}: holds no quantized model; nunchaku-py quantize makes one")
    return found


def _configs(source: Source) -> dict[str, dict[str, Any]]:
    return {name: read_json(folder / "config.json") for name, folder in source.components.items()
            if (folder / "config.json").is_file()}

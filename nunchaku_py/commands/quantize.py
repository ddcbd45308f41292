"""`nunchaku-py quantize`: a pipeline or model folder in, the same folder with 4-bit linears out."""
from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import NunchakuError
from ..folders import DENOISERS, checked_call
from ..sizes import parse_size
from .arguments import LARGEST_SEED, whole
from .output import Output
from .sources import (
    Source,
    device_for,
    load_model,
    load_pipeline,
    lora_path,
    model_path,
    peak_memory,
    quiet_libraries,
    torch_dtype,
    weight_bytes,
    weight_files,
)

SUMMARY = "quantize a pipeline or a model to 4 bits"
DESCRIPTION = """\
Quantize a diffusers pipeline (a folder with model_index.json), one model (a folder with config.json), or a file of
16-bit weights. OUT_DIR becomes a complete pipeline or model folder that diffusers loads by itself; a name that ends in
.safetensors becomes one file with the model alone. The report lies in it as report.txt, report.json and report.csv.
A block is read, quantized and written before the next is read, so models larger than memory can be quantized.

Without --prompts no data is needed. With it, the pipeline runs on the prompts and the quantization is fitted to what
the layers then see. Work is kept in OUT_DIR.partial: when interrupted, the same command goes on where it stopped."""
EXAMPLES = """\
  nunchaku-py quantize tiny-flux ./tiny-flux-int4
  nunchaku-py quantize ./FLUX.1-dev ./FLUX.1-dev-int4
  nunchaku-py quantize ./FLUX.1-dev ./FLUX.1-dev-nvfp4 --recipe svdquant-nvfp4 --prompts prompts.txt --states 32
  nunchaku-py quantize ./FLUX.1-dev/transformer ./flux-int4.safetensors
  nunchaku-py quantize ./my-fine-tune.safetensors ./my-int4 --into ./FLUX.1-dev --budget 8GB
  nunchaku-py quantize ./FLUX.1-dev ./out --lora ./style.safetensors:0.8
  nunchaku-py quantize ./model ./out --rule "*.ff.*=w4a16" --rule "blocks.0.*=keep"
  nunchaku-py quantize ./FLUX.1-dev ./out --component transformer --component text_encoder_2=w4a16-int4
"""
Writers = dict[str, Callable[[Path], object]]
_log = logging.getLogger("nunchaku_py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=model_path, metavar="MODEL",
        help="a pipeline or model folder of 16- or 32-bit weights, a .safetensors or .gguf file of a denoiser, or "
             "tiny-flux, or tiny-sdxl")
    add("out", type=Path, metavar="OUT_DIR", help="a new folder, or a new file ending in .safetensors")
    add("--recipe", default="svdquant-int4", metavar="NAME",
        help="svdquant-int4 (default), svdquant-nvfp4, rtn-int4, rtn-nvfp4 or w4a16-int4")
    add("--preset", choices=("fast", "best"), help="less work for a little more error, or more for a little less")
    add("--rank", type=whole(0), metavar="R", help="rank of the 16-bit branch (default: the recipe's)")
    add("--mode", default="auto", choices=("auto", "a4", "a8", "a16"),
        help="activations while calibrating with feedback; the file does not depend on the mode it is run in")
    add("--rule", action="append", default=[], metavar="GLOB=CHOICE",
        help="linears by name: w4a4, w4a16 or keep; may be repeated, a later rule overrides an earlier one")
    add("--component", action="append", default=[], metavar="NAME[=RECIPE]",
        help="which of a pipeline's models, each with its own recipe if named (default: the denoiser)")
    add("--prompts", type=Path, metavar="FILE",
        help='calibrate on these, a prompt or {"prompt": …, "height": …} on each line')
    add("--states", type=whole(1), default=16, metavar="N", help="denoising states to calibrate on (default 16)")
    add("--no-feedback", action="store_true", help="calibrate every block on what 16-bit blocks before it give")
    add("--seed", type=whole(0, LARGEST_SEED), default=0, help="of everything random (default 0)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="compute in this type (default: the file's 16-bit type)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    add("--into", type=model_path, metavar="PIPELINE_DIR",
        help="OUT_DIR becomes this pipeline, with the model in place of its own; prompts run through it")
    add("--config", type=Path, metavar="DIR", help="of a file: the folder of a model or pipeline of the same kind")
    add("--lora", type=lora_path, action="append", metavar="FILE[:STRENGTH]",
        help="fuse a LoRA into the 16-bit weights first; may be repeated (it can as well be loaded later, as it is)")
    add("--budget", metavar="SIZE",
        help="memory that this may take, such as 8GB (of the GPU, if it computes); less than it needs is refused")
    add("--in-memory", action="store_true", help="read the models as a whole instead of block by block")
    add("--overwrite", action="store_true", help="replace OUT_DIR if it is there")
    add("--report", type=Path, metavar="DIR", help="write the report here too")


@dataclass(frozen=True)
class Wanted:
    """The arguments, understood."""

    components: dict[str, str]  # name → recipe; "" is the model itself
    rules: dict[str, str]
    prompts: list[str | dict[str, Any]] | None
    dtype: str


def run(args: argparse.Namespace) -> int:
    source = Source.of_weights(args.model, args.into)
    wanted = _wanted(args, source)
    output = Output.at(args.out, [path for path in (args.model, args.into) if path is not None], args.overwrite)
    source.check(list(source.models))
    quiet_libraries(args.verbose)  # slow: it imports them
    output.open(_settings(args, source, wanted))
    try:
        writers, report = _quantized(args, source, wanted, output)
        output.write(source, writers, report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(output.interrupted()) from None
    finally:
        output.tidy()
    if args.report:
        report.save(args.report)
    print(report)
    print(f"\nwritten: {args.out}")
    print(f"peak memory: {peak_memory()}")
    return 0


def _wanted(args: argparse.Namespace, source: Source) -> Wanted:
    from ..recipes import recipe_of

    components = _components(args, source)
    for recipe in components.values():
        recipe_of(recipe)
    if args.budget is not None:
        parse_size(args.budget, "--budget")
    given = [option for option in ("budget", "config", "into", "lora") if getattr(args, option)]
    if args.in_memory and (given or source.placed):
        raise NunchakuError(f"--in-memory: only whole folders are read so, and without --{(*given, 'lora')[0]}")
    if args.config is not None and args.model.is_dir():
        raise NunchakuError(f"--config: {args.model} is a folder, which has a config of its own")
    if args.prompts is not None and source.index is None:
        raise NunchakuError(f"{source.path}: prompts need a whole pipeline to run, this is a model alone; "
                            f"--into PIPELINE_DIR names one")
    if args.lora and not {"", *DENOISERS} & set(components):
        raise NunchakuError(f"--lora: LoRAs are fused into a denoiser, and only {', '.join(components)} is quantized")
    if args.out.suffix.lower() == ".safetensors" and len(components) > 1:
        raise NunchakuError(f"{args.out}: one file holds one model, {len(components)} components are to be quantized")
    prompts = None if args.prompts is None else _prompts(args.prompts, source.call)
    return Wanted(components, rules_of(args.rule), prompts, args.dtype or source.dtype(list(components)))


def rules_of(given: Sequence[str]) -> dict[str, str]:
    """Of --rule, in order."""
    rules: dict[str, str] = {}
    for glob, choice in (_pair(rule, "--rule", "GLOB=CHOICE") for rule in given):
        rules.pop(glob, None)  # said again it takes the later place
        rules[glob] = choice
    return rules


def _components(args: argparse.Namespace, source: Source) -> dict[str, str]:
    if source.index is None:
        if args.component:
            raise NunchakuError(f"--component: {source.path} is a model alone, only a pipeline has components")
        return {"": args.recipe}
    models = source.models
    chosen = dict(_pair(text, "--component", "NAME", args.recipe) for text in args.component)
    chosen = chosen or {name: args.recipe for name in source.placed or DENOISERS if name in models}
    if left := next((name for name in source.placed if name not in chosen), None):
        raise NunchakuError(f"--into: {source.placed[left]} is to be the {left}, which --component leaves out")
    unknown = [name for name in chosen if name not in models]
    if unknown or not chosen:
        what = f"component {unknown[0]!r}" if unknown else "transformer or unet"
        raise NunchakuError(f"{source.path}: has no {what} with weights; it has {', '.join(models) or 'none at all'}")
    return chosen


def _pair(text: str, option: str, form: str, default: str | None = None) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not equals and default is not None:
        return text, default
    if not name or not value:
        raise NunchakuError(f"{option}: expected {form}, got {text!r}")
    return name, value


def _prompts(path: Path, usual: dict[str, Any]) -> list[str | dict[str, Any]]:
    """A line is a prompt, or a JSON object of arguments of the pipeline; `usual` are those that no line has to say."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise NunchakuError(f"{path}: cannot be read: {error}") from error
    if not any(lines):
        raise NunchakuError(f"{path}: holds no prompts; expected one on a line")
    return [_prompt(line, f"{path}: line {i}", usual) for i, line in enumerate(lines, 1) if line]


def _prompt(line: str, where: str, usual: dict[str, Any]) -> str | dict[str, Any]:
    if not line.startswith("{"):
        return {**usual, "prompt": line} if usual else line
    try:
        said = json.loads(line)
    except ValueError as error:
        raise NunchakuError(f"{where}: starts like JSON but is none: {error}") from error
    return {**usual, **checked_call(said, where)}


def _settings(args: argparse.Namespace, source: Source, wanted: Wanted) -> str:
    """What unfinished work depends on, beyond what the blocks themselves remember."""
    loras = [(str(path.resolve()), strength) for path, strength in args.lora or ()]
    more = {name: str(path.resolve()) for name in ("into", "config") if (path := getattr(args, name)) is not None}
    states = _states_of(args, source, wanted.prompts) if wanted.prompts else None
    return json.dumps({"model": str(args.model.resolve()), **more, "loras": loras, "components": wanted.components,
                       "preset": args.preset, "rules": wanted.rules, "states": states, "dtype": wanted.dtype,
                       "mode": args.mode})


def _states_of(args: argparse.Namespace, source: Source, prompts: list[str | dict[str, Any]]) -> dict[str, Any]:
    """What the calibration states are made of; of weights, which a run reads only later, when they were written."""
    files = [*(file for path in source.models.values() for file in weight_files(path)),
             *(path for path, _ in args.lora or ())]
    made = {str(file.resolve()): (file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()}
    return {"prompts": _digest(prompts), "count": args.states, "seed": args.seed, "files": _digest(made)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _quantized(args: argparse.Namespace, source: Source, wanted: Wanted, output: Output) -> tuple[Writers, Any]:
    """(component → what writes it, report): block by block from the files, unless they have to be read as a whole."""
    from ..stream.files import NotStreamable

    if not args.in_memory:
        try:
            return _streamed(args, source, wanted, output)
        except NotStreamable as reason:
            if args.lora or source.placed or args.budget:
                raise NunchakuError(f"{reason}, so --budget, --lora and --into do not work with it") from reason
            print(f"note: {reason}: it is read into memory as a whole", file=sys.stderr)
    return _in_memory(args, source, wanted, output)


def _streamed(args: argparse.Namespace, source: Source, wanted: Wanted, output: Output) -> tuple[Writers, Any]:
    from ..quantize import Settings
    from ..recipes import with_preset
    from ..stream.files import Calibration, Opening, quantize_files, write

    device = device_for(args.device, 0)
    _log.info("streaming %s in %s onto %s", source.path, wanted.dtype, device)
    beside = set(source.models) - set(wanted.components) if wanted.prompts else set()
    config = args.config or next((source.path / name for name in source.placed if name), None)
    dtype = torch_dtype(wanted.dtype)
    opening = Opening(dtype, device, config, args.lora or (), whole=args.budget is None, say=print)
    homes = opening.all(source.components, wanted.components, beside)
    for name in filter(None, source.placed):
        source.check_class(name, type(homes[name].model).__name__)
    calibration = None
    if wanted.prompts:
        calibration = Calibration(source.path, dtype, wanted.prompts, args.states, not args.no_feedback)
    recipes = {name: with_preset(recipe, args.preset) for name, recipe in wanted.components.items()}
    settings = Settings(args.rank, wanted.rules, args.mode, args.seed)
    budget = None if args.budget is None else parse_size(args.budget, "--budget")
    runs, report = quantize_files(homes, recipes, settings, output.blocks, calibration, budget)
    return {name: partial(write, run) for name, run in runs.items()}, report


def _in_memory(args: argparse.Namespace, source: Source, wanted: Wanted, output: Output) -> tuple[Writers, Any]:
    from ..checkpoint import save
    from ..quantize import quantize
    from ..recipes import with_preset

    recipes = {name: with_preset(recipe, args.preset) for name, recipe in wanted.components.items()}
    target = _target(args, source, wanted)
    held = {"": target} if source.index is None else target.components
    report = quantize(
        target, recipes.get("", args.recipe), wanted.prompts, args.mode, rank=args.rank, rules=wanted.rules,
        components=None if source.index is None else recipes, states=args.states,
        feedback=not args.no_feedback, work_dir=output.blocks, keep_work=True, seed=args.seed)
    return {name: partial(save, held[name]) for name in wanted.components}, report


def _target(args: argparse.Namespace, source: Source, wanted: Wanted) -> Any:
    """The whole pipeline where prompts run through it, else only the models to be quantized."""
    names = list(source.models) if wanted.prompts else list(wanted.components)
    device = device_for(args.device, sum(weight_bytes(source.components[name]) for name in names))
    _log.info("loading %s in %s onto %s", ", ".join(filter(None, names)) or source.path, wanted.dtype, device)
    if wanted.prompts:
        return load_pipeline(source.path, wanted.dtype).to(device)
    models = {name: load_model(source.components[name], wanted.dtype).to(device) for name in wanted.components}
    return models[""] if source.index is None else _Models(models)


@dataclass(frozen=True)
class _Models:
    """Those models of a pipeline that are quantized, without the rest of it."""

    components: dict[str, Any]

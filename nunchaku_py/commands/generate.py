"""`nunchaku-py generate`: run a pipeline folder and write its images."""
from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import NunchakuError
from ..folders import DENOISERS, read_json
from .arguments import BACKENDS, LARGEST_SEED, whole
from .sources import (
    Source,
    check_there,
    device_for,
    loading,
    lora_path,
    model_path,
    quantization_of,
    quiet_libraries,
    require_pillow,
    weight_bytes,
)

SUMMARY = "run a pipeline folder and write its images"
DESCRIPTION = ("Load a quantized (or 16-bit) pipeline folder, run it on a GPU if there is one with room for it,\n"
               "else on the CPU, and write its images. tiny-flux and tiny-sdxl are small trained pipelines that\n"
               "come with the package. What is not given keeps the pipeline's own default.")
EXAMPLES = ('  nunchaku-py generate tiny-flux --prompt "a large red circle on a white background" --out circle.png\n'
            '  nunchaku-py generate ./FLUX.1-dev-int4 --prompt "a lighthouse at dusk" --out lighthouse.png\n'
            '  nunchaku-py generate tiny-flux --prompt "a red circle in neon style" --lora tiny-flux-neon:0.8\n'
            '  nunchaku-py generate ./FLUX.1-dev-int4 --prompt "a cat" --steps 8 --width 512 --height 512 --mode a16\n')
# option → what the pipeline calls it
NAMES = {"prompt": "prompt", "negative_prompt": "negative_prompt", "steps": "num_inference_steps", "width": "width",
         "height": "height", "guidance": "guidance_scale", "count": "num_images_per_prompt"}
LENGTH = "max_sequence_length"
_OPTIONS = {name: f"--{option.replace('_', '-')}" for option, name in NAMES.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("pipeline", type=model_path, metavar="PIPELINE_DIR",
        help="a folder with model_index.json, or tiny-flux, or tiny-sdxl")
    add("--prompt", help="what to paint")
    add("--negative-prompt", help="what not to paint, where the pipeline takes this")
    add("--steps", type=whole(1), metavar="N", help="denoising steps")
    add("--width", type=whole(1), metavar="PIXELS")
    add("--height", type=whole(1), metavar="PIXELS")
    add("--guidance", type=float, metavar="SCALE", help="guidance scale")
    add("--lora", type=lora_path, action="append", metavar="FILE[:STRENGTH]",
        help="a LoRA, or the name of a shipped one; may be given more than once. In any community format for a "
             "quantized pipeline, else in those that diffusers reads")
    add("--count", type=whole(1), metavar="N", help="images for the prompt")
    add("--seed", type=whole(0, LARGEST_SEED), default=0, help="of the initial noise (default 0)")
    add("--mode", default="auto", choices=("auto", "a4", "a8", "a16"), help="activations of the 4-bit linears")
    add("--backend", choices=BACKENDS, help="the only one to use for 4-bit linears (default: the first that can)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="of everything else (default: the checkpoint's)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, … (default: a GPU with room for it, else the CPU)")
    add("--out", type=Path, default=Path("image.png"), metavar="FILE",
        help="image to write; several are numbered (default image.png)")


def run(args: argparse.Namespace) -> int:
    if args.backend is None:
        return _generate(args)
    from ..ops import backend

    with backend(args.backend):
        return _generate(args)


def _generate(args: argparse.Namespace) -> int:
    source = Source.of(args.pipeline)
    if source.index is None:
        raise NunchakuError(f"{args.pipeline}: is a model alone; generating needs a pipeline (model_index.json)")
    source.check(list(source.models))
    require_pillow()
    _check_writable(args.out)
    quiet_libraries(args.verbose)
    device = device_for(args.device, sum(map(weight_bytes, source.models.values())))
    pipe = _load(source, args)
    call = _arguments(pipe, args, source.call)
    with loading(args.pipeline):
        pipe = pipe.to(device)
    _put_on(pipe, args.lora or [])
    started = time.monotonic()
    images = _images(_call(pipe, call))
    written = _write(images, args.out)
    print(f"{time.monotonic() - started:.1f} s on {device}: {', '.join(map(str, written))}")
    return 0


def _load(source: Source, args: argparse.Namespace) -> Any:
    from ..checkpoint import load
    from .sources import torch_dtype

    with loading(source.path):
        pipe = load(source.path, args.mode, torch_dtype(args.dtype or _dtype(source)))
    pipe.set_progress_bar_config(disable=None)  # tqdm: only where somebody watches
    return pipe


def _put_on(pipe: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Load LoRAs, with their strengths."""
    if loras and not hasattr(pipe, "load_lora_weights"):
        raise NunchakuError(f"--lora: {type(pipe).__name__} takes no LoRA")
    for i, (path, _) in enumerate(loras):
        check_there(path)
        with loading(path):
            report = pipe.load_lora_weights(str(path), adapter_name=f"lora_{i}", weight_name=path.name)
        print(report or f"LoRA 'lora_{i}': {path}")
    if loras:
        pipe.set_adapters([f"lora_{i}" for i in range(len(loras))], [weight for _, weight in loras])


def _dtype(source: Source) -> str:
    """The compute dtype of a quantized denoiser, else the 16-bit type of the weights."""
    denoisers = [name for name in DENOISERS if name in source.models] or list(source.models)
    for name in denoisers:
        config = source.components[name] / "config.json"
        if config.is_file():
            stored = quantization_of(read_json(config)).get("compute_dtype")
            if stored in ("bfloat16", "float16"):
                return {"bfloat16": "bf16", "float16": "fp16"}[stored]
    return source.dtype(denoisers)


def _arguments(pipe: Any, args: argparse.Namespace, usual: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call, `usual` first; one that it does not take is refused rather than dropped."""
    import torch

    known = inspect.signature(pipe.__call__).parameters
    call = {**longest_prompt(pipe, known), **usual, **_given(args, usual)}
    for name in call:
        if name not in known:
            raise NunchakuError(f"{_OPTIONS.get(name, name)}: {type(pipe).__name__} takes no {name}")
    if "prompt" in known and "prompt" not in call:
        raise NunchakuError(f"--prompt is missing: {type(pipe).__name__} paints from a prompt")
    if "prompt" in known and getattr(pipe, "tokenizer", None) is None:
        raise NunchakuError(f"{args.pipeline}: holds no tokenizer, so it cannot read a prompt")
    if "generator" in known:
        call["generator"] = torch.Generator().manual_seed(args.seed)
    return call


def _given(args: argparse.Namespace, usual: dict[str, Any]) -> dict[str, Any]:
    """--guidance is that of a negative prompt where the pipeline is made for it: a FLUX that was not distilled."""
    names = NAMES | ({"guidance": "true_cfg_scale"} if "true_cfg_scale" in usual else {})
    return {name: getattr(args, option) for option, name in names.items() if getattr(args, option) is not None}


def longest_prompt(pipe: Any, known: Mapping[str, inspect.Parameter]) -> dict[str, int]:
    """The pipelines' default is made for large text encoders; no tokenizer is asked for more than it knows."""
    lengths = [part.model_max_length for name, part in pipe.components.items()
               if name.startswith("tokenizer") and hasattr(part, "model_max_length")]
    default = known[LENGTH].default if LENGTH in known else None
    return {LENGTH: max(lengths)} if lengths and isinstance(default, int) and default > max(lengths) else {}


def _call(pipe: Any, call: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        try:
            return pipe(**call)
        except ValueError as error:  # what the pipeline finds wrong with its arguments
            raise NunchakuError(str(error)) from error


def _images(result: Any) -> list[Any]:
    """PIL images of an image pipeline, or the frames of a video one."""
    found = getattr(result, "images", None)
    if found is None:
        found = [frame for video in getattr(result, "frames", None) or [] for frame in video]
    if not len(found) or not hasattr(found[0], "save"):
        raise NunchakuError(f"the pipeline returned no images but {type(result).__name__}")
    return list(found)


def _check_writable(out: Path) -> None:
    from PIL import Image

    if out.suffix.lower() not in Image.registered_extensions():
        raise NunchakuError(f"{out}: expected the name of an image file, such as image.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NunchakuError(f"{out}: cannot be written: {error}") from error


def _write(images: list[Any], out: Path) -> list[Path]:
    names = [out] if len(images) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(images))]
    for image, name in zip(images, names, strict=True):
        try:
            image.save(name)
        except OSError as error:
            raise NunchakuError(f"{name}: cannot be written: {error}") from error
    return names

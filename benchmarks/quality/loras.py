"""The shipped LoRAs on quantized models, against the same LoRAs on 16 bit.

    python -m benchmarks.quality.loras [--prompts N] [--out CSV] [--sheet PNG]

error: ‖found − expected‖ / ‖expected‖ of the denoiser's outputs along a 16-bit trajectory, without the LoRA and with
it, each against 16 bit of the same. ratio: the second over the first. ideal: the error with the LoRA if nothing but the
stored weights were off: dequantized to fp32, with PEFT's own LoRA beside them, no activation rounded. effect: part of
the pictures that show what their prompt says (hearts), or that glow in the dark (neon).
"""
from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nunchaku_py as nq
from benchmarks.machine import provenance
from benchmarks.quality.picture_cells import Extent
from benchmarks.quality.picture_subjects import Subject, in_fp32
from benchmarks.rows import Origin, RowFile
from nunchaku_py.demo import shipped
from nunchaku_py.demo.checker import agreement, load_checker
from nunchaku_py.demo.measure import outputs, paint, psnr, relative_error
from nunchaku_py.demo.scenes import NEW_SHAPES, describe, described, draw
from nunchaku_py.demo.sheet import pil

RECIPES = ("svdquant-int4", "svdquant-nvfp4")
MODES = ("a4", "a8", "a16")
SEEDS = (0, 1, 2)
PROMPT_SEED, SHOWN, STEPS = 6000, 4, 10
NEON_DARK, NEON_BRIGHT = 0.6, 0.7  # as the tests of the 16-bit LoRA have it
BAR = 1.1


@dataclass
class Row(Origin):
    lora: str
    recipe: str
    mode: str
    seed: int
    error_without: float
    error_with: float
    ideal: float
    ratio: float
    psnr: float
    effect: float
    effect_16_bit: float


class Case:
    """A LoRA with its pipeline: in 16 bit, without and with it."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.neon = name, name.endswith("neon")
        self.subject = Subject(shipped.LORAS[name], False, Extent(prompts=count, steps=STEPS))
        suffix = " in neon style" if self.neon else ""
        fits = [caption for caption in prompts(2 * count, self.neon) if self.fits(caption + suffix)]
        self.captions = fits[:count]
        asked = [caption + suffix for caption in self.captions]
        vars(self.subject)["prompts"] = asked
        self.plain = self.subject.denoiser
        self.states_without = self.subject.trajectory(self.captions[:8], PROMPT_SEED, STEPS)
        self.with_lora = self.adapted(self.plain)
        pipe, self.subject.pipe = self.subject.pipe, self.subject.with_denoiser(self.with_lora)
        self.states_with = self.subject.trajectory(asked[:8], PROMPT_SEED, STEPS)
        self.subject.pipe = pipe

    def fits(self, prompt: str) -> bool:
        """Whether CLIP reads it to its end."""
        tokenizer = self.subject.pipe.tokenizer
        return len(tokenizer(prompt).input_ids) <= tokenizer.model_max_length

    def adapted(self, model: nn.Module) -> nn.Module:
        found = copy.deepcopy(model)
        found.load_lora_adapter(shipped.lora(self.name), prefix=shipped.DENOISERS[shipped.LORAS[self.name]],
                                adapter_name="it")
        return found

    def painted(self, model: nn.Module) -> Tensor:
        return paint(self.subject.with_denoiser(model), self.subject.prompts, PROMPT_SEED, self.subject.call)

    def effect(self, pictures: Tensor, before: Tensor) -> float:
        """Part of the pictures on which the LoRA shows."""
        if not self.neon:
            right = agreement(load_checker(), pictures, self.captions)
            return sum(right) / len(right)
        glow = (pictures.mean((1, 2, 3)) < NEON_DARK * before.mean((1, 2, 3))) & (
            pictures.flatten(1).amax(1) > NEON_BRIGHT)
        return glow.float().mean().item()


def prompts(count: int, neon: bool) -> list[str]:
    """Of any scenes; of one or two things with a heart among them, where hearts are what the LoRA teaches."""
    if neon:
        return described(count, PROMPT_SEED)[1]
    chance, found = random.Random(PROMPT_SEED), []
    while len(found) < count:
        scene = draw(chance, shapes=("circle", "square", *NEW_SHAPES))
        if len(scene.things) < 3 and any(thing.shape in NEW_SHAPES for thing in scene.things):
            found.append(describe(scene, chance))
    return found


def measure(case: Case) -> Iterator[tuple[Row, Tensor]]:
    """(row, pictures) of every recipe, calibration and mode."""
    plain_outputs = outputs(case.plain, case.states_without)
    lora_outputs = outputs(case.with_lora, case.states_with)
    before, expected = case.painted(case.plain), case.painted(case.with_lora)
    exact = case.effect(expected, before)
    for recipe in RECIPES:
        for seed in SEEDS:
            model = copy.deepcopy(case.plain)
            states = case.subject.calibration(seed)
            nq.quantize(model, recipe, states, states=len(states), rank=16, seed=seed, progress=False)
            both = case.adapted(model)
            wide = [in_fp32(state) for state in case.states_with]
            ideal = relative_error(outputs(case.adapted(nq.dequantize(model).float()), wide), lora_outputs)
            for mode in MODES:
                nq.set_mode(model, mode)
                nq.set_mode(both, mode)
                errors = (relative_error(outputs(model, case.states_without), plain_outputs),
                          relative_error(outputs(both, case.states_with), lora_outputs))
                pictures = case.painted(both)
                yield Row(**provenance(), lora=case.name, recipe=recipe, mode=mode, seed=seed,
                          error_without=errors[0], error_with=errors[1], ideal=ideal, ratio=errors[1] / errors[0],
                          psnr=psnr(pictures, expected).mean().item(), effect=case.effect(pictures, before),
                          effect_16_bit=exact), pictures


def sheet(columns: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> Any:
    """Pictures of a few prompts: a row each, a column for each variant."""
    from PIL import Image, ImageDraw, ImageFont

    side, gap, top, left = 128, 10, 34, 250
    image = Image.new("RGB", (left + len(columns) * (side + gap), top + len(captions) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for j, (title, pictures) in enumerate(columns):
        pen.text((left + j * (side + gap), 10), title, "black", font)
        for i in range(len(captions)):
            shown = pil(pictures[i]).resize((side, side), Image.Resampling.NEAREST)
            image.paste(shown, (left + j * (side + gap), top + i * (side + gap)))
    for i, caption in enumerate(captions):
        words, lines = caption.split(), [""]
        for word in words:
            if font.getlength(f"{lines[-1]} {word}") > left - 20:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((10, top + i * (side + gap) + 20), "\n".join(lines), "black", font)
    return image


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/loras.csv"))
    options.add_argument("--sheet", type=Path, default=Path("docs/loras.png"))
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, captions, columns = [], [], {}
    with RowFile(arguments.out, Row) as file:
        for name in shipped.LORAS:
            case = Case(name, arguments.prompts)
            shown = {"16 bit": case.painted(case.plain), "16 bit + LoRA": case.painted(case.with_lora)}
            for row, pictures in measure(case):
                file.write(row)
                rows.append(row)
                print(f"{name} {row.recipe} {row.mode} #{row.seed}: error {row.error_without:.4f} -> "
                      f"{row.error_with:.4f} ({row.ratio:.2f}; ideal {row.ideal:.4f}), {row.psnr:.1f} dB, "
                      f"LoRA shows on {row.effect:.0%} "
                      f"(16 bit: {row.effect_16_bit:.0%})", flush=True)
                if row.seed == 0 and row.recipe == RECIPES[0] and row.mode != "a16":
                    shown[f"INT4 {row.mode} + LoRA"] = pictures
            chosen = case.subject.prompts[:SHOWN // 2]
            captions += [f"{name}: {prompt}" for prompt in chosen]
            for title, pictures in shown.items():
                columns.setdefault(title, []).append(pictures[:len(chosen)])
    sheet([(title, torch.cat(parts)) for title, parts in columns.items()], captions).save(arguments.sheet)
    worst = max(rows, key=lambda row: row.ratio)
    print(f"worst ratio {worst.ratio:.3f} ({worst.lora}, {worst.recipe}, {worst.mode}); the bar is {BAR}")
    print("a row for each in", asdict(worst)["date"], arguments.out, arguments.sheet)


if __name__ == "__main__":
    main()

"""Training a LoRA on the quantized tiny-flux, beside the same training on 16 bit:

    python -m benchmarks.training.lora_on_4bit [--steps N] [--out CSV]

Both see the same pictures, noise and times, and start from the same adapter. What a LoRA has learned is by how much its
loss fell, on examples and times of their own that are the same for all, against the loss before the first step.
"""
from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import nunchaku_py as nq
from benchmarks.machine import provenance
from benchmarks.rows import Origin, RowFile
from nunchaku_py.demo.scenes import described

from . import flux, lora
from .latents import Examples

NAME, RATE, BATCH, WARMUP = "tiny-flux-neon", 2e-3, 24, 20
TESTS, TEST_SEED = 16, 99
PROMPT_SEED, PROMPTS = 7000, 8


@dataclass
class Row(Origin):
    weights: str
    step: int
    loss: float
    fallen: float


def started(quantized: bool) -> tuple[nn.Module, nn.Module]:
    """(drawer, denoiser) with a fresh adapter, drawn from the same seed."""
    torch.manual_seed(0)
    pipe, drawer = lora.adapted(lora.shipped.LORAS[NAME], prepare if quantized else lambda pipe: None)
    return drawer, pipe.transformer


def prepare(pipe: object) -> None:
    """Quantized, and calibrated on ordinary prompts."""
    nq.quantize(pipe, "svdquant-int4", described(PROMPTS, PROMPT_SEED)[1], rank=16, progress=False)


def trained(drawer: nn.Module, data: Examples, steps: int, every: int) -> list[tuple[int, float]]:
    """(step, loss on the test examples)."""
    adapter = [parameter for parameter in drawer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=RATE, weight_decay=0.01)
    generator, found = torch.Generator().manual_seed(1), [(0, tested(drawer, data))]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP, (steps - step) / (0.5 * steps))
        loss = flux.losses(drawer, data, BATCH, generator)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0:
            found.append((step + 1, tested(drawer, data)))
            print(f"  step {step + 1}: {found[-1][1]:.4f}", flush=True)
    return found


@torch.no_grad()
def tested(drawer: nn.Module, data: Examples) -> float:
    generator = torch.Generator().manual_seed(TEST_SEED)
    return sum(flux.losses(drawer, data, BATCH, generator)[0].item() for _ in range(TESTS)) / TESTS


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/lora_training.csv"))
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    falls, data = {}, None
    with RowFile(arguments.out, Row) as file:
        for weights in ("16 bit", "INT4"):
            drawer, _ = started(weights != "16 bit")
            data = data or lora.examples(lora.LORAS[NAME], lora.shipped.pipeline("tiny-flux").vae.float())
            print(weights, flush=True)
            curve = trained(drawer, data, arguments.steps, max(1, arguments.steps // 6))
            for step, loss in curve:
                file.write(Row(**provenance(), weights=weights, step=step, loss=loss, fallen=1 - loss / curve[0][1]))
            falls[weights] = curve[0][1] - curve[-1][1]
    print(f"loss fell by {falls['16 bit']:.4f} on 16 bit, by {falls['INT4']:.4f} on INT4: "
          f"{falls['INT4'] / falls['16 bit']:.1%}")


if __name__ == "__main__":
    main()

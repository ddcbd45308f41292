"""States of runs from the shipped weights, where the runs themselves are lost: `python -m benchmarks.training.restore`.

A denoiser's run starts at step 0 with what is shipped; its optimizers and the head that is asked what is where start
from nothing. Autoencoders, text encoders and the checker are there to be used, not to be trained on: the heads that
taught the encoders are not shipped. What is there already is left as it is, so all must be of one training.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from nunchaku_py.demo import checker, shipped

from . import flux, sdxl
from .loop import save_whole, started_from, state_of


def main() -> None:
    for base, drawer, names in (("flux", flux.Drawer, flux.READERS), ("sdxl", sdxl.Drawer, sdxl.READERS)):
        pipe = shipped.pipeline(f"tiny-{base}", torch.float32)
        autoencoder = _without_shift(pipe.vae)
        _keep(f"vae-{base}", {"averaged": autoencoder})
        _keep(f"decoder-{base}", {"averaged": _part(autoencoder, "decoder.")})
        encoders = {name: getattr(pipe, part) for name, part in names.items()}
        _keep(f"text-{base}", {"averaged": nn.ModuleDict({"encoders": nn.ModuleDict(encoders)}).state_dict()})
        denoiser = getattr(pipe, shipped.DENOISERS[f"tiny-{base}"])
        torch.manual_seed(0)
        _keep(base, started_from(drawer(*encoders.values(), denoiser)))
    _keep("checker", {"averaged": checker.load_checker().state_dict()})


def _without_shift(vae: nn.Module) -> dict[str, Tensor]:
    """As vae.py trains it: `ship` adds the convolutions around the latents."""
    return {name: value for name, value in vae.state_dict().items() if "quant_conv" not in name}


def _part(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _keep(name: str, state: dict) -> None:
    path = state_of(name)
    if path.exists():
        print(f"{path}: is there already, left as it is")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(state, path)
    print(path)


if __name__ == "__main__":
    main()

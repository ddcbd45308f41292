"""Models larger than the memory they compute in: blocks streamed to a GPU while others compute, or, on the CPU, pages
of a mapped file that come and go with them."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import NunchakuError
from ..folders import DENOISERS
from ..sizes import parse_size
from ..swap import quantized_components
from .guests import Guests
from .paging import Paging
from .streaming import Streaming

ATTRIBUTE = "nunchaku_offload"
_GROUP = ("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker")
Size = int | float | str


def offload(target: Any, vram: Size | None = None, ram: Size | None = None,
            device: torch.device | str | None = None) -> None:
    """Let a quantized model, or the denoiser of a pipeline, compute in less memory than its weights take.

    vram="4GB": on a GPU (`device`, by default the current one) as many blocks stay as fit into so much beside what lies
    outside the blocks; the others are copied from host memory, each while the one before computes. Activations come
    on top. ram="4GB": on the CPU, of a model that nq.load(path, mmap=True) gave: so much of the mapped file counts as
    memory of the process. Of a pipeline, text encoders and VAE are there only while they are needed. None undoes it.
    """
    if vram is not None and ram is not None:
        raise NunchakuError("nq.offload: vram= is for a model on a GPU, ram= for one on the CPU; give one of them")
    models = _models_of(target)
    for holder in (*models, target):
        done = vars(holder).pop(ATTRIBUTE, None)
        if done is not None:
            done.undo()
    size, name = (vram, "vram") if ram is None else (ram, "ram")
    if size is None:
        return
    budget = parse_size(size, name)
    for model in models:
        _refuse(model)
    for model in models:
        share = budget // len(models)
        vars(model)[ATTRIBUTE] = Streaming(model, share, device) if ram is None else Paging(model, share)
    if not isinstance(target, nn.Module):
        vars(target)[ATTRIBUTE] = guests = Guests(target, [vars(model)[ATTRIBUTE] for model in models])
        _check_place(target, guests.device)


def offload_lines(models: list[nn.Module]) -> list[str]:
    """What `explain` says of it."""
    return [vars(model)[ATTRIBUTE].line() for model in models if ATTRIBUTE in vars(model)]


def _models_of(target: Any) -> list[nn.Module]:
    found = quantized_components(target)
    models = [model for name, model in found.items() if name in ("", *DENOISERS)]
    if not models:
        raise NunchakuError(f"nq.offload: of this {type(target).__name__} {', '.join(found)} is quantized, and none of "
                            f"{', '.join(DENOISERS)}; name the component instead of the pipeline")
    return models


def _check_place(pipe: Any, place: torch.device | None) -> None:
    """The pipeline makes its inputs where it believes that it computes."""
    found = getattr(pipe, "_execution_device", place)
    if place is not None and found.type != place.type:
        offload(pipe, None)
        raise NunchakuError(f"nq.offload: this {type(pipe).__name__} would make its inputs on {found}, while its "
                            f"denoiser computes on {place}; offload the denoiser alone, or update diffusers")


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"nq.offload: {type(model).__name__}{f'.{name}' if name else ''}"
        if getattr(module, "_hf_hook", None) is not None:
            raise NunchakuError(f"{where} has an offload hook of accelerate's (enable_model_cpu_offload, "
                                "enable_sequential_cpu_offload, a device_map); remove it before, by "
                                "pipe.remove_all_hooks()")
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if any(hook in hooks for hook in _GROUP):
            raise NunchakuError(f"{where} has a hook of diffusers' group offloading; load the model again without it")
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise NunchakuError(f"{where} is compiled, and its graphs would read weights where they no longer are; "
                                "offload a model that is not")

"""An empty model as a folder describes it, and how its tensors are called in the files there."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.build import empty_model
from ..models.discover import blocks_of
from ..models.pattern import pattern_of
from .residence import Streamed, tied
from .weights import Weights


def described(config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> nn.Module:
    """The model of a config, in eval mode, its parameters on the meta device in the types that loading gives them."""
    nbytes = sum(tensor.nbytes for tensor in weights.tensors.values())
    model = empty_model(config, len(weights.tensors), nbytes, weights.label).eval().requires_grad_(False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    if not hasattr(model, "register_to_config"):  # transformers notes the type that it loads a model in
        for part in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
            if part is not None:
                part.dtype = dtype
    kept = _kept_in_fp32(model, dtype)
    for name, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point():
                continue
            wanted = torch.float32 if kept & set(f"{name}.{leaf}".split(".")) else dtype
            if leaf in module._parameters:
                tensor.data = tensor.data.to(wanted)
            elif leaf not in module._non_persistent_buffers_set:
                module._buffers[leaf] = tensor.to(wanted)
    return model


def _kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Components of names that the model's library loads in 32 bits; that of transformers only beside fp16."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if hasattr(model, "register_to_config") or dtype == torch.float16:
        return {kept} if isinstance(kept, str) else {*kept, *strict}
    return set(strict)


def streamed(model: nn.Module, weights: Weights, device: torch.device | str = "cpu") -> Streamed | None:
    """Its weights, a block at a time; None where the files have names that only the model's library understands."""
    renamed = names_in_files(model, weights)
    return None if renamed is None else Streamed(model, blocks_of(model, pattern_of(model)), weights, device, renamed)


def names_in_files(model: nn.Module, weights: Weights) -> Mapping[str, str] | None:
    """Name in the model → name in the files: the same, or with one component more in front; None where what is
    missing may be there under names of another kind."""
    tensors, aliases = weights.tensors, tied(model)
    state = model.state_dict(keep_vars=True)
    optional = {*aliases, *aliases.values()}
    wanted = [name for name, tensor in state.items() if tensor.is_meta and name not in optional]
    fronts = {name.partition(".")[0] + "." for name in tensors}
    forms = [lambda name: name, *((lambda name, front=front: front + name) for front in fronts)]

    def missing(form: Callable[[str], str]) -> int:
        return sum(form(name) not in tensors for name in wanted)

    best = min(forms, key=missing)
    unknown = set(tensors).difference(map(best, state))
    if 0 < missing(best) <= len(unknown):
        return None
    return {name: best(name) for name in (*wanted, *optional) if best(name) != name}

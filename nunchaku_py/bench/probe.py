"""What must be known before anything is made: the machine, the device, and how large the model is in which form."""
from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import NunchakuError
from ..models.discover import blocks_of
from ..models.pattern import pattern_of
from ..models.plan import Plan, plan
from ..site import Site, auto_mode, auto_weights
from . import machine
from .inputs import MAKERS
from .job import Job
from .quick import CHOICES
from .random_models import Sources, meta_model

QUANTIZED = 0.62  # bytes of a weight in 4 bits, with scales and branch: to reckon with, not to show
FOLDED = 1.0  # more, where mode a8 keeps INT8 weights beside the codes


def probe(job: Job) -> dict[str, Any]:
    """Sizes in bytes: of the denoiser in 16 bit, quantized, and in 16 bit with one block of each kind."""
    device = torch.device(chosen(job.device))
    model, recipe = meta_model(job.config, job.name), CHOICES[f"quick-{job.format}"]
    planned = plan(model, recipe.kind, job.rules)
    dense = bytes_of(model)
    return {"device": str(device), "device_name": device_name(device), "cpu": machine.cpu_name(),
            "memory_left": memory_left(device), "version": __version__, "versions": machine.versions(),
            "torch": torch.__version__,
            "kernels": machine.kernels() if device.type == "cpu" else f"CUDA {torch.version.cuda}",
            "mode": auto_mode(Site(recipe.kind, recipe.format, recipe.group or 64), device),
            "threads": torch.get_num_threads(), "dense": dense,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "quantized": quantized_bytes(model, planned, device), "shared": shared_bytes(model),
            "inputs": type(model).__name__ in MAKERS}


def chosen(wanted: str) -> str:
    """A GPU by its number. "auto": one where there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or wanted == "auto" and not count:
        return "cpu"
    named = re.fullmatch(r"auto|cuda(?::(\d+))?", wanted)
    if named is None:
        raise NunchakuError(f"--device {wanted}: expected auto, cpu, cuda or cuda:N")
    index = int(named[1] or (torch.cuda.current_device() if count else 0))
    if index >= count:
        raise NunchakuError(f"--device {wanted}: this PyTorch sees {count or 'no'} CUDA device{'s' * (count > 1)}")
    return f"cuda:{index}"


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def quantized_bytes(model: nn.Module, planned: Plan, device: torch.device) -> int:
    """About."""
    weights = sum(model.get_submodule(name).weight.numel() for name in planned.choices)
    taken = QUANTIZED + (FOLDED if auto_weights(device) == "int8" else 0)
    return bytes_of(model) - int((2 - taken) * weights)


def shared_bytes(model: nn.Module) -> int:
    sources = Sources(model, 1).of_block
    copies = sum(bytes_of(model.get_submodule(name)) for name, source in sources.items() if name != source)
    largest = max(blocks_of(model, pattern_of(model)).values(), key=bytes_of, default=model)
    return bytes_of(model) - copies + bytes_of(largest)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_name()


def memory_left(device: torch.device) -> int:
    """Where the model will lie."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.memory_left()

"""What an architecture's file says, as data. `GENERIC` holds for every model, also for one that nobody named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from torch import nn

from ..feed_forward import FEED_FORWARDS
from ..fusion import Fusion
from ..together import SHARED_INPUTS

Parts = tuple[tuple[int, int, bool], ...]  # (k0, k1, its values come from a GELU) of each K-part, covering 0..K


@dataclass(frozen=True)
class Shared:
    """Children of one module that read the same input."""

    members: tuple[str, ...]
    beside: str = ""  # a sibling that tells this type of module from others with such children
    self_attention: bool = False  # holds only where queries and keys come from one sequence


@dataclass(frozen=True)
class Pattern:
    """Data of an architecture. Names and globs are relative to the block, matched with case."""

    classes: tuple[str, ...] = ()  # model class names
    order: tuple[str, ...] = ()  # globs of block names in order of execution, where registration says otherwise
    groups: tuple[tuple[str, ...], ...] = ()  # modules of a block that read the same input
    shared: tuple[Shared, ...] = ()  # the same, by the children of any one module
    gelu: tuple[str, ...] = ()  # linears whose input is the output of a GELU
    modulation: tuple[str, ...] = ()  # one row per sample: weight-only
    keep: tuple[tuple[str, str], ...] = ()  # (glob, reason): stays 16 bit
    parts: tuple[tuple[str, Callable[[nn.Module, nn.Module], Parts | None]], ...] = ()  # (glob, f(linear, block))
    fusions: tuple[Fusion, ...] = ()  # what runs together in a quantized model; the first that concerns a module has it

    def extend(self, **more: tuple) -> Pattern:
        """A pattern of which this one is the rest: what `more` says comes first."""
        return Pattern(**{field.name: more.get(field.name, ()) + getattr(self, field.name) for field in fields(self)})


def matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


GENERIC = Pattern(
    shared=(
        Shared(("to_q", "to_k", "to_v"), self_attention=True),
        Shared(("to_k", "to_v")),
        Shared(("add_q_proj", "add_k_proj", "add_v_proj")),
        Shared(("add_k_proj", "add_v_proj")),  # Wan image-to-video
        Shared(("q_proj", "k_proj", "v_proj"), self_attention=True),  # transformers
        Shared(("k_proj", "v_proj")),
        Shared(("q", "k", "v"), self_attention=True),  # T5
        Shared(("k", "v")),
        Shared(("query", "key", "value"), self_attention=True),
        Shared(("key", "value")),
        Shared(("to_query", "to_key", "to_value"), self_attention=True),  # Kandinsky
        Shared(("to_key", "to_value")),
        Shared(("wi_0", "wi_1"), beside="wo"),  # T5 v1.1
        Shared(("gate_proj", "up_proj"), beside="down_proj"),
        Shared(("w1", "w3"), beside="w2"),  # Z-Image, Lumina: w2(silu(w1 x) * w3 x)
        Shared(("linear_1", "linear_2"), beside="out_projection"),  # AuraFlow
    ),
    modulation=(
        "*norm*.linear",
        "*norm*.linear_[0-9]",
        "*_mod.*",
        "*modulation*",
        "*ada[lL][nN]*",
        "*ada_ln*",
        "*ada_lin*",
        "*time_emb_proj",
        "*scale_shift*",
    ),
    keep=(
        ("*.processor.*", "belongs to an attention processor (IP-Adapter): few rows, loaded and unloaded by the user"),
        ("*.router*", "chooses experts: a rounding error there changes which weights are used"),
    ),
    fusions=(FEED_FORWARDS, SHARED_INPUTS),
)


def pattern_of(model: nn.Module) -> Pattern:
    """The data of the model's class, or of a class it inherits from; else GENERIC."""
    from .flux import FLUX
    from .sdxl import SDXL

    names = {base.__name__ for base in type(model).__mro__}
    return next((pattern for pattern in (FLUX, SDXL) if names & set(pattern.classes)), GENERIC)

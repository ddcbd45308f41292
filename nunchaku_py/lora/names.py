"""From a module path as a file has it to the modules of the model at hand."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import NunchakuError
from .delta import Target, some
from .names_unet import unet_names
from .tables import FAMILIES, Row


@dataclass(frozen=True)
class Place:
    """The modules whose rows a foreign weight holds, in its order; `swap`: its halves are in the other order."""

    modules: tuple[str, ...]
    swap: bool = False


# (how diffusers' modules end, how old files have them end)
_OLD_ENDINGS = (
    *((f".to_{name}", f".processor.to_{name}") for name in "qkv"),
    (".to_out.0", ".processor.to_out"),
    (".to_out.0", ".to_out"),
    *((f".self_attn.{name}_proj", f".self_attn.to_{name}") for name in "qkv"),
    (".self_attn.out_proj", ".self_attn.to_out"),
)
_TEXT_MODEL = "text_model."


class Names:
    """Every name of a target's modules. Names are compared with underscores for dots, which is how kohya's scripts
    write them; a name with its dots that is exactly the model's own needs no comparison."""

    def __init__(self, target: Target) -> None:
        self._modules = target.shapes
        self._places: dict[str, dict[Place, str]] = {}  # name with underscores → places, each with whose name it is
        own = [(name, Place((name,))) for name in target.shapes]
        self._add(own, "")
        self._add([(alias, place) for name, place in own for alias in _aliases(name)], "")
        if "UNet" in target.cls:
            self._add([(foreign, Place((name,))) for foreign, name in unet_names(target.shapes)], "LDM names")
        for family in FAMILIES:
            if re.search(family.classes, target.cls):
                self._add(_foreign(family.rows, target), family.names)

    def _add(self, names: list[tuple[str, Place]], whose: str) -> None:
        """Names that are known already keep their meaning; two meanings of one call are both kept."""
        known = set(self._places)
        for name, place in names:
            flat = _flat(name)
            if flat not in known:
                self._places.setdefault(flat, {}).setdefault(place, whose)

    def find(self, path: str) -> tuple[Place, str] | None:
        """(place, whose name it is: "" for diffusers' own)."""
        if path in self._modules:
            return Place((path,)), ""
        places = self._places.get(_flat(path))
        if places is None:
            return None
        if len(places) > 1:
            meanings = some(" with ".join(place.modules) for place in places)
            raise NunchakuError(f"{path}: may name several modules of the model: {meanings}")
        return next(iter(places.items()))


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _aliases(name: str) -> Iterator[str]:
    for own, old in _OLD_ENDINGS:
        if name.endswith(own):
            yield name.removesuffix(own) + old
            if name.startswith(_TEXT_MODEL):
                yield (name.removesuffix(own) + old).removeprefix(_TEXT_MODEL)
            elif old.startswith(".self_attn"):
                yield _TEXT_MODEL + name.removesuffix(own) + old
    # CLIP's modules are, from one version of transformers to another, in a module of this name or not.
    if name.startswith(_TEXT_MODEL):
        yield name.removeprefix(_TEXT_MODEL)
    elif name.startswith("encoder."):
        yield _TEXT_MODEL + name


def _foreign(rows: tuple[Row, ...], target: Target) -> list[tuple[str, Place]]:
    """The rows, once for every block that the target has."""
    return [(row.foreign.replace("{}", number), _place(row, number, target))
            for row in rows for number in _numbers(row, target)]


def _numbers(row: Row, target: Target) -> list[str]:
    first, *others = row.modules
    pattern = re.compile(re.escape(first).replace(r"\{\}", r"(\d+)"))
    numbers = [found.group(1) if found.groups() else "" for name in target.shapes if (found := pattern.fullmatch(name))]
    return [number for number in numbers if all(name.replace("{}", number) in target.shapes for name in others)]


def _place(row: Row, number: str, target: Target) -> Place:
    modules = tuple(name.replace("{}", number) for name in row.modules)
    rows, columns = target.shapes[modules[0]][:2]
    return Place(modules, swap=row.shift_first and rows == 2 * columns)

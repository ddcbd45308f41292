"""LoRA files of every trainer, read to one form: `read` finds out by itself what it was given.

A key is parsed (keys.py), its module path is found among the names that the model's modules have (names.py, with
foreign names as tables), and the tensors of one weight become the Delta of each module (assemble.py)."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import NunchakuError
from . import nunchaku
from .assemble import Group, assemble
from .delta import Delta, Reading, Target, some
from .keys import TEXT_ENCODERS, Key, parse
from .lycoris import Fit, Misfit, Refused
from .names import Names, Place
from .tensors import State, same

__all__ = ["Delta", "Found", "Reading", "Target", "check_shapes", "equal", "find", "read"]

_CONTROL = "BFL FLUX control"


@dataclass(frozen=True)
class Found:
    """The weights of models that the keys of a file are of; what its tensors say is still to be assembled."""

    format: str
    state: State
    groups: list[Group]
    unread: list[str]


def find(state: State, targets: Mapping[str, Target]) -> Found:
    """Every key's weight, for the models `targets`, for instance {"transformer": …} or {"unet": …, "text_encoder": …}.
    """
    state, converted = nunchaku.unpacked(state)
    keys = [key for key in map(parse, state) if key is not None]
    if not keys:
        raise NunchakuError(f"no key is one of a LoRA, among {len(state)} keys: {some(sorted(state)) or 'none'}")
    if any(text.endswith(("query_norm.scale", "key_norm.scale")) for text in state):
        return Found(_CONTROL, state, [], sorted(state))
    search = Search(state, targets)
    for key in keys:
        search.add(key)
    groups = [group for group in search.groups.values() if group.kind is not None]
    _check_halves(groups)
    done = {key for group in groups for key in group.keys.values()} | search.doubles
    style = "Nunchaku's converted" if converted else _describe(search.found or keys, search.whose)
    return Found(style, state, groups, sorted(set(state) - done))


def read(state: State, targets: Mapping[str, Target], *, most: int = 512, tolerance: float = 0.0) -> Reading:
    """Read a LoRA for the models `targets`.

    Changes that are no LoRA (LoHa, LoKr, full differences) get at most the rank `most`. Where they need more, a part
    of each up to `tolerance`, as a share of its Frobenius norm, may be left out.
    """
    found, fit = find(state, targets), Fit(most, tolerance)
    deltas, left = _assemble(found.groups, found.state, fit)
    fit.check()
    return Reading(found.format, _ordered(deltas, targets), sorted({*found.unread, *left}), fit.notes())


class Search:
    """Keys by the foreign weight that they are of."""

    def __init__(self, state: State, targets: Mapping[str, Target]) -> None:
        self._state, self._targets = state, targets
        self._names = {component: Names(target) for component, target in targets.items()}
        self._denoiser = _denoiser(targets)
        self.groups: dict[tuple[str, Place], Group] = {}
        self.doubles: set[str] = set()
        self.whose: set[str] = set()
        self.found: list[Key] = []

    def add(self, key: Key) -> None:
        found = self._find(key)
        if found is None or key.style == "another":
            return
        component, place, whose = found
        self.found.append(key)
        self.whose.add(whose)
        group = self.groups.setdefault((component, place), Group(component, place, self._targets[component], {}))
        other = group.keys.setdefault(key.part, key.text)
        if other != key.text:
            if not same(self._state[other], self._state[key.text]):
                raise NunchakuError(f"{other} and {key.text} are for the same thing, {key.part} of {group.name}, "
                                    "and differ")
            self.doubles.add(key.text)

    def _find(self, key: Key) -> tuple[str, Place, str] | None:
        for components, path in key.places():
            names = (self._denoiser if name == "" else name for name in components)
            component = next((name for name in names if name in self._targets), None)
            place = None if component is None else self._names[component].find(path)
            if place is not None:
                return component, *place
        return None


def _denoiser(targets: Mapping[str, Target]) -> str | None:
    """The component that keys without a container are of; a target that stands alone is taken at any name."""
    others = [name for name in targets if name not in TEXT_ENCODERS]
    known = [name for name in ("transformer", "unet") if name in targets]
    return next(iter(known or others or (list(targets) if len(targets) == 1 else ())), None)


def _check_halves(groups: list[Group]) -> None:
    missing = [phrase for group in groups if (phrase := group.missing()) is not None]
    if missing:
        raise NunchakuError(f"half of a pair is missing: {some(missing)}")


def _assemble(groups: list[Group], state: State, fit: Fit) -> tuple[dict[tuple[str, str], Delta], list[str]]:
    deltas: dict[tuple[str, str], Delta] = {}
    sources: dict[tuple[str, str], Group] = {}
    misfits, left = [], []
    for group in groups:
        try:
            changed, unread = assemble(group, state, fit)
        except Misfit as misfit:
            misfits.append(str(misfit))
            continue
        except Refused:
            continue
        left += unread
        for module, delta in changed.items():
            place = group.component, module
            if place in deltas and not equal(deltas[place], delta):
                raise NunchakuError(f"{module}: changed twice, by {some(sorted(sources[place].keys.values()))} and by "
                                    f"{some(sorted(group.keys.values()))}")
            deltas.setdefault(place, delta)
            sources[place] = group
    check_shapes(misfits, len(groups))
    return deltas, left


def check_shapes(misfits: list[str], groups: int) -> None:
    if 2 * len(misfits) > groups > 1:
        raise NunchakuError(f"this LoRA is for another model: {len(misfits)} of {groups} changes have shapes that do "
                            f"not fit. {misfits[0]}")
    if misfits:
        raise NunchakuError(f"shapes do not fit: {some(misfits)}")


def equal(first: Delta, second: Delta) -> bool:
    def alike(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and same(a, b))

    return (first.alpha / first.rank == second.alpha / second.rank and alike(first.up, second.up)
            and alike(first.down, second.down) and alike(first.bias, second.bias)
            and alike(first.magnitude, second.magnitude))


def _ordered(deltas: dict[tuple[str, str], Delta], targets: Mapping[str, Target]) -> dict[str, dict[str, Delta]]:
    """In the order of the models' modules, whatever the order of the file."""
    ordered = {component: {module: deltas[component, module] for module in target.shapes
                           if (component, module) in deltas} for component, target in targets.items()}
    return {component: modules for component, modules in ordered.items() if modules}


def _describe(keys: list[Key], whose: set[str]) -> str:
    """For people: who writes such keys, the kind of change, and whose names the modules have."""
    styles = sorted({key.style for key in keys if key.style not in ("", "another")}) or ["of another method"]
    names = sorted(whose - {""})
    return " and ".join(styles) + (f" ({', '.join(names)})" if names else "")

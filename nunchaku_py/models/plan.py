"""Which linears of a model are quantized, how, and together with which: `plan(model, kind, rules)`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from ..errors import NunchakuError
from .discover import MIN_K, MIN_N, after_gelu, blocks_of, is_linear, linears_in, shape_of, shared_inputs
from .pattern import Parts, Pattern, matches, pattern_of

CHOICES = ("w4a4", "w4a16", "keep")
OUTSIDE = "outside the repeated blocks"


@dataclass(frozen=True)
class Unit:
    """Linears that are quantized together because they read the same input; or one K-part of a linear."""

    names: tuple[str, ...]
    kind: str  # "w4a4" | "w4a16"
    gelu: bool = False  # the input is the output of a GELU
    block: str = ""  # name of the block it is in; "" outside the blocks
    k_range: tuple[int, int] | None = None

    def __str__(self) -> str:
        return ", ".join(self.names)


@dataclass
class Plan:
    """`units` in order of execution, `kept` (name → reason) in that of registration; every linear is in one of them."""

    units: list[Unit] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()  # every block in order of execution, also those without units
    weights: dict[str, int] = field(default_factory=dict)  # name → number of weights, of every linear

    @property
    def choices(self) -> dict[str, str]:
        """Name → "w4a4" | "w4a16" of every linear that is quantized."""
        return {name: unit.kind for unit in self.units for name in unit.names}

    def of_block(self, block: str) -> list[Unit]:
        return [unit for unit in self.units if unit.block == block]

    def share(self, *kinds: str) -> float:
        """The part of all weights of linears that has one of these kinds."""
        chosen = sum(self.weights[name] for name, kind in self.choices.items() if kind in kinds)
        return chosen / max(sum(self.weights.values()), 1)

    def table(self) -> str:
        """What becomes of how many linears and weights, as text."""
        outcome = {name: "16 bit: " + reason for name, reason in self.kept.items()} | self.choices
        linears, weights = Counter(outcome.values()), Counter()
        for name, what in outcome.items():
            weights[what] += self.weights[name]
        rows = [f"{'linears':>8} {'weights':>8}  what"]
        for what in sorted(linears, key=lambda what: (what.startswith("16 bit"), what)):
            rows.append(f"{linears[what]:>8} {weights[what] / 1e6:>7.1f}M  {what}")
        return "\n".join(rows)


def plan(model: nn.Module, kind: str = "w4a4", rules: Mapping[str, str] | None = None) -> Plan:
    """Decide for every linear and 1×1 convolution of `model`.

    kind: what linears in the repeated blocks become, "w4a4" or "w4a16". rules: glob on full module names → "w4a4",
    "w4a16" or "keep"; applied in order, so a later rule overrides an earlier one.
    """
    if kind not in ("w4a4", "w4a16"):
        raise NunchakuError(f"kind: expected 'w4a4' or 'w4a16', got {kind!r}")
    _check_model(model)
    pattern = pattern_of(model)
    linears = linears_in(model)
    if not linears:
        raise NunchakuError(f"{type(model).__name__}: there is no linear or 1×1 convolution to quantize")
    blocks = blocks_of(model, pattern)
    chosen, kept = _choose(linears, blocks, pattern, kind)
    _apply_rules(rules or {}, linears, chosen, kept)
    out = Plan(blocks=tuple(blocks), weights={name: module.weight.numel() for name, module in linears.items()})
    out.kept = {name: kept[name] for name in linears if name not in chosen} | _unusable(model)
    out.weights |= {name: model.get_submodule(name).weight.numel() for name in out.kept}
    out.kept |= _aliases(model, linears)
    for name, block in blocks.items():
        out.units += _units_of_block(name, block, chosen, pattern)
    inside = out.choices
    out.units += [Unit((name,), chosen[name]) for name in linears if name in chosen and name not in inside]
    return out


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"{type(model).__name__}: {name}"
        if getattr(module, "is_nunchaku_quantized", False):
            raise NunchakuError(f"{where} is already quantized; dequantize the model or load the 16-bit one")
        if hasattr(module, "lora_A"):
            raise NunchakuError(f"{where} carries a LoRA; unload or fuse it first, it can be loaded again afterwards")
        if getattr(module, "fused_projections", False):
            raise NunchakuError(f"{where} has fused projections; call unfuse_qkv_projections() first")


def _choose(
    linears: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module], pattern: Pattern, kind: str
) -> tuple[dict[str, str], dict[str, str]]:
    """(name → kind, name → reason to keep) by the pattern alone."""
    chosen: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, linear in linears.items():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        reason = OUTSIDE if block is None else _reason_to_keep(name[len(block) + 1 :], linear, pattern)
        if reason:
            kept[name] = reason
        else:
            chosen[name] = "w4a16" if matches(name[len(block) + 1 :], pattern.modulation) else kind
    return chosen, kept


def _reason_to_keep(name: str, linear: nn.Module, pattern: Pattern) -> str | None:
    n, k = shape_of(linear)
    if k < MIN_K or n < MIN_N:
        return f"small: fewer than {MIN_K} inputs or {MIN_N} outputs"
    return next((reason for glob, reason in pattern.keep if fnmatchcase(name, glob)), None)


def _unusable(model: nn.Module) -> dict[str, str]:
    """Linears of a type that cannot be replaced, with the reason."""
    others = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name: f"is a {type(module).__name__}, not a plain nn.Linear"
        for name, module in others.items()
        if not is_linear(module)
    }


def _aliases(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Further names of linears that are registered more than once, with the reason why they keep the 16-bit module."""
    first = {id(linear): name for name, linear in linears.items()}
    return {
        name: f"is the same module as {first[id(module)]}, under which it is quantized"
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in first and first[id(module)] != name
    }


def _apply_rules(
    rules: Mapping[str, str], linears: Mapping[str, nn.Module], chosen: dict[str, str], kept: dict[str, str]
) -> None:
    for glob, choice in rules.items():
        if choice not in CHOICES:
            raise NunchakuError(f"rule {glob!r}: expected one of {', '.join(CHOICES)}, got {choice!r}")
        names = [name for name in linears if fnmatchcase(name, glob)]
        if not names:
            raise NunchakuError(f"rule {glob!r}: no linear or 1×1 convolution of the model has such a name")
        for name in names:
            kept.pop(name, None), chosen.pop(name, None)
            target = kept if choice == "keep" else chosen
            target[name] = f"rule {glob!r}" if choice == "keep" else choice


def _units_of_block(name: str, block: nn.Module, chosen: Mapping[str, str], pattern: Pattern) -> Iterator[Unit]:
    """Units of one block, in order of registration of their first member."""
    gelu = after_gelu(block, pattern)
    group_of = {member: group for group in shared_inputs(block, pattern) for member in group}
    done: set[str] = set()
    for linear in linears_in(block):
        kind = chosen.get(f"{name}.{linear}")
        if kind is None or linear in done:
            continue
        members = tuple(m for m in group_of.get(linear, (linear,)) if chosen.get(f"{name}.{m}") == kind)
        done.update(members)
        full = tuple(f"{name}.{member}" for member in members)
        yield from _units_of_group(full, kind, name, linear, linear in gelu, block, pattern)


def _units_of_group(
    names: tuple[str, ...], kind: str, block_name: str, linear: str, gelu: bool, block: nn.Module, pattern: Pattern
) -> Iterator[Unit]:
    """One unit; or one for each K-part, where the activations are quantized and the parts differ in nature."""
    parts = _parts_of(linear, block, pattern) if kind == "w4a4" and len(names) == 1 else None
    if parts is None:
        yield Unit(names, kind, gelu and kind == "w4a4", block_name)
    for k0, k1, part_gelu in parts or ():
        yield Unit(names, kind, part_gelu, block_name, (k0, k1))


def _parts_of(linear: str, block: nn.Module, pattern: Pattern) -> Parts | None:
    split = next((split for glob, split in pattern.parts if fnmatchcase(linear, glob)), None)
    module = block.get_submodule(linear)
    return split(module, block) if split and isinstance(module, nn.Linear) else None

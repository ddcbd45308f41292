"""What the `quantization_config` of a nunchaku_lite folder says, checked.

    {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16",
     "svdq_w4a4": {"precision": "int4" | "nvfp4", "group_size": 64 | 16, "rank": 32, "targets": ["…", …]},
     "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": ["…", …]},
     "patches": [{"type": "split_linear", "module": "….*.proj_out", "args": {"splits": ["out_features"]}}],
     "nunchaku_py": {"ranks": {target: rank}}}

`patches` is not diffusers': some folders hold linears in parts along K, `proj_out.linears.0`, `….1`, which targets
name so. `nunchaku_py` is ours: ranks without what pads them to the one that such a folder has for all."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from ..errors import NunchakuError
from .nunchaku.layouts import RANKS
from .nunchaku.linears import AWQ_GROUP, GROUPS

QUANT_METHOD = "nunchaku_lite"
OWN = "nunchaku_py"
W4A4, W4A16 = "svdq_w4a4", "awq_w4a16"
PARTS = "linears"
OUT = "out_features"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What diffusers' kernels take as arguments, and its configuration cannot say: a file that does means something else.
_OTHER_MEANING = ("act_unsigned", "unsigned", "shift")
Size = int | Literal["out_features"]


@dataclass(frozen=True)
class Target:
    """A packed linear: its name in the file, and the module, or K-part of it, that it is."""

    name: str
    kind: Literal["w4a4", "w4a16"]
    module: str
    part: int | None = None

    @property
    def prefix(self) -> str:
        return self.module if self.part is None else f"{self.module}.parts.{self.part}"


@dataclass(frozen=True)
class Split:
    """Modules that are held in parts: the inputs of all but the last, which has the rest."""

    module: str
    sizes: tuple[Size, ...]

    def ranges(self, n: int, k: int) -> list[tuple[int, int]] | None:
        """None where a linear (n, k) cannot be cut so."""
        edges = [0]
        for size in self.sizes:
            edges.append(edges[-1] + (n if size == OUT else size))
        edges += [k] if edges[-1] < k else []
        fits = edges[-1] == k and all(a < b for a, b in zip(edges, edges[1:], strict=False))
        return list(zip(edges, edges[1:], strict=False)) if fits else None


@dataclass(frozen=True)
class Description:
    """format and rank: of the W4A4 targets, all of which have one."""

    dtype: torch.dtype
    format: str
    rank: int
    targets: tuple[Target, ...]
    splits: tuple[Split, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def group(self) -> int:
        return GROUPS[self.format]

    def split_of(self, module: str) -> Split | None:
        return next((split for split in self.splits if fnmatchcase(module, split.module)), None)

    @staticmethod
    def from_json(data: Mapping[str, Any], source: str) -> Description:
        try:
            return _described(data)
        except NunchakuError as error:
            raise NunchakuError(f"{source}: quantization_config: {error}") from error


def _described(data: Mapping[str, Any]) -> Description:
    dtype = data.get("compute_dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise NunchakuError(f"compute_dtype is {dtype!r}, expected one of {sorted(DTYPES)}")
    w4a4, w4a16 = (_section(data, name) for name in (W4A4, W4A16))
    if w4a4 is None and w4a16 is None:
        raise NunchakuError(f"expected {W4A4!r} or {W4A16!r}, a table with 'targets'")
    splits = _splits(data.get("patches"))
    targets = [*_targets(w4a4, "w4a4", splits), *_targets(w4a16, "w4a16", splits)]
    names = [target.name for target in targets]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise NunchakuError(f"target {twice[0]!r} is named twice")
    fmt, rank = _w4a4_format(w4a4) if w4a4 else ("int4", 0)
    if w4a16 and (w4a16.get("precision"), w4a16.get("group_size")) != ("int4", AWQ_GROUP):
        raise NunchakuError(f"{W4A16}: expected precision 'int4' and group_size {AWQ_GROUP}, got "
                            f"{w4a16.get('precision')!r} and {w4a16.get('group_size')!r}")
    return Description(DTYPES[dtype], fmt, rank, tuple(targets), splits, _ranks(data.get(OWN), rank))


def _section(data: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    found = data.get(name)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise NunchakuError(f"{name}: expected a table, got {found!r}")
    targets = found.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise NunchakuError(f"{name}: targets: expected a list of module names")
    meant = [key for key in _OTHER_MEANING if found.get(key)]
    if meant:
        raise NunchakuError(f"{name}: {meant[0]} is {found[meant[0]]!r}, which no such file is known to say")
    return found


def _w4a4_format(section: Mapping[str, Any]) -> tuple[str, int]:
    fmt, group, rank = (section.get(name) for name in ("precision", "group_size", "rank"))
    if fmt not in GROUPS or group != GROUPS[fmt]:
        raise NunchakuError(f"{W4A4}: expected precision 'int4' with group_size 64 or 'nvfp4' with 16, got {fmt!r} "
                            f"with {group!r}")
    if type(rank) is not int or rank < 0 or rank % RANKS:
        raise NunchakuError(f"{W4A4}: rank: expected a multiple of {RANKS}, or 0, got {rank!r}")
    return fmt, rank


def _targets(section: Mapping[str, Any] | None, kind: Literal["w4a4", "w4a16"], splits: tuple[Split, ...]
             ) -> list[Target]:
    return [_target(name, kind, splits) for name in (section or {}).get("targets", ())]


def _target(name: str, kind: Literal["w4a4", "w4a16"], splits: tuple[Split, ...]) -> Target:
    module, _, part = name.rpartition(f".{PARTS}.")
    if part.isdecimal() and any(fnmatchcase(module, split.module) for split in splits):
        return Target(name, kind, module, int(part))
    return Target(name, kind, name)


def _splits(patches: Any) -> tuple[Split, ...]:
    if not isinstance(patches, list | None):
        raise NunchakuError(f"patches: expected a list, got {patches!r}")
    return tuple(map(_split, patches or ()))


def _split(patch: Any) -> Split:
    kind = patch.get("type") if isinstance(patch, Mapping) else patch
    if kind != "split_linear":
        raise NunchakuError(f"patches: {kind!r} is unknown to this release, and without it the model would be another")
    module, arguments = patch.get("module"), patch.get("args")
    sizes = arguments.get("splits") if isinstance(arguments, Mapping) else None
    good = isinstance(sizes, list) and sizes and all(size == OUT or type(size) is int and size > 0 for size in sizes)
    if not isinstance(module, str) or not good or set(arguments) != {"splits"}:
        raise NunchakuError("patches: split_linear: expected a 'module' and 'args' with 'splits', a list of whole "
                            f"numbers and {OUT!r}, got {dict(patch)}")
    return Split(module, tuple(sizes))


def _ranks(own: Any, rank: int) -> Mapping[str, int]:
    ranks = {} if own is None else own.get("ranks", {}) if isinstance(own, Mapping) else None
    good = isinstance(ranks, Mapping) and all(type(r) is int and 0 <= r <= rank for r in ranks.values())
    if not good:
        raise NunchakuError(f"{OWN}: ranks: expected a table of whole numbers from 0 to {rank}")
    return ranks

"""Fused adapters that stay when their layers are taken off: they become rank that the linears store."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import NunchakuError
from ..module_tools import is_offloaded
from .branch import Columns, alike, branches_of, fold, present


@torch.no_grad()
def keep(sites: Sequence[Any]) -> None:
    """Let sites store the adapters that they hold. Those that share an input go on sharing it, if no other of them
    holds adapters that are not to stay."""
    if any(map(is_offloaded, sites)):  # accelerate would not find the tensors again that are stored anew
        raise NunchakuError("unload: fused adapters become part of the model, whose tensors are offloaded; remove the "
                            "offloading before, or unfuse")
    left = dict.fromkeys(sites)
    while left:
        site = next(iter(left))
        members = alike(site)
        others = [member for member in members if member not in left and member.adapters]
        group = [site] if others else members
        _store(group)
        for member in (*group, *others[:1]):
            left.pop(member, None)
            fold(member)


def _store(members: Sequence[Any]) -> None:
    with present(members):
        down, branches = branches_of(members, padded=False)
        wide = [_spread(up, columns, down.shape[0]) for up, columns in branches]
        for member, up in zip(members, wide, strict=True):
            member.adapters = ()
            member.site = replace(member.site, rank=down.shape[0])
            member.set_branch(None, None, None, "")
            member.set_tensor("down", down.clone())  # files do not share tensors
            member.set_tensor("up", up)


def _spread(up: Tensor, columns: Columns, ranks: int) -> Tensor:
    """up over all ranks of the group, zero where the site takes none."""
    wide, taken = up.new_zeros(up.shape[0], ranks), 0
    for start, stop in columns:
        wide[:, start:stop] += up[:, taken:taken + stop - start]
        taken += stop - start
    return wide

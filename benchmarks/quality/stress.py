"""Makes the activations of a small model as hard to quantize as a large model's, without changing what it computes.

Where the input x of some linears is made by something linear, A·x can be made instead, and the linears that read it
get W·A⁻¹. Two kinds of A, both fixed by a seed and by what a few forwards of the model show, never by a result:

* channels: A = diag(c), so that some channels reach STRENGTH times the median channel. Wherever a norm, a modulation, a
  linear or the value half of a GEGLU makes x.
* directions: inside a group of 64 channels of an attention head, the direction in which one token stands out most
  from the others is stretched and then spread over all 64 channels by a random rotation. No factor per channel undoes
  that. Only attention allows it, because it mixes tokens and not channels, and only every second group gets it: the
  others get channels.

What follows a GELU is left as it is: nothing commutes with a GELU.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nunchaku_py.calibrate import State
from nunchaku_py.demo.measure import outputs

STRENGTH = 25.0  # absmax of the largest channel over the median channel's: 20 to 30 in FLUX.1 and SDXL
WEAKEST = 0.5  # the other chosen channels reach between this part of STRENGTH and all of it
SHARE = 0.025  # of the channels
ORDINARY = (0.5, 2.0)  # chosen are channels whose absmax is in this range of the median: no dead one is blown up
GROUP = 64
TOKEN_STRENGTH = 16.0  # norm of the token that stands out, inside its group, over the median token's
RIDGE = 0.1  # of the mean energy, when looking for its direction: none in which hardly anything happens
Write = Callable[[nn.Module, Tensor], None]


@dataclass(frozen=True)
class Place:
    """One input of `width` channels; every writer makes some of its tokens, every reader multiplies some of them."""

    writers: tuple[tuple[str, Write], ...]
    readers: tuple[str, ...]  # these channels are the first ones that the linears read
    width: int
    mixes: bool = False  # made by attention: channels may be mixed, and each reader has tokens of its own

    @property
    def measured(self) -> tuple[str, ...]:
        """Readers that together see every token once."""
        return self.readers if self.mixes else self.readers[:1]

    def apply(self, model: nn.Module, change: Tensor) -> None:
        """x → change·x (C,C), in place."""
        undo = torch.linalg.inv(change)
        for name, write in self.writers:
            write(model.get_submodule(name), change)
        for name in self.readers:
            columns = model.get_submodule(name).weight[:, :self.width]
            columns.copy_(columns.double() @ undo)


# ----------------------------------------------------------------------------------------------- who can write
def rows(linear: nn.Module, change: Tensor) -> None:
    """The first rows of a linear's weight and bias."""
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            part = parameter[:len(change)]
            part.copy_(change @ part.double())


def norm(module: nn.Module, change: Tensor) -> None:
    """Gain and bias of a LayerNorm."""
    factors = change.diagonal()
    module.weight.copy_(factors * module.weight.double())
    module.bias.copy_(factors * module.bias.double())


def modulation(chunk: int) -> Write:
    """LN(x)·(1 + scale) + shift, both made by one linear: shift is its chunk number `chunk`, scale the next."""
    def write(linear: nn.Module, change: Tensor) -> None:
        factors, size = change.diagonal(), len(change)
        shift, scale = (slice(i * size, (i + 1) * size) for i in (chunk, chunk + 1))
        for part in (shift, scale):
            linear.weight[part] = (factors[:, None] * linear.weight[part].double()).to(linear.weight.dtype)
        linear.bias[shift] = (factors * linear.bias[shift].double()).to(linear.bias.dtype)
        linear.bias[scale] = (factors * (1 + linear.bias[scale].double()) - 1).to(linear.bias.dtype)
    return write


# ------------------------------------------------------------------------------------------- where it is possible
def places_of(model: nn.Module) -> list[Place]:
    """Every place of a FLUX transformer or of an SDXL UNet."""
    of_class = {"FluxTransformerBlock": _flux_double, "FluxSingleTransformerBlock": _flux_single,
                "BasicTransformerBlock": _unet_block}
    found = [place for name, module in model.named_modules() if type(module).__name__ in of_class
             for place in of_class[type(module).__name__](name, module)]
    if not found:
        raise ValueError(f"{type(model).__name__}: no block of it is known here")
    return found


def _place(name: str, block: nn.Module, writers: Mapping[str, Write], readers: Sequence[str], mixes: bool = False,
           width: int | None = None) -> Place:
    """Names are relative to the block. width: where it is less than what the readers read."""
    return Place(tuple((f"{name}.{writer}", write) for writer, write in writers.items()),
                 tuple(f"{name}.{reader}" for reader in readers),
                 width or block.get_submodule(readers[0]).in_features, mixes)


def _flux_double(name: str, block: nn.Module) -> Iterator[Place]:
    for kind, projections, feed in (("norm1", ("to_q", "to_k", "to_v"), "ff"),
                                    ("norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "ff_context")):
        linear = f"{kind}.linear"
        yield _place(name, block, {linear: modulation(0)}, [f"attn.{projection}" for projection in projections])
        yield _place(name, block, {linear: modulation(3)}, [f"{feed}.net.0.proj"])
    yield _place(name, block, {"attn.to_v": rows, "attn.add_v_proj": rows}, ["attn.to_out.0", "attn.to_add_out"], True)


def _flux_single(name: str, block: nn.Module) -> Iterator[Place]:
    yield _place(name, block, {"norm.linear": modulation(0)}, ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"])
    yield _place(name, block, {"attn.to_v": rows}, ["proj_out"], True,  # proj_out reads cat(attention, mlp)
                 width=block.attn.to_v.out_features)


def _unet_block(name: str, block: nn.Module) -> Iterator[Place]:
    yield _place(name, block, {"norm1": norm}, ["attn1.to_q", "attn1.to_k", "attn1.to_v"])
    yield _place(name, block, {"norm2": norm}, ["attn2.to_q"])
    yield _place(name, block, {"norm3": norm}, ["ff.net.0.proj"])
    for attention in ("attn1", "attn2"):
        yield _place(name, block, {f"{attention}.to_v": rows}, [f"{attention}.to_out.0"], True)
    yield _place(name, block, {"ff.net.0.proj": rows}, ["ff.net.2"])  # of a GEGLU's rows the first half are the values


# ------------------------------------------------------------------------------------------------- what is done
@torch.no_grad()
def stress(model: nn.Module, states: Sequence[State], seed: int = 0) -> None:
    """Change an fp32 model in place; its function stays. states: a few typical forwards."""
    places = places_of(model)
    seen = inputs(model, states, places)
    generator = torch.Generator().manual_seed(seed)
    for place in places:
        parts = [seen[name].double() for name in place.measured]
        place.apply(model, change_of(parts, place.mixes, generator))


def change_of(parts: Sequence[Tensor], mixes: bool, generator: torch.Generator) -> Tensor:
    """A (C,C) for channels of which some tokens are known, (T,C) for each linear that reads tokens of its own."""
    like = parts[0]
    change, free = torch.eye(like.shape[1], dtype=like.dtype), torch.ones(like.shape[1], dtype=torch.bool)
    for first in range(GROUP, like.shape[1] + 1 - GROUP, 2 * GROUP) if mixes else ():
        group = slice(first, first + GROUP)
        change[group, group] = direction(torch.cat([x[:, group] for x in parts]), generator)
        free[group] = False
    return torch.diag(channel_factors([x @ change.T for x in parts], free, generator)) @ change


def channel_factors(parts: Sequence[Tensor], free: Tensor, generator: torch.Generator) -> Tensor:
    """c (C): 1, but for a few of the `free` channels; the first of them reaches STRENGTH, on average over the parts."""
    tops = torch.stack([x.abs().amax(0) for x in parts])
    usual = (tops / tops[:, free].median(1, keepdim=True).values).mean(0)
    ordinary = ((usual >= ORDINARY[0]) & (usual <= ORDINARY[1]) & free).nonzero().flatten()
    chosen = ordinary[torch.randperm(len(ordinary), generator=generator)[:max(2, round(SHARE * len(free)))]]
    middle = tops.index_fill(1, chosen, torch.inf).median(1, keepdim=True).values  # as it will be then
    reached = STRENGTH * WEAKEST ** torch.rand(len(chosen), generator=generator, dtype=usual.dtype)
    reached[:1] = STRENGTH
    return torch.ones_like(usual).index_put((chosen,), reached / (tops / middle).mean(0)[chosen])


def direction(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rotation · stretch of one direction, (C,C)."""
    size = x.shape[1]
    energy = x.T @ x / len(x)
    energy += RIDGE * energy.diagonal().mean() * torch.eye(size, dtype=x.dtype)
    away = torch.linalg.solve(energy, x.T).T  # (T,C): in this direction each token stands out most
    token = (away * x).sum(1).argmax()
    line = away[token] / away[token].norm()
    factor = max(1.0, (TOKEN_STRENGTH * x.norm(dim=1).median() / (x @ line).abs().max()).item())
    stretch = torch.eye(size, dtype=x.dtype) + (factor - 1) * torch.outer(line, line)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=x.dtype))
    return rotation @ stretch


# ----------------------------------------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Hardness:
    """Of one input of a linear: how far its largest channel, and its largest token inside a group, stand out."""

    linear: str
    channels: float  # absmax of the largest channel over the median channel's
    tokens: float  # in the group where it is most: norm of the largest token over the median token's


@torch.no_grad()
def hardness(model: nn.Module, states: Sequence[State]) -> list[Hardness]:
    """Of every input that `stress` concerns."""
    return [_hardness(name, x) for name, x in inputs(model, states, places_of(model)).items()]


def inputs(model: nn.Module, states: Sequence[State], places: Iterable[Place]) -> dict[str, Tensor]:
    """Linear → x (T,C) of the place it reads, over all states; of the linears that are `measured`."""
    widths = {name: place.width for place in places for name in place.measured}
    parts: dict[str, list[Tensor]] = {name: [] for name in widths}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: parts[name].append(args[0].detach()[..., :widths[name]].flatten(0, -2).float())
    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in widths]
    try:
        outputs(model, states)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(found) for name, found in parts.items()}


def _hardness(name: str, x: Tensor) -> Hardness:
    top = x.abs().amax(0)
    sizes = x[:, :x.shape[1] // GROUP * GROUP].unflatten(1, (-1, GROUP)).norm(dim=2)  # (T, groups)
    usual = sizes.median(0).values
    alive = usual > 1e-3 * usual.max()  # a group that is next to nothing for most tokens says nothing
    return Hardness(name, (top.max() / top.median()).item(), (sizes.amax(0) / usual)[alive].max().item())

"""What benchmarks.quality.pictures measures: methods, formats, ranks, modes and seeds, and where it makes pictures."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.quality.peer_layers import Peer, sdnq
from nunchaku_py.methods.fit import absmax, fit
from nunchaku_py.methods.gptq import gptq
from nunchaku_py.methods.lowrank import lowrank
from nunchaku_py.methods.smooth import smooth
from nunchaku_py.methods.work import Options, Step
from nunchaku_py.recipes import RECIPES, Recipe
from nunchaku_py.site import MODES

ONCE = Options(rounds=0)  # the branch is the truncated SVD of the weight, without alternation
# Name → (steps, options): each line from "smooth+lowrank" on is the one before and one thing more; "svdquant" is the
# recipe that the package ships, which refits the branch in the end.
METHODS: dict[str, tuple[tuple[Step, ...], Options]] = {
    "rtn": ((absmax,), Options()),
    "smooth": ((smooth, absmax), Options()),
    "lowrank": ((lowrank, absmax), ONCE),
    "smooth+lowrank": ((smooth, lowrank, absmax), ONCE),
    "+rounds": ((smooth, lowrank, absmax), Options()),
    "+fit": ((smooth, lowrank, fit), Options()),
    "+gptq": ((smooth, lowrank, fit, gptq), Options()),
    "svdquant": ((), Options()),
}
SIXTEEN, EXACT = "16 bit", "fp32"  # the model itself, and the same without 16-bit rounding
FREE, FREE_RANK = "svdquant, data-free", 32  # the recipe as the peers work: it sees the weights alone
FORMATS = ("int4", "nvfp4")
RANKS, RANK = (0, 8, 16, 32), 16
JUDGED = ("tiny-flux", "stressed")  # where the bars on errors are set
# Rank 32 is a fifth of the bytes of layers as narrow as these; the leaner settings are nearer to what sdnq is used for.
PEERS: tuple[Peer, ...] = (
    sdnq("svd 32, default", use_svd=True, svd_rank=32),
    sdnq("svd 32, group 64, bf16 scales", use_svd=True, svd_rank=32, dequantize_fp32=False, group_size=64),
    sdnq("svd 16, group 64, bf16 scales", use_svd=True, svd_rank=16, dequantize_fp32=False, group_size=64),
    sdnq("svd 16, Hadamard, bf16 scales", use_svd=True, svd_rank=16, dequantize_fp32=False, use_hadamard=True),
)
SHOWN_PEERS = (0, 2)  # of these pictures are made


def recipe_of(method: str, fmt: str) -> Recipe:
    if method in ("svdquant", FREE):
        return RECIPES[f"svdquant-{fmt}"]
    steps, options = METHODS[method]
    return Recipe(f"{method}-{fmt}", fmt, "w4a4", 0, steps, (absmax,), options)


@dataclass(frozen=True)
class Build:
    """One quantized model. modes: mode → whether pictures are made in it."""

    method: str
    format: str = ""
    rank: int = 0
    seed: int = 0
    modes: dict[str, bool] = field(default_factory=lambda: {"a16": True}, hash=False)
    peer: Peer | None = None

    @property
    def settings(self) -> str:
        return self.peer.settings if self.peer else ""

    def __str__(self) -> str:
        named = [self.settings, self.format, f"rank {self.rank}" if self.rank else "", f"seed {self.seed}"]
        return ", ".join([self.method, *filter(None, named)])


@dataclass(frozen=True)
class Extent:
    """How much is measured. `seeds` calibrations where the bars on errors are set, else one."""

    prompts: int = 256
    steps: int = 10  # of the trajectory, on which errors are measured
    seeds: int = 3
    formats: tuple[str, ...] = FORMATS
    ranks: tuple[int, ...] = RANKS
    methods: tuple[str, ...] = tuple(METHODS)
    peers: int = len(PEERS)


FULL = Extent()
QUICK = Extent(prompts=16, steps=3, seeds=1, formats=("int4",), ranks=(RANK,), methods=("rtn", "smooth", "svdquant"),
               peers=1)


def builds(extent: Extent, model: str, stress: str) -> Iterator[Build]:
    """Everything that is measured of one model, the first seed first."""
    judged = (model, stress) == JUDGED
    yield Build(SIXTEEN)
    yield Build(EXACT, modes={"a16": False})
    for i, peer in enumerate(PEERS[:extent.peers]):
        yield Build(peer.method, modes={"a16": i in SHOWN_PEERS}, peer=peer)
    if extent.peers:
        yield Build(FREE, "int4", FREE_RANK, modes={"a16": True, "a8": False})  # pictures in the peers' mode
    for seed in range(extent.seeds if judged else 1):
        for fmt in extent.formats:
            for method, rank in ladder(extent):
                if seed == 0 or method != "rtn":  # which sees no data
                    modes = {mode: seed == 0 and pictured(method, fmt, rank, mode, stress) for mode in MODES}
                    yield Build(method, fmt, rank, seed, modes)


def ladder(extent: Extent) -> Iterator[tuple[str, int]]:
    """(method, rank): every method at one rank, the shipped one at every rank."""
    for method in extent.methods:
        if method == "svdquant":
            yield from ((method, rank) for rank in extent.ranks)
        else:
            yield method, 0 if method in ("rtn", "smooth") else RANK


def pictured(method: str, fmt: str, rank: int, mode: str, stress: str) -> bool:
    """Pictures take as long as all else of a dozen models, so they are made of a few."""
    if method == "svdquant":
        every = rank == RANK and (fmt == "int4" or mode == "a4")
        return every or (fmt, rank) == ("int4", 32) and mode != "a4"  # what stands against sdnq
    return fmt == "int4" and mode == "a4" and (method == "rtn" or (method, stress) == ("smooth", "stressed"))

"""What is asked of the quantizer, computed from the rows of benchmarks.quality.pictures."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.picture_cells import JUDGED, RANK, RANKS, SIXTEEN
from benchmarks.quality.picture_rows import Row

WHERE = dict(zip(("model", "stress"), JUDGED, strict=True))
SEEDS = 3  # calibrations that a bar on errors wants to have seen
OVER_RTN, OVER_SMOOTH, A8_OVER_A4 = 0.4, 0.75, 0.75
AGREEMENT_LOSS, PSNR_GAIN = 0.02, 3.0
AGREEMENT_FLOOR = 0.5  # below it the 16-bit model draws too little of what is said for others to lose


@dataclass(frozen=True)
class Bar:
    """met None: not decided, as rows are missing or the 16-bit model draws too badly to be compared with."""

    asked: str
    found: str
    met: bool | None


class Table:
    """Rows by what they are of."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def pick(self, **wanted: object) -> list[Row]:
        """Rows with these values that have an error."""
        return [row for row in self.rows if row.error != "" and
                all(getattr(row, name) == value for name, value in wanted.items())]

    def errors(self, **wanted: object) -> dict[int, float]:
        """Seed → error."""
        return {row.seed: row.error for row in self.pick(**wanted)}

    def looks(self, **wanted: object) -> Row | None:
        """The row with pictures."""
        return next((row for row in self.pick(**wanted) if row.psnr != ""), None)

    def subjects(self) -> list[tuple[str, str]]:
        """(model, stress)"""
        return list(dict.fromkeys((row.model, row.stress) for row in self.rows))

    def peers(self, model: str, stress: str) -> list[Row]:
        return [row for row in self.pick(model=model, stress=stress) if row.settings]

    def fitting(self, peer: Row, fmt: str, mode: str, method: str = "svdquant") -> Row | None:
        """Ours of the largest rank that needs no more bytes than the peer, with pictures if there are some."""
        same = {"model": peer.model, "stress": peer.stress, "method": method, "format": fmt, "mode": mode}
        found = [row for row in self.pick(**same) if row.bytes <= peer.bytes]
        return max(found, key=lambda row: (row.rank, row.psnr != "", -row.seed), default=None)


def bars(table: Table) -> list[Bar]:
    return [*_over_baselines(table), *_ranks(table), *_steps(table), *_modes_and_formats(table), *_looks(table),
            *_stress(table), *_sdnq(table)]


def ours(table: Table, **other: object) -> dict[int, float]:
    """Errors by seed of the shipped recipe where the bars are set, or of what differs from it."""
    return table.errors(**{**WHERE, "method": "svdquant", "format": "int4", "rank": RANK, "mode": "a4", **other})


def at_most(asked: str, limit: float, found: Mapping[int, float], base: Mapping[int, float]) -> Bar:
    """found ≤ limit·base for each seed. A base without calibration has only one, which serves for all."""
    return _compared(asked, found, base, lambda ratio: ratio <= limit)


def below(asked: str, found: Mapping[int, float], base: Mapping[int, float]) -> Bar:
    """found < base for each seed: what changes nothing does not meet it."""
    return _compared(asked, found, base, lambda ratio: ratio < 1)


def _compared(asked: str, found: Mapping[int, float], base: Mapping[int, float], met: Callable[[float], bool]) -> Bar:
    if len(base) == 1:
        base = dict.fromkeys(found, next(iter(base.values())))
    ratios = [found[seed] / base[seed] for seed in sorted(found.keys() & base.keys())]
    if len(ratios) < SEEDS:
        return Bar(asked, f"{len(ratios)} seeds measured", None)
    return Bar(asked, f"{statistics.mean(ratios):.3f} (worst {max(ratios):.3f}, {len(ratios)} seeds)",
               met(max(ratios)))


def _over_baselines(table: Table) -> Iterator[Bar]:
    for rank in (rank for rank in RANKS if 0 < rank <= RANK):
        for method, limit in (("rtn", OVER_RTN), ("smooth", OVER_SMOOTH)):
            yield at_most(f"SVDQuant rank {rank} ≤ {limit} × {method}", limit, ours(table, rank=rank),
                          ours(table, method=method, rank=0))


def _ranks(table: Table) -> Iterator[Bar]:
    for less, more in zip(RANKS, RANKS[1:], strict=False):
        yield below(f"rank {more} below rank {less}", ours(table, rank=more), ours(table, rank=less))


def _steps(table: Table) -> Iterator[Bar]:
    for before, after, what in (("smooth+lowrank", "+rounds", "alternating rounds lower it"),
                                ("+fit", "+gptq", "GPTQ lowers it")):
        yield below(what, ours(table, method=after), ours(table, method=before))


def _modes_and_formats(table: Table) -> Iterator[Bar]:
    yield at_most(f"a8 ≤ {A8_OVER_A4} × a4", A8_OVER_A4, ours(table, mode="a8"), ours(table))
    yield at_most("NVFP4 ≤ INT4", 1.0, ours(table, format="nvfp4"), ours(table))


def _looks(table: Table) -> Iterator[Bar]:
    found = table.looks(**WHERE, method="svdquant", format="int4", rank=RANK, mode="a4")
    sixteen, rtn = table.looks(**WHERE, method=SIXTEEN), table.looks(**WHERE, method="rtn", format="int4", mode="a4")
    asked = f"agreement within {100 * AGREEMENT_LOSS:.0f} points of 16 bit", f"PSNR ≥ rounding's + {PSNR_GAIN:.0f} dB"
    if found is None or sixteen is None or rtn is None:
        yield from (Bar(one, "not measured", None) for one in asked)
        return
    yield _agrees(asked[0], found, sixteen)
    yield Bar(asked[1], f"{found.psnr:.2f} dB beside {rtn.psnr:.2f} dB", found.psnr >= rtn.psnr + PSNR_GAIN)


def _agrees(asked: str, row: Row, base: Row) -> Bar:
    """Prompt agreement, against a base that draws what is said at least now and then."""
    found = f"{percent(row.agreement)} beside {percent(base.agreement)}, {row.prompts} prompts"
    if base.agreement < AGREEMENT_FLOOR:
        return Bar(asked, f"{found}; nothing to lose below {percent(AGREEMENT_FLOOR)}", None)
    return Bar(asked, found, row.agreement >= base.agreement - AGREEMENT_LOSS)


def _stress(table: Table) -> Iterator[Bar]:
    """Stress is no weakness of the 16-bit model."""
    for model in dict.fromkeys(model for model, _ in table.subjects()):
        plain, hard = (table.looks(model=model, stress=stress, method=SIXTEEN) for stress in ("plain", "stressed"))
        if plain is not None and hard is not None:
            asked = f"{model}, 16 bit: agreement within {100 * AGREEMENT_LOSS:.0f} points when stressed"
            yield _agrees(asked, hard, plain)


def _sdnq(table: Table) -> Iterator[Bar]:
    for model, stress in table.subjects():
        for peer in table.peers(model, stress):
            yield against(table, peer)


def against(table: Table, peer: Row) -> Bar:
    """INT4 at equal or fewer bytes: lower error and higher PSNR, in a16 and in a8."""
    asked = f"{peer.model}, {peer.stress}: INT4 a16 and a8 better than sdnq {peer.settings} at no more bytes"
    fits = {mode: table.fitting(peer, "int4", mode) for mode in ("a16", "a8")}
    if None in fits.values():
        return Bar(asked, "no rank that was measured is small enough", None)
    better, said = [], []
    for mode, row in fits.items():
        better.append(row.error < peer.error)
        said.append(f"{mode} {percent(row.error)}")
        if row.psnr != "" and peer.psnr != "":
            better.append(row.psnr > peer.psnr)
            said[-1] += f", {row.psnr:.1f} dB"
    theirs = percent(peer.error) + (f", {peer.psnr:.1f} dB" if peer.psnr != "" else "")
    return Bar(asked, f"rank {fits['a16'].rank}: {'; '.join(said)}; sdnq {theirs}", all(better))


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def spread(errors: Sequence[float]) -> str:
    """Mean and worst."""
    if not errors:
        return "–"
    worst = f" ({100 * max(errors):.2f})" if len(errors) > 1 else ""
    return f"{100 * statistics.mean(errors):.2f}{worst}"


def verdict(found: Sequence[Bar]) -> str:
    met, missed, open_ = (sum(bar.met is value for bar in found) for value in (True, False, None))
    return f"{met} of {len(found)} bars met, {missed} missed, {open_} not decided."

"""What a CSV of gpu_ops says of the bars that mode a8 is to reach on Hopper: `python -m benchmarks.gpu_bars ops.csv`.

Everything is computed from the rows of the file. A bar without a measurement is open, and so are all bars of a run that
was not made on such a GPU.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import BASELINE
from benchmarks.rows import read
from benchmarks.timing import Spread

CAPABILITY = "9.0"
LEAST_ROWS = 4096  # tokens from which on the bars hold: below, a launch does not fill the GPU
OVER_BF16, OVER_BF16_SMALL, SMALL = 1.5, 1.3, ("3072", "3072")  # SMALL: N, K
FOUR_BITS = 0.85  # of the speed with INT8 weights
TRITON_OVER_BF16 = 1.2
BY_TRITON = ", by triton"
Line = dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """A ratio, from round to round, beside its bar."""

    what: str
    ratio: Spread | None
    bar: float

    def __str__(self) -> str:
        bar = f"{self.what}, bar {self.bar:g}"
        if self.ratio is None:
            return f"{bar}: open, not measured"
        low, median, high = self.ratio.low, self.ratio.median, self.ratio.high
        close = ", within the spread" if low < self.bar <= high else ""
        return f"{bar}: {'met' if median >= self.bar else 'MISSED'} by {median:.3f} ({low:.3f}-{high:.3f}){close}"


def ratio(mine: Line | None, theirs: Line | None) -> Spread | None:
    """How many times as fast as the other, within rounds."""
    a, b = ([float(value) for value in (line or {}).get("rounds_ms", "").split()] for line in (mine, theirs))
    pairs = [y / x for x, y in zip(a, b, strict=False)]
    return Spread.of(pairs) if pairs else None


def verdicts(case: Sequence[Line]) -> Iterator[Verdict]:
    """Of one product's rows: mode a8 with INT8 weights against bf16, with 4 bits against INT8."""
    bf16 = next((line for line in case if line["contender"] == BASELINE), None)
    bar = OVER_BF16_SMALL if (case[0]["n"], case[0]["k"]) == SMALL else OVER_BF16
    for fmt in dict.fromkeys(line["format"] for line in case if line["mode"] == "a8"):
        held = {weights: _whole(case, fmt, weights) for weights in ("int8", "int4")}
        yield Verdict(f"a8 {fmt}, weights int8, over bf16", ratio(held["int8"], bf16), bar)
        yield Verdict(f"a8 {fmt}, weights int4 over int8", ratio(held["int4"], held["int8"]), FOUR_BITS)
        if any(BY_TRITON in line["contender"] and line["format"] == fmt for line in case if line["mode"] == "a8"):
            mine = _whole(case, fmt, "int8", by_triton=True)
            yield Verdict(f"a8 {fmt}{BY_TRITON}, weights int8, over bf16", ratio(mine, bf16), TRITON_OVER_BF16)


def _whole(case: Sequence[Line], fmt: str, weights: str, by_triton: bool = False) -> Line | None:
    """The row of a whole linear that really held its weights so."""
    return next((line for line in case if (line["mode"], line["format"], line["weights"]) == ("a8", fmt, weights)
                 and "input given" not in line["contender"] and (BY_TRITON in line["contender"]) == by_triton), None)


def summary(lines: Sequence[Line]) -> str:
    cases: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        cases.setdefault((line["shape"], line["m"], line["n"], line["k"]), []).append(line)
    return "\n".join([text for case in cases.values() for text in _of_case(case)])


def _of_case(case: Sequence[Line]) -> Iterator[str]:
    first = case[0]
    yield f"\n{first['shape']}, {first['m']}×{first['k']} → {first['n']}, {first['device']}"
    width = max(len(line["contender"]) for line in case)
    yield from (f"  {line['contender']:{width}}  {_figures(line)}" for line in case)
    if first["capability"] != CAPABILITY:
        yield f"  bars: open, they are of GPUs of compute capability {CAPABILITY}"
    elif int(first["m"]) < LEAST_ROWS:
        yield f"  bars: none below {LEAST_ROWS} rows"
    else:
        yield from (f"  {verdict}" for verdict in verdicts(case))


def _figures(line: Line) -> str:
    if not line["ms"]:
        return f"no figure: {line['note']}"
    part = f"{100 * float(line['int8_peak']):5.1f} % of INT8 peak" if line["int8_peak"] else ""
    speedup = (f"{float(line['speedup']):5.2f}x bf16 ({float(line['speedup_low']):.2f}-"
               f"{float(line['speedup_high']):.2f})" if line["speedup"] else "")
    error = f"error {100 * float(line['error']):.2f} %" if line["error"] else ""
    figures = [f"{float(line['ms']):8.4f} ms", f"{float(line['tops']):7.1f} TOPS", part, speedup, error, line["note"]]
    return "  ".join(filter(None, figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    print(summary(read(parser.parse_args().csv)))


if __name__ == "__main__":
    main()

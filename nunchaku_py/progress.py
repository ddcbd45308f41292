"""A progress bar for long work, whose time left follows from the cost of the work rather than from a count of items."""

import sys
from typing import Any

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"


def wanted(show: bool | None = None) -> bool:
    """What the caller asks for; unasked, only where somebody watches: in a terminal or a notebook."""
    if show is not None:
        return show
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Progress:
    """`total` and what `advance` adds are in one unit of cost, for a linear N·K: the time left is the rest of the cost
    at the pace so far.

        with Progress(sum(costs), "quantize") as progress:
            for name, cost in ...:
                progress.say(name)
                progress.advance(cost)
    """

    def __init__(self, total: float, label: str, show: bool | None = None, **bar_options: Any) -> None:
        self.bar = None
        if wanted(show):
            from tqdm.auto import tqdm  # a terminal's or a notebook's, imported only to be seen

            # smoothing=0: the average over all, since neighbouring pieces differ much in speed.
            self.bar = tqdm(total=total, desc=label, bar_format=BAR, smoothing=0, **bar_options)

    def advance(self, cost: float) -> None:
        if self.bar is not None:
            self.bar.update(min(cost, self.bar.total - self.bar.n))  # rounding may not push it over 100 %

    def say(self, what: str) -> None:
        """What is being worked on now, shown at the end of the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(what)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Where the time of a step goes: 4-bit linears, 16-bit linears, attention, everything else."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from nunchaku_py.ops.registry import Op

ATTENTION = ("aten::scaled_dot_product_attention", "nunchaku_py::attention")
OURS, DENSE = "nunchaku_py::", ("aten::linear", "aten::conv2d")


def parts(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call on a CPU, by what they were spent on, as torch's profiler sees it; "all" is their sum."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _named(), torch.no_grad(), torch.profiler.profile(activities=activities) as profile:
        run()
    events = [event for event in profile.events() if event.cpu_parent is None]
    found = dict.fromkeys(("4-bit linears", "16-bit linears", "attention", "rest"), 0.0)
    for event in events:
        found[_part(event.name)] += event.cpu_time_total / 1e6
    span = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    found["rest"] += max(0.0, span / 1e6 - sum(found.values()))  # what torch does not see is Python's
    return {**found, "all": sum(found.values())}


@contextmanager
def _named() -> Iterator[None]:
    """Ops of ours do not pass through torch unless it compiles: within this it sees each as one event."""
    def named(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(op: Op, *args: Any) -> Any:
            with torch.profiler.record_function(f"{OURS}{op.name}"):
                return method(op, *args)

        return call

    with mock.patch.object(Op, "_run", named(Op._run)), mock.patch.object(Op, "together", named(Op.together)):
        yield


def _part(name: str) -> str:
    if name in ATTENTION:
        return "attention"
    if name.startswith(OURS):
        return "4-bit linears"
    return "16-bit linears" if name in DENSE else "rest"


def line(found: dict[str, float]) -> str:
    """4-bit linears 12.0 s (60 %), …"""
    return ", ".join(f"{name} {seconds:.1f} s ({100 * seconds / found['all']:.0f} %)"
                     for name, seconds in found.items() if name != "all")

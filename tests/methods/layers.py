"""Small synthetic works for the tests of steps."""
import torch

from benchmarks.quality.layer_table import site_of
from benchmarks.quality.synthetic import layer, stats_of
from nunchaku_py.methods.work import Context, Work

CTX = Context()


def small(fmt: str = "int4", gelu: bool = False, rank: int = 8, n: int = 96, k: int = 160, seed: int = 0,
          rows: int = 2048) -> tuple[Work, torch.Tensor]:
    """A work of two linears that share an input (N = n in all), and held-out tokens."""
    data = layer(n, k, seed, gelu, rows, 256)
    first = n // 3
    work = Work.of(["a", "b"], [data.weight[:first], data.weight[first:]], site_of(fmt, gelu, rank),
                   stats_of(data.calibration))
    return work, data.held_out

"""Quantized linears on a GPU beside cuBLAS in bf16, on FLUX.1's shapes: `python -m benchmarks.gpu_ops --out ops.csv`.

Ours is what a layer costs: quantizing its input with the branch's h, then the product. Both run as CUDA graphs over
several sets of operands, of which ours alone are larger than the caches, in turns; medians of rounds, ratios within
rounds. The error is of the 16-bit product of the same weight, on random data.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import NO_GPU, GpuRow, provenance
from benchmarks.rows import RowFile
from benchmarks.timing import Spread
from nunchaku_py import ops
from nunchaku_py.demo.measure import relative_error
from nunchaku_py.linear import LINEAR_OPS, QuantLinear
from nunchaku_py.site import MODES, Site
from nunchaku_py.tensor import QTensor

SHAPES = {"qkv": (3072, 3072), "up": (12288, 3072), "down": (3072, 12288), "single.out": (3072, 15360)}  # N, K
ROWS = (512, 4096, 4608)
RANK, ROUNDS, SPREAD = 32, 7, 256 * 2**20  # SPREAD: bytes that no cache holds
Run = Callable[[int], Tensor]  # of a set of operands


@dataclass
class Row(GpuRow):
    shape: str
    m: int
    n: int
    k: int
    mode: str
    backend: str
    ms: float
    ms_low: float
    ms_high: float
    tops: float
    bf16_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    error: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the CSV, which is written anew")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=("a4",))
    parser.add_argument("--quick", action="store_true", help="one shape")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    with RowFile.create(arguments.out, Row) as file:
        for name, (n, k) in list(SHAPES.items())[:1 if arguments.quick else None]:
            for m in ROWS:
                for mode in arguments.modes:
                    row = measured(name, m, n, k, mode)
                    file.write(row)
                    print(row.line(), flush=True)


@torch.no_grad()
def measured(name: str, m: int, n: int, k: int, mode: str) -> Row:
    torch.manual_seed(0)
    sets = -(-SPREAD // (2 * m * k + n * k // 2))
    inputs = [torch.randn(m, k, device="cuda").bfloat16() for _ in range(sets)]
    weights = [(torch.randn(n, k, device="cuda") / k**0.5).bfloat16() for _ in range(sets)]
    layers = [quantized(weight, mode) for weight in weights]
    error = relative_error(layers[0](inputs[0]).float(), (inputs[0] @ weights[0].T).float())
    ours = in_graph(lambda i: layers[i](inputs[i]), sets)
    plain = in_graph(lambda i: torch.nn.functional.linear(inputs[i], weights[i]), sets)
    times = [(seconds(ours) / sets, seconds(plain) / sets) for _ in range(ROUNDS)]
    took, ratio = Spread.of([1e3 * one for one, _ in times]), Spread.of([other / one for one, other in times])
    return Row(**provenance(), shape=name, m=m, n=n, k=k, mode=mode, backend=backend_of(layers[0], inputs[0]),
               ms=took.median, ms_low=took.low, ms_high=took.high, tops=2e-9 * m * n * k / took.median,
               bf16_ms=Spread.of([1e3 * other for _, other in times]).median, speedup=ratio.median,
               speedup_low=ratio.low, speedup_high=ratio.high, error=error)


def quantized(weight: Tensor, mode: str) -> QuantLinear:
    """Rounded, with a branch of small random numbers: what it says does not change what it costs."""
    n, k = weight.shape
    layer = QuantLinear(Site("w4a4", "int4", 64, RANK), k, n, False, torch.bfloat16)
    code = QTensor.quantize(weight.float(), layer.site.weight_format, search=False)
    for key, tensor in {"codes": code.codes, "scales": code.scales, "smooth": weight.new_ones(k),
                        "down": weight[:RANK] * 2**-10, "up": weight[:, :RANK] * 2**-10}.items():
        layer.set_tensor(key, tensor)
    layer.set_mode(mode)
    return layer


def backend_of(layer: QuantLinear, x: Tensor) -> str:
    """What its product runs on."""
    quantized_x = layer.quantize_input(x)
    qw, sw, aux, up, bias = layer.operands(x.dtype)
    op: ops.Op = LINEAR_OPS[layer.linear_spec.act.format]
    answers = op.explain(quantized_x.qx, quantized_x.sx, qw, sw, aux, quantized_x.h, up, bias, layer.linear_spec)
    return next(name for name, answer in answers.items() if answer == "can run")


def in_graph(run: Run, sets: int) -> torch.cuda.CUDAGraph:
    """One call with each set of operands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(sets):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            run(i)
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


if __name__ == "__main__":
    main()

"""Who multiplies on a GPU: this package's linears, cuBLAS in bf16, and torch's INT8 and FP8 products.

A contender may be missing or refuse the GPU: whatever it raises becomes the note of its row.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

import nunchaku_py as nq
from benchmarks.contenders import BASELINE, OURS
from benchmarks.gpu_turns import Run
from nunchaku_py.linear import QuantLinear
from nunchaku_py.site import Site, SiteTensors
from nunchaku_py.tensor import QTensor

GROUPS = {"int4": 64, "nvfp4": 16}
RANK, SPREAD = 32, 256 * 2**20  # SPREAD: bytes that no cache holds
FP8, FP8_MOST = torch.float8_e4m3fn, 448.0
HELD = {"folded": "int8"}  # what a residency is called here; all the others keep 4 bits


class Refused(Exception):
    """Why a contender does not take part."""


@dataclass
class Operands:
    """Sets of x (M,K) and w (N,K), random, together larger than the caches also where a contender holds 4 bits."""

    m: int
    n: int
    k: int
    device: str
    compiler: str = "inductor"
    spread: int = SPREAD
    codes: dict[str, list[QTensor]] = field(default_factory=dict)  # format → of each weight

    @cached_property
    def sets(self) -> int:
        return max(2, -(-self.spread // (2 * self.m * self.k + self.n * self.k // 2)))

    @cached_property
    def x(self) -> list[Tensor]:
        return [torch.randn(self.m, self.k, device=self.device).bfloat16() for _ in range(self.sets)]

    @cached_property
    def w(self) -> list[Tensor]:
        return [(torch.randn(self.n, self.k, device=self.device) / self.k**0.5).bfloat16() for _ in range(self.sets)]

    def quantized(self, site: Site) -> list[QTensor]:
        """The weights, rounded to nearest; contenders of a format share them."""
        if site.format not in self.codes:
            self.codes[site.format] = [QTensor.quantize(w.float(), site.weight_format, search=False) for w in self.w]
        return self.codes[site.format]


@dataclass
class Ready:
    """run(i) is what is timed; y() is what it says of the first set, in the terms of x·wᵀ."""

    run: Run
    y: Callable[[], Tensor]
    held: int  # bytes of one weight with its scales and branch, between calls
    backend: str = ""
    weights: str = ""
    note: str = ""

    @staticmethod
    def of(run: Run, held: int, backend: str) -> Ready:
        return Ready(run, lambda: run(0), held, backend)


@dataclass(frozen=True)
class Contender:
    name: str
    build: Callable[[Operands], Ready]
    mode: str = ""
    format: str = ""


# ------------------------------------------------------------------------------------------------------------ ourselves
def ours(mode: str, fmt: str, weights: str = "", given: bool = False, by: str = "") -> Contender:
    """Quantizing the input with the branch's h, then the product; given: the product alone; by: on this backend."""
    def build(on: Operands) -> Ready:
        layers = layers_of(on, Site("w4a4", fmt, GROUPS[fmt], RANK), mode, weights)
        backend, held = backend_of(layers[0], on), HELD.get(layers[0].packed.residency, "int4")
        made = Ready.of(lambda i: layers[i](on.x[i]), held_bytes(layers[0]), backend)
        if given:
            inputs = [layer.quantize_input(x) for layer, x in zip(layers, on.x, strict=True)]
            made = Ready.of(lambda i: layers[i].multiply(inputs[i], torch.bfloat16), made.held, backend)
        made.weights = held
        made.note = f"asked for {weights} weights, holds {held}" if weights not in ("", held) else ""
        return made
    words = [f"{OURS} {mode} {fmt}", f"weights {weights}" if weights else "", "input given" if given else "",
             f"by {by}" if by else ""]
    return Contender(", ".join(filter(None, words)), asking_for(by, build) if by else build, mode, fmt)


def asking_for(backend: str, build: Callable[[Operands], Ready]) -> Callable[[Operands], Ready]:
    """The same, made and run on that backend."""
    def built(on: Operands) -> Ready:
        with nq.backend(backend):
            made = build(on)
        return replace(made, run=within(made.run), y=within(made.y))

    def within(call: Callable) -> Callable:
        def run(*args: object) -> Tensor:
            with nq.backend(backend):
                return call(*args)
        return run

    return built


def layers_of(on: Operands, site: Site, mode: str, weights: str) -> list[QuantLinear]:
    """One for each set, with a branch of small random numbers: what it says does not change what it costs."""
    made = []
    for w, code in zip(on.w, on.quantized(site), strict=True):
        layer = QuantLinear(site, on.k, on.n, False, torch.bfloat16)
        layer.set_tensors(SiteTensors(code, w.new_ones(on.k), w[:RANK] * 2**-10, w[:, :RANK] * 2**-10))
        layer.set_mode(mode, now=False)
        layer.set_weights(weights or "auto")
        made.append(layer)
    return made


def backend_of(layer: QuantLinear, on: Operands) -> str:
    """What its product runs on. On a GPU, where none of the kernels takes it, why: torch's formula is no contender."""
    product = nq.explain(layer, rows=on.m)[-1]
    if product.backend == "torch" and torch.device(on.device).type == "cuda":
        raise Refused(f"no kernel: {product.refusals.get('cuda', 'not built')}")
    return product.backend


def held_bytes(layer: QuantLinear) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


# ---------------------------------------------------------------------------------------------------------------- torch
def bf16() -> Contender:
    def build(on: Operands) -> Ready:
        return Ready.of(lambda i: torch.nn.functional.linear(on.x[i], on.w[i]), on.w[0].nbytes, "F.linear")
    return Contender(BASELINE, build)


def per_row(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """(x / scale, scale (M,1)) with |x / scale| ≤ most"""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / most
    return x.float() / scale, scale


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scale = per_row(x, 127.0)
    return scaled.round().to(torch.int8), scale


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled, scale = per_row(x, FP8_MOST)
    return scaled.clamp(-FP8_MOST, FP8_MOST).to(FP8), scale


def int8_linear(x: Tensor, w8: Tensor, sw: Tensor) -> Tensor:
    qx, sx = int8_rows(x)
    return (torch._int_mm(qx, w8.T).float() * sx * sw.T).to(x.dtype)


def fp8_product(qx: Tensor, sx: Tensor, w8: Tensor, sw: Tensor) -> Tensor:
    return torch._scaled_mm(qx, w8.T, scale_a=sx, scale_b=sw.T, out_dtype=torch.bfloat16, use_fast_accum=True)


def fp8_linear(x: Tensor, w8: Tensor, sw: Tensor) -> Tensor:
    return fp8_product(*fp8_rows(x), w8, sw)


def int8_product_only() -> Contender:
    """32-bit sums as torch._int_mm gives them: neither scales nor 16 bits."""
    def build(on: Operands) -> Ready:
        x, w = [int8_rows(x) for x in on.x], [int8_rows(w) for w in on.w]

        def run(i: int) -> Tensor:
            return torch._int_mm(x[i][0], w[i][0].T)
        return Ready(run, lambda: run(0).float() * x[0][1] * w[0][1].T, w[0][0].nbytes, "torch._int_mm", note=(
            "product only: codes in, 32-bit sums out"))
    return Contender("torch int8, product only", build)


def fp8_product_only() -> Contender:
    def build(on: Operands) -> Ready:
        x, w = [fp8_rows(x) for x in on.x], [fp8_rows(w) for w in on.w]
        made = Ready.of(lambda i: fp8_product(*x[i], *w[i]), w[0][0].nbytes, "torch._scaled_mm")
        made.note = "product only: codes in, scaled bf16 out"
        return made
    return Contender("torch fp8 row-wise, product only", build)


def whole(name: str, rows: Callable[[Tensor], tuple[Tensor, Tensor]], linear: Callable[..., Tensor], backend: str,
          compiled: bool) -> Contender:
    """With the quantization of its input, which a compiler makes one kernel of."""
    def build(on: Operands) -> Ready:
        w = [rows(w) for w in on.w]
        run = torch.compile(linear, fullgraph=True, dynamic=False, backend=on.compiler) if compiled else linear
        return Ready.of(lambda i: run(on.x[i], *w[i]), w[0][0].nbytes + w[0][1].nbytes, backend)
    return Contender(f"{name}, {'compiled' if compiled else 'eager'}", build)


int8 = partial(whole, "torch int8 per token", int8_rows, int8_linear, "torch._int_mm")
fp8 = partial(whole, "torch fp8 row-wise", fp8_rows, fp8_linear, "torch._scaled_mm")


# ---------------------------------------------------------------------------------------------------------------- lists
def contenders(compiled: bool = True) -> list[Contender]:
    """bf16 first: ratios are over it."""
    a8 = [ours("a8", fmt, weights) for fmt in GROUPS for weights in ("int8", "int4")]
    found = [bf16(), *a8, ours("a8", "int4", "int8", given=True), *(ours("a4", fmt) for fmt in GROUPS)]
    found += [*(ours("a8", "int4", weights, by="triton") for weights in ("int8", "int4")),
              ours("a4", "nvfp4", by="triton")]
    found += [int8_product_only(), fp8_product_only(), fp8(False)]
    return found + ([int8(True), fp8(True)] if compiled else [])

"""Everybody who takes part: torch, oneDNN, other packages and ourselves, each making one call out of a chain.

A contender may be missing or refuse the machine: whatever it raises becomes the note of its row.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.chains import CHAINS_OF_ROLE, Chain
from benchmarks.quality.peer_layers import stored_bytes
from benchmarks.shapes import Layer
from benchmarks.sites import Setting, sites_of
from benchmarks.timing import Call
from nunchaku_py.explain import explain

PEER_PACKAGES = ("torchao", "sdnq", "bitsandbytes")
INSTALL = "pip install torch==2.13.0 diffusers transformers sdnq torchao bitsandbytes"
OURS = "nunchaku-py"
BASELINE = "torch bf16"


@dataclass(frozen=True)
class Ready:
    """One call, what it stores, and the memory it holds between calls. `gives_y`: it returns the chain's output."""

    call: Call
    stored: int
    held: int
    backend: str = ""
    gives_y: bool = True


@dataclass(frozen=True)
class Contender:
    """`build` takes a bf16 chain, which it may consume, and its input (M,K) in bf16."""

    name: str
    package: str
    build: Callable[[Chain, Tensor], Ready]


# ------------------------------------------------------------------------------------------------ torch and oneDNN
def torch_chain(name: str, dtype: torch.dtype) -> Contender:
    def build(chain: Chain, x: Tensor) -> Ready:
        chain, x = chain.to(dtype), x.to(dtype)
        return Ready(lambda: chain(x), *_sizes(chain))
    return Contender(name, "torch", build)


def torch_prepacked() -> Contender:
    """The weight in oneDNN's own order, as torch.compile with freezing leaves it."""
    def build(chain: Chain, x: Tensor) -> Ready:
        weight, bias = chain.proj.weight, chain.proj.bias
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        linear = torch.ops.mkldnn._linear_pointwise
        return Ready(lambda: linear(x, packed, bias, "none", [], ""), *_sizes(chain))
    return Contender("torch bf16 prepacked", "torch", build)


def onednn_w8a8(gemm_alone: bool) -> Contender:
    """One scale per output channel, one per activation tensor, taken from its largest value in every call.

    Activations are s8 where there is AMX, and u8 with zero point 128 elsewhere: AVX512-VNNI multiplies u8 with s8, and
    oneDNN answers s8 with its reference code there, thousands of times slower."""
    kind, zero = (torch.int8, 0) if torch.cpu._is_amx_tile_supported() else (torch.uint8, 128)

    def quantize(x: Tensor) -> tuple[Tensor, float]:
        scale = x.abs().amax().float() / 127
        return (x.float() / scale).round_().add_(zero).to(kind), scale.item()

    def build(chain: Chain, x: Tensor) -> Ready:
        scales = chain.proj.weight.float().abs().amax(1) / 127
        codes = (chain.proj.weight.float() / scales[:, None]).round_().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(codes, list(x.shape))
        zeros, bias = torch.zeros(len(scales), dtype=torch.int32), chain.proj.bias.float()

        def multiply(qx: Tensor, scale: float) -> Tensor:
            return torch.ops.onednn.qlinear_pointwise(qx, scale, zero, packed, scales, zeros, bias, 1.0, 0,
                                                      torch.bfloat16, "none", [], "")
        given = quantize(x)
        size = codes.nbytes + scales.nbytes + bias.nbytes
        return Ready(lambda: multiply(*(given if gemm_alone else quantize(x))), size, size)
    return Contender(f"oneDNN W8A8{', input given' if gemm_alone else ''}", "torch", build)


# --------------------------------------------------------------------------------------------------------- packages
def torchao_int8(compiled: bool) -> Contender:
    def build(chain: Chain, x: Tensor) -> Ready:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(chain, Int8DynamicActivationInt8WeightConfig())
        torch._dynamo.reset()  # every shape anew: recompiling for other shapes is limited to a few
        run = torch.compile(chain, dynamic=False) if compiled else chain
        return Ready(lambda: run(x), stored_bytes(chain), stored_bytes(chain))
    return Contender(f"torchao int8 dynamic{', compiled' if compiled else ''}", "torchao", build)


def sdnq_uint4(**options: object) -> Contender:
    def build(chain: Chain, x: Tensor) -> Ready:
        from sdnq import sdnq_post_load_quant

        made = sdnq_post_load_quant(chain, weights_dtype="uint4", torch_dtype=torch.bfloat16, add_skip_keys=False,
                                    **options)
        return Ready(lambda: made(x), stored_bytes(made), stored_bytes(made))
    name = "sdnq uint4" + (", svd 32" if options.get("use_svd") else "")
    return Contender(name + (", int8 matmul" if options.get("use_quantized_matmul") else ""), "sdnq", build)


def bitsandbytes_nf4() -> Contender:
    def build(chain: Chain, x: Tensor) -> Ready:
        from bitsandbytes.nn import Linear4bit, Params4bit

        n, k = chain.proj.weight.shape
        made = Linear4bit(k, n, compute_dtype=torch.bfloat16, quant_type="nf4")
        made.weight = Params4bit(chain.proj.weight.data, requires_grad=False, quant_type="nf4")
        made.bias = nn.Parameter(chain.proj.bias.data, requires_grad=False)
        made = made.to("cpu")  # the move is what quantizes
        return Ready(lambda: made(x), stored_bytes(made), stored_bytes(made))
    return Contender("bitsandbytes NF4", "bitsandbytes", build)


def missing_packages() -> list[str]:
    """A sentence for each peer package that is not installed."""
    return [f"{name} is not installed, its rows will say so; in an environment of its own: {INSTALL}"
            for name in PEER_PACKAGES if find_spec(name) is None]


# --------------------------------------------------------------------------------------------------------- ourselves
def ours(setting: Setting, fused: bool = False, part: str = "") -> Contender:
    """part: "" | "quantize_act" | "multiply", the halves of a plain linear; fused: with the chain's fused ops."""
    def build(chain: Chain, x: Tensor) -> Ready:
        chain.quantize(setting)
        sites = [site for linear in chain.children() for site in sites_of(linear)]
        stored, held = sum(site.nbytes() for site in sites), _sizes(chain)[1]
        backend = "+".join(sorted({found.backend for site in sites for found in explain(site, x.shape[0])}))
        if part == "quantize_act":
            return Ready(lambda: chain.proj.quantize_input(x), stored, held, backend, gives_y=False)
        if part == "multiply":
            given = chain.proj.quantize_input(x)
            return Ready(lambda: chain.proj.multiply(given, x.dtype), stored, held, backend)
        return Ready((lambda: chain.fused(x)) if fused else (lambda: chain(x)), stored, held, backend)
    how = {"quantize_act": ", quantize_act alone", "multiply": ", input given"}.get(part, ", fused" if fused else "")
    return Contender(f"{OURS} {setting}{how}", OURS, build)


def _sizes(chain: Chain) -> tuple[int, int]:
    """Bytes of all tensors of its linears, twice: as stored and as held."""
    size = sum(tensor.nbytes for linear in chain.children() for tensor in (*linear.parameters(), *linear.buffers()))
    return size, size


# ------------------------------------------------------------------------------------------------------------- lists
A8 = Setting("int4", 32, "a8")
WEIGHT_ONLY = Setting("int4", 0, "a16", "w4a16")


def linear_contenders(split: bool, peers: bool, everything: bool) -> list[Contender]:
    """split: the linear is stored in parts, so that its halves are no single calls."""
    fp32 = torch_chain("torch fp32", torch.float32)  # where a CPU, or what torch is held to, has no bf16
    found = [torch_chain(BASELINE, torch.bfloat16), torch_prepacked(), fp32, ours(A8)]
    found += [] if split else [ours(A8, part="quantize_act"), ours(A8, part="multiply")]
    if everything:
        found += [ours(Setting("int4", rank)) for rank in (0, 128)]
        found += [ours(Setting("nvfp4", 32)), *(ours(Setting("int4", 32, mode)) for mode in ("a4", "a16"))]
    if peers:
        found += [onednn_w8a8(False), onednn_w8a8(True), torchao_int8(False), torchao_int8(True),
                  sdnq_uint4(use_svd=True, svd_rank=32),
                  sdnq_uint4(use_svd=True, svd_rank=32, use_quantized_matmul=True), bitsandbytes_nf4()]
    return found


def chain_contenders(peers: bool) -> list[Contender]:
    found = [torch_chain(BASELINE, torch.bfloat16), ours(A8), ours(A8, fused=True)]
    return found + ([torchao_int8(True)] if peers else [])


def weight_only_contenders(peers: bool) -> list[Contender]:
    found = [torch_chain(BASELINE, torch.bfloat16), torch_prepacked(), ours(WEIGHT_ONLY)]
    return found + ([bitsandbytes_nf4(), sdnq_uint4()] if peers else [])


def chains_of(layer: Layer) -> tuple[type[Chain], ...]:
    """What a layer is timed in besides alone."""
    return CHAINS_OF_ROLE.get(layer.role, ())


def fresh(reference: Chain) -> Chain:
    """A bf16 copy that a contender may consume."""
    return copy.deepcopy(reference).bfloat16().requires_grad_(False)

"""What other packages make of one linear, each called through its public API: sdnq, bitsandbytes, torchao."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONSTANTS = ("bias", "quant_map", "quant_state", "nf4")  # code books and json, the same for every layer: not counted


@dataclass(frozen=True)
class Peer:
    """One package in one setting; `build` takes a bf16 nn.Linear that it may consume."""

    method: str
    settings: str
    package: str
    build: Callable[[nn.Linear], nn.Module]


def sdnq(settings: str, **options: Any) -> Peer:
    def build(linear: nn.Linear) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        made = sdnq_post_load_quant(holder(linear), weights_dtype="uint4", torch_dtype=torch.bfloat16,
                                    add_skip_keys=False, **options)
        return made.proj
    return Peer("sdnq uint4", settings, "sdnq", build)


def bitsandbytes(settings: str, nested: bool) -> Peer:
    def build(linear: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        made = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
                          compress_statistics=nested, quant_type="nf4")
        made.weight = Params4bit(linear.weight.data, requires_grad=False, compress_statistics=nested, quant_type="nf4")
        return made.to(linear.weight.device)  # the move is what quantizes
    return Peer("bitsandbytes NF4", settings, "bitsandbytes", build)


def torchao_nf4() -> Peer:
    def build(linear: nn.Linear) -> nn.Module:
        try:
            from torchao.quantization import to_nf4
        except ImportError:  # where it stood before torchao 0.17
            from torchao.dtypes.nf4tensor import to_nf4
        linear.weight = nn.Parameter(to_nf4(linear.weight.data), requires_grad=False)
        return linear
    return Peer("torchao NF4", "block 64, scaler block 256", "torchao", build)


def torchao_int4(settings: str, group: int, algorithm: str = "tinygemm", prototype: bool = True) -> Peer:
    def build(linear: nn.Linear) -> nn.Module:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        if prototype:  # the CPU's packing of the same format
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig as Int4WeightOnlyConfig
        config = Int4WeightOnlyConfig(group_size=group, int4_choose_qparams_algorithm=algorithm)
        held = holder(linear)
        quantize_(held, config)
        return held.proj
    return Peer("torchao int4", settings, "torchao", build)


PEERS: tuple[Peer, ...] = (
    sdnq("default: group 64, fp32 scales"),
    sdnq("group 64, bf16 scales", dequantize_fp32=False),
    sdnq("Hadamard, bf16 scales", dequantize_fp32=False, use_hadamard=True),
    sdnq("svd 32, default: group 128, fp32 scales", use_svd=True, svd_rank=32),
    sdnq("svd 32, group 128, bf16 scales", use_svd=True, svd_rank=32, dequantize_fp32=False),
    sdnq("svd 32, group 64, bf16 scales", use_svd=True, svd_rank=32, dequantize_fp32=False, group_size=64),
    sdnq("svd 32, Hadamard, bf16 scales", use_svd=True, svd_rank=32, dequantize_fp32=False, use_hadamard=True),
    bitsandbytes("block 64, fp32 absmax", nested=False),
    bitsandbytes("block 64, double quantization", nested=True),
    torchao_nf4(),
    torchao_int4("Int4WeightOnlyConfig, group 128", 128, prototype=False),
    torchao_int4("group 128", 128),
    torchao_int4("group 64", 64),
    torchao_int4("group 128, HQQ", 128, "hqq"),
    torchao_int4("group 64, HQQ", 64, "hqq"),
)


def holder(linear: nn.Linear) -> nn.Module:
    """A module with the linear inside, as quantizers of models expect."""
    parent = nn.Module()
    parent.proj = linear
    return parent


def stored_bytes(module: nn.Module) -> int:
    """Codes, scales, zero points, factors and nested statistics of one layer; neither bias nor constant tables."""
    found = (inner for name, value in module.state_dict().items() if isinstance(value, Tensor)
             for inner in plain_tensors(name, value))
    return sum(tensor.nbytes for name, tensor in found if not any(word in name for word in CONSTANTS))


def plain_tensors(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors inside a tensor subclass, by name; or the tensor itself."""
    if not hasattr(value, "__tensor_flatten__"):
        yield name, value
        return
    for inner in value.__tensor_flatten__()[0]:
        if isinstance(part := getattr(value, inner), Tensor):
            yield from plain_tensors(inner, part)

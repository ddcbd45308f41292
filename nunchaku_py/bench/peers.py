"""Other packages that quantize diffusers models: what each makes of one block, through its public API.

None is required. One that is not installed, does not import or refuses the machine is a row that says so.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Peer:
    """`convert` may consume the block that it is given, in 16 bit; it returns what stands in its place."""

    label: str
    package: str  # as pip names it
    module: str
    convert: Callable[[nn.Module], nn.Module]
    copies: bool = True  # what it made of a block can be copied

    @property
    def missing(self) -> str:
        """Why it cannot take part, as far as that is known without importing it."""
        try:
            there = find_spec(self.module) is not None
        except ModuleNotFoundError:  # of the package that the module is in
            there = False
        return "" if there else "not installed"


def torchao_int8(block: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(block, Int8DynamicActivationInt8WeightConfig())
    return block


def bitsandbytes_nf4(block: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in [found for found in block.named_modules() if type(found[1]) is nn.Linear]:
        made = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=BF16,
                          quant_type="nf4")
        made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        made.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, made.to(linear.weight.device))  # the move is what quantizes
    return block


def sdnq_uint4(block: nn.Module) -> nn.Module:
    """With its own low-rank branch, and its INT8 products."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # read when it is imported: it would compile for minutes
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(block, weights_dtype="uint4", torch_dtype=BF16, add_skip_keys=False, use_svd=True,
                                svd_rank=32, use_quantized_matmul=True)


def quanto_qint4(block: nn.Module) -> nn.Module:
    from optimum.quanto import freeze, qint4, quantize

    quantize(block, weights=qint4)
    freeze(block)
    return block


PEERS: Sequence[Peer] = (
    Peer("torchao INT8 dynamic", "torchao", "torchao", torchao_int8),
    Peer("bitsandbytes NF4", "bitsandbytes", "bitsandbytes", bitsandbytes_nf4),
    Peer("sdnq uint4 + SVD 32", "sdnq", "sdnq", sdnq_uint4),
    Peer("optimum-quanto qint4", "optimum-quanto", "optimum.quanto", quanto_qint4, copies=False),
)
BY_LABEL = {peer.label: peer for peer in PEERS}

"""LoRAs converted for Nunchaku's FLUX.1: the bits of the LoRA they were made from."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nunchaku_py import NunchakuError
from nunchaku_py.checkpoint.nunchaku.packing import unpack_down, unpack_up
from nunchaku_py.lora.formats import read
from tests.lora.toys import State, normal
from tests.lora.writers import target_of
from tests.tiny import MODELS


def packed(plain: Tensor, down: bool) -> Tensor:
    """(channels, ranks) element by element, as the kernels' tiles lie in memory."""
    channels, ranks = plain.shape
    out = torch.empty_like(plain).flatten()
    for c in range(channels):
        for r in range(ranks):
            a, b = (r % 16, c % 16) if down else (c % 16, r % 16)
            tile = c // 16 * (ranks // 16) + r // 16
            place = (((((tile * 8 + a % 8) * 4 + b % 8 // 2) * 2 + a // 8) * 2 + b // 8) * 2) + b % 2
            out[place] = plain[c, r]
    return out.view(channels, ranks)


def padded(matrix: Tensor) -> Tensor:
    """(channels, r) with r up to a multiple of 16."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 16))


def pair(n: int, k: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    return normal(rank, k, seed=seed), normal(n, rank, seed=seed + 1)


def converted(name: str, down: Tensor, up: Tensor) -> State:
    return {f"{name}.lora_down": packed(padded(down.T), True), f"{name}.lora_up": packed(padded(up), False)}


@pytest.mark.parametrize("down", [True, False])
def test_the_order_of_the_kernels(down: bool) -> None:
    plain = torch.arange(48 * 32.0).view(48, 32)
    found = unpack_down(packed(plain, True), *plain.shape).T if down else unpack_up(packed(plain, False), *plain.shape)
    assert torch.equal(found, plain)


def test_a_converted_lora_is_the_one_it_was_made_from() -> None:
    model, _ = MODELS["flux"]()
    block, single = "transformer_blocks.0", "single_transformer_blocks.1"
    wanted = {f"{block}.attn.to_{name}": pair(128, 128, rank, 10 * rank) for name, rank in zip("qkv", (4, 2, 3),
                                                                                             strict=True)}
    wanted |= {f"{block}.ff_context.net.2": pair(128, 512, 16, 90), f"{single}.proj_mlp": pair(512, 128, 5, 100)}
    qkv = [wanted[f"{block}.attn.to_{name}"] for name in "qkv"]
    state = converted(f"{block}.qkv_proj", torch.cat([down for down, _ in qkv]),
                      torch.block_diag(*(up.float() for _, up in qkv)).bfloat16())
    state |= converted(f"{block}.mlp_context_fc2", *wanted[f"{block}.ff_context.net.2"])
    state |= converted(f"{single}.mlp_fc1", *wanted[f"{single}.proj_mlp"])
    for name, spread in ((f"{block}.norm1.linear", 6), (f"{single}.norm.linear", 3)):
        down, up = wanted[name] = pair(spread * 128, 128, 4, 110 + spread)
        order = [s * 128 + c for c in range(128) for s in range(spread)]  # row c·S + s of the file
        state |= {f"{name}.lora_down": down, f"{name}.lora_up": up[order]}
    attention, mlp = pair(128, 128, 4, 200), pair(128, 512, 6, 210)
    state |= converted(f"{single}.out_proj", *attention) | converted(f"{single}.mlp_fc2", *mlp)
    reading = read(state, {"transformer": target_of(model)})
    assert reading.format == "Nunchaku's converted" and not reading.unread
    deltas = reading.deltas["transformer"]
    output = deltas.pop(f"{single}.proj_out")
    assert set(deltas) == set(wanted)
    for name, (down, up) in wanted.items():
        assert torch.equal(deltas[name].down, down) and torch.equal(deltas[name].up, up)
        assert deltas[name].alpha == down.shape[0]
    assert torch.equal(output.up, torch.cat([attention[1], mlp[1]], 1))
    assert torch.equal(output.down[:4, :128], attention[0]) and torch.equal(output.down[4:, 128:], mlp[0])
    assert not output.down[:4, 128:].any() and not output.down[4:, :128].any()


@pytest.mark.parametrize(("key", "shape", "sentence"), [
    ("transformer_blocks.0.out_proj.lora_down", (128, 8), "both multiples of 16"),
    ("transformer_blocks.0.out_proj.lora_up", (128,), "expected a matrix"),
    ("transformer_blocks.0.norm1.linear.lora_up", (100, 4), "a multiple of 6 rows"),
    ("transformer_blocks.0.out_proj.lora_up", (128, 16), "half of a pair is missing"),
])
def test_broken_ones(key: str, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(NunchakuError, match=sentence):
        read({key: torch.ones(shape)}, {"transformer": target_of(MODELS["flux"]()[0])})

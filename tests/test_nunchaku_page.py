"""docs/nunchaku.md: its orders of tensors are those of the code, and its formula of W4A16 codes is right."""
from __future__ import annotations

import re
from pathlib import Path

import torch

from nunchaku_py.checkpoint.nunchaku import layouts
from nunchaku_py.checkpoint.nunchaku.packing import pack_awq_codes
from nunchaku_py.formats import unpack_nibbles

PAGE = (Path(__file__).parents[1] / "docs/nunchaku.md").read_text(encoding="utf-8")
ORDERS = {"weight words": "WEIGHT_WORDS", "scales": "SCALES", "micro scales": "MICRO_SCALES", "down": "DOWN",
          "up": "UP"}


def test_orders_are_those_of_the_code():
    lines = dict(re.findall(r"^\| ([a-z ]+) \| .* \| `(\(.* -> .*)` \|$", PAGE, re.MULTILINE))
    assert lines == {name: getattr(layouts, constant).line for name, constant in ORDERS.items()}


def test_the_formula_of_w4a16_codes():
    n, k = 8, 128
    codes = torch.randint(0, 256, (n, k // 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed, wanted = pack_awq_codes(codes, torch.int16), unpack_nibbles(codes, k, signed=False)
    for row in range(n):
        for i in range(k):
            word = packed[row // 4, 64 * (i // 64) + 16 * (row % 4) + 8 * (i % 64 // 32) + i % 8].item()
            assert word >> 4 * (i % 32 // 8) & 15 == wanted[row, i]

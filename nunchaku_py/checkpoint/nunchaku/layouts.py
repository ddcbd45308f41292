"""The orders in which Nunchaku's files hold their tensors, a line of data each; docs/nunchaku.md says them in words."""
from __future__ import annotations

from ...layout import Layout

# Words of eight neighbours along K, of a weight (N, K/8): the B operands of two mma.m16n8k64 for each lane.
WEIGHT_WORDS = Layout("(N p:8 i:2 g:8) (K j:2 t:4) -> N K p g t i j")
SCALES = Layout("(N a:8 h:2 t:4 e:2) (G) -> N G a t h e")  # INT4's (N, G); vectors are (N, 1)
MICRO_SCALES = Layout("(N p:4 q:4 l:8) (G s:4) -> N G l q p s")  # NVFP4's (N, G)
DOWN = Layout("(R i:2 g:8) (C j:2 t:4 e:2) -> C R g t i j e")
UP = Layout("(C i:2 g:8) (R j:2 t:4 e:2) -> C R g t i j e")
# Of bytes (N, K/2), once the nibbles of each int32 are shuffled (packing.unpack_awq_codes): an int16 holds the codes
# of k, k+8, k+16 and k+24.
AWQ_PAIRS = Layout("(N a:4) (K b:2 c:4 d:4) -> N K a b d c")

CHANNELS, RANKS = 128, 16  # what N and K, and the rank, of a W4A4 linear are padded to
AWQ_ROWS, AWQ_COLUMNS = AWQ_PAIRS.tile[0], 2 * AWQ_PAIRS.tile[1]


def whole(size: int, tile: int) -> int:
    return -(-size // tile) * tile

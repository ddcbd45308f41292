"""How scales lie on the device (csrc/cuda/common/scales.h)."""
from nunchaku_py.layout import Layout

TOKEN_SCALES = Layout("(M m:4 i:2 g:8) (G) -> G M g m i")
CHANNEL_SCALES = Layout("(N n:8 t:4 e:2) (G) -> G N t n e")

"""What mode a8 does to weights: how far folding to INT8 takes each from its 4 bits, ‖folded − 4 bit‖/‖4 bit‖."""
from __future__ import annotations

from torch import nn
from torch.linalg import vector_norm

from .checkpoint.mapping import release
from .methods.error import rows_of
from .swap import QuantizedSite
from .tensor import QTensor

SAMPLE = 2**18  # weights that are looked at: whole rows, evenly spread; of 3072×3072 it is 2 ms, and right to 2 %


def fold_error(weight: QTensor) -> float:
    """Of one weight; 0 where there is nothing to fold, NaN where it is not finite."""
    n, k = weight.shape
    some = rows_of(weight, slice(None, None, max(1, n * k // SAMPLE)))
    exact, (w8, s_ch) = some.dequantize(), some.fold_int8()
    size = vector_norm(exact).item()
    return vector_norm(w8 * s_ch[:, None] - exact).item() / size if size else 0.0


def fold_errors(model: nn.Module) -> dict[str, float]:
    """Name → fold_error of every site of a model that is made for 4-bit activations, in whatever mode it runs."""
    found = {}
    for name, site in model.named_modules():
        if isinstance(site, QuantizedSite) and site.site.kind == "w4a4":
            found[name] = fold_error(site.qtensor())
            release(site.parameters())
    return found

"""How wrong a work is: the true output error on its token sample, and the analytic model of it that steps minimise.

With x̃ the input as the site sees it, undone of its shift (the corrected bias does that), and Q = deq(residual):

    y − ŷ = (R − Q)·x̂ − Q·(x̃ − x̂)          x̂ = x/smooth, x̃ = deq(Q_a((x+S)/smooth)) − S/smooth
    J = Σ_j E[x̂_j²]·‖(R−Q)_:,j‖² + Σ_j E[(x̃−x̂)_j²]·‖R_:,j‖²
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import decode, format_of, quantize_rows
from ..site import Mode
from ..tensor import QTensor, fake_quantize
from . import fast
from .work import Context, Step, Work

ENOUGH_CHUNKS = 9  # on a CPU: all of a 3072×3072 weight, a quarter of a 3072×12288 one


class Noise(NamedTuple):
    """Per channel: E[x̂²] and E[(x̃−x̂)²]; what J needs to know of the input."""

    signal: Tensor
    rounding: Tensor

    def cost(self, error: Tensor, remainder: Tensor) -> Tensor:
        """J of some rows: error = (R−Q), remainder = R, both (n,K)."""
        return (error.square() @ self.signal + remainder.square() @ self.rounding).sum()


def site_inputs(work: Work, ctx: Context, mode: Mode = "a4", tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x̂, x̃), both (T,K) fp32: the smoothed input, and what the quantized activations of a mode make of it."""
    tokens = work.stats.tokens[: ctx.options.search_tokens] if tokens is None else tokens
    x, inverse, spec = tokens.float(), 1.0 / work.smooth, work.site.act_spec(mode)
    if spec.format == "none":
        return (exact := x * inverse), exact
    fmt = format_of(spec.format, spec.group)
    seen = decode(*quantize_rows((x + spec.shift) * inverse, fmt, ctx.scale_dtype), fmt)
    return x * inverse, seen - spec.shift * inverse


def noise_of(work: Work, ctx: Context) -> Noise:
    exact, seen = site_inputs(work, ctx)
    return Noise(work.stats.second / work.smooth.square(), (seen - exact).square().mean(0))


def rounded(x: Tensor, work: Work, ctx: Context) -> Tensor:
    """deq(RTN(x)) of some rows, with absmax scales."""
    return fake_quantize(x, work.site.weight_format, ctx.scale_dtype)


def rounding_of(work: Work, ctx: Context, rows: slice, noise: Noise) -> tuple[Tensor, Tensor]:
    """Of some rows Ŵ − Q, Q the plain rounding of R = Ŵ − up·low, and their share of J."""
    remainder, fmt = work.remainder(rows), work.site.weight_format
    if fast.rounds_rows(remainder, work.weight, fmt):
        cost = fast.round_rows(remainder, work.weight[rows], work.smooth, *noise, fmt, ctx.scale_dtype).sum()
        if cost.isfinite():
            return remainder, cost
        remainder = work.remainder(rows)  # rounding it says what is wrong with it
    quantized = rounded(remainder, work, ctx)
    cost = noise.cost(quantized - remainder, remainder)
    return torch.sub(work.smoothed(rows), quantized, out=quantized), cost


def rows_of(residual: QTensor, rows: slice) -> QTensor:
    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]
    return QTensor(residual.codes[rows], residual.scales[rows], residual.format, residual.k,
                   cut(residual.zeros), cut(residual.channel_scale))


def residual_rows(work: Work, ctx: Context, rows: slice, mode: Mode = "a4") -> Tensor:
    """Rows of Q as a mode multiplies by them; before a step has fixed the codes, what plain rounding would give."""
    if work.residual is None:
        weight = QTensor.quantize(work.remainder(rows), work.site.weight_format, ctx.scale_dtype, search=False)
    else:
        weight = rows_of(work.residual, rows)
    if mode != "a8" or work.site.kind == "w4a16":
        return weight.dequantize()
    folded, scale = weight.fold_int8()
    return folded.float() * scale[:, None]


def output_error(
    work: Work, ctx: Context, mode: Mode | None = None, tokens: Tensor | None = None, enough: int = ENOUGH_CHUNKS
) -> float:
    """‖Y − Ŷ‖/‖Y‖ on the token sample (or other tokens); of the weights alone if the input is unknown.

    Of a large weight it looks at some of the outputs, evenly spread: all of them would cost as much as a step."""
    exact, seen = site_inputs(work, ctx, mode or ("a16" if work.stats.synthetic else "a4"), tokens)
    hidden = exact @ work.low.T
    wrong = total = 0.0
    chunks = list(work.chunks())
    for rows in chunks[:: max(1, len(chunks) // enough)]:
        y = exact @ work.smoothed(rows).T
        total += y.square().sum().item()
        y.addmm_(hidden, work.up[rows].T, alpha=-1)
        y.addmm_(seen, residual_rows(work, ctx, rows, mode or "a4").T, alpha=-1)
        wrong += y.square().sum().item()
    return (wrong / total) ** 0.5 if total else 0.0


def run(steps: tuple[Step, ...], work: Work, ctx: Context) -> Work:
    """Each step in turn, noting the output error after it."""
    for step in steps:
        step(work, ctx)
        work.errors[step.__name__] = output_error(work, ctx)
    return work

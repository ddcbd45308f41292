"""Why a quantized model runs the way it does: for each kind of site the backend it runs on, and why others refuse."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from . import ops
from .errors import NunchakuError
from .linear import LINEAR_OPS, QuantizedSite
from .swap import quantized_models, quantized_sites


@dataclass(frozen=True)
class Explanation:
    """One op as `sites` linears of a model call it."""

    op: str
    call: str
    sites: int
    backend: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        why = "; ".join(f"{name}: {reason}" for name, reason in self.refusals.items())
        return f"{self.op} ({self.call}), {self.sites} sites: runs on {self.backend}" + (f" — {why}" if why else "")


class Explanations(list[Explanation]):
    """A list that prints one sentence a line."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def explain(target: object, rows: int = 64) -> Explanations:
    """What each distinct call of a model's (or pipeline's) quantized linears runs on, for inputs of so many rows."""
    kinds: dict[tuple[str, int, int, str], list[QuantizedSite]] = {}
    for site in (site for model in quantized_models(target) for site in quantized_sites(model)):
        if not site.has_data():
            raise NunchakuError("explain: the model has no weights here (meta device); load it, or remove offloading")
        site.pack()
        key = (site.linear_spec.token, site.rows_out, site.site.rank, str(site.codes.device))
        kinds.setdefault(key, []).append(site)
    found = Explanations()
    for sites in kinds.values():
        found += _explain_site(sites[0], len(sites), rows)
    return found


@torch.no_grad()
def _explain_site(site: QuantizedSite, count: int, rows: int) -> list[Explanation]:
    x = torch.zeros(rows, site.rows_in, dtype=site.compute_dtype, device=site.codes.device)
    quantized = site.quantize_input(x)
    qw, sw, aux, up, bias = site.operands(x.dtype)
    spec = site.linear_spec
    shape = f"{rows}x{site.rows_in} -> {site.rows_out}, {spec.act.format} x {spec.weight}"
    calls = [(LINEAR_OPS[spec.act.format], (*quantized[:2], qw, sw, aux, quantized.h, up, bias, spec))]
    if site.site.has_smooth:
        calls.insert(0, (ops.quantize_act, (x, site.inv_smooth, site.branch(x.dtype)[0], spec.act)))
    return [_explain_call(op, args, shape, count) for op, args in calls]


def _explain_call(op: ops.Op, args: tuple, shape: str, count: int) -> Explanation:
    answers = op.explain(*args)
    able = [name for name, answer in answers.items() if answer == "can run"]
    refusals = {name: answer for name, answer in answers.items() if answer != "can run"}
    return Explanation(op.name, shape, count, able[0] if able else "nothing", refusals)


"""What the plan claims of inputs, checked by running: groups read one input, GELU sites read the output of a GELU."""

from __future__ import annotations

import pytest
import torch

from nunchaku_py.models import Plan, Unit, plan
from tests.tiny import MODELS, TEXT_ENCODERS
from tests.tiny_models import flux_controlnet, sdxl_controlnet

SHIFT = 0.171875
CASES = MODELS | TEXT_ENCODERS | {"flux_controlnet": flux_controlnet, "sdxl_controlnet": sdxl_controlnet}


class Run:
    """A plan, the first input of every linear in it, and the names of linears in the order of their first call."""

    def __init__(self, case: str) -> None:
        model, arguments = CASES[case]()
        self.plan: Plan = plan(model)
        self.inputs: dict[str, torch.Tensor] = {}
        for name in self.plan.choices:
            model.get_submodule(name).register_forward_pre_hook(self._hook(name))
        with torch.no_grad():
            model(**arguments)

    def _hook(self, name: str):
        def keep(module: torch.nn.Module, args: tuple) -> None:
            self.inputs.setdefault(name, args[0].clone())

        return keep

    def input_of(self, unit: Unit) -> torch.Tensor:
        x = self.inputs[unit.names[0]]
        return x if unit.k_range is None else x[..., slice(*unit.k_range)]


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


def test_every_planned_linear_runs(run: Run) -> None:
    assert set(run.inputs) == set(run.plan.choices)


def test_members_of_a_group_read_the_same_input(run: Run) -> None:
    for unit in run.plan.units:
        first, *others = (run.inputs[name] for name in unit.names)
        assert all(torch.equal(first, other) for other in others), unit.names


def test_no_shared_input_is_missed(run: Run) -> None:
    for block in run.plan.blocks:
        units = [unit for unit in run.plan.of_block(block) if unit.kind == "w4a4" and unit.k_range is None]
        seen = [run.input_of(unit) for unit in units]
        same = [
            (units[i].names, units[j].names)
            for i in range(len(units))
            for j in range(i)
            if seen[i].shape == seen[j].shape and torch.equal(seen[i], seen[j])
        ]
        assert not same


def test_gelu_sites_are_those_that_never_read_less_than_the_shift_allows(run: Run) -> None:
    for unit in run.plan.units:
        if unit.kind == "w4a4":
            assert unit.gelu == (run.input_of(unit).min() >= -SHIFT), unit


def test_weight_only_sites_read_one_row_per_sample(run: Run) -> None:
    rows = {name: x.numel() // x.shape[-1] for name, x in run.inputs.items()}
    assert all(rows[name] == 1 for name, kind in run.plan.choices.items() if kind == "w4a16")
    assert all(rows[name] > 1 for name, kind in run.plan.choices.items() if kind == "w4a4")


def test_blocks_are_in_order_of_execution(run: Run) -> None:
    first_call = {name: i for i, name in enumerate(run.inputs)}
    starts = [
        min(first_call[name] for unit in units for name in unit.names)
        for units in map(run.plan.of_block, run.plan.blocks)
    ]
    assert starts == sorted(starts)

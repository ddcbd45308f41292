"""Jobs, and what becomes of a unit: kinds, formats, ranks, K-parts and shifted biases."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.quality.synthetic import stats_of
from nunchaku_py.conv import QuantConv1x1
from nunchaku_py.engine import GELU_SHIFT, Engine, Job, jobs_of
from nunchaku_py.errors import NunchakuError
from nunchaku_py.linear import QuantLinear
from nunchaku_py.methods.work import Context
from nunchaku_py.models.plan import Plan, Unit
from nunchaku_py.recipes import RECIPES
from nunchaku_py.split_linear import SplitLinear


def engine(recipe: str = "svdquant-int4", **more: object) -> Engine:
    return Engine(RECIPES[recipe], Context(), **more)


def run(unit_list: list[Unit], modules: dict[str, nn.Module], **more: object) -> dict[str, nn.Module]:
    plan = Plan(units=unit_list)
    made: dict[str, nn.Module] = {}
    for job in jobs_of(plan):
        with torch.no_grad():
            modules_of_job, rows = engine(**more).run(job, modules, {})
        assert [row.name for row in rows] == [name for unit in job.units for name in unit.names]
        made |= modules_of_job
    return made


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_units_that_share_a_module_are_one_job() -> None:
    units = [Unit(("q", "k"), "w4a4"), Unit(("out",), "w4a4", k_range=(0, 8)), Unit(("mod",), "w4a16"),
             Unit(("out",), "w4a4", True, k_range=(8, 32))]
    assert [job.names for job in jobs_of(Plan(units=units))] == [("q", "k"), ("mod",), ("out",)]


def test_a_group_shares_smooth_and_down_and_each_member_keeps_its_function() -> None:
    modules = {name: nn.Linear(64, 96, bias=name != "k") for name in "qkv"}
    made = run([Unit(("q", "k", "v"), "w4a4")], modules)
    assert torch.equal(made["q"].down, made["v"].down) and torch.equal(made["q"].smooth, made["k"].smooth)
    assert made["q"].input_key == made["k"].input_key == made["v"].input_key
    assert made["k"].bias is None
    for name, module in modules.items():
        # rank 32 of 64 channels takes the larger half of the energy; what is left is rounded to about 10 %
        assert 0 < rel(made[name].effective_weight(), module.weight) < 0.1


def test_modulation_is_int4_without_branch_also_under_nvfp4() -> None:
    made = run([Unit(("mod",), "w4a16"), Unit(("fc",), "w4a4")], {"mod": nn.Linear(64, 96), "fc": nn.Linear(64, 96)},
               recipe="svdquant-nvfp4")
    assert (made["mod"].site.format, made["mod"].site.rank, made["mod"].site.kind) == ("int4", 0, "w4a16")
    assert (made["fc"].site.format, made["fc"].site.group) == ("nvfp4", 16)


@pytest.mark.parametrize(("recipe", "shifted"), [("svdquant-int4", True), ("svdquant-nvfp4", False)])
def test_post_gelu_inputs_are_shifted_in_int4_only(recipe: str, shifted: bool) -> None:
    fc = nn.Linear(64, 96)
    made = run([Unit(("fc",), "w4a4", gelu=True)], {"fc": fc}, recipe=recipe)["fc"]
    assert (made.site.shift, made.site.unsigned_act) == ((GELU_SHIFT, True) if shifted else (0.0, False))
    x = nn.functional.gelu(torch.randn(256, 64, generator=torch.Generator().manual_seed(0)))
    for mode in ("a4", "a8", "a16"):
        made.set_mode(mode)
        assert rel(made(x), fc(x)) < 0.15, mode
    assert torch.allclose(made.effective_bias().float(), fc.bias, atol=0.02)  # stored in bf16


def test_parts_are_split_and_the_bias_is_corrected_once() -> None:
    out = nn.Linear(96, 48, bias=False)
    units = [Unit(("out",), "w4a4", False, "", (0, 32)), Unit(("out",), "w4a4", True, "", (32, 96))]
    made = run(units, {"out": out})["out"]
    assert isinstance(made, SplitLinear) and [part.site.unsigned_act for part in made.parts] == [False, True]
    assert made.bias is not None, "a shifted part needs a bias to correct"
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(64, 32, generator=g), nn.functional.gelu(torch.randn(64, 64, generator=g))], 1)
    for mode in ("a4", "a8", "a16"):
        for part in made.parts:
            part.set_mode(mode)
        assert rel(made(x), out(x)) < 0.15, mode


def test_a_1x1_convolution_becomes_one() -> None:
    conv = nn.Conv2d(64, 96, 1)
    made = run([Unit(("c",), "w4a4")], {"c": conv})["c"]
    x = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    assert isinstance(made, QuantConv1x1) and rel(made(x), conv(x)) < 0.1


def test_default_rank_fits_small_layers_and_a_wished_one_must() -> None:
    made = run([Unit(("fc",), "w4a4")], {"fc": nn.Linear(48, 16)})["fc"]
    assert isinstance(made, QuantLinear) and made.site.rank == 16
    with pytest.raises(NunchakuError, match=r"fc: rank 20 exceeds min\(N, K\) = 16"):
        run([Unit(("fc",), "w4a4")], {"fc": nn.Linear(48, 16)}, rank=20)
    assert run([Unit(("fc",), "w4a4")], {"fc": nn.Linear(48, 16)}, rank=0)["fc"].site.rank == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    fc = nn.Linear(64, 96)
    fc.weight.data[3, 5] = value
    with pytest.raises(NunchakuError, match="fc.weight: holds NaN or infinite values"):
        engine().check(jobs_of(Plan(units=[Unit(("fc",), "w4a4")])), nn.ModuleDict({"fc": fc}))


def test_a_recipe_may_ask_for_larger_int4_groups() -> None:
    wide = replace(RECIPES["svdquant-int4"], group=128)
    units = [Unit(("fc",), "w4a4"), Unit(("mod",), "w4a16")]
    modules = {"fc": nn.Linear(256, 64), "mod": nn.Linear(256, 64)}
    with torch.no_grad():
        made = {name: module for job in jobs_of(Plan(units=units))
                for name, module in Engine(wide, Context()).run(job, modules, {})[0].items()}
    assert made["fc"].scales.shape == made["mod"].scales.shape == (64, 2)
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    for mode in ("a4", "a8", "a16"):
        made["fc"].set_mode(mode)
        assert rel(made["fc"](x), modules["fc"](x)) < 0.2, mode
    with pytest.raises(NunchakuError, match="group is a number of int4 weights"):
        replace(RECIPES["svdquant-nvfp4"], group=32)


def test_an_input_that_is_no_gelu_output_is_not_shifted() -> None:
    """A guess from names is checked against the data, where there is some."""
    fc, unit = nn.Linear(64, 96), Unit(("fc",), "w4a4", gelu=True)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    said: list[str] = []
    for data, shift in ((nn.functional.gelu(x), GELU_SHIFT), (x, 0.0)):
        context = Context(log=said.append)
        with torch.no_grad():
            job = Job("", ("fc",), (unit,))
            made, _ = Engine(RECIPES["svdquant-int4"], context).run(job, {"fc": fc}, {unit: stats_of(data)})
        assert made["fc"].site.shift == shift
    assert said == ["fc: is taken for the output of a GELU, but its input reaches below; not shifted"]

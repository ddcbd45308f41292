"""Linears whose smoothing was moved into the layer before: a model, and a twin of it that is divided by powers of two,
so that every number in it is the other's but for its exponent. Adapters give both the same bits."""
from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from nunchaku_py.conv import QuantConv1x1
from nunchaku_py.linear import QuantizedSite, QuantLinear
from nunchaku_py.module_tools import adapted_layers, restate
from nunchaku_py.site import Site
from nunchaku_py.split_linear import SplitLinear
from tests.checks import relative, run, same_bits, state_of
from tests.lora.test_use import OFFLOADS, compiled
from tests.lora.toys import normal, toy
from tests.test_linear import K, N, site, tensors

DOUBLE = ("transformer_blocks", ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out"))
SINGLE = ("single_transformer_blocks", ("attn.to_v",), ("proj_out",))
MODES = ["a4", "a8", "a16"]


def powers(channels: int, seed: int) -> Tensor:
    exponents = torch.randint(-3, 4, (channels,), generator=torch.Generator().manual_seed(seed))
    return (2.0 ** exponents).to(torch.bfloat16)


def scale(the: QuantizedSite, name: str, by: Tensor) -> None:
    if the._parameters.get(name) is not None:
        tensor = getattr(the, name).data
        the.set_tensor(name, (tensor.float() * by).to(tensor.dtype))


def divide(the: QuantizedSite, side: str, divisor: Tensor) -> None:
    """The stored tensors of a site, for an input that arrives divided, or an output that is to be."""
    s = divisor.float()
    if side == "input":
        scale(the, "smooth", 1 / s)
        scale(the, "down", s)
    else:
        scale(the, "channel_scale" if the.site.format == "nvfp4" else "scales",
              1 / (s if the.site.format == "nvfp4" else s[:, None]))
        scale(the, "up", 1 / s[:, None])
        scale(the, "bias", 1 / s)
    the.site = replace(the.site, divided=side)
    the.set_tensor("divisor", divisor)


def pairs(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Names of linears that give values, and of those that read what attention makes of them."""
    for blocks, before, after in (DOUBLE, SINGLE):
        for i in range(len(model.get_submodule(blocks))):
            yield [f"{blocks}.{i}.{name}" for name in before], [f"{blocks}.{i}.{name}" for name in after]


def names(model: nn.Module) -> list[str]:
    return [name for pair in pairs(model) for side in pair for name in side]


def twin_of(model: nn.Module, says_so: bool = True) -> nn.Module:
    twin = copy.deepcopy(model)
    for i, (before, after) in enumerate(pairs(twin)):
        for side, linears in (("output", before), ("input", after)):
            for module in map(twin.get_submodule, linears):
                the = module.parts[0] if isinstance(module, SplitLinear) else module
                divide(the, side, powers(the.rows_in if side == "input" else the.rows_out, i))
    if not says_so:
        for the in [one for one in twin.modules() if isinstance(one, QuantizedSite) and one.site.divided]:
            the.site = replace(the.site, divided="")
            del the._parameters["divisor"]
    restate(twin)
    return twin


def copies(model: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(model)
    if not any(tensor.dtype == torch.float8_e4m3fn for tensor in model.state_dict().values()):  # torch pickles none
        yield pickle.loads(pickle.dumps(model))


@pytest.fixture
def both(fresh: tuple) -> tuple[nn.Module, nn.Module, dict]:
    """(a quantized FLUX, its divided twin, forward arguments)"""
    model, inputs, _ = fresh
    return model, twin_of(model), inputs


def load(models: tuple[nn.Module, ...], seed: int = 0, name: str = "style", **more: Any) -> None:
    for model in models:
        model.load_lora_adapter(toy(model, names(models[0]), seed=seed), prefix=None, adapter_name=name, **more)


def load_biased(models: tuple[nn.Module, ...]) -> None:
    state = toy(models[0], names(models[0]))
    for i, name in enumerate(names(models[0])):
        state[f"{name}.lora_B.bias"] = normal(models[0].get_submodule(name).out_features, seed=i)
    for model in models:
        model.load_lora_adapter(dict(state), prefix=None, adapter_name="biased")


def load_dora(models: tuple[nn.Module, ...]) -> None:
    state = toy(models[0], names(models[0]))
    for i, name in enumerate(names(models[0])):
        rows = models[0].get_submodule(name).out_features
        state[f"{name}.lora_magnitude_vector"] = 0.5 + torch.rand(rows, generator=torch.Generator().manual_seed(i))
    for model in models:
        model.load_lora_adapter(dict(state), prefix=None, adapter_name="dora")


# ------------------------------------------------------------------------------------------------------- whole models
@pytest.mark.parametrize("mode", MODES)
def test_a_lora_adds_the_same_bits(both: tuple, mode: str) -> None:
    model, twin, inputs = both
    for one in (model, twin):
        nq.set_mode(one, mode)
    plain = run(model, inputs)
    assert same_bits(run(twin, inputs), plain)
    load((model, twin))
    adapted = run(model, inputs)
    assert same_bits(run(twin, inputs), adapted) and relative(adapted, plain) > 0.02
    for one in (model, twin):
        one.set_adapters("style", -0.7)
    weaker = run(model, inputs)
    assert same_bits(run(twin, inputs), weaker) and relative(weaker, adapted) > 0.02
    twin.fuse_lora()
    assert same_bits(run(twin, inputs), weaker)
    twin.unfuse_lora()
    assert same_bits(run(twin, inputs), weaker)
    twin.unload_lora()
    assert same_bits(run(twin, inputs), plain)


def test_without_saying_so_it_adds_something_else(both: tuple) -> None:
    model, _, inputs = both
    silent = twin_of(model, says_so=False)
    plain = run(model, inputs)
    assert same_bits(run(silent, inputs), plain)
    load((model, silent))
    adapted = run(model, inputs)
    assert relative(run(silent, inputs), adapted) > 0.5 * relative(adapted, plain)


def test_several_adapters_and_room(both: tuple) -> None:
    model, twin, inputs = both
    nq.reserve_lora(twin, 16)
    load((model, twin))
    load((model, twin), seed=1, name="more")
    for one in (model, twin):
        one.set_adapters(["style", "more"], [0.5, 1.25])
    assert relative(run(twin, inputs), run(model, inputs)) < 0.005  # sums with zeros in them


def test_compressed(both: tuple) -> None:
    """The product that is compressed is the stored one; what is left of it adds the same, as it is of rank 4."""
    model, twin, inputs = both
    load((model, twin))
    load((model, twin), name="again")
    for one in (model, twin):
        one.set_adapters(["style", "again"], [0.5, 0.75])
    exact = run(twin, inputs)
    found = nq.compress_lora(twin, 4, 1e-3)
    assert found.compressed == found.sites > 0
    assert relative(run(twin, inputs), exact) < 0.02 and relative(run(twin, inputs), run(model, inputs)) < 0.02


@pytest.mark.parametrize("form", ["folder", "file", "diffusers"])
def test_a_fused_lora_is_saved_and_read_back(both: tuple, form: str, tmp_path: Path) -> None:
    model, twin, inputs = both
    load((model, twin))
    for one in (model, twin):
        one.fuse_lora(lora_scale=0.6)
        one.unload_lora()
    adapted = run(model, inputs)
    assert same_bits(run(twin, inputs), adapted)
    path = tmp_path / ("twin.safetensors" if form == "file" else "twin")
    nq.save(twin, path)
    read = type(twin).from_pretrained(path, torch_dtype=torch.bfloat16) if form == "diffusers" else nq.load(path)
    assert same_bits(run(read, inputs), adapted)
    load((model, read), seed=3)
    assert same_bits(run(read, inputs), run(model, inputs)) and not same_bits(run(read, inputs), adapted)


def test_what_a_divided_model_carries_is_kept(both: tuple) -> None:
    _, twin, inputs = both
    before, state = run(twin, inputs), state_of(twin)
    kept = [name for name in state if name.endswith(".divisor")]
    assert len(kept) == len(names(twin)) and "transformer_blocks.0.attn.to_v.divisor" in kept
    assert "single_transformer_blocks.0.proj_out.parts.0.divisor" in kept
    for other in copies(twin):
        assert same_bits(run(other, inputs), before)
        assert all(same_bits(other.state_dict()[name], state[name]) for name in kept)


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("kind", ["folded", "beside"])
def test_offloaded(both: tuple, offload: Callable, kind: str) -> None:
    _, twin, inputs = both
    nq.set_fusion(twin, False)
    load((twin,)) if kind == "folded" else load_biased((twin,))
    expected = run(twin, inputs)
    offload(twin)
    assert same_bits(run(twin, inputs), expected)


# -------------------------------------------------------------------------------------------- beside the linears
def test_adapters_train_alike(both: tuple) -> None:
    model, twin, inputs = both
    load((model, twin))
    found = []
    for one in (model, twin):
        y = one(**inputs)[0]
        y.float().square().mean().backward()
        found.append((y, {name: p.grad for name, p in one.named_parameters() if "lora_" in name}))
    assert same_bits(found[0][0].detach(), found[1][0].detach())
    assert len(found[0][1]) == 2 * len(names(model))
    assert all(same_bits(grad, found[1][1][name]) and grad.any() for name, grad in found[0][1].items())


def test_dora(both: tuple) -> None:
    """Norms are those of the weights of the original model."""
    model, twin, inputs = both
    plain = run(model, inputs)
    load_dora((model, twin))
    adapted = run(model, inputs)
    assert same_bits(run(twin, inputs), adapted) and relative(adapted, plain) > 0.02
    for copied in copies(twin):
        assert same_bits(run(copied, inputs), adapted)


def test_with_a_bias(both: tuple) -> None:
    """Which runs beside the linears, in graphs too."""
    model, twin, inputs = both
    load_biased((model, twin))
    adapted = run(model, inputs)
    assert same_bits(run(twin, inputs), adapted)
    assert not any(layer.folded for layer in adapted_layers(twin))
    fast, graphs = compiled(twin)
    assert same_bits(run(fast, inputs), adapted) and len(graphs) == 1


def test_prepared_for_hot_swaps(both: tuple) -> None:
    """PEFT pads the factors: it makes modules of its own for them, which run beside the linear in training."""
    model, twin, inputs = both
    for one in (model, twin):
        one.enable_lora_hotswap(target_rank=8)
    load((model, twin))
    load((model, twin), seed=4, hotswap=True)
    assert same_bits(run(twin, inputs), run(model, inputs))
    for one in (model, twin):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("lora_" in name)
    assert same_bits(twin(**inputs)[0].detach(), model(**inputs)[0].detach())


def test_several_adapters_in_one_batch(both: tuple) -> None:
    model, twin, _ = both
    load((model, twin))
    x = torch.randn(2, 5, model.inner_dim, dtype=torch.bfloat16)
    with torch.no_grad():
        for name in ("transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.to_out.0"):
            one, other = model.get_submodule(name), twin.get_submodule(name)
            s = other.base_layer.divisor
            before, after = (1, s) if name.endswith("to_v") else (s, 1)
            y = one(x, adapter_names=["style", "__base__"])
            assert same_bits(other(x / before, adapter_names=["style", "__base__"]) * after, y)


def test_dequantized_it_is_the_original_model(both: tuple) -> None:
    model, twin, _ = both
    one, other = nq.dequantize(model).state_dict(), nq.dequantize(twin).state_dict()
    assert all(same_bits(tensor, other[name]) for name, tensor in one.items()) and one.keys() == other.keys()


# ------------------------------------------------------------------------- one linear, divided by what is no power of 2
def divided(kind: str, side: str) -> tuple[nn.Module, Tensor]:
    """(a divided module, its divisor over all channels)"""
    the = replace(site(), divided=side)
    s = (0.4 + 2 * torch.rand(K if side == "input" else N, generator=torch.Generator().manual_seed(9))).bfloat16()
    if kind == "split":
        sites = [replace(site(), divided=side), site()]
        module = SplitLinear(sites, [(0, 32), (32, K)], N, True, torch.bfloat16)
        for part, one in zip(module.parts, sites, strict=True):
            part.set_tensors(tensors(one, N, part.in_features, bias=False))
        module.parts[0].set_tensor("divisor", s[:32].clone())
        module.set_tensor("bias", torch.randn(N))
        s[32:] = 1
    else:
        made = tensors(the)
        made.divisor = s
        module = (QuantLinear if kind == "linear" else QuantConv1x1)(the, K, N, True, torch.bfloat16)
        module.set_tensors(made)
    for part in module.modules():
        if isinstance(part, QuantizedSite):
            part.compute_dtype = torch.float32
            part.set_mode("a16")
    return module, s.float()


SHAPES = [("linear", "input"), ("linear", "output"), ("split", "input"), ("conv", "input"), ("conv", "output")]


@pytest.mark.parametrize(("kind", "side", "how"), [(*shape, how) for shape in SHAPES for how in
                                                   ("folded", "beside", "dora") if (shape[0], how) != ("conv", "dora")])
def test_it_adds_what_it_adds_to_the_original(kind: str, side: str, how: str) -> None:
    holder, plain = nn.Module(), nn.Module()
    holder.one, s = divided(kind, side)
    plain.one = holder.one.dense()
    s = s[:, None, None] if kind == "conv" else s
    before, after = (s, 1.0) if side == "input" else (1.0, s)
    x = torch.randn(*((2, K, 3, 3) if kind == "conv" else (7, K)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bare, plainly = holder.one(x / before) * after, plain.one(x)
    assert relative(bare, plainly) < 1e-5
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["one"], init_lora_weights=False, use_dora=how == "dora")
    for module in (holder, plain):
        torch.manual_seed(0)
        inject_adapter_in_model(config, module)
    with torch.set_grad_enabled(how == "beside"):
        y, expected = holder.one(x / before) * after, plain.one(x)
    assert holder.one.folded == (how == "folded")
    # folded, both factors are rounded to bf16; beside, all is in fp32
    assert relative(y - bare, expected - plainly) < (2**-7 if how == "folded" else 1e-4)
    assert relative(expected, plainly) > 0.1


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(("fields", "sentence"), [
    ({"divided": "both"}, "site: divided is '', 'input' or 'output', not 'both'"),
    ({"divided": None}, "site: divided is '', 'input' or 'output', not None"),
    ({"divided": ["input"]}, "site: divided is"),
    ({"divided": "input", "kind": "w4a16", "rank": 0}, "site: only w4a4 sites are divided, not w4a16"),
])
def test_sites_that_cannot_be(fields: dict, sentence: str) -> None:
    with pytest.raises(NunchakuError, match=sentence):
        Site.from_json({"kind": "w4a4", "format": "int4", "group": 64, "rank": 4} | fields)


def test_it_is_written_where_it_is_so() -> None:
    plain = Site("w4a4", "int4", 64, 4)
    assert "divided" not in plain.to_json()
    for side in ("input", "output"):
        one = replace(plain, divided=side)
        assert one.to_json()["divided"] == side and Site.from_json(json.loads(json.dumps(one.to_json()))) == one
        assert one.tensors(N, K, False, torch.float16)["divisor"] == ((K if side == "input" else N,), torch.float16)


def test_a_part_gives_all_outputs() -> None:
    with pytest.raises(NunchakuError, match="parts: each of them gives all outputs, so that only its input may be"):
        SplitLinear([replace(site(), divided="output"), site()], [(0, 32), (32, K)], N, False, torch.bfloat16)


def test_a_divisor_of_another_shape_or_dtype() -> None:
    module, _ = divided("linear", "input")
    with pytest.raises(NunchakuError, match=rf"divisor: expected \({K},\) bfloat16, got \({N},\) bfloat16"):
        module.set_tensor("divisor", torch.ones(N, dtype=torch.bfloat16))
    with pytest.raises(NunchakuError, match=rf"divisor: expected \({K},\) bfloat16, got \({K},\) float32"):
        module.set_tensor("divisor", torch.ones(K))


VALUE = "transformer_blocks.0.attn.to_v"
BAD: dict[str, tuple[Callable[[dict], Any], str]] = {
    "missing": (lambda state: state.pop(f"{VALUE}.divisor"), "1 tensors are missing"),
    "unexpected": (lambda state: state.update({f"{VALUE[:-1]}q.divisor": torch.ones(128).bfloat16()}), "unexpected"),
    "zero": (lambda state: state[f"{VALUE}.divisor"][3:4].zero_(), "must not be zero"),
    "infinite": (lambda state: state[f"{VALUE}.divisor"][3:4].fill_(torch.inf), "holds NaN or infinite values"),
    "shape": (lambda state: state.update({f"{VALUE}.divisor": torch.ones(7).bfloat16()}), r"\(7,\)"),
    "dtype": (lambda state: state.update({f"{VALUE}.divisor": torch.ones(128)}), "float32"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_files_that_are_refused(both: tuple, case: str, form: str, tmp_path: Path) -> None:
    change, sentence = BAD[case]
    path = tmp_path / ("twin.safetensors" if form == "file" else "twin")
    nq.save(both[1], path)
    weights = path if form == "file" else next(path.glob("*.safetensors"))
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    state = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    change(state)
    save_file(state, weights, metadata=metadata)
    with pytest.raises(NunchakuError, match=sentence) as caught:
        nq.load(path)
    assert "divisor" in str(caught.value)

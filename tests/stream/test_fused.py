"""LoRAs in the weights: against their formula in fp64, and against the merging of PEFT."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nunchaku_py.errors import NunchakuError
from nunchaku_py.lora.delta import Delta
from nunchaku_py.stream.fused import FusedLora, fuse
from nunchaku_py.stream.sources import open_source
from tests.lora.writers import (
    FLUX_FUSED,
    KOHYA,
    PEFT,
    XLABS,
    blocks,
    change,
    flattened,
    lora_of,
    normal,
    prefixed,
    random_lora,
    target_of,
    write,
    write_fused,
)
from tests.tiny import MODELS

State = dict[str, Tensor]
FIRST = "transformer_blocks.0.attn.to_q"
Source = tuple[Path, State, Any]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """(folder, state, target)"""
    return saved("flux", tmp_path_factory.mktemp("flux"))


def saved(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Source:
    model = MODELS[name]()[0].to(dtype)
    model.save_pretrained(folder)
    return folder, {key: tensor.clone() for key, tensor in model.state_dict().items()}, target_of(model)


def file_of(state: State, tmp_path: Path, metadata: dict[str, str] | None = None) -> Path:
    path = tmp_path / f"lora_{len(list(tmp_path.iterdir()))}.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path, metadata)
    return path


def fused(folder: Path, *loras: tuple[Path, float]) -> FusedLora:
    config, weights = open_source(folder)
    return fuse(weights, config, loras)


def assert_added(weights: FusedLora, state: State, changes: dict[str, Tensor], size: float = 0.0) -> None:
    """Every weight is W + change, in fp64, but for fp32 sums and one rounding to the weight's type; the others are W's
    bits. size: of the largest sum of magnitudes that a change was made of."""
    assert set(weights.tensors) == set(state)
    for name, tensor in state.items():
        read = weights.read(name)
        if name not in changes:
            assert torch.equal(read, tensor), name
            continue
        wanted = tensor.double() + changes[name].reshape(tensor.shape)
        bound = torch.finfo(tensor.dtype).eps / 2 * wanted.abs() + 16 * 2.0**-24 * (wanted.abs() + size)
        assert read.dtype == tensor.dtype and ((read.double() - wanted).abs() <= bound).all(), name
        assert not torch.equal(read, tensor), name


def magnitude(lora: dict[str, Delta], strength: float = 1.0) -> float:
    return max(float(abs(strength) * delta.alpha / delta.rank * (delta.up.double().flatten(1).abs()
                                                                @ delta.down.double().flatten(1).abs()).max())
               for delta in lora.values())


@pytest.mark.parametrize(("table", "name", "parts"), [
    (None, prefixed("transformer."), PEFT), (None, flattened("lora_unet_"), KOHYA), (None, prefixed(""), PEFT),
    (FLUX_FUSED, flattened("lora_unet_"), KOHYA), (FLUX_FUSED, prefixed("diffusion_model."), PEFT),
    (XLABS, prefixed(""), (".down.weight", ".up.weight")),
])
def test_every_format(table: dict | None, name: Callable[[str], str], parts: tuple[str, str], flux: Source,
                      tmp_path: Path) -> None:
    folder, state, target = flux
    if table is None:
        lora = random_lora(target.shapes)
        keys = write(lora, name, parts)
    else:
        rows = blocks(table, target)
        lora = lora_of(rows, target)
        keys = write_fused(lora, rows, name, parts)
    path = file_of(keys, tmp_path)
    weights = fused(folder, (path, 0.75))
    changes = {f"{module}.weight": 0.75 * change(delta) for module, delta in lora.items()}
    assert_added(weights, state, changes, magnitude(lora, 0.75))
    assert len(weights.notes) == 1 and weights.notes[0].startswith(
        f"{path}: fused into {len(lora)} modules at strength 0.75 (")


def test_convolutions(tmp_path: Path) -> None:
    folder, state, target = saved("sdxl", tmp_path / "sdxl")
    lora = random_lora({name: shape for name, shape in target.shapes.items() if "resnets" in name or "attn1" in name})
    assert any(len(target.shapes[name]) == 4 for name in lora)
    path = file_of(write(lora, prefixed("unet."), PEFT), tmp_path)
    assert_added(fused(folder, (path, 1.0)), state, {f"{name}.weight": change(delta) for name, delta in lora.items()},
                 magnitude(lora))


def test_several_loras_are_added(flux: Source, tmp_path: Path) -> None:
    folder, state, target = flux
    first = random_lora({FIRST: target.shapes[FIRST]})
    second = {FIRST: Delta(normal(8, 2, 128), normal(9, 128, 2), 6.0)}
    files = [file_of(write(lora, prefixed("transformer."), PEFT), tmp_path) for lora in (first, second)]
    weights = fused(folder, (files[0], 0.5), (files[1], -2.0))
    added = 0.5 * change(first[FIRST]) - 2 * change(second[FIRST])
    assert_added(weights, state, {f"{FIRST}.weight": added}, magnitude(first, 0.5) + magnitude(second, 2))
    assert len(weights.notes) == 2


def test_kronecker_products_of_any_rank(flux: Source, tmp_path: Path) -> None:
    folder, state, target = flux
    parts = {"lokr_w1": normal(1, 4, 4), "lokr_w2": normal(2, 32, 32)}
    path = file_of({f"lora_unet_{FIRST.replace('.', '_')}.{leaf}": part for leaf, part in parts.items()}, tmp_path)
    product = torch.kron(parts["lokr_w1"].double(), parts["lokr_w2"].double())
    assert_added(fused(folder, (path, 0.5)), state, {f"{FIRST}.weight": 0.5 * product}, float(product.abs().max()))


def test_full_differences(flux: Source, tmp_path: Path) -> None:
    folder, state, target = flux
    difference = normal(1, 128, 128).bfloat16()
    path = file_of({f"diffusion_model.{FIRST}.diff": difference, f"diffusion_model.{FIRST}.diff_b": normal(3, 128)},
                   tmp_path)
    changes = {f"{FIRST}.weight": difference.double(), f"{FIRST}.bias": normal(3, 128).double()}
    assert_added(fused(folder, (path, 1.0)), state, changes, 1.0)


def test_alphas_in_the_metadata(flux: Source, tmp_path: Path) -> None:
    folder, state, target = flux
    lora = random_lora({FIRST: target.shapes[FIRST]}, alpha=16.0)
    said = {"transformer.r": 4, "transformer.lora_alpha": 16}
    path = file_of(write(lora, prefixed("transformer."), PEFT, alpha=None), tmp_path,
                   {"lora_adapter_metadata": json.dumps(said)})
    assert_added(fused(folder, (path, 1.0)), state, {f"{FIRST}.weight": change(lora[FIRST])}, magnitude(lora))
    broken = file_of(write(lora, prefixed("transformer."), PEFT), tmp_path, {"lora_adapter_metadata": "["})
    with pytest.raises(NunchakuError, match="lora_adapter_metadata cannot be understood"):
        fused(folder, (broken, 1.0))


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
def test_as_peft_merges(dora: bool, strength: float, tmp_path: Path) -> None:
    """In fp32, so that only the order of sums differs."""
    folder, state, target = saved("flux", tmp_path / "flux", torch.float32)
    names = [name for name in target.shapes if "attn" in name or name.endswith("proj_mlp")]
    lora = random_lora({name: target.shapes[name] for name in names}, dtype=torch.float32)
    keys = write(lora, prefixed(""), PEFT, alpha=None)
    if dora:
        keys |= {f"{name}.lora_magnitude_vector": normal(n, target.shapes[name][0]).abs() + 1
                 for n, name in enumerate(names)}
    model = MODELS["flux"]()[0].float()
    alphas = {"r": 4, "lora_alpha": 2, "target_modules": names, "use_dora": dora}
    model.load_lora_adapter(dict(keys), prefix=None, adapter_name="a", metadata=alphas)
    model.set_adapters(["a"], [strength])
    model.fuse_lora(safe_fusing=True)
    merged = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    path = file_of({f"transformer.{key}": tensor for key, tensor in keys.items()}, tmp_path, {
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in alphas.items()})})
    weights = fused(folder, (path, strength))
    for name, tensor in state.items():
        read = weights.read(name)
        assert torch.allclose(read, merged[name], rtol=1e-5, atol=1e-5 * float(merged[name].abs().max())), name
        assert torch.equal(read, tensor) != (name.removesuffix(".weight") in names), name


def test_dora_of_a_fused_weight(flux: Source, tmp_path: Path) -> None:
    folder, state, _ = flux
    names = [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"]
    down, up, norms = normal(1, 4, 128), normal(2, 384, 4), normal(3, 384).abs() + 1
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    path = file_of({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": norms,
                    f"{stem}.alpha": torch.tensor(4.0)}, tmp_path)
    changes = {}
    for n, name in enumerate(names):
        rows = slice(128 * n, 128 * n + 128)
        weight = state[f"{name}.weight"].double()
        changed = weight + up[rows].double() @ down.double()
        changes[f"{name}.weight"] = norms[rows, None].double() * changed / changed.norm(dim=1, keepdim=True) - weight
    assert_added(fused(folder, (path, 1.0)), state, changes, 16.0)


# ---------------------------------------------------------------------------------------------------- what is not used
def test_keys_that_find_no_place_are_counted(flux: Source, tmp_path: Path) -> None:
    folder, _, target = flux
    keys = write(random_lora({FIRST: target.shapes[FIRST]}), prefixed("transformer."), PEFT)
    keys |= write(random_lora({"layers.7.nothing": (4, 4)}), prefixed("transformer."), PEFT)
    keys |= write(random_lora({"text_model_encoder_layers_0_mlp_fc1": (4, 4)}), prefixed("lora_te1_"), KOHYA)
    notes = fused(folder, (file_of(keys, tmp_path), 1.0)).notes
    assert len(notes) == 3 and "fused into 1 modules" in notes[0]
    assert "3 keys are for text encoders, into which they are not fused: lora_te1_text_model" in notes[1]
    assert "3 keys find no module: transformer.layers.7.nothing.alpha" in notes[2]


@pytest.mark.parametrize(("keys", "said"), [
    (write(random_lora({"a.b": (4, 4)}), prefixed("transformer."), PEFT), "changes no module of a FluxTr"),
    ({"x.weight": torch.ones(2)}, "no key is one of a LoRA"),
    ({f"{FIRST}.lora_A.weight": torch.ones(2, 128)}, "half of a pair is missing"),
    ({f"{FIRST}.lora_A.weight": torch.ones(2, 64), f"{FIRST}.lora_B.weight": torch.ones(128, 2)}, "shapes do not fit"),
    ({f"{FIRST}.lora_A.weight": torch.full((2, 128), float("nan")), f"{FIRST}.lora_B.weight": torch.ones(128, 2)},
     "holds NaN"),
    ({"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(64), f"{FIRST}.lora_A.weight": torch.ones(2, 128)},
     "BFL FLUX control"),
])
def test_loras_that_are_refused(keys: State, said: str, flux: Source, tmp_path: Path) -> None:
    path = file_of(keys, tmp_path)
    with pytest.raises(NunchakuError, match=said) as error:
        fused(flux[0], (path, 1.0))
    assert str(path) in str(error.value)


def test_a_bias_that_has_no_place(tmp_path: Path) -> None:
    folder, _, target = saved("z_image", tmp_path / "z")
    name = next(name for name in target.shapes if name.endswith("attention.to_q"))
    rows, columns = target.shapes[name]
    path = file_of({f"{name}.lora_A.weight": normal(1, 2, columns), f"{name}.lora_B.weight": normal(2, rows, 2),
                    f"{name}.lora_B.bias": normal(3, rows)}, tmp_path)
    with pytest.raises(NunchakuError, match=f"changes the bias of {name}, which has none"):
        fused(folder, (path, 1.0))


def test_a_strength_that_is_none(flux: Source, tmp_path: Path) -> None:
    path = file_of(write(random_lora({FIRST: (128, 128)}), prefixed("transformer."), PEFT), tmp_path)
    with pytest.raises(NunchakuError, match="expected a finite strength, got nan"):
        fused(flux[0], (path, float("nan")))


def test_a_weight_changed_twice(flux: Source, tmp_path: Path) -> None:
    keys = write(random_lora({FIRST: (128, 128)}), prefixed("transformer."), PEFT)
    rows = {"double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"]}
    keys |= write_fused(lora_of(rows, flux[2]), rows, prefixed("diffusion_model."), PEFT)
    with pytest.raises(NunchakuError, match=f"{FIRST}: changed twice"):
        fused(flux[0], (file_of(keys, tmp_path), 1.0))

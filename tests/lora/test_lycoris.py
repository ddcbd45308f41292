"""LoHa, LoKr and full differences against their dense formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nunchaku_py.errors import NunchakuError
from nunchaku_py.lora.compress import spectrum_of_matrix
from nunchaku_py.lora.formats import Delta, Reading, Target, read
from tests.lora.writers import change, flattened, normal, target_of
from tests.tiny import MODELS

State = dict[str, Tensor]
N, K = 24, 20
RANKS = st.integers(1, 5)


def linear(rows: int = N, columns: int = K) -> dict[str, Target]:
    return {"unet": Target("Any", {"a.b": (rows, columns)})}


def parts(prefix: str, dtype: torch.dtype = torch.bfloat16, **shapes: tuple[int, ...]) -> State:
    return {f"lora_unet_a_b.{prefix}{name}": normal(sum(shape) + n, *shape).to(dtype)
            for n, (name, shape) in enumerate(shapes.items())}


def alpha(value: float) -> State:
    return {"lora_unet_a_b.alpha": torch.tensor(value)}


def only(reading: Reading) -> Delta:
    assert reading.unread == []
    return reading.deltas["unet"]["a.b"]


def of(state: State, name: str) -> Tensor:
    return state[f"lora_unet_a_b.{name}"].double()


def close(got: Tensor, want: Tensor, tolerance: float = 1e-6) -> None:
    assert (got - want).norm() <= tolerance * want.norm()


# ------------------------------------------------------------------------------------------------------------- LoHa
def loha(first: int, second: int, rows: int = N, columns: int = K) -> State:
    return parts("hada_", w1_a=(rows, first), w1_b=(first, columns), w2_a=(rows, second), w2_b=(second, columns))


def dense_loha(state: State) -> Tensor:
    return (of(state, "hada_w1_a") @ of(state, "hada_w1_b")) * (of(state, "hada_w2_a") @ of(state, "hada_w2_b"))


@settings(deadline=None, max_examples=25)
@given(first=RANKS, second=RANKS, scale=st.sampled_from([0.25, 1.0, 7.0]))
def test_loha_is_exact(first: int, second: int, scale: float) -> None:
    state = loha(first, second)
    reading = read(state | alpha(scale), linear())
    delta = only(reading)
    assert delta.rank == first * second and delta.up.dtype == torch.float32
    assert reading.notes == [f"LoHa: rank {first} became {first * second}"] and reading.format == "LoHa"
    close(change(delta), scale / first * dense_loha(state), 1e-12)  # of bf16 factors no product is rounded


def test_loha_of_a_convolution_with_cores() -> None:
    state = parts("hada_", w1_a=(2, 6), w1_b=(2, 5), t1=(2, 2, 3, 3), w2_a=(2, 6), w2_b=(2, 5), t2=(2, 2, 3, 3))
    delta = only(read(state, {"unet": Target("Any", {"a.b": (6, 5, 3, 3)})}))
    assert delta.down.shape == (4, 5, 3, 3) and delta.up.shape == (6, 4, 1, 1)
    sides = [torch.einsum("ijkl,jr,ip->prkl", of(state, f"hada_t{n}"), of(state, f"hada_w{n}_b"),
                          of(state, f"hada_w{n}_a")) for n in (1, 2)]
    close(change(delta), (sides[0] * sides[1]).flatten(1))


def test_loha_of_a_convolution() -> None:
    state = parts("hada_", w1_a=(6, 2), w1_b=(2, 45), w2_a=(6, 2), w2_b=(2, 45))
    close(change(only(read(state, {"unet": Target("Any", {"a.b": (6, 5, 3, 3)})}))), dense_loha(state))


def test_a_rank_above_most_is_first_lowered_without_loss() -> None:
    state = loha(4, 5)
    for name in ("hada_w1_a", "hada_w2_a"):  # of rank 2 each
        key = f"lora_unet_a_b.{name}"
        state[key] = state[key][:, :1].repeat(1, state[key].shape[1])
        state[key][:, 0] = normal(3, N).bfloat16()
    reading = read(state, linear(), most=6)
    assert only(reading).rank == 4 and reading.notes == ["LoHa: rank 4 became 4"]
    close(change(only(reading)), dense_loha(state))


# ------------------------------------------------------------------------------------------------------------- LoKr
LOKR = {
    "whole and factored": dict(w1=(4, 5), w2_a=(6, 2), w2_b=(2, 4)),
    "factored and whole": dict(w1_a=(4, 2), w1_b=(2, 5), w2=(6, 4)),
    "both factored": dict(w1_a=(4, 2), w1_b=(2, 5), w2_a=(6, 2), w2_b=(2, 4)),
    "both whole": dict(w1=(4, 5), w2=(6, 4)),
    "more rank than rows": dict(w1=(4, 5), w2_a=(6, 9), w2_b=(9, 4)),
}


def side(state: State, name: str) -> Tensor:
    whole = f"lora_unet_a_b.lokr_{name}" in state
    return of(state, f"lokr_{name}") if whole else of(state, f"lokr_{name}_a") @ of(state, f"lokr_{name}_b")


def lokr_scale(state: State, value: float) -> float:
    """alpha/r where a factor is given as a product, as LyCORIS has it, and 1 otherwise."""
    ranks = [tensor.shape[0] for key, tensor in state.items() if key.endswith(("w2_b", "w1_b"))]
    return value / ranks[-1] if ranks else 1.0


@pytest.mark.parametrize("case", LOKR)
@pytest.mark.parametrize("most", [512, 6])
def test_lokr(case: str, most: int) -> None:
    state = parts("lokr_", **LOKR[case])
    dense = torch.kron(side(state, "w1"), side(state, "w2"))
    reading = read(state | alpha(3.0), linear(), most=most, tolerance=0.999)
    delta, want = only(reading), lokr_scale(state, 3.0) * dense
    exact = torch.linalg.matrix_rank(dense)
    if exact <= most:
        assert delta.rank == exact and not any("kept" in note for note in reading.notes)
        close(change(delta), want)
    else:
        assert delta.rank <= most and "kept" in reading.notes[0]
        assert (change(delta) - want).norm() < 0.999 * want.norm()


def test_lokr_truncates_as_well_as_an_svd() -> None:
    state = parts("lokr_", w1=(4, 5), w2=(6, 4))
    dense = torch.kron(side(state, "w1"), side(state, "w2"))
    values = torch.linalg.svdvals(dense)
    lost = float(values[10:].square().sum().sqrt() / values.norm())
    reading = read(state, linear(), most=10, tolerance=lost * 1.001)
    assert only(reading).rank == 10
    assert float((change(only(reading)) - dense).norm() / dense.norm()) == pytest.approx(lost, abs=1e-6)
    assert reading.notes == [f"1 LoKr module: kept {100 * (1 - lost):.4g} % of the norm"]
    with pytest.raises(NunchakuError, match="a.b: as low-rank products \\(LoKr\\) these changes need rank 16"):
        read(state, linear(), most=10, tolerance=lost * 0.999)
    with pytest.raises(NunchakuError, match="Allow more by max_rank=16, or less of it by tolerance="):
        read(state, linear(), most=10)


def test_a_refusal_does_not_measure_hundreds_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {f"m{n}": (N, K) for n in range(9)}
    state = {f"{name}.diff": normal(n, N, K) for n, name in enumerate(modules)}
    measured = []
    monkeypatch.setattr("nunchaku_py.lora.lycoris.spectrum_of_matrix",
                        lambda matrix: measured.append(1) or spectrum_of_matrix(matrix))
    with pytest.raises(NunchakuError, match="m0, m1, m2, … and 6 more: as low-rank products"):
        read(state, {"unet": Target("Any", modules)}, most=4)
    assert len(measured) == 3


def test_lokr_of_a_convolution() -> None:
    target = {"unet": Target("Any", {"a.b": (6, 8, 3, 3)})}
    for case in (dict(w1=(2, 4), w2=(3, 2, 3, 3)), dict(w1=(2, 4), w2_a=(3, 2), w2_b=(2, 18)),
                 dict(w1=(2, 4), w2_a=(2, 3), w2_b=(2, 2), t2=(2, 2, 3, 3))):
        state = parts("lokr_", **case)
        second = of(state, "lokr_w2") if "w2" in case else None
        if "t2" in case:
            second = torch.einsum("ijkl,jr,ip->prkl", of(state, "lokr_t2"), of(state, "lokr_w2_b"),
                                  of(state, "lokr_w2_a"))
        elif second is None:
            second = (of(state, "lokr_w2_a") @ of(state, "lokr_w2_b")).reshape(3, 2, 3, 3)
        dense = torch.kron(of(state, "lokr_w1")[:, :, None, None], second.contiguous())
        close(change(only(read(state, target))), dense.flatten(1))


@pytest.mark.parametrize(("model", "stem", "modules"), [
    ("flux", "double_blocks_0_img_attn_qkv", [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"]),
    ("flux2", "double_blocks_1_txt_attn_qkv", [f"transformer_blocks.1.attn.add_{n}_proj" for n in "qkv"]),
    ("z_image", "layers_0_attention_qkv", [f"layers.0.attention.to_{n}" for n in "qkv"]),
])
def test_fused_weights(model: str, stem: str, modules: list[str]) -> None:
    target = target_of(MODELS[model]()[0])
    width = target.shapes[modules[0]][0]
    loha_state = loha(2, 3, 3 * width, width)
    lokr_state = parts("lokr_", w1=(4, 4), w2_a=(3 * width // 4, 2), w2_b=(2, width // 4))
    for state, dense in ((loha_state, dense_loha(loha_state)),
                         (lokr_state, torch.kron(side(lokr_state, "w1"), side(lokr_state, "w2")))):
        renamed = {key.replace("lora_unet_a_b", flattened("lora_unet_")(stem)): value for key, value in state.items()}
        deltas = read(renamed, {"transformer": target}).deltas["transformer"]
        close(torch.cat([change(deltas[name]) for name in modules]), dense)


# --------------------------------------------------------------------------------------------------- full differences
def test_a_full_difference_is_kept_to_the_bit() -> None:
    state = {"a.b.diff": normal(1, N, K), "a.b.diff_b": normal(2, N)}
    delta = only(read(state, linear()))
    assert torch.equal(delta.up @ delta.down, state["a.b.diff"]) and delta.alpha == delta.rank == K
    assert torch.equal(delta.bias, state["a.b.diff_b"])


def test_a_full_difference_of_low_rank_takes_no_more() -> None:
    difference = normal(1, N, 3) @ normal(2, 3, K)
    reading = read({"a.b.diff": difference}, linear(), most=5)
    assert only(reading).rank == 3
    close(change(only(reading)), difference.double(), 1e-5)


def test_locon_with_a_core() -> None:
    state = {f"lora_unet_a_b.lora_{name}.weight": normal(n, *shape) for n, (name, shape) in enumerate(
        {"down": (2, 5, 1, 1), "mid": (3, 2, 3, 3), "up": (6, 3, 1, 1)}.items())}
    delta = only(read(state, {"unet": Target("Any", {"a.b": (6, 5, 3, 3)})}))
    want = torch.einsum("ijkl,jc,ni->nckl", of(state, "lora_mid.weight"), of(state, "lora_down.weight").flatten(1),
                        of(state, "lora_up.weight").flatten(1))
    close(change(delta), want.flatten(1))


@pytest.mark.parametrize(("state", "sentence"), [
    (loha(2, 2, N + 1), "expected a change of \\(24, 20\\), got LoHa of \\(25, 20\\)"),
    (parts("hada_", w1_a=(N, 2), w1_b=(3, K), w2_a=(N, 2), w2_b=(2, K)), "hada_w1_b: expected rank 2, got 3"),
    (parts("lokr_", w1=(4, 5), w2=(6, 5)), "expected a change of \\(24, 20\\), got LoKr of \\(24, 25\\)"),
    (parts("lokr_", w1=(4, 5), w2_a=(6, 2)), "half of a pair is missing: no lokr_w2 or lokr_w2_a with lokr_w2_b"),
    (parts("hada_", w1_a=(N, 2), w1_b=(2, K), w2_a=(N, 2)), "no hada_w2_b beside lora_unet_a_b.hada_w1_a"),
    (parts("lokr_", w1=(4,), w2=(6, 4)), "lokr_w1: expected a matrix, got \\(4,\\)"),
    ({"a.b.diff": normal(1, K, N)}, "expected a change of \\(24, 20\\), got diff of \\(20, 24\\)"),
])
def test_refusals(state: State, sentence: str) -> None:
    with pytest.raises(NunchakuError, match=sentence):
        read(state, linear())

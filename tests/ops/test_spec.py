"""Specs: tokens that mean the same spec, and refusals."""
import pytest

from nunchaku_py.errors import NunchakuError
from nunchaku_py.formats import INT4, NVFP4
from nunchaku_py.ops import ActSpec, AttentionSpec, LinearSpec

SPECS = [
    ActSpec("int4", 64),
    ActSpec("uint4", 64, shift=0.171875, layout="tiles"),
    ActSpec("none", norm="rms", eps=1e-5),
    LinearSpec("int4", 64, 3072, ActSpec("int4", 64)),
    LinearSpec("nvfp4", 16, 131, ActSpec("nvfp4", 16), layout="tiles", activation="silu", gate_first=True,
               next=ActSpec("int8"), head_dim=128, eps=1e-5),
    AttentionSpec(),
    AttentionSpec("fp8", scale=0.1),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_token_is_the_spec(spec):
    assert type(spec).parse(spec.token) == spec
    assert type(spec).parse(spec.token) is type(spec).parse(spec.token)


def test_tokens_differ_when_specs_do():
    assert len({spec.token for spec in SPECS}) == len(SPECS)
    assert SPECS[0].token == '{"format":"int4","group":64}'


def test_formats_and_layouts():
    assert SPECS[0].fmt == INT4 and SPECS[2].fmt is None and SPECS[4].fmt == NVFP4
    assert SPECS[4].layouts == ("tiles", "row", "row") and SPECS[1].layouts == ("tiles",)


@pytest.mark.parametrize("make, sentence", [
    (lambda: ActSpec("int5", 64), "ActSpec.format: expected one of int4, uint4, nvfp4, int8, none, got 'int5'"),
    (lambda: ActSpec("int4", 64, norm="batch"), "ActSpec.norm: expected one of none, layer, rms, got 'batch'"),
    (lambda: LinearSpec("none", 0, 1, SPECS[0]), "LinearSpec.weight: expected one of int4, uint4, nvfp4, int8"),
    (lambda: LinearSpec("int4", 64, 1, SPECS[0], activation="relu"), "LinearSpec.activation: .* got 'relu'"),
    (lambda: AttentionSpec("int8"), "AttentionSpec.products: expected one of auto, fp8, 16bit, got 'int8'"),
    (lambda: AttentionSpec(scale=float("nan")), "AttentionSpec.scale: expected a finite number, got nan"),
])
def test_unknown_words_are_refused(make, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        make()


@pytest.mark.parametrize("make", [lambda: ActSpec("int8", 64), lambda: LinearSpec("int8", 64, 1, SPECS[0])])
def test_int8_has_one_scale_for_a_row(make):
    with pytest.raises(NunchakuError, match=r"Spec.group: int8 has one scale for the whole row .* got groups of 64"):
        make()

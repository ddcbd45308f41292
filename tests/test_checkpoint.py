"""The manifest: JSON round trip, globs, refusals; and keys that a reader checks."""

import json

import pytest
import torch
from torch import nn

from nunchaku_py.checkpoint import Manifest
from nunchaku_py.checkpoint.manifest import entry_from_json, entry_to_json
from nunchaku_py.checkpoint.validate import check_keys, check_loaded
from nunchaku_py.errors import NunchakuError
from nunchaku_py.linear import QuantLinear
from nunchaku_py.site import Site
from nunchaku_py.split_linear import SplitLinear

SITE = Site("w4a4", "int4", 64, 4)
SHIFTED = Site("w4a4", "int4", 64, 4, 0.171875, True)


def model() -> nn.Module:
    block = lambda: nn.ModuleDict({"q": nn.Linear(64, 32), "out": nn.Linear(96, 32, bias=False)})  # noqa: E731
    return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "head": nn.Linear(8, 8)})


def manifest() -> Manifest:
    parts = (((0, 32), SITE), ((32, 96), SHIFTED))
    sites = {"blocks.*.q": SITE, "blocks.1.q": SHIFTED, "blocks.0.out": parts}
    return Manifest("bfloat16", sites, [["a", "b"]], "r", {"n": 1})


def test_json_round_trip() -> None:
    data = json.loads(json.dumps(manifest().to_json()))
    assert Manifest.from_json(data) == manifest()
    assert data["sites"]["blocks.0.out"]["parts"][1]["k_range"] == [32, 96]
    assert entry_from_json(entry_to_json(SHIFTED)) == SHIFTED


def test_install_resolves_globs_exact_names_first() -> None:
    built = model()
    manifest().install(built, None, "file")
    blocks = built["blocks"]
    assert isinstance(blocks[0]["q"], QuantLinear) and blocks[0]["q"].site == SITE and blocks[1]["q"].site == SHIFTED
    assert isinstance(blocks[0]["out"], SplitLinear) and blocks[0]["out"].ranges == ((0, 32), (32, 96))
    assert type(blocks[1]["out"]) is nn.Linear and type(built["head"]) is nn.Linear


def test_a_bias_that_the_file_holds_is_declared() -> None:
    built = model()
    keys = [f"blocks.{i}.q.bias" for i in (0, 1)] + ["blocks.0.out.bias"]
    manifest().install(built, keys, "file")
    assert built["blocks"][0]["out"].bias is not None
    with pytest.raises(NunchakuError, match="file: blocks.0.q.bias is missing"):
        manifest().install(model(), [], "file")


@pytest.mark.parametrize(("change", "sentence"), [
    ({"format_version": 2}, "c: format_version is 2, this release reads 1"),
    ({"compute_dtype": "float8"}, "c: compute_dtype is 'float8', expected one of"),
    ({"sites": {}}, "c: 'sites' must be a non-empty table"),
    ({"sites": {"a": {"kind": "w4a4"}}}, "c: bad site entry: site: missing fields"),
    ({"sites": {"a": {"kind": "w4a4", "format": "int5", "group": 64}}}, "format is 'int4', 'uint4' or 'nvfp4'"),
    ({"sites": {"a": {"parts": [], "kind": "w4a4"}}}, "an entry with parts holds nothing else"),
])
def test_bad_manifests_are_refused_in_a_sentence(change: dict, sentence: str) -> None:
    with pytest.raises(NunchakuError, match=sentence):
        Manifest.from_json({**manifest().to_json(), **change}, "c")


def test_sites_must_match_the_model() -> None:
    with pytest.raises(NunchakuError, match=r"file: site 'nothing\.\*' matches no linear"):
        Manifest(sites={"nothing.*": SITE}).install(model(), None, "file")
    with pytest.raises(NunchakuError, match="k_range of the parts ends at 64, the linear has 96 inputs"):
        Manifest(sites={"blocks.0.out": (((0, 64), SITE),)}).install(model(), None, "file")


def test_missing_and_unexpected_keys_are_counted_and_named() -> None:
    plain = nn.Linear(2, 2)
    with pytest.raises(NunchakuError, match="f: 1 tensors are missing: bias"):
        check_keys(plain, ["weight"], "f")
    with pytest.raises(NunchakuError, match="f: 1 tensors are unexpected: gamma"):
        check_keys(plain, ["weight", "bias", "gamma"], "f")


@pytest.mark.parametrize(("leaf", "value", "sentence"), [
    ("scales", float("nan"), "q.scales: holds NaN or infinite values"),
    ("up", float("inf"), "q.up: holds NaN or infinite values"),
    ("smooth", 0.0, "q.smooth: must be positive"),
])
def test_loaded_tensors_must_make_sense(leaf: str, value: float, sentence: str) -> None:
    holder = nn.ModuleDict({"q": QuantLinear(SITE, 64, 32, False, torch.bfloat16)})
    for name, (shape, dtype) in SITE.tensors(32, 64, False, torch.bfloat16).items():
        holder["q"].set_tensor(name, torch.ones(shape, dtype=dtype))
    check_loaded(holder, "f")
    holder["q"]._parameters[leaf].data.view(-1)[0] = value
    with pytest.raises(NunchakuError, match=f"f: {sentence}"):
        check_loaded(holder, "f")


def test_a_tensor_left_on_the_meta_device_is_missing() -> None:
    with pytest.raises(NunchakuError, match="f: 4 tensors are missing: q.codes, q.down, q.scales, …"):
        holder = nn.ModuleDict({"q": QuantLinear(SITE, 64, 32, False, torch.bfloat16)})
        holder["q"].set_tensor("up", torch.ones(32, 4, dtype=torch.bfloat16))
        check_loaded(holder, "f")

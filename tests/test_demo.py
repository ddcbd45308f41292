"""The demonstration: its models are reproducible, its measures are right, and the small form runs end to end."""

import csv
from pathlib import Path

import torch

from nunchaku_py import cli
from nunchaku_py.demo import TINY, flux_pipeline, flux_transformer
from nunchaku_py.demo.tokens import byte_tokenizer


def test_the_same_seed_gives_the_same_pipeline():
    one, two, other = (flux_pipeline(TINY, seed) for seed in (0, 0, 1))
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        first, second = (pipe.components[name].state_dict() for pipe in (one, two))
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert not torch.equal(one.transformer.x_embedder.weight, other.transformer.x_embedder.weight)


def test_weights_have_tails_and_inputs_have_outlier_channels():
    model = flux_transformer(TINY)
    weight = model.transformer_blocks[0].ff.net[2].weight
    kurtosis = (weight / weight.std()).pow(4).mean().item()
    assert kurtosis > 4  # a gaussian has 3
    scale = model.transformer_blocks[0].norm1.linear.bias.view(6, -1)[1]
    assert scale.abs().max() > 10 > 20 * scale.abs().median()


def test_tokenizer_has_one_token_per_byte():
    tokenizer = byte_tokenizer(16)
    ids = tokenizer("cät", padding="max_length", truncation=True).input_ids
    assert len(ids) == 16 and len(tokenizer("cät").input_ids) == 5  # four bytes and the end
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cät"


def test_demo_end_to_end(tmp_path: Path, capsys):
    assert cli.main(["demo", "--tiny", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    assert "DIFFERS" not in said and "bit for bit" in said and "random" in said
    with (tmp_path / "demo/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 and all(row["same_bits_after_reload"] == "same bits" for row in rows)
    assert all(0 < float(row["error"]) < 1 and float(row["smaller"]) > 1.5 for row in rows)
    error = {(row["variant"], row["mode"]): float(row["error"]) for row in rows}
    for mode in ("a4", "a8", "a16"):
        assert error["svdquant-int4-data-free", mode] < error["rtn-int4-data-free", mode]
        for recipe in ("svdquant-int4", "svdquant-nvfp4"):
            assert error[f"{recipe}-calibrated", mode] < error[f"{recipe}-data-free", mode]
    assert len(list((tmp_path / "demo/images").glob("*.png"))) == 16


def test_demo_refuses_a_folder_it_cannot_write(capsys):
    assert cli.main(["demo", "--tiny", "--out", "/proc/nowhere/demo"]) == 1
    assert "/proc/nowhere/demo: cannot be written" in capsys.readouterr().err

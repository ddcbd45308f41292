"""The parts that training stands on: the loop, tokenizers, captions as numbers, and what is asked of the models."""
from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training import captions, data, flux, layout, loop, lora, muon, restore, sdxl, text, text_models, vae
from nunchaku_py.demo import shipped
from nunchaku_py.demo.render import render
from nunchaku_py.demo.scenes import COLOURS, SHAPES, Scene, Thing, describe, draw, read

PLAN = loop.Plan(steps=12, batch=4, rate=1e-2, warmup=3)


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loop, "OUT", tmp_path)
    monkeypatch.setattr(data, "OUT", tmp_path)
    return tmp_path


def trained(name: str, *steps: int) -> dict[str, Tensor]:
    """A line fitted to data, in one go or with stops; a new process would do the same as each new Run."""
    for last in steps:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 1))
        run = loop.Run(name, module, PLAN)

        def loss(step: int, generator: torch.Generator, module: nn.Module = module) -> tuple[Tensor, dict[str, float]]:
            x = torch.randn(PLAN.batch, 3, generator=generator)
            return (module(x) - x.sum(1, keepdim=True)).square().mean(), {"step": step}

        stopped = replace(PLAN, steps=last)
        run.plan = _Stopping(**vars(stopped), whole=PLAN)
        run.train(loss)
    return loop.averaged(name)


class _Stopping(loop.Plan):
    """Ends early, with the rates of the whole."""

    def __init__(self, whole: loop.Plan, **values: object):
        super().__init__(**values)
        object.__setattr__(self, "whole", whole)

    def rate_at(self, step: int) -> float:
        return self.whole.rate_at(step)


def test_a_stopped_and_resumed_run_gives_the_same_weights():
    once, twice = trained("once", 12), trained("twice", 5, 12)
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert not torch.equal(once["0.weight"], trained("shorter", 5)["0.weight"])


def test_rates_rise_stay_and_fall():
    plan = loop.Plan(steps=100, batch=1, rate=1.0, warmup=10, fall=0.4)
    rates = [plan.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:60] == [1.0] * 51
    assert rates[60:] == sorted(rates[60:], reverse=True) and rates[-1] == pytest.approx(1 / 40)


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves(out: Path, asked: signal.Signals):
    script = textwrap.dedent("""
        import sys, time, torch
        from pathlib import Path
        from benchmarks.training import loop
        loop.OUT = Path(sys.argv[1])
        module = torch.nn.Linear(2, 2)
        def loss(step, generator):
            if step == 3: print("there", flush=True)
            time.sleep(0.01)
            return module(torch.ones(1, 2)).sum() * 0, {}
        loop.Run("cut", module, loop.Plan(10**6, 1, 1e-3)).train(loss)
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout.readline() == "there\n"
    process.send_signal(asked)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command goes on from there" in said
    assert torch.load(out / "cut" / "state.pt", weights_only=True)["step"] >= 3


def test_every_word_is_one_token():
    t5, clip = text_models.t5_tokenizer(), text_models.clip_tokenizer()
    for word in text_models.words():
        assert len(t5(word).input_ids) == 2 and len(clip(word).input_ids) == 3, word
    for word in text_models.FIRST_WORDS:
        assert len(t5(word).input_ids) == 2
    assert clip("A Red circle").input_ids == clip("a red circle").input_ids


@pytest.mark.parametrize("make", [text_models.t5_tokenizer, text_models.clip_tokenizer])
def test_words_have_the_same_numbers_every_time(make):
    assert make().get_vocab() == make().get_vocab()


def test_merges_are_of_the_commonest_pair_and_make_whole_words():
    wanted = [("e", "d</w>"), ("b", "e</w>"), ("b", "ed</w>"), ("r", "ed</w>")]
    assert text_models.byte_pairs(["red", "bed", "be"]) == wanted


def test_shipped_tokenizers_number_words_as_in_training():
    for name, kind, made in (("tiny-flux", "tokenizer", text_models.clip_tokenizer),
                             ("tiny-flux", "tokenizer_2", text_models.t5_tokenizer),
                             ("tiny-sdxl", "tokenizer", text_models.clip_tokenizer),
                             ("tiny-sdxl", "tokenizer_2", text_models.clip_tokenizer)):
        tokenizer = type(made()).from_pretrained(shipped.WEIGHTS / name / kind)
        assert tokenizer.get_vocab() == made().get_vocab(), (name, kind)


def test_no_caption_is_cut():
    chance = random.Random(5)
    sentences = [describe(draw(chance), chance) for _ in range(500)]
    for tokenizer in (text_models.t5_tokenizer(), text_models.clip_tokenizer()):
        assert max(map(len, tokenizer(sentences).input_ids)) <= text_models.TOKENS


def test_tokenizers_survive_saving(tmp_path: Path):
    from transformers import CLIPTokenizer, T5TokenizerFast

    sentence = "A large red circle above a lighthouse"
    for kind, made in ((T5TokenizerFast, text_models.t5_tokenizer), (CLIPTokenizer, text_models.clip_tokenizer)):
        tokenizer = made()
        tokenizer.save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path)(sentence).input_ids == tokenizer(sentence).input_ids


def test_what_the_encoders_are_asked():
    sentence = "a large striped red circle to the left of a blue star on a fading gray background"
    key = text.Key([sentence], captions.tokens([sentence]))
    things, ends, ground = key.where["t5"]
    assert things.tolist() == [[4, 11, -1]] and ground.tolist() == [16]
    assert ends.tolist() == [[8, 11, -1]]  # the first is "of": then the relation has been said
    assert [part.tolist() for part in key.where["clip"][:2]] == [[[5, 12, -1]], [[9, 12, -1]]]  # after the start token
    circle, star = captions.claimed(read(sentence))
    assert circle == [1 + SHAPES.index("circle"), 1 + COLOURS.index("red"), 2, 2, 0, 1]
    assert star == [1 + SHAPES.index("star"), 1 + COLOURS.index("blue"), 0, 0, 0, 2]
    assert key.pairs.sum() == 2 and key.ground.tolist() == [[3, 2]]


def test_the_last_word_of_a_thing():
    sentence = "A red circle at the top left, a small blue star and a cyan ring on the right on a gray background"
    words = re.findall(r"\w+|,", sentence)
    assert [words[end] for end in text.phrase_ends(sentence)] == ["left", "star", "right"]
    chance = random.Random(3)
    for sentence in (describe(draw(chance), chance) for _ in range(300)):
        key = text.Key([sentence], captions.tokens([sentence]))
        for kind, (nouns, ends, _) in key.where.items():
            tokens = getattr(captions.tokens([sentence]), kind)
            assert ((ends >= nouns) & (ends < (tokens != tokens[0, -1]).sum())).all()


def test_maps_say_what_is_where():
    thing = Thing("star", "blue", "dotted", "small", 16.0, 48.0, 8.0, 0.0)
    found = layout.maps([Scene((), "black", "plain"), Scene((thing,), "black", "plain")])
    empty, one = found.kinds
    grid = one[0].reshape(8, 8)
    assert not empty.any() and not found.geometry[0].any() and not found.geometry[1][:, one[0] == 0].any()
    right, down = found.geometry[1].reshape(4, 8, 8)[:2]
    assert right[5, 1] == right[6, 1] == 0.8 and right[5, 2] == -0.8  # of 5 pixels, from the middle of the cell
    assert down[5, 1] == 0.8 and down[6, 2] == -0.8
    assert grid[5:7, 1:3].unique().tolist() == [1 + SHAPES.index("star")]
    assert not grid[:4].any() and not grid[:, 4:].any()
    assert one[1].max() == 1 + COLOURS.index("blue")


@pytest.mark.parametrize("side", [4, 8])
def test_each_state_answers_for_its_cells(side: int):
    """A head that copies what a state says of its own cells puts every answer where the map has it."""
    listened = nn.Identity()
    cells, answers = layout.CELLS // side, sum(layout.ANSWERS) + 4
    question = layout.Question(cells ** 2 * answers, listened, side)
    with torch.no_grad():
        question.head.weight.copy_(torch.eye(cells ** 2 * answers))
        question.head.bias.zero_()
    thing = Thing("star", "blue", "dotted", "small", 20.0, 48.0, 8.0, 0.0)
    wanted = layout.maps([Scene((thing,), "black", "plain")])
    kinds = [100.0 * F.one_hot(part.long(), count)
             for part, count in zip(wanted.kinds[0], layout.ANSWERS, strict=True)]
    said = torch.cat([*kinds, wanted.geometry[0].T], 1)
    grid = said.reshape(side, cells, side, cells, answers).transpose(1, 2)  # rows and columns of states, then of cells
    listened(grid.reshape(1, side ** 2, -1))
    assert question.loss(wanted) < 1e-6
    listened(grid.flip(1).reshape(1, side ** 2, -1))
    assert question.loss(wanted) > 1


def test_orthogonal_steps():
    torch.manual_seed(0)
    for shape in ((64, 96), (96, 64)):
        values = torch.linalg.svdvals(muon.orthogonal(torch.randn(shape)))
        assert 0.6 < values.min() and values.max() < 1.3
    convolution, linear = (loop._optimizers(module, PLAN)[1:] for module in (nn.Conv2d(8, 8, 3), nn.Linear(64, 64)))
    assert convolution and linear and not loop._optimizers(nn.Linear(3, 64), PLAN)[1:]


def test_processes_that_train_together_take_one_step(out: Path):
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from benchmarks.training import loop, together
        def main():
            loop.OUT = Path(sys.argv[1])
            together.join()
            torch.manual_seed(0)
            module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
            def loss(step, generator):
                x = torch.randn(4, 64, generator=generator)
                return (module(x) - x).square().mean(), {}
            loop.Run("both", module, loop.Plan(5, 4, 1e-2)).train(loss)
            torch.save(module.state_dict(), f"{sys.argv[1]}/{together.part()}.pt")
        together.run(main)
    """)
    (out / "both.py").write_text(script)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", out / "both.py", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root,
                          env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(out / f"{part}.pt", weights_only=True) for part in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = _in_one_process()
    assert all(torch.allclose(first[name], alone[name], atol=2e-5) for name in first)


@pytest.mark.parametrize("end, code", [("", 0), ("sys.exit('stopped')", 1), ("sys.exit(3)", 3), ("1 / 0", 1)])
def test_how_a_program_ends(end: str, code: int):
    """Also one of several processes, of which here is one."""
    script = f"""import sys; from benchmarks.training import together
def main():
    together.join()
    {end or 'pass'}
together.run(main)"""
    root = Path(__file__).parents[2]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "x"}
    for more in ({}, alone):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=root,
                              env={**os.environ, **more, "PYTHONPATH": str(root)})
        assert done.returncode == code and ("stopped" in done.stderr) == ("stopped" in end), done.stderr


def _in_one_process() -> dict[str, Tensor]:
    """The same five steps in one process: both batches of four, one after the other."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    plan = loop.Plan(5, 4, 1e-2)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        generators = (generator, torch.Generator().manual_seed(10**9 + step))
        x = torch.cat([torch.randn(4, 64, generator=one) for one in generators])
        return (module(x) - x).square().mean(), {}

    loop.Run("alone", module, plan).train(loss)
    return module.state_dict()


def test_the_deeper_autoencoder_starts_from_the_finest_levels():
    torch.manual_seed(0)
    fine = vae.autoencoder("sdxl")
    deep = vae.with_fine_levels(vae.autoencoder("flux"), fine)
    for mine, its in ((deep.encoder.down_blocks[0], fine.encoder.down_blocks[0]),
                      (deep.decoder.up_blocks[3], fine.decoder.up_blocks[2])):
        for one, other in zip(mine.parameters(), its.parameters(), strict=True):
            assert torch.equal(one, other)
    latents = deep.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, vae.LATENT_CHANNELS["flux"], 2 * flux.GRID, 2 * flux.GRID)
    assert deep.decode(latents).sample.shape == (1, 3, 64, 64)


def test_attention_starts_at_the_neighbours():
    from diffusers.models.embeddings import apply_rotary_emb

    model = flux._started(flux.transformer())
    rope = model.pos_embed(flux.image_ids())
    middle = flux.GRID + 1  # row 1, column 1
    for block, offsets in zip([*model.transformer_blocks, *model.single_transformer_blocks], flux.NEIGHBOURS,
                              strict=True):
        query, key = (apply_rotary_emb(bias.reshape(1, 1, 2, -1).expand(-1, flux.GRID ** 2, -1, -1), rope,
                                       sequence_dim=1)
                      for bias in (block.attn.to_q.bias, block.attn.to_k.bias))
        seen = torch.einsum("qhd,khd->hqk", query[0], key[0])[:, middle].argmax(-1)
        assert [(int(at) // flux.GRID - 1, int(at) % flux.GRID - 1) for at in seen] == list(offsets)


def test_packing_is_the_pipelines():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 8, 8)
    assert torch.equal(flux.packed(latents), FluxPipeline._pack_latents(latents, 2, 16, 8, 8))
    ids = FluxPipeline._prepare_latent_image_ids(2, flux.GRID, flux.GRID, torch.device("cpu"), torch.float32)
    assert torch.equal(flux.image_ids(), ids)


@pytest.mark.parametrize("model", ["flux", "sdxl"])
def test_a_step_of_each_denoiser_lowers_its_loss(model: str):
    torch.manual_seed(0)
    encoders = text.encoders(model)
    chance = random.Random(0)
    scenes = [draw(chance) for _ in range(4)]
    from benchmarks.training.latents import Examples

    latents = torch.randn(4, 16, 8, 8) if model == "flux" else torch.randn(4, 8, 16, 16)
    examples = Examples(latents, layout.maps(scenes), captions.tokens(captions.captions(scenes)),
                        captions.tokens([""]))
    if model == "flux":
        drawer = flux.Drawer(encoders["t5"], encoders["clip"], flux.transformer())
        ask = lambda: flux.losses(drawer, examples, 4, torch.Generator().manual_seed(1))  # noqa: E731
    else:
        drawer = sdxl.Drawer(encoders["clip"], encoders["wide_clip"], sdxl.unet())
        ask = lambda: sdxl.losses(drawer, sdxl.kept(), examples, 4,  # noqa: E731
                                  torch.Generator().manual_seed(1))
    optimizers = loop._optimizers(drawer, loop.Plan(3, 4, 1e-3))
    first = None
    for _ in range(6):
        loss = sum(ask())
        first = first if first is not None else loss.item()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert sum(ask()).item() < 0.97 * first
    assert all(not parameter.requires_grad for part in encoders.values() for parameter in part.parameters()
               if any(parameter is own for own in drawer.parameters()))


def test_nothing_is_trained_on_held_out_pairs():
    assert not any(scene.held_out for scene in data.scenes("scenes", 1))
    assert any(scene.held_out for scene in data.scenes("anything", 1))  # the checker's
    for one in lora.LORAS.values():
        chance = random.Random(0)
        assert not any(one.scene(chance).held_out for _ in range(500)), one


def test_pictures_of_other_scenes_are_drawn_anew(monkeypatch):
    monkeypatch.setattr(data, "SHARD", 2)
    for seed in (1, 2, 1):
        monkeypatch.setattr(data, "SOURCES", {"few": data.Source(2, seed)})
        found = data.pictures("few")
        assert torch.equal(found.pixels, data.to_bytes(render(found.scenes)))
    assert len(list((data.OUT / "pictures").iterdir())) == 2


def test_runs_go_on_from_what_is_shipped(out: Path, capsys):
    restore.main()
    for name, drawer, denoiser in (("flux", flux.fresh, "transformer"), ("sdxl", sdxl.fresh, "unet")):
        pipe = shipped.pipeline(f"tiny-{name}", torch.float32)
        run = loop.Run(name, drawer(), PLAN)
        assert run.step == 0
        for part, of in {denoiser: denoiser, **(flux if name == "flux" else sdxl).READERS}.items():
            mine, its = getattr(run.module, part).state_dict(), getattr(pipe, of).state_dict()
            assert all(torch.equal(mine[key], its[key]) for key in its), part
        own, its = vae.trained(name).state_dict(), pipe.vae.state_dict()
        assert own and all(torch.equal(value, its[key]) for key, value in own.items())
        run.train(lambda step, generator, run=run: (sum(p.sum() for p in run.module.parameters() if p.requires_grad),
                                                    {}))
    assert "left as it is" not in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.rglob("state.pt")}
    restore.main()
    assert capsys.readouterr().out.count("left as it is") == len(before) == 9
    assert all(path.read_bytes() == was for path, was in before.items()), "what has been trained is lost"
    with pytest.raises(SystemExit, match="was made from shipped weights, which are not all that this training needs"):
        loop.Run("checker", nn.Linear(2, 2), PLAN)


def test_a_lora_of_other_weights_is_not_resumed():
    class Adapted(nn.Module):
        def __init__(self, base: float):
            super().__init__()
            self.base = nn.Parameter(torch.full((2,), base), requires_grad=False)
            self.lora_A = nn.Parameter(torch.ones(2))

    run = lora.resumed("tiny-flux-neon", Adapted(1.0), PLAN)
    run.train(lambda step, generator: (run.module.lora_A.sum(), {}))
    again = lora.resumed("tiny-flux-neon", Adapted(1.0), PLAN)
    assert again.step == PLAN.steps and not torch.equal(again.module.lora_A, torch.ones(2))
    with pytest.raises(SystemExit, match="was trained on other weights of tiny-flux; delete it to begin again"):
        lora.resumed("tiny-flux-neon", Adapted(2.0), PLAN)

"""The text encoders learn to read before anything is drawn: `python -m benchmarks.training.text flux`, or `… sdxl`.

The state of a word that names a thing has to tell the thing's colour, texture, size, place and relation, the state of
'background' which one, and the pooled state which pairs of colour and shape there are. CLIP reads from left to right
and knows a place only where it has been said: so the last word that is said of a thing is asked the same. The heads
that ask are thrown away, and the encoders stay as they are: the denoisers learn to use what they say.
"""
from __future__ import annotations

import re
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nunchaku_py.demo.scenes import COLOURS, NEW_SHAPES, SHAPES, phrases, read

from . import captions as texts
from . import together
from .data import random_rows, scenes
from .loop import Plan, Run, averaged, low_precision, parser, prepared
from .text_models import CLIP_WIDTH, T5_WIDTH, WIDE_CLIP_WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

PLAN = Plan(steps=2500, batch=128, rate=2e-3)
# Encoder → (its class of tokens, width of a state, width of the pooled one or 0).
ENCODERS = {"t5": ("t5", T5_WIDTH, 0), "clip": ("clip", CLIP_WIDTH, CLIP_WIDTH),
            "wide_clip": ("clip", WIDE_CLIP_WIDTH, WIDE_CLIP_WIDTH)}
ANSWERS = [1 + len(values) for values in texts.SAID.values()] + [1 + 2 * texts.RELATED]
GROUND_ANSWERS = [1 + len(values) for values in texts.GROUND.values()]
NOUNS = SHAPES + NEW_SHAPES


MODELS = {"flux": ("t5", "clip"), "sdxl": ("clip", "wide_clip")}
MAKERS = {"t5": t5_encoder, "clip": clip_encoder, "wide_clip": partial(clip_encoder, WIDE_CLIP_WIDTH, True)}


def encoders(model: str) -> nn.ModuleDict:
    return nn.ModuleDict({name: MAKERS[name]() for name in MODELS[model]})


def trained(model: str) -> nn.ModuleDict:
    found = encoders(model)
    found.load_state_dict({name[len("encoders."):]: value for name, value in averaged(f"text-{model}").items()
                           if name.startswith("encoders.")})
    return found


def read_states(name: str, encoder: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """(states of words, pooled) as the pipelines take them: CLIP's words from the layer before the last."""
    if name == "t5":
        return encoder(tokens).last_hidden_state, None
    found = encoder(tokens, output_hidden_states=True)
    return found.hidden_states[-2], found.text_embeds if name == "wide_clip" else found.pooler_output


class Reader(nn.Module):
    """The encoders with the heads that question them."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.encoders = encoders(model)
        sizes = {name: ENCODERS[name] for name in MODELS[model]}
        self.of_things = nn.ModuleDict({name: nn.Linear(width, sum(ANSWERS)) for name, (_, width, _) in sizes.items()})
        self.of_ground = nn.ModuleDict({name: nn.Linear(width, sum(GROUND_ANSWERS))
                                        for name, (_, width, _) in sizes.items()})
        self.of_all = nn.ModuleDict({name: nn.Linear(pooled, len(COLOURS) * len(NOUNS) + sum(GROUND_ANSWERS))
                                     for name, (_, _, pooled) in sizes.items() if pooled})

    def questioned(self, name: str, tokens: Tensor, key: Key, rows: Tensor) -> Tensor:
        states, pooled = read_states(name, self.encoders[name], tokens)
        things, ends, ground = key.where[ENCODERS[name][0]]
        loss = torch.zeros(())
        for at in (things[rows], ends[rows]):
            said = at >= 0
            found = states.gather(1, at.clamp_min(0)[..., None].expand(-1, -1, states.shape[-1]))[said]
            loss = loss + _asked(self.of_things[name](found), key.things[rows][said], ANSWERS)
        last = ground[rows]
        named = last >= 0
        state = states[torch.arange(len(rows)), last.clamp_min(0)][named]
        loss = loss + _asked(self.of_ground[name](state), key.ground[rows][named], GROUND_ANSWERS)
        if pooled is not None:
            pairs, grounds = self.of_all[name](pooled).split([len(COLOURS) * len(NOUNS), sum(GROUND_ANSWERS)], 1)
            loss = loss + 10 * F.binary_cross_entropy_with_logits(pairs, key.pairs[rows])
            loss = loss + _asked(grounds, key.ground[rows], GROUND_ANSWERS)
        return loss


def _asked(logits: Tensor, wanted: Tensor, sizes: list[int]) -> Tensor:
    return sum(F.cross_entropy(part, wanted[:, i]) for i, part in enumerate(logits.split(sizes, dim=1)))


class Key:
    """The right answers, and at which token of each caption they are asked."""

    def __init__(self, sentences: list[str], tokens: texts.Tokens):
        claims = [read(sentence) for sentence in sentences]
        rows = [texts.claimed(claim) for claim in claims]
        blank = [0] * len(ANSWERS)
        self.things = torch.tensor([(row + [blank] * 3)[:3] for row in rows])
        self.ground = torch.tensor([texts.claimed_ground(claim) for claim in claims])
        self.pairs = torch.zeros(len(rows), len(COLOURS) * len(NOUNS))
        for i, claim in enumerate(claims):
            for thing in claim.things:
                self.pairs[i, COLOURS.index(thing.colour) * len(NOUNS) + NOUNS.index(thing.shape)] = 1
        ends = torch.tensor([(phrase_ends(sentence) + [-1] * 3)[:3] for sentence in sentences])
        self.where = {"t5": _places(tokens.t5, t5_tokenizer(), ends),
                      "clip": _places(tokens.clip, clip_tokenizer(), ends + (ends >= 0))}  # its first token is no word


def phrase_ends(caption: str) -> list[int]:
    """For each thing which word of the caption is the last that is said of it; commas are words."""
    spans = phrases(caption)
    return [len(re.findall(r"\w+|,", caption[:end])) - 1 for _, end in spans]


def _places(tokens: Tensor, tokenizer: object, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the up to three words that name things, of the last words said of them, and of 'background';
    −1: none."""
    of = {word: tokenizer(word, add_special_tokens=False).input_ids[0] for word in (*NOUNS, "background")}
    nouns = torch.isin(tokens, torch.tensor([of[word] for word in NOUNS]))
    order = nouns.int().cumsum(1) * nouns
    things = torch.stack([torch.where((order == k).any(1), (order == k).int().argmax(1), -1) for k in (1, 2, 3)], 1)
    ground = tokens == of["background"]
    return things, ends, torch.where(ground.any(1), ground.int().argmax(1), -1)


def main() -> None:
    options = parser(__doc__, PLAN)
    options.add_argument("model", choices=MODELS)
    arguments = options.parse_args()
    plan = prepared(arguments, PLAN)
    sentences = texts.captions(scenes("scenes"))
    tokens = texts.tokens(sentences)
    key = Key(sentences, tokens)
    reader = Reader(arguments.model)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = random_rows(len(sentences), plan.batch, generator)
        with low_precision():
            found = {name: reader.questioned(name, getattr(tokens, ENCODERS[name][0])[rows], key, rows)
                     for name in MODELS[arguments.model]}
        return sum(chain(found.values())), {name: value.item() for name, value in found.items()}

    Run(f"text-{arguments.model}", reader, plan).train(loss)


if __name__ == "__main__":
    together.run(main)

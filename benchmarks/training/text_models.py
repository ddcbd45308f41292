"""Tokenizers whose words are the grammar's, and the small text encoders of both pipelines, not trained."""
from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

from torch import nn

from nunchaku_py.demo import scenes

TOKENS = 32
EXTRA_WORDS = ("in", "neon", "sketch", "style")  # for LoRAs: no caption of the base models has them
T5_WIDTH, CLIP_WIDTH, WIDE_CLIP_WIDTH = 128, 64, 128
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def words() -> list[str]:
    """Every word a caption can have."""
    phrases = (*scenes.SHAPES, *scenes.NEW_SHAPES, *scenes.COLOURS, *scenes.TEXTURES, *scenes.SIZES,
               *scenes.BACKGROUNDS, *scenes.BACKDROPS, *scenes.PLACES, *scenes.RELATIONS, *EXTRA_WORDS,
               "a an and there is picture of on background")
    return sorted({word for phrase in phrases for word in phrase.split()})


# T5 knows capitals; a sentence may begin with one.
FIRST_WORDS = ("A", "An", "On", "There")


def t5_tokenizer() -> Any:
    """Whole words of the grammar; any other text letter by letter."""
    from transformers import T5TokenizerFast

    letters = string.ascii_lowercase + string.digits + ".,'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0),
              *((f"▁{word}", -5.0) for word in (*words(), *FIRST_WORDS)), ("▁", -6.0),
              *((letter, -8.0) for letter in letters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def clip_tokenizer() -> Any:
    """Byte pairs, merged until every word of the grammar is one token."""
    from transformers import CLIPTokenizer

    alphabet = sorted(string.ascii_lowercase + string.digits + ".,'-")
    merges = byte_pairs(words())
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *map("".join, merges), START, END]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=TOKENS)


def byte_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that make one token of every word: always of the commonest pair, of equals the first in the alphabet.

    Not by the tokenizers package: it numbers tokens anew in every call, and models would read other words than they
    learned."""
    parts = [(*word[:-1], word[-1] + WORD_END) for word in words]
    merges = []
    while pairs := Counter(chain.from_iterable(map(pairwise, parts))):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        parts = [_merged(word, best) for word in parts]
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    found: list[str] = []
    for symbol in word:
        if found and (found[-1], symbol) == pair:
            found[-1] += symbol
        else:
            found.append(symbol)
    return tuple(found)


def t5_encoder() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer()), d_model=T5_WIDTH, d_kv=32, d_ff=256, num_layers=3, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", relative_attention_num_buckets=16,
        relative_attention_max_distance=32))


def clip_encoder(width: int = CLIP_WIDTH, projection: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids = clip_tokenizer().get_vocab()
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(
        vocab_size=len(ids), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=width // 32, projection_dim=width, max_position_embeddings=TOKENS, attention_dropout=0.0,
        bos_token_id=ids[START], eos_token_id=ids[END], pad_token_id=ids[END]))

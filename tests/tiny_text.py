"""Tiny text encoders and tokenizers, made in memory: prompts as strings work without any file."""

from __future__ import annotations

import string

import torch

from tests.tiny_models import POOLED, TEXT, TEXT_DIM, Case, randomise

CHARACTERS = string.ascii_lowercase + string.digits + ".,"


def clip_vocabulary() -> dict[str, int]:
    """Single characters, alone and at the end of a word; no merges."""
    pieces = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return {piece: i for i, piece in enumerate(pieces)}


def clip_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=clip_vocabulary(), merges=[], model_max_length=77)


def t5_tokenizer():
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT)


def clip_model(projection: bool = False, width: int = POOLED, seed: int = 2) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary = clip_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=POOLED,
        max_position_embeddings=77,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return randomise((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def t5_model() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
    )
    return randomise(T5EncoderModel(config), seed=3)


def clip() -> Case:
    return clip_model(), dict(input_ids=torch.arange(10)[None])


def clip_with_projection() -> Case:
    return clip_model(projection=True), dict(input_ids=torch.arange(10)[None])


def t5() -> Case:
    return t5_model(), dict(input_ids=torch.arange(3, 15)[None])


TEXT_ENCODERS = {"clip": clip, "clip_with_projection": clip_with_projection, "t5": t5}

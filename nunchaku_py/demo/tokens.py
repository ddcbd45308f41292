"""Tokenizers of bytes, made in code: prompts work without downloading anything."""
from __future__ import annotations

from typing import Any

PAD, END, BEGIN = "<pad>", "</s>", "<s>"
SPECIAL = (PAD, END, BEGIN)
VOCABULARY = 256 + len(SPECIAL)


def byte_tokenizer(length: int) -> Any:
    """A tokenizer of at most `length` tokens: one per byte, then END, then padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, SPECIAL.index(END))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=BEGIN,
                                   model_max_length=length)

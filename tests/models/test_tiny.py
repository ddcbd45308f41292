"""The tiny models are worth testing with: every block matters, every pipeline runs and repeats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nunchaku_py.models import blocks_of
from tests.tiny import MODELS, PIPELINES, TEXT_ENCODERS
from tests.tiny_text import clip_tokenizer, t5_tokenizer


def first(output: object) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


@pytest.mark.parametrize("case", MODELS | TEXT_ENCODERS)
def test_every_block_matters(case: str) -> None:
    model, arguments = (MODELS | TEXT_ENCODERS)[case]()
    output = first(model(**arguments)).float()
    assert output.isfinite().all() and output.std() > 0.1
    output.square().mean().backward()
    for name, block in blocks_of(model).items():
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters()), name


@pytest.mark.parametrize("case", PIPELINES)
def test_pipelines_run(case: str) -> None:
    pipe, arguments = PIPELINES[case]()
    output = pipe(**arguments).images
    assert output.isfinite().all() and output.float().std() > 0.1


def test_cases_repeat() -> None:
    runs = [pipe(**arguments).images for pipe, arguments in (PIPELINES["flux"](), PIPELINES["flux"]())]
    assert torch.equal(*runs)


@pytest.mark.parametrize("case", ["flux_prompt", "sdxl"])
def test_saved_pipelines_load_bit_for_bit(case: str, tmp_path: Path) -> None:
    (pipe, arguments), (_, again) = PIPELINES[case](), PIPELINES[case]()
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(pipe(**arguments).images, loaded(**again).images)


def test_images_come_out() -> None:
    pipe, arguments = PIPELINES["flux"]()
    assert pipe(**(arguments | {"output_type": "pil"})).images[0].size == (16, 16)


def test_prompts_make_a_difference() -> None:
    outputs = []
    for prompt in ("a red cube", "two dogs"):
        pipe, arguments = PIPELINES["flux_prompt"]()
        outputs.append(pipe(**(arguments | {"prompt": [prompt]})).images)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("tokenizer", [clip_tokenizer, t5_tokenizer])
def test_tokenizers_know_letters(tokenizer: object) -> None:
    first_prompt, second = (tokenizer()(text).input_ids for text in ("ab cd", "ab ce"))
    assert len(first_prompt) == len(second) and first_prompt != second

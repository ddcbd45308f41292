"""Models whose weights stay in their file, mapped into memory."""
from __future__ import annotations

import json
import os
import shutil
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from nunchaku_py.checkpoint import mapping
from nunchaku_py.checkpoint.mapping import PAGE, drop, is_mapped, map_file, spans_of
from nunchaku_py.checkpoint.tensor_file import TensorFile, write_tensors
from nunchaku_py.swap import quantized_sites
from tests.checks import QUICK, QUICK_NVFP4, differences, run, same_bits, state_of
from tests.fuzz_seeds import ours_text, peer_text
from tests.lora.toys import quantized as quantized_names
from tests.lora.toys import toy
from tests.offloading import picture, refused
from tests.test_tensor_file import every_dtype
from tests.tiny import MODELS, PIPELINES

needs_madvise = pytest.mark.skipif(not mapping.CAN_DROP, reason="this system drops no pages of mapped files")
AROUND = 2**18  # bytes: the system maps some pages around one that is read, at both ends of each part of the file


# ------------------------------------------------------------------------------------------------------------- mappings
def test_views_are_the_file_and_what_reading_gives(tmp_path: Path) -> None:
    tensors = every_dtype()
    path = tmp_path / "every.safetensors"
    write_tensors(path, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, tensors.items(), {})
    with TensorFile(path) as file:
        views = {name: file.view(name) for name in file.names()}
        assert differences(views, {name: file.read(name) for name in file.names()}) == []
    assert differences(views, tensors) == []  # also after it is closed
    assert all(is_mapped(view) == bool(view.numel()) for view in views.values())


def test_tensors_that_lie_askew_are_copied(tmp_path: Path) -> None:
    """A byte before them, as writers other than ours may put it."""
    values = torch.arange(6, dtype=torch.float32)
    header = json.dumps({"byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                         "values": {"dtype": "F32", "shape": [2, 3], "data_offsets": [1, 25]}}).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    path = tmp_path / "askew.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x07" + values.numpy().tobytes())
    with TensorFile(path) as file:
        assert is_mapped(file.view("byte")) and not is_mapped(file.view("values"))
        assert torch.equal(file.view("values"), values.view(2, 3))


def test_files_larger_than_memory_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 2**40)  # no block of it is on the disk
    mapped = map_file(path)
    assert len(mapped) == 2**40 and mapped[2**39] == 0


def test_what_is_written_stays_here_and_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "ones"
    path.write_bytes(b"\x01" * 8 * PAGE)
    view = torch.frombuffer(map_file(path), dtype=torch.uint8)
    assert spans_of([view[:3 * PAGE], view[3 * PAGE:5 * PAGE - 1]])[0][1:] == (0, 4 * PAGE)
    assert spans_of([view[1:PAGE]]) == []
    drop(spans_of([view]))
    assert view.sum() == 8 * PAGE
    view[7] = 2
    assert spans_of([view]) == [] and path.read_bytes() == b"\x01" * 8 * PAGE
    drop(spans_of([view]))
    assert view[7] == 2


# --------------------------------------------------------------------------------------------------------------- models
@pytest.fixture(scope="module", params=[QUICK, QUICK_NVFP4], ids=["int4", "nvfp4"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Form → checkpoint of a tiny FLUX, in shards as well; inputs; what it gives."""
    folder = tmp_path_factory.mktemp("stored")
    model, inputs = MODELS["flux"]()
    nq.quantize(model, request.param)
    paths = {"folder": folder / "model", "file": folder / "model.safetensors", "shards": folder / "shards"}
    nq.save(model, paths["folder"])
    nq.save(model, paths["file"])
    model.save_pretrained(paths["shards"], max_shard_size="300KB")
    return paths, inputs, run(nq.load(paths["folder"]), inputs)


def load(stored: tuple, form: str = "file", **more: Any) -> nn.Module:
    return nq.load(stored[0][form], mmap=True, **more)


@pytest.mark.parametrize("form", ["folder", "file", "shards"])
def test_mapped_models_give_the_same_bits(stored: tuple, form: str) -> None:
    paths, inputs, expected = stored
    model, plain = load(stored, form), nq.load(paths[form])
    assert same_bits(run(model, inputs), expected)
    assert differences(plain.state_dict(), model.state_dict()) == []
    assert all(is_mapped(site.codes) for site in quantized_sites(model))
    assert type(model) is type(plain) and model.config["quantization_config"].to_dict() == \
        plain.config["quantization_config"].to_dict()
    assert same_bits(run(load(stored, form, mode="a16"), inputs), run(nq.load(paths[form], mode="a16"), inputs))


def test_little_of_a_mapped_model_is_its_own(stored: tuple) -> None:
    model = load(stored)
    own = sum(tensor.nbytes for site in quantized_sites(model) for tensor in (*site.parameters(), *site.buffers())
              if not is_mapped(tensor))
    whole = sum(tensor.nbytes for site in quantized_sites(model) for tensor in site.parameters())
    assert own < 0.2 * whole  # inv_smooth and a scale per channel: of layers this narrow they are not that little


def test_saving_over_the_mapped_file(stored: tuple, tmp_path: Path) -> None:
    paths, inputs, expected = stored
    for form in ("file", "folder"):
        path = tmp_path / paths[form].name
        nq.save(nq.load(paths[form]), path)
        model = nq.load(path, mmap=True)
        model.proj_out.weight.data = -model.proj_out.weight.data
        changed, state = run(model, inputs), state_of(model)
        nq.save(model, path)
        assert differences(state, nq.load(path).state_dict()) == []
        assert same_bits(run(model, inputs), changed) and not torch.equal(changed, expected)


def test_a_deleted_file_is_still_mapped(stored: tuple, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    nq.save(nq.load(stored[0]["file"]), path)
    model = nq.load(path, mmap=True)
    path.unlink()
    assert same_bits(run(model, stored[1]), stored[2])


def test_what_cannot_be_mapped_says_what_can(quantized: tuple, tmp_path: Path) -> None:
    nq.export(quantized[0], tmp_path / "lite", "nunchaku_lite")
    with pytest.raises(NunchakuError, match="nunchaku_lite, .* cannot be mapped; `nunchaku-py convert .*lite NEW"):
        nq.load(tmp_path / "lite", mmap=True)
    with pytest.raises(NunchakuError, match="is one of Nunchaku's, .* cannot be mapped; `nunchaku-py convert"):
        nq.load(peer_text(tmp_path), mmap=True)
    with pytest.raises(NunchakuError, match="no such file or folder"):
        nq.load(tmp_path / "nothing", mmap=True)
    with pytest.raises(NunchakuError, match="neither a pipeline"):
        nq.load(tmp_path, mmap=True)


def test_folders_that_do_not_say_which_files_are_theirs(stored: tuple, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored[0]["folder"], folder)
    file = next(folder.glob("*.safetensors"))
    shutil.copy(file, folder / "another.safetensors")
    with pytest.raises(NunchakuError, match="holds 2 safetensors files and 0 indexes"):
        nq.load(folder, mmap=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(NunchakuError, match="does not name files that lie beside it"):
        nq.load(folder, mmap=True)


@pytest.mark.parametrize("make", [ours_text, lambda folder: save_folder(ours_text(folder), folder / "folder")])
def test_text_encoders_whose_tensors_are_tied(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path)
    model, plain = nq.load(path, mmap=True), nq.load(path)
    assert differences(model.state_dict(), plain.state_dict()) == []
    assert model.shared.weight is model.encoder.embed_tokens.weight
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert same_bits(model(ids)[0], plain(ids)[0])


def save_folder(file: Path, folder: Path) -> Path:
    return nq.save(nq.load(file), folder)


# --------------------------------------------------------------------------------------------------------------- memory
def resident(path: Path) -> int:
    """Bytes of a mapped file that are memory of this process."""
    text = Path("/proc/self/smaps").read_text()
    parts = text.split(str(path.resolve()))[1:]
    return sum(1024 * int(part.split("Rss:", 1)[1].split(None, 1)[0]) for part in parts)


def _note(seen: list[int], path: Path, *_: Any) -> None:
    seen.append(resident(path))


@needs_madvise
def test_pages_come_and_go_within_a_budget(stored: tuple, tmp_path: Path) -> None:
    paths, inputs, expected = stored
    path = nq.save(nq.load(paths["file"]), tmp_path / "model.safetensors")
    model = nq.load(path, mmap=True)
    assert resident(path) < path.stat().st_size // 2  # although all of it has been read and checked
    run(model, inputs)
    whole = resident(path)
    assert whole > 0.9 * path.stat().st_size
    small = refused(model, "ram")
    for more in (0, small // 4):
        nq.offload(model, ram=small + more)
        seen: list[int] = []
        look = partial(_note, seen, path)
        handles = [block.register_forward_hook(look)
                   for block in (*model.transformer_blocks, *model.single_transformer_blocks)]
        for _ in range(2):
            assert same_bits(run(model, inputs), expected)
        assert max(seen) <= small + more + AROUND < whole
        assert "offload: the pages of" in str(nq.explain(model))
        for handle in handles:
            handle.remove()
    nq.offload(model, None)
    run(model, inputs)
    assert resident(path) > 0.9 * path.stat().st_size


@needs_madvise
def test_weights_that_were_changed_are_not_dropped(stored: tuple) -> None:
    model, plain, inputs = load(stored), nq.load(stored[0]["file"]), stored[1]
    nq.offload(model, ram=refused(model, "ram"))
    run(model, inputs)
    state = {name: -tensor if name.endswith("up") else tensor for name, tensor in plain.state_dict().items()}
    for one in (model, plain):
        one.load_state_dict(state)
    for _ in range(2):
        assert same_bits(run(model, inputs), run(plain, inputs))


@needs_madvise
def test_adapters_on_a_mapped_model(stored: tuple) -> None:
    model, plain, inputs = load(stored), nq.load(stored[0]["file"]), stored[1]
    nq.offload(model, ram=refused(model, "ram"))
    lora = toy(plain, quantized_names(plain))
    for one in (model, plain):
        one.load_lora_adapter(dict(lora), prefix=None, adapter_name="style")
    for scale in (1.0, 0.3):
        for one in (model, plain):
            one.set_adapters("style", scale)
        assert same_bits(run(model, inputs), run(plain, inputs))


@needs_madvise
def test_a_mapped_pipeline_drops_its_text_encoder(tmp_path: Path) -> None:
    pipe, call = PIPELINES["flux_prompt"]()
    nq.quantize(pipe, components={"transformer": QUICK, "text_encoder_2": "w4a16-int4"})
    pipe.save_pretrained(tmp_path)
    expected = picture(nq.load(tmp_path), call)
    pipe = nq.load(tmp_path, mmap=True)
    assert all(is_mapped(site.codes) for part in (pipe.transformer, pipe.text_encoder_2)
               for site in quantized_sites(part))
    nq.offload(pipe, ram=refused(pipe.transformer, "ram"))
    text = next((tmp_path / "text_encoder_2").glob("*.safetensors"))
    seen: list[int] = []
    pipe.text_encoder_2.register_forward_hook(lambda *_: seen.append(resident(text)))
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: seen.append(resident(text)))
    for _ in range(2):
        assert torch.equal(picture(pipe, call), expected)
    encoding, denoising = seen[0], seen[1]
    assert denoising < encoding / 2
    nq.offload(pipe, None)
    assert torch.equal(picture(pipe, call), expected)

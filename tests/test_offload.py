"""Models whose blocks are streamed, with the CPU in the place of a GPU; on GPUs: test_offload_pipelines.py."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from nunchaku_py.offload import streaming
from nunchaku_py.swap import quantized_sites
from tests.checks import QUICK, differences, run, same_bits, state_of
from tests.lora.toys import quantized as quantized_names
from tests.lora.toys import toy
from tests.offloading import least, streamed
from tests.tiny import MODELS

SEVERAL = ("flux", "sd3", "sdxl", "z_image")  # with three blocks or more


@pytest.fixture(scope="module", params=SEVERAL)
def several(request: pytest.FixtureRequest) -> tuple[nn.Module, dict]:
    model, inputs = MODELS[request.param]()
    nq.quantize(model, QUICK)
    return model, inputs


def test_streamed_models_give_the_same_bits(several: tuple) -> None:
    model, inputs = copy.deepcopy(several[0]), several[1]
    expected, state = run(model, inputs), state_of(model)
    used = [use.used for use in nq.explain(model).patterns]
    streamed(model)
    assert len(model.nunchaku_offload.plan.streamed) >= 3
    for _ in range(3):
        assert same_bits(run(model, inputs), expected)
        assert differences(state, model.state_dict()) == []
    assert [use.used for use in nq.explain(model).patterns] == used
    assert same_bits(run(model, inputs), expected)
    nq.offload(model, None)
    assert "nunchaku_offload" not in vars(model) and "_apply" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert same_bits(run(copy.deepcopy(model), inputs), expected) and differences(state, model.state_dict()) == []


def test_under_inference_mode(fresh: tuple) -> None:
    model, inputs, _ = fresh
    expected = run(model, inputs)
    with torch.inference_mode():
        streamed(model)
        for _ in range(2):
            assert same_bits(model(**inputs)[0].clone(), expected)
    assert same_bits(run(model, inputs), expected)


def test_a_block_computes_from_a_buffer_and_nothing_is_packed_again(fresh: tuple, monkeypatch: pytest.MonkeyPatch
                                                                   ) -> None:
    model, inputs, _ = fresh
    streamed(model)
    run(model, inputs)
    buffers = model.nunchaku_offload.buffers
    spans = [range(buffer.data_ptr(), buffer.data_ptr() + buffer.numel()) for buffer in buffers]
    seen = []

    def look(block: nn.Module, *_: Any) -> None:
        tensors = [tensor for tensor in (*block.parameters(), *block.buffers()) if tensor.numel()]
        seen.append([all(tensor.data_ptr() in span for tensor in tensors) for span in spans])

    for block in model.nunchaku_offload.blocks:
        block.module.register_forward_pre_hook(look)
    monkeypatch.setattr("nunchaku_py.linear.QuantizedSite._fold", lambda *_: pytest.fail("packed again"))
    run(model, inputs)
    assert seen == [[True, False], [False, True]] * 2
    assert all(not site.has_data() for site in quantized_sites(model) if site.berth.visit)


def test_derived_tensors_come_along(fresh: tuple) -> None:
    model, _, _ = fresh
    streamed(model)
    block = model.nunchaku_offload.blocks[0]
    held = {id(held.tensor) for held in block.tensors}
    assert {id(tensor) for tensor in block.module.buffers()} <= held
    assert any(site.folded_scales is not None for site in block._sites())
    assert not any(site.folded_codes is not None for site in quantized_sites(model))


def test_budgets_are_kept(fresh: tuple) -> None:
    model, inputs, _ = fresh
    expected, small = run(model, inputs), least(model)
    for more in (0, small // 8, small // 2, small):
        nq.offload(model, vram=small + more, device="cpu")  # again: what was done is undone before
        assert model.nunchaku_offload.plan.nbytes <= small + more
        assert same_bits(run(model, inputs), expected)
    assert model.nunchaku_offload.plan.streamed == ()


# --------------------------------------------------------------------------------------------- changes while it streams
@pytest.fixture
def styled() -> tuple[nn.Module, nn.Module, dict]:
    """A model that streams, one that does not, inputs."""
    model, inputs = MODELS["flux"]()
    nq.quantize(model, "rtn-int4")
    twin = copy.deepcopy(model)
    return streamed(model), twin, inputs


def test_adapters_come_change_and_go(styled: tuple) -> None:
    model, twin, inputs = styled
    plain = run(twin, inputs)
    assert same_bits(run(model, inputs), plain)
    lora = toy(twin, quantized_names(twin), rank=20)

    def both(change: Callable[[nn.Module], Any]) -> None:
        for one in (model, twin):
            change(one)
        for _ in range(2):
            assert same_bits(run(model, inputs), run(twin, inputs))

    both(lambda one: one.load_lora_adapter(dict(lora), prefix=None, adapter_name="style"))
    assert not torch.equal(run(model, inputs), plain)
    both(lambda one: one.set_adapters("style", 0.3))
    both(lambda one: one.disable_lora())
    both(lambda one: one.enable_lora())
    both(lambda one: one.unload_lora())
    assert same_bits(run(model, inputs), plain)
    nq.offload(model, None)
    assert same_bits(run(model, inputs), plain)


def test_changed_weights_are_noticed(styled: tuple) -> None:
    model, twin, inputs = styled
    run(model, inputs)
    state = {name: -tensor if name.endswith("scales") else tensor for name, tensor in twin.state_dict().items()}
    for one in (model, twin):
        one.load_state_dict(state)
    assert same_bits(run(model, inputs), run(twin, inputs))
    for one in (model, twin):  # another tensor in the place of the one that streaming knows
        weight = one.transformer_blocks[1].attn.norm_q.weight
        weight.data = -weight.data
    assert same_bits(run(model, inputs), run(twin, inputs))

    def turn(attention: nn.Module, *_: Any) -> None:
        attention.to_q.scales.neg_()

    for one in (model, twin):  # while the block is in a buffer
        handle = one.transformer_blocks[1].attn.register_forward_pre_hook(turn)
        assert not torch.equal(run(one, inputs), run(one, inputs))
        run(one, inputs)
        handle.remove()
    assert same_bits(run(model, inputs), run(twin, inputs))
    assert differences(model.state_dict(), twin.state_dict()) == []


def test_modes_and_casts(styled: tuple) -> None:
    model, twin, inputs = styled
    for mode in ("a16", "a8"):
        for one in (model, twin):
            nq.set_mode(one, mode)
        assert same_bits(run(model, inputs), run(twin, inputs))
    for one in (model, twin):
        one.to("cpu")
        nn.Module.to(one, torch.float32)
    inputs = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    assert same_bits(run(model, inputs), run(twin, inputs))


def test_an_interruption_does_no_harm(fresh: tuple) -> None:
    model, inputs, _ = fresh
    expected = run(model, inputs)
    streamed(model)
    for error in (RuntimeError, KeyboardInterrupt):
        def stop(*_: Any, error: type = error) -> None:
            raise error

        handle = model.transformer_blocks[1].attn.register_forward_pre_hook(stop)
        with pytest.raises(error):
            run(model, inputs)
        handle.remove()
        assert same_bits(run(model, inputs), expected)


def test_a_failure_undoes_what_was_begun(fresh: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, state = fresh
    expected = run(model, inputs)
    monkeypatch.setattr(streaming, "host_memory", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streamed(model)
    assert all(site.berth is None for site in quantized_sites(model))
    assert same_bits(run(model, inputs), expected) and differences(state, model.state_dict()) == []


def test_saving(fresh: tuple, tmp_path: Any) -> None:
    model, inputs, state = fresh
    nq.save(model, tmp_path / "before.safetensors")
    streamed(model)
    nq.save(model, tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()


def test_compiled_afterwards(fresh: tuple) -> None:
    """Every streamed block breaks the graph, and gives the same bits."""
    model, inputs, _ = fresh
    expected = run(model, inputs)
    streamed(model)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager")
    for _ in range(2):
        assert same_bits(run(fast, inputs), expected)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------- refusals
def test_hooks_of_others_are_refused(fresh: tuple) -> None:
    from accelerate import cpu_offload

    for offloaded, reason in (
            (lambda one: cpu_offload(one, execution_device=torch.device("cpu")), "offload hook of accelerate's"),
            (lambda one: one.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level",
                                                  num_blocks_per_group=1), "diffusers' group offloading"),
            (lambda one: one.transformer_blocks[0].compile(backend="eager"), "is compiled")):
        model = copy.deepcopy(fresh[0])
        offloaded(model)
        with pytest.raises(NunchakuError, match=reason):
            nq.offload(model, vram="1GB", device="cpu")


def test_an_offloaded_model_stays_where_it_is(fresh: tuple) -> None:
    model = streamed(fresh[0])
    with pytest.raises(NunchakuError, match="cannot be moved to meta; nq.offload"):
        model.to("meta")
    with pytest.raises(NunchakuError, match="is not copied or pickled"):
        copy.deepcopy(model)
    with pytest.raises(NunchakuError, match="remove the offloading"):
        nq.dequantize(model)


def test_what_is_not_offloaded(fresh: tuple) -> None:
    with pytest.raises(NunchakuError, match="holds no quantized linears"):
        nq.offload(MODELS["flux"]()[0], vram="1GB", device="cpu")
    with pytest.raises(NunchakuError, match="give one of them"):
        nq.offload(fresh[0], vram="1GB", ram="1GB")
    with pytest.raises(NunchakuError, match="are not mapped from a file"):
        nq.offload(fresh[0], ram="1GB")
    nq.offload(fresh[0], None)
    if not torch.cuda.is_available():
        with pytest.raises(NunchakuError, match="there is no cuda here"):
            nq.offload(fresh[0], vram="1GB")

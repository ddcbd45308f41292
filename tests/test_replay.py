import copy
import inspect
import signal
import threading

import pytest
import torch
from torch import nn

from nunchaku_py.calibrate import State
from nunchaku_py.collect import Collector, SiteTap, tapped
from nunchaku_py.errors import NunchakuError
from nunchaku_py.models.discover import blocks_of, is_linear
from nunchaku_py.replay import UNREACHED, replay
from tests import tiny_models

STATES = 3
PARTS = ("absmax", "mean", "second", "tokens", "gram")


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.wide, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x, scale=1.0):
        return x + scale * self.narrow(torch.relu(self.wide(x)))


class Toy(nn.Module):
    """An architecture nobody knows; `way` says in which order which blocks are called."""

    def __init__(self, dim=16, count=3, way=None):
        super().__init__()
        self.stem, self.head = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(Block(dim) for _ in range(count))
        self.way = way or (lambda x: range(count))

    def forward(self, x, scale=1.0):
        kept = x = self.stem(x)
        for i in self.way(x):
            x = self.layers[i](x, scale=scale)
        return self.head(x + kept)


def toy(**options):
    model = tiny_models.randomise(Toy(**options), dtype=torch.float32)
    return model, [State.of((), dict(x=tiny_models.normal(2, 5 + i, 16, dtype=torch.float32))) for i in range(STATES)]


def layers(model):
    return {f"layers.{i}": block for i, block in enumerate(model.layers)}


def varied(inputs):
    """States that differ in the first tensor: the latents."""
    first = next(iter(inputs))
    return [State.of((), {**inputs, first: _scaled(inputs[first], 1 + i / 4)}) for i in range(STATES)]


def _scaled(value, factor):
    return [x * factor for x in value] if isinstance(value, list) else value * factor


def tap_all(model, blocks):
    def taps_of(name):
        inner = {f"{name}.{n}": module for n, module in blocks[name].named_modules() if is_linear(module)}
        return {key: SiteTap(module, gram=True) for key, module in inner.items()}

    return taps_of


def ordinary(model, states, taps, sample=512):
    """Outputs and statistics of whole forwards, one after the other."""
    collectors = {key: Collector(key, tap, len(states), sample) for key, tap in taps.items()}
    with torch.no_grad(), tapped(collectors.values()):
        outputs = [model(*state.on("cpu")[0], **state.on("cpu")[1]) for state in states]
    return outputs, {key: collector.stats() for key, collector in collectors.items() if collector.rows}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "absmax"):
        return all(torch.equal(getattr(one, part), getattr(other, part)) for part in PARTS)
    return one == other


def lanes():
    return [thread for thread in threading.enumerate() if thread.name == "nunchaku_py calibration"]


def untouched(model):
    return not lanes() and all(
        "forward" not in vars(module) and not module._forward_pre_hooks for module in model.modules()
    )


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_without_feedback_it_equals_ordinary_forwards(name):
    model, inputs = tiny_models.MODELS[name]()
    states, blocks = varied(inputs), blocks_of(model)
    taps_of, seen, outputs = tap_all(model, blocks), {}, []
    unreached = replay(
        model, blocks, states, taps_of, lambda _, stats: seen.update(stats), on_output=lambda _, y: outputs.append(y)
    )
    expected, stats = ordinary(model, states, {k: tap for block in blocks for k, tap in taps_of(block).items()})
    assert unreached == {}
    assert same(outputs, expected)
    assert seen.keys() == stats.keys() and all(same(seen[key], stats[key]) for key in stats)
    assert untouched(model)


def test_blocks_come_in_the_order_of_the_forward_with_progress():
    model, states = toy(way=lambda x: (2, 0, 1))
    order, said = [], []

    class Listener:
        def say(self, what):
            said.append(what)

    blocks = layers(model)
    replay(model, blocks, states, tap_all(model, blocks), lambda name, _: order.append(name), progress=Listener())
    assert order == ["layers.2", "layers.0", "layers.1"]
    assert said[:4] == [f"layers.2, state {i} of 3" for i in (1, 2, 3)] + ["layers.2"]


def spoil(model, which):
    def finish(name, stats):
        if name == which:
            block = model.get_submodule(name)
            block.narrow = copy.deepcopy(block.narrow)
            with torch.no_grad():
                block.narrow.weight.mul_(0.5)

    return finish


@pytest.mark.parametrize("feedback", [False, True])
def test_feedback_shows_the_next_block_what_the_changed_block_does(feedback):
    model, states = toy()
    blocks, outputs, seen = layers(model), [], {}
    taps_of = tap_all(model, blocks)
    taps = {k: tap for block in blocks for k, tap in taps_of(block).items()}
    before, stats = ordinary(model, states, taps)

    def finish(name, found):
        seen.update(found)
        spoil(model, "layers.0")(name, found)

    replay(model, blocks, states, taps_of, finish, feedback=feedback, on_output=lambda _, y: outputs.append(y))
    assert same(seen["layers.0.wide"], stats["layers.0.wide"])
    assert same(seen["layers.1.wide"], stats["layers.1.wide"]) is not feedback
    after, changed = ordinary(model, states, taps)
    assert same(outputs, after if feedback else before) and not same(before, after)
    assert same(seen["layers.1.wide"], (changed if feedback else stats)["layers.1.wide"])
    assert untouched(model)


def test_a_block_that_changes_its_input_is_fed_back_right():
    class Greedy(Block):
        def forward(self, x, scale=1.0):
            return x.add_(self.narrow(self.wide(x)))

    model, states = toy()
    for i in range(3):
        model.layers[i].__class__ = Greedy
    outputs = []
    blocks = layers(model)
    finish, keep = spoil(model, "layers.1"), lambda _, y: outputs.append(y)
    replay(model, blocks, states, tap_all(model, blocks), finish, feedback=True, on_output=keep)
    assert same(outputs, ordinary(model, states, {})[0])


def test_same_bits_every_time():
    runs = []
    for _ in range(2):
        model, inputs = tiny_models.flux()
        blocks = blocks_of(model)
        runs.append({})
        replay(model, blocks, varied(inputs), tap_all(model, blocks), lambda _, s: runs[-1].update(s), feedback=True)
    assert all(same(runs[0][key], runs[1][key]) for key in runs[0])


def test_a_block_called_twice_is_finished_once_with_the_statistics_of_both_calls():
    model, states = toy(way=lambda x: (0, 1, 0, 2))
    blocks, seen, order = layers(model), {}, []

    def finish(name, stats):
        order.append(name)
        seen.update(stats)

    taps_of = tap_all(model, blocks)
    replay(model, blocks, states, taps_of, finish)
    assert order == ["layers.1", "layers.0", "layers.2"]
    assert seen["layers.0.wide"].rows == 2 * sum(2 * (5 + i) for i in range(STATES))
    _, stats = ordinary(model, states, taps_of("layers.0"))
    torch.testing.assert_close(seen["layers.0.wide"].gram, stats["layers.0.wide"].gram)


def test_a_block_skipped_by_some_states_sees_the_others():
    model, states = toy(way=lambda x: (0, 2) if x.shape[1] == 6 else (0, 1, 2))
    blocks, seen = layers(model), {}
    assert replay(model, blocks, states, tap_all(model, blocks), lambda _, s: seen.update(s)) == {}
    assert seen["layers.1.wide"].rows == 2 * (5 + 7) and seen["layers.2.wide"].rows == 2 * (5 + 6 + 7)


def test_a_block_that_only_later_states_reach_is_finished_too():
    model, states = toy(way=lambda x: (0, 1) if x.shape[1] == 5 else (0, 2, 1))
    blocks, seen = layers(model), {}
    assert replay(model, blocks, states, tap_all(model, blocks), lambda _, s: seen.update(s)) == {}
    assert seen["layers.2.wide"].rows == 2 * (6 + 7)


def test_states_that_return_to_a_finished_block_are_an_error():
    model, states = toy(way=lambda x: (0, 1, 2) if x.shape[1] == 5 else (1, 0, 2))
    with pytest.raises(NunchakuError, match="layers.0: calibration state 1 calls it again after it was quantized"):
        replay(model, layers(model), states, tap_all(model, layers(model)), lambda *_: None)
    assert untouched(model)


def test_unreached_blocks_and_uncalled_modules_are_told():
    model, states = toy(way=lambda x: (0, 2))
    model.layers[0].spare = nn.Linear(16, 16)
    blocks, seen = layers(model), {}
    assert replay(model, blocks, states, tap_all(model, blocks), lambda _, s: seen.update(s)) == {"layers.1": UNREACHED}
    assert "layers.0.wide" in seen and "layers.0.spare" not in seen


def test_the_caller_has_the_block_to_itself_while_it_finishes_it():
    model, states = toy()
    blocks, outputs = layers(model), []

    def finish(name, stats):
        block = blocks[name]
        assert "forward" not in vars(block)
        copy.deepcopy(block)(torch.ones(1, 16))
        if name == "layers.1":
            block.forward = lambda x, scale=1.0: x

    keep = lambda _, y: outputs.append(y)  # noqa: E731
    replay(model, blocks, states, tap_all(model, blocks), finish, feedback=True, on_output=keep)
    assert "forward" in vars(blocks["layers.1"])
    assert same(outputs, ordinary(model, states, {})[0])


@pytest.mark.parametrize("feedback", [False, True])
def test_a_single_linear_may_be_a_block_and_another_module_take_its_place(feedback):
    model, states = toy()
    blocks, outputs, seen = {"stem": model.stem} | layers(model), [], {}
    before, stats = ordinary(model, states, {"stem": SiteTap(model.stem, gram=True)})
    taps = {"stem": {"stem": SiteTap(model.stem, gram=True)}}

    def finish(name, found):
        seen.update(found)
        if name in ("stem", "layers.1"):
            model.set_submodule(name, nn.Sequential(nn.Linear(16, 16)) if name == "stem" else PlainBlock())

    class PlainBlock(Block):
        def __init__(self):
            super().__init__(16)

    keep = lambda _, y: outputs.append(y)  # noqa: E731
    replay(model, blocks, states, lambda name: taps.get(name, {}), finish, feedback=feedback, on_output=keep)
    assert same(seen["stem"], stats["stem"])
    assert same(outputs, ordinary(model, states, {})[0] if feedback else before)
    assert untouched(model)


def test_an_instance_level_forward_stays():
    model, states = toy()
    block = model.layers[1]
    own = block.forward = lambda x, scale=1.0: Block.forward(block, x, scale) * 2
    expected, outputs = ordinary(model, states, {})[0], []
    blocks = layers(model)
    replay(model, blocks, states, tap_all(model, blocks), lambda *_: None, on_output=lambda _, y: outputs.append(y))
    assert block.forward is own and same(outputs, expected)


def test_models_that_look_at_signatures_still_find_them():
    model, states = toy()
    found = []

    def way(x):
        found.append(list(inspect.signature(model.layers[0].forward).parameters))
        return range(3)

    model.way = way
    replay(model, layers(model), states, tap_all(model, layers(model)), lambda *_: None)
    assert found and all(names == ["x", "scale"] for names in found)


def test_the_states_are_not_changed_by_forwards_that_change_their_inputs():
    model, states = toy()
    before = [state.kwargs["x"].clone() for state in states]

    def spend(_module, args, kwargs):
        kwargs["x"].zero_()

    model.register_forward_pre_hook(spend, with_kwargs=True)
    replay(model, layers(model), states, tap_all(model, layers(model)), lambda *_: None)
    assert same([state.kwargs["x"] for state in states], before)


def test_the_error_of_a_forward_comes_to_the_caller_as_it_is():
    model, states = toy(way=lambda x: (0, 1, 2) if x.shape[1] != 7 else (0, "one"))
    with pytest.raises(TypeError, match="str"):
        replay(model, layers(model), states, tap_all(model, layers(model)), lambda *_: None)
    assert untouched(model)


def test_the_error_of_the_caller_ends_it_cleanly():
    def finish(name, stats):
        if name == "layers.1":
            raise ZeroDivisionError("mine")

    model, states = toy()
    with pytest.raises(ZeroDivisionError, match="mine"):
        replay(model, layers(model), states, tap_all(model, layers(model)), finish)
    assert untouched(model)


def test_states_that_the_model_refuses_say_so_in_a_sentence():
    model, wrong = toy()[0], State.of((torch.ones(3, 7),), {})
    with pytest.raises(NunchakuError, match="calibration state 0: Toy fails on it: RuntimeError: mat1 and mat2"):
        replay(model, layers(model), [wrong], tap_all(model, layers(model)), lambda *_: None)
    assert untouched(model)


def test_nan_names_the_site():
    model, states = toy()
    states[1].kwargs["x"][0, 0, 0] = float("nan")
    with pytest.raises(NunchakuError, match="layers.0.wide: the calibration input holds NaN or Inf"):
        replay(model, layers(model), states, tap_all(model, layers(model)), lambda *_: None)
    assert untouched(model)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as at a terminal; a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["in a forward", "in finish"])
def test_ctrl_c_leaves_nothing_behind(where, ctrl_c):
    model, states = toy()
    steps = []

    def interrupt(*_):
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        steps.append(1)

    if where == "in a forward":
        model.layers[1].narrow.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2):  # finish comes three times per replay
            finish = interrupt if where == "in finish" else lambda *_: None
            replay(model, layers(model), states, tap_all(model, layers(model)), finish)
    assert untouched(model)
    assert len(steps) <= 7


def test_lanes_take_over_autocast():
    model, states = toy()
    seen, blocks = {}, layers(model)
    with torch.autocast("cpu", torch.bfloat16):
        replay(model, blocks, states, tap_all(model, blocks), lambda _, s: seen.update(s))
    assert seen["layers.0.narrow"].tokens.dtype == torch.bfloat16


def test_it_works_within_inference_mode():
    model, states = toy()
    with torch.inference_mode():
        replay(model, layers(model), states, tap_all(model, layers(model)), lambda *_: None)
    assert untouched(model)


def test_blocks_within_blocks_are_refused():
    model, states = toy()
    blocks = layers(model) | {"layers.1.wide": model.layers[1].wide}
    with pytest.raises(NunchakuError, match="'layers.1.wide' is or lies inside 'layers.1'"):
        replay(model, blocks, states, lambda _: {}, lambda *_: None)


def test_compiled_models_and_no_states_are_refused():
    model, states = toy()
    with pytest.raises(NunchakuError, match="at least one, got none"):
        replay(model, layers(model), [], lambda _: {}, lambda *_: None)
    model.layers[1].compile()
    with pytest.raises(NunchakuError, match="layers.1: it is compiled"):
        replay(model, layers(model), states, lambda _: {}, lambda *_: None)

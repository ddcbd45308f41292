import pytest
import torch
from torch import nn

from nunchaku_py.calibrate import STEPS, State, Thinned, capture_states, evenly
from nunchaku_py.errors import NunchakuError
from nunchaku_py.models.discover import blocks_of
from nunchaku_py.replay import replay
from tests.tiny import PIPELINES


class Denoiser(nn.Module):
    def forward(self, sample, timestep, extra=None):
        return sample


class Pipeline:
    """Calls its denoiser `calls` times per step, as guidance by two forwards does."""

    def __init__(self, calls=1):
        self.transformer, self.calls, self.runs = Denoiser(), calls, []

    def __call__(self, prompt=None, size=4, num_inference_steps=50, generator=None, output_type="pil"):
        self.runs.append(dict(prompt=prompt, size=size, steps=num_inference_steps, output_type=output_type))
        latents = torch.randn(1, size, generator=generator)
        for step in range(num_inference_steps):
            for call in range(self.calls):
                self.transformer(latents, timestep=torch.tensor([step]), extra={"call": call, "latents": [latents]})
        latents.zero_()


def steps_of(states):
    return [int(state.kwargs["timestep"]) for state in states]


def test_prompts_give_states_evenly_over_prompts_and_steps():
    pipeline = Pipeline()
    states = capture_states(pipeline, pipeline.transformer, ["a", "b", "c", "d"], states=8)
    assert [run["prompt"] for run in pipeline.runs] == ["a", "b", "c", "d"]
    assert steps_of(states) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert all(run["steps"] == STEPS and run["output_type"] == "latent" for run in pipeline.runs)
    assert len({float(state.args[0][0, 0]) for state in states}) == 4  # a seed per prompt


def test_more_prompts_than_states_are_thinned_and_still_cover_the_steps():
    pipeline = Pipeline()
    states = capture_states(pipeline, pipeline.transformer, list("abcdefghijklmnop"), states=4)
    assert [run["prompt"] for run in pipeline.runs] == ["c", "g", "k", "o"]
    assert steps_of(states) == [1, 3, 5, 7]


def test_few_prompts_take_more_steps():
    pipeline = Pipeline()
    assert steps_of(capture_states(pipeline, pipeline.transformer, "a", states=12)) == list(range(12))
    assert pipeline.runs[0]["steps"] == 12


def test_guidance_by_two_forwards_is_covered():
    pipeline = Pipeline(calls=2)
    states = capture_states(pipeline, pipeline.transformer, list("abcd"), states=16)
    assert {state.kwargs["extra"]["call"] for state in states} == {0, 1}


def test_arguments_of_the_pipeline_common_and_per_prompt():
    pipeline, own = Pipeline(), dict(prompt="b", size=6, num_inference_steps=3)
    capture_states(pipeline, pipeline.transformer, [{"prompt": "a"}, own], states=4, size=5)
    assert [(run["size"], run["steps"]) for run in pipeline.runs] == [(5, STEPS), (6, 3)]


def test_the_same_states_every_time_detached_from_what_the_pipeline_does_later():
    once, again = (capture_states(p, p.transformer, ["a", "b"], states=4, seed=3) for p in (Pipeline(), Pipeline()))
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one.args[0], other.args[0]) and one.args[0].abs().sum() > 0
        assert torch.equal(one.kwargs["extra"]["latents"][0], one.args[0])


def test_another_seed_gives_other_states():
    one, other = (capture_states(p, p.transformer, "a", 1, seed=s)[0] for s, p in enumerate([Pipeline(), Pipeline()]))
    assert not torch.equal(one.args[0], other.args[0])


def test_states_are_plain_tensors_even_from_inference_mode():
    pipeline = Pipeline()
    with torch.inference_mode():
        state = capture_states(pipeline, pipeline.transformer, "a", states=1)[0]
    assert not state.args[0].is_inference()
    (sample,), kwargs = state.on(torch.device("cpu"))
    assert sample.data_ptr() != state.args[0].data_ptr() and kwargs["extra"] is not state.kwargs["extra"]


def test_forward_kwargs_are_used_as_they_are():
    model, items = Denoiser(), [dict(sample=torch.ones(2) * i, timestep=torch.tensor([i])) for i in range(10)]
    assert steps_of(capture_states(model, model, items, states=16)) == list(range(10))
    assert steps_of(capture_states(model, model, items, states=5)) == [1, 3, 5, 7, 9]
    assert steps_of(capture_states(Pipeline(), model, items[:2])) == [0, 1]
    assert len(capture_states(model, model, iter(items), states=5)) == 5
    assert steps_of(capture_states(model, model, items[3])) == [3]


def test_captured_states_may_be_passed_again():
    model = Denoiser()
    states = [State.of((torch.ones(1),), dict(timestep=torch.tensor([i]))) for i in range(3)]
    assert capture_states(model, model, states) == states


def test_a_callable_runs_the_model():
    def run(model):
        for step in range(100):
            model(torch.ones(1, requires_grad=True), torch.tensor([step]))

    model = Denoiser()
    states = capture_states(model, model, run, states=10)
    steps = [int(state.args[1]) for state in states]
    assert len(steps) == 10 and steps == sorted(steps) and steps[0] < 10 and steps[-1] >= 85
    assert not states[0].args[0].requires_grad and not model._forward_pre_hooks


@pytest.mark.parametrize("data", [[], (), iter([]), lambda model: None])
def test_data_without_a_forward_is_an_error(data):
    with pytest.raises(NunchakuError, match="calibration data: it led to no forward of Denoiser"):
        capture_states(Denoiser(), Denoiser(), data)


def test_a_pipeline_that_never_runs_the_model_is_an_error():
    with pytest.raises(NunchakuError, match="it led to no forward of Linear"):
        capture_states(Pipeline(), nn.Linear(2, 2), ["a"])


def test_kwargs_the_model_refuses():
    model = Denoiser()
    with pytest.raises(NunchakuError, match="item 0: Denoiser.forward refuses it: missing .*'timestep'; it takes "):
        capture_states(model, model, [dict(sample=torch.ones(1))])
    with pytest.raises(NunchakuError, match="nor is it an argument list of Pipeline, which does not know promt"):
        capture_states(Pipeline(), model, [dict(promt="a", size=4)])


@pytest.mark.parametrize(
    "target, data, states, message",
    [
        (None, ["a cat"], 4, "prompts need a pipeline; a Denoiser takes forward kwargs or a callable"),
        (None, 7, 4, "expected prompts, an iterable of forward kwargs or a callable, got int"),
        (None, [7], 4, "calibration item 0: expected a dict of forward kwargs, got int"),
        (Pipeline(), ["a", dict(sample=torch.ones(1), timestep=torch.ones(1))], 4, "got a mixture"),
        (None, [], 0, "states: expected a number of calibration states above 0, got 0"),
    ],
)
def test_what_cannot_be_calibration_data(target, data, states, message):
    model = Denoiser()
    with pytest.raises(NunchakuError, match=message):
        capture_states(target or model, model, data, states=states)


def test_thinning_is_even_whatever_comes():
    for offered in (1, 7, 8, 16, 17, 100, 1000):
        kept = Thinned(8)
        for i in range(offered):
            kept.offer(lambda i=i: i)
            assert len(kept.held) <= 16
        picked = kept.pick(8)
        assert len(picked) == min(8, offered)
        gaps = {b - a for a, b in zip(picked, picked[1:], strict=False)}
        assert not gaps or max(gaps) - min(gaps) <= kept.stride
    assert evenly(10, 5) == [1, 3, 5, 7, 9] and evenly(3, 5) == [0, 1, 2] and evenly(0, 5) == []


def denoiser_of(pipeline):
    return getattr(pipeline, "transformer", None) or pipeline.unet


@pytest.mark.parametrize("name", ["flux_prompt", "flux_img2img", "sdxl"])
def test_diffusers_pipelines(name):
    pipeline, call = PIPELINES[name]()
    call = {key: value for key, value in call.items() if key not in ("generator", "num_inference_steps", "output_type")}
    pipeline.set_progress_bar_config(leave=False)
    states = capture_states(pipeline, denoiser_of(pipeline), [call, call], states=4)
    times = [float(state.kwargs.get("timestep", state.args[1] if state.args[1:] else 0)) for state in states]
    assert len(states) == 4 and len(set(times)) == 4
    assert pipeline._progress_bar_config == {"leave": False}


@pytest.mark.parametrize("name", ["flux_prompt", "flux_controlnet", "flux_ip_adapter", "sdxl", "sdxl_controlnet"])
def test_captured_states_replay_to_what_the_pipeline_made(name):
    """Residuals of a ControlNet, adapter embeddings and conditions in dicts come along."""
    pipeline, call = PIPELINES[name]()
    model, made, replayed = denoiser_of(pipeline), [], []
    hook = model.register_forward_hook(lambda _model, _args, output: made.append(output))
    states = capture_states(pipeline, model, [call], states=2)
    hook.remove()
    blocks = blocks_of(model)
    keep = lambda _, output: replayed.append(output)  # noqa: E731
    assert replay(model, blocks, states, lambda block: {}, lambda *_: None, feedback=True, on_output=keep) == {}
    assert all(torch.equal(one[0], other[0]) for one, other in zip(made, replayed, strict=True))


def test_a_prompt_that_the_pipeline_refuses_is_counted_and_quoted() -> None:
    pipe, _ = PIPELINES["flux_prompt"]()
    with pytest.raises(NunchakuError, match="calibration prompt 2: FluxPipeline refuses it"):
        capture_states(pipe, pipe.transformer, ["a cat", {"prompt": 3}], 2)

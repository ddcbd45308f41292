"""What the demonstration measures: pictures against hand-computed values, and models that are the same or not."""

import math

import pytest
import torch

from nunchaku_py import NunchakuError
from nunchaku_py.bench.held import held_bytes
from nunchaku_py.calibrate import State
from nunchaku_py.demo import measure, shipped


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_of_each_picture():
    expected = torch.zeros(3, 3, 4, 4)
    found = expected + torch.tensor([0.0, 0.1, 1.0])[:, None, None, None]
    assert measure.psnr(found, expected).tolist() == [math.inf, pytest.approx(20), pytest.approx(0)]
    half = torch.zeros(1, 3, 4, 4)
    half[:, :, :2] = 0.2  # half the pixels off by 0.2: a mean square of 0.02
    assert measure.psnr(half, torch.zeros(1, 3, 4, 4)).item() == pytest.approx(10 * math.log10(50))


def test_ssim_of_flat_pictures_is_their_luminance_term():
    found, expected = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.8)
    by_hand = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert measure.ssim(found, expected).item() == pytest.approx(by_hand, rel=1e-5)


def test_ssim_is_one_of_the_same_picture_symmetric_and_falls_with_noise():
    picture = pictures(2, 3, 20, 24)
    noise = pictures(2, 3, 20, 24, seed=1) - 0.5
    little, much = (picture + amount * noise for amount in (0.1, 0.6))
    assert torch.allclose(measure.ssim(picture, picture), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(measure.ssim(picture, much), measure.ssim(much, picture))
    assert ((measure.ssim(picture, little) > measure.ssim(picture, much)) & (measure.ssim(picture, little) < 1)).all()
    assert (measure.ssim(picture, 1 - picture) < 0).all()  # an opposite structure


def test_ssim_of_one_window_is_the_formula_in_plain_loops():
    x, y = pictures(1, 1, 11, 11), pictures(1, 1, 11, 11, seed=1)
    weights = {(i, j): math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for i in range(11) for j in range(11)}
    total = sum(weights.values())

    def mean(of) -> float:
        values = (weight * of(x[0, 0, i, j].item(), y[0, 0, i, j].item()) for (i, j), weight in weights.items())
        return sum(values) / total

    mx, my = mean(lambda a, b: a), mean(lambda a, b: b)
    vx, vy = mean(lambda a, b: (a - mx) ** 2), mean(lambda a, b: (b - my) ** 2)
    cov = mean(lambda a, b: (a - mx) * (b - my))
    by_hand = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert measure.ssim(x, y).item() == pytest.approx(by_hand, rel=1e-5)


def test_ssim_is_the_mean_over_channels_and_does_not_mix_pictures():
    found, expected = pictures(2, 3, 12, 12), pictures(2, 3, 12, 12, seed=1)
    whole = measure.ssim(found, expected)
    for i in range(2):
        channels = [measure.ssim(found[i, c][None, None], expected[i, c][None, None]) for c in range(3)]
        assert whole[i].item() == pytest.approx(torch.cat(channels).mean().item())


@pytest.mark.parametrize("shapes", [((1, 3, 8, 8), (1, 3, 8, 9)), ((3, 16, 16), (3, 16, 16)), ((1, 3, 8, 8),) * 2])
def test_pictures_that_cannot_be_compared_are_refused(shapes):
    with pytest.raises(NunchakuError, match=r"expected two of one shape \(B, C, H, W\)"):
        measure.ssim(*(torch.zeros(shape) for shape in shapes))


def test_relative_error_and_same_bits():
    assert measure.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == pytest.approx(0.75)
    linear = torch.nn.Linear(2, 2)
    assert measure.same_bits(linear, linear, [])
    assert not measure.same_bits(linear, torch.nn.Linear(2, 2), [])


class Scaled(torch.nn.Linear):
    """What its state does not say: a factor."""

    factor = 1.0

    def forward(self, x: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.factor * super().forward(x),)


def test_models_of_the_same_tensors_with_other_predictions_differ():
    one, two = Scaled(2, 2), Scaled(2, 2)
    two.load_state_dict(one.state_dict())
    states = [State((torch.ones(1, 2),))]
    assert measure.same_bits(one, two, states)
    two.factor = 1.5
    assert not measure.same_bits(one, two, states)


def test_pictures_are_painted_in_batches_with_a_seed_each(stand_in, monkeypatch):
    pipe, call = shipped.pipeline("tiny-flux", torch.float32), {**shipped.CALLS["tiny-flux"], "num_inference_steps": 2}
    prompts, done = ["a red circle", "a blue star", "a pink ring"], []
    monkeypatch.setattr(measure, "BATCH", 2)
    together = measure.paint(pipe, prompts, 5, call, done.append)
    assert together.shape == (3, 3, 64, 64) and 0 <= together.min() < together.max() <= 1
    assert done == [2, 2, 1, 1]
    alone = torch.cat([measure.paint(pipe, [prompt], 5 + i, call) for i, prompt in enumerate(prompts)])
    assert torch.allclose(together, alone, atol=1e-3)


def test_held_bytes_counts_each_tensor_once():
    first, second = torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(4, 8)
    second.weight = first.weight
    both = torch.nn.ModuleList([first, second]).bfloat16()
    both.register_buffer("table", torch.zeros(5, dtype=torch.int8), persistent=False)
    assert held_bytes(both) == 2 * 4 * 8 + 2 * 8 + 5

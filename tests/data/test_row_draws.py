import torch
from torch.testing import assert_close

from dreambooth_lab import draw, lab
from dreambooth_lab.data import row_draws
from dreambooth_lab.draw import Purpose

SAMPLES = list(range(3000))
SHAPE = (4, 8, 8)


def test_noise_without_offset_is_unchanged():
    cfg = lab.compose()
    assert all(torch.equal(row_draws.noise_draws(cfg, n, SHAPE), draw.normal(0, n, Purpose.NOISE, SHAPE)) for n in SAMPLES[:20])


def test_noise_offset_is_per_channel_with_given_strength_and_probability():
    cfg = lab.compose("objective.noise_offset=0.1", "objective.noise_offset_probability=0.25")
    offsets = torch.stack([row_draws.noise_draws(cfg, n, SHAPE) - draw.normal(0, n, Purpose.NOISE, SHAPE) for n in SAMPLES])
    assert_close(offsets, offsets[..., :1, :1].expand_as(offsets), atol=1e-6, rtol=0)
    has = offsets.abs().amax((1, 2, 3)) > 0
    assert abs(has.double().mean() - 0.25) < 0.03
    values = offsets[has][:, :, 0, 0]
    assert abs(values.std() - 0.1) < 0.005 and abs(values.mean()) < 0.005
    assert abs(torch.corrcoef(values.T)[0, 1]) < 0.1, "channels have independent offsets"


def test_masks_are_dropped_per_sample_with_given_probability():
    cfg = lab.compose("mask.drop_probability=0.3")
    mask = torch.rand(len(SAMPLES), 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.9
    left = row_draws.drop_masks(cfg, SAMPLES, mask)
    dropped = (left == 1).all((1, 2, 3))
    assert abs(dropped.double().mean() - 0.3) < 0.03
    assert torch.equal(left[~dropped], mask[~dropped])
    for n in (5, 6, 7):
        assert torch.equal(row_draws.drop_masks(cfg, [n], mask[n : n + 1])[0], left[n])
    assert torch.equal(row_draws.drop_masks(lab.compose(), SAMPLES, mask), mask)
    assert row_draws.drop_masks(cfg, SAMPLES, None) is None


def test_rollout_draws_are_per_row_and_uniform():
    draws = row_draws.rollout_draws(lab.compose(), SAMPLES)
    assert torch.equal(row_draws.rollout_draws(lab.compose(), [7, 3]), draws[[7, 3]])
    assert draws.shape == (3000, 2) and draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 0.02 and abs(torch.corrcoef(draws.T)[0, 1]) < 0.05

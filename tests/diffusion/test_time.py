import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.diffusion.time import Times, build_times, logit_normal, logit_normal_cdf, shift

U = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
SIZE = (8, 8)


def none(height, width):
    return 1.0


def test_uniform_over_the_whole_range_is_the_identity():
    assert torch.equal(Times(enums.Timesteps.uniform, 0.0, 1.0, none, 0.0, 1.0)(U, SIZE), U)


@given(st.floats(0.1, 8), st.floats(0, 1))
def test_shift_has_an_inverse_and_keeps_the_endpoints(s, t):
    t = torch.tensor([t, 0.0, 1.0], dtype=torch.float64)
    assert_close(shift(shift(t, s), 1 / s), t)
    assert_close(shift(t, s)[1:], t[1:])


def test_shift_of_three_matches_sd3():
    from diffusers import FlowMatchEulerDiscreteScheduler

    plain, shifted = FlowMatchEulerDiscreteScheduler(shift=1.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert_close(shift(plain.sigmas, 3.0), shifted.sigmas)


def test_logit_normal_has_the_expected_moments_and_cdf():
    t = logit_normal(U, -0.5, 0.8)
    z = torch.logit(t)
    assert_close(z.mean(), torch.tensor(-0.5, dtype=torch.float64), atol=1e-3, rtol=0)
    assert_close(z.std(), torch.tensor(0.8, dtype=torch.float64), atol=1e-3, rtol=0)
    assert_close(logit_normal_cdf(t, -0.5, 0.8), U)


@pytest.mark.parametrize("kind", enums.Timesteps, ids=lambda k: k.value)
@pytest.mark.parametrize("s", [1.0, 3.0])
def test_limited_range_keeps_the_distribution_inside(kind, s):
    whole, limited = (Times(kind, 0.3, 1.2, lambda height, width: s, *ends)(U, SIZE) for ends in ((0.0, 1.0), (0.2, 0.7)))
    assert limited.min() >= 0.2 - 1e-9 and limited.max() <= 0.7 + 1e-9
    inside = whole[(whole >= 0.2) & (whole < 0.7)]
    for q in (0.1, 0.5, 0.9):
        assert_close(limited.quantile(q), inside.quantile(q), atol=1e-3, rtol=0)


def test_time_increases_with_u():
    for kind in enums.Timesteps:
        assert (Times(kind, 0.0, 1.0, lambda height, width: 2.0, 0.1, 0.9)(U, SIZE).diff() >= 0).all()


def test_range_outside_the_models_times_is_refused():
    cfg = lab.compose("objective.min_time=0.5").objective
    assert build_times(cfg, (0.0, 0.8), none)(torch.tensor([0.0, 1.0]), SIZE).tolist() == pytest.approx([0.5, 0.8])
    with pytest.raises(ConfigError, match=r"objective\.min_time=0\.5 .* exclude all of this model.s training range, 0 to 0\.2"):
        build_times(cfg, (0.0, 0.2), none)


def test_shift_is_the_models_own_for_the_latent_size_or_the_given_number():
    def grows(height, width):
        return height * width / 64

    u = torch.tensor([0.25, 0.5], dtype=torch.float64)
    own = build_times(lab.compose("objective.shift=model").objective, (0.0, 1.0), grows)
    assert torch.equal(own(u, (8, 8)), u)
    assert_close(own(u, (16, 8)), shift(u, 2.0))
    assert own.describe((8, 8)) == own.describe((4, 16)) != own.describe((16, 8))
    numeric = build_times(lab.compose("objective.shift=3").objective, (0.0, 1.0), grows)
    assert_close(numeric(u, (8, 8)), shift(u, 3.0))
    assert numeric.describe((8, 8)) == numeric.describe((16, 8))

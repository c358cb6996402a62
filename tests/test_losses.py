import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from dreambooth_lab.batch import RowCounts
from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.data.sampling.schedule import Bucket, Group, Schedule
from dreambooth_lab.diffusion.path import RectifiedFlow, VariancePreserving
from dreambooth_lab.losses import (
    ON_NOISE,
    consistency,
    huber_width,
    masked_error,
    outside_error,
    preserve_prior,
    pseudo_huber,
    require_finite,
    squared,
    time_weight,
)

NOISE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
EPS, V = (VariancePreserving(NOISE.alphas_cumprod, kind) for kind in enums.Prediction)
FLOW = RectifiedFlow(1000)
ZERO = VariancePreserving(
    DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod, enums.Prediction.v_prediction
)
NATIVE = torch.tensor([0, 1, 20, 250, 500, 900, 999])


def pair(seed=0, rows=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, 8, 8, generator=g), torch.randn(rows, 4, 8, 8, generator=g)


@given(st.booleans(), st.floats(0, 1))
def test_a_mask_of_ones_is_the_plain_loss(normalize, floor):
    output, target = pair()
    plain = masked_error(output, target, None, normalize, floor)
    assert_close(masked_error(output, target, torch.ones(3, 1, 8, 8), normalize, floor), plain)
    assert_close(plain, ((output - target) ** 2).flatten(1).mean(1))


@given(st.integers(1, 64))
def test_normalised_error_does_not_depend_on_the_mask_area(cells):
    mask = torch.zeros(1, 1, 64)
    mask[..., :cells] = 1
    error = masked_error(torch.full((1, 4, 8, 8), 3.0), torch.ones(1, 4, 8, 8), mask.view(1, 1, 8, 8), True, 0.0)
    assert_close(error, torch.tensor([4.0]))


def test_what_lies_outside_the_mask_does_not_matter_and_the_floor_brings_it_back():
    output, target = pair()
    mask = torch.zeros(3, 1, 8, 8)
    mask[..., :4] = 1
    wrong = output.clone()
    wrong[..., 4:] += 100
    assert_close(masked_error(wrong, target, mask, True, 0.0), masked_error(output, target, mask, True, 0.0))
    assert (masked_error(wrong, target, mask, True, 0.1) > masked_error(output, target, mask, True, 0.1) + 100).all()


def rows(*which):
    return torch.tensor(which, dtype=torch.long)


def alone(error, instances, classes, weight):
    """Of a batch that has the rows to be expected."""
    return preserve_prior(error, instances, classes, RowCounts(len(instances), len(classes)), weight)


def test_the_weight_zero_is_training_without_class_rows():
    error = torch.tensor([1.0, 2.0, 30.0, 50.0])
    assert_close(alone(error, rows(0, 1), rows(2, 3), 0.0), alone(error[:2], rows(0, 1), rows(), 1.0))


@given(st.integers(1, 7), st.floats(0, 4))
def test_each_term_is_the_mean_of_its_own_rows(split, weight):
    error = torch.arange(1.0, 9.0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(split))
    total = alone(error, order[:split], order[split:], weight)
    assert_close(total, error[order[:split]].mean() + weight * error[order[split:]].mean())


def test_a_term_without_rows_is_zero():
    assert alone(torch.tensor([2.0]), rows(), rows(0), 0.5) == 1.0
    assert alone(torch.tensor([2.0]), rows(0), rows(), 0.5) == 2.0


def group(first, n, each, is_class):
    return Group(tuple(range(first, first + n)), n * each, is_class)


FIVE, CLASSES = group(0, 5, 1, False), group(10, 100, 1, True)
MIXTURES = {share: [Bucket((8, 8), (FIVE, CLASSES._replace(rows=5 * share / (1 - share))))] for share in (0.1, 0.2, 0.5, 0.6)}
MIXTURES |= {
    "100 class pictures, once each": [Bucket((8, 8), (FIVE, CLASSES))],
    "repeats, and a bucket without class pictures": [
        Bucket((8, 8), (group(0, 3, 7, False), group(20, 9, 1, True))), Bucket((8, 16), (group(3, 2, 7, False),)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=map(str, MIXTURES))
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_over_time_each_term_has_its_weight_whatever_the_share_and_batch(mixture, batch_size):
    """E[loss] = mean over instance rows + λ · mean over class rows, of the rows that the sampler really gives."""
    schedule, weight = Schedule(mixture, batch_size, 0), 0.7
    row_counts = RowCounts.expected(batch_size, schedule.class_share)
    mean = {False: [], True: []}
    for n in range(4200 // batch_size):
        is_class = torch.tensor([row.entry >= 10 for row in schedule.batch(n)])
        parts = (~is_class).nonzero()[:, 0], is_class.nonzero()[:, 0]
        for kind, found in mean.items():
            error = (is_class == kind).double()  # 1 of one kind of rows, 0 of the other
            found.append(preserve_prior(error, *parts, row_counts, weight))
    assert torch.stack(mean[False]).mean() == pytest.approx(1.0, rel=0.01)
    assert torch.stack(mean[True]).mean() == pytest.approx(weight, rel=0.01)


@given(st.lists(st.booleans(), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4, 6]), st.floats(0.05, 0.95))
def test_a_step_is_the_mean_of_its_parts_however_it_is_cut(row_counts, rows_each, share):
    error, is_class = torch.arange(1.0, 13.0).double(), torch.tensor(row_counts)

    def loss(of):
        parts = (~is_class[of]).nonzero()[:, 0], is_class[of].nonzero()[:, 0]
        return preserve_prior(error[of], *parts, RowCounts.expected(len(of), share), 0.4)

    assert_close(torch.stack([loss(part) for part in torch.arange(12).split(rows_each)]).mean(), loss(torch.arange(12)))


def test_a_mask_of_zeros_has_no_error_rather_than_none_that_is_a_number():
    output, target = pair()
    mask = torch.ones(3, 1, 8, 8)
    mask[1] = 0
    error = masked_error(output, target, mask, True, 0.0)
    assert error.isfinite().all() and error[1] == 0 < error[0]


def test_inside_and_outside_are_all_of_it():
    output, target = pair()
    mask = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    whole = masked_error(output, target, mask, False, 0.2) + outside_error(output, target, mask, 0.2)
    assert_close(whole, masked_error(output, target, None, False, 0.0))
    assert outside_error(output, target, torch.ones(3, 1, 8, 8), 0.0).abs().max() == 0


def test_min_snr_is_its_closed_form():
    snr, t = compute_snr(NOISE, NATIVE), EPS.time(NATIVE)
    least = snr.clamp(max=5.0)
    assert_close(time_weight(enums.Weight.min_snr, 5.0, EPS, t), least / snr, rtol=1e-4, atol=1e-6)
    assert_close(time_weight(enums.Weight.min_snr, 5.0, V, t), least / (snr + 1), rtol=1e-4, atol=1e-6)
    t = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    assert_close(
        time_weight(enums.Weight.min_snr, 5.0, FLOW, t), torch.minimum(((1 - t) / t) ** 2, torch.tensor(5.0)).mul(t**2).float()
    )


def test_the_other_weights_are_their_closed_forms():
    snr, t = compute_snr(NOISE, NATIVE), EPS.time(NATIVE)
    assert_close(time_weight(enums.Weight.soft_min_snr, 5.0, EPS, t), 5.0 / (snr + 5.0), rtol=1e-4, atol=1e-6)
    assert_close(time_weight(enums.Weight.debiased, 5.0, EPS, t), snr.rsqrt(), rtol=1e-4, atol=1e-6)
    assert torch.equal(time_weight(enums.Weight.none, 5.0, EPS, t), torch.ones(7))


@given(st.floats(1e-2, 100))
def test_min_snr_on_every_step_is_min_over_snr_on_noise_and_min_over_snr_plus_one_on_v(gamma):
    t = EPS.time(torch.arange(1000))
    snr = EPS.snr(t)
    least = snr.clamp(max=gamma)
    assert_close(time_weight(enums.Weight.min_snr, gamma, EPS, t), (least / snr).float())
    assert_close(time_weight(enums.Weight.min_snr, gamma, V, t), (least / (snr + 1)).float())
    ended = ZERO.snr(t)
    assert_close(time_weight(enums.Weight.min_snr, gamma, ZERO, t), (ended.clamp(max=gamma) / (ended + 1)).float())
    assert ended[-1] == 0


def test_weights_are_finite_at_zero_terminal_snr_but_debiased_which_is_refused():
    t = ZERO.time(torch.arange(1000))
    for kind in (enums.Weight.none, enums.Weight.min_snr, enums.Weight.soft_min_snr):
        weight = time_weight(kind, 5.0, ZERO, t)
        assert weight.isfinite().all() and (weight >= 0).all()
        require_finite(kind, ZERO)
    assert not time_weight(enums.Weight.debiased, 5.0, ZERO, t).isfinite().all()
    with pytest.raises(ConfigError, match=r"objective\.weight is debiased, which is infinite at pure noise"):
        require_finite(enums.Weight.debiased, ZERO)
    for path in (EPS, V, FLOW):
        require_finite(enums.Weight.debiased, path)
        assert time_weight(enums.Weight.debiased, 5.0, path, t).isfinite().all()
    assert huber_width(enums.HuberSchedule.snr, 0.1, ZERO.snr(t)).isfinite().all()


@pytest.mark.parametrize("kind", list(ON_NOISE), ids=lambda w: w.value)
@pytest.mark.parametrize("path", [EPS, V, FLOW], ids=["epsilon", "v", "flow"])
def test_a_weight_means_the_same_whatever_the_network_predicts(path, kind):
    """The weighted error of the answer is w(SNR) times the squared error of x_0, for all three."""
    output, target = pair(rows=5)
    x_t, t = pair(1, 5)[0], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    x0_error = (path.split(output, x_t, t)[0] - path.split(target, x_t, t)[0]).square().mean((1, 2, 3))
    weighted = masked_error(output, target, None, True, 0.0) * time_weight(kind, 5.0, path, t)
    snr = path.snr(t)
    in_data = {
        enums.Weight.min_snr: snr.clamp(max=5.0),
        enums.Weight.soft_min_snr: 5 * snr / (snr + 5),
        enums.Weight.debiased: snr.sqrt(),
    }[kind]
    assert_close(weighted, (in_data * x0_error).float(), rtol=1e-3, atol=1e-5)


def test_pseudo_huber_is_square_near_zero_and_straight_far_out():
    c = torch.tensor(0.1).view(1, 1, 1, 1)
    d = torch.tensor([1e-3, 100.0]).view(2, 1, 1, 1)
    near, far = pseudo_huber(d, c).flatten()
    assert_close(near, torch.tensor(1e-6), rtol=1e-2, atol=1e-8)
    assert_close(far, torch.tensor(2 * 0.1 * 100.0), rtol=1e-2, atol=0)
    wide = pseudo_huber(torch.tensor([0.7]).double(), torch.tensor(1e4).double())
    assert_close(wide, squared(torch.tensor([0.7]).double()), rtol=1e-6, atol=0)


def test_the_huber_schedule_is_wide_at_data_and_narrow_at_noise():
    snr = EPS.snr(EPS.time(NATIVE))
    width = huber_width(enums.HuberSchedule.snr, 0.1, snr).flatten()
    sigmas = ((1 - NOISE.alphas_cumprod) / NOISE.alphas_cumprod).sqrt()[NATIVE]
    assert_close(width, (1 - 0.1) / (1 + sigmas) ** 2 + 0.1, rtol=1e-4, atol=1e-6)
    assert (width.diff() < 0).all() and width.shape == (7,)
    assert (huber_width(enums.HuberSchedule.constant, 0.1, snr) == 0.1).all()


@given(st.floats(-0.01, 0.01), st.floats(1, 5000))
def test_consistency_is_the_papers_loss_and_its_gradient_the_plain_one_where_the_model_is_the_base(apart, beta):
    base = torch.tensor([0.1], dtype=torch.float64)
    error = (base + apart).requires_grad_()
    ours = consistency(error, base, beta)
    assert_close(ours * beta / 2, -torch.log(torch.sigmoid(-beta * (error - base))), atol=1e-9, rtol=1e-6)
    (slope,) = torch.autograd.grad(ours.sum(), error)
    assert_close(slope, 2 * torch.sigmoid(beta * (error.detach() - base)))
    same = base.clone().requires_grad_()
    assert torch.autograd.grad(consistency(same, base, beta).sum(), same)[0].item() == pytest.approx(1)


def test_consistency_is_the_plain_error_less_a_constant_for_a_small_beta():
    error, base = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.9], dtype=torch.float64)
    apart = consistency(error, base, 1e-6) - error
    assert_close(apart - apart[2], -(base - base[2]), atol=1e-6, rtol=0)

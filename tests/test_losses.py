import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from dreambooth_lab.losses import masked_error, preserve_prior


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


def test_the_weight_zero_is_training_without_class_rows():
    error = torch.tensor([1.0, 2.0, 30.0, 50.0])
    total, _, prior = preserve_prior(error, rows(0, 1), rows(2, 3), 0.0)
    assert_close(total, preserve_prior(error[:2], rows(0, 1), rows(), 1.0)[0])
    assert_close(prior, torch.tensor(40.0))


@given(st.integers(1, 7), st.floats(0, 4))
def test_each_term_is_the_mean_of_its_own_rows(split, weight):
    error = torch.arange(1.0, 9.0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(split))
    total, *_ = preserve_prior(error, order[:split], order[split:], weight)
    assert_close(total, error[order[:split]].mean() + weight * error[order[split:]].mean())


def test_a_term_without_rows_is_zero():
    total, instance, prior = preserve_prior(torch.tensor([2.0]), rows(), rows(0), 0.5)
    assert (total, instance, prior) == (1.0, 0.0, 2.0)

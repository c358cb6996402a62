"""Averages of any length from snapshots of two (EDM2)."""

import numpy as np
import pytest
import torch

from dreambooth_lab.power_average import LONGEST, Share, beta, coefficients, gamma_of, product

STEPS = 1000
LENGTHS = (0.05, 0.1)


def average(values: np.ndarray, gamma: float) -> np.ndarray:
    """The power-function average after each step, by its own weights."""
    steps = np.arange(1, len(values) + 1)
    return np.array(
        [np.average(values[:t], weights=(steps[:t] / t) ** (gamma + 1) - ((steps[:t] - 1) / t) ** (gamma + 1)) for t in steps]
    )


def test_length_is_the_relative_standard_deviation():
    tau = np.linspace(0, 1, 200_001)
    for length in (0.01, 0.05, 0.1, 0.25, LONGEST):
        share = tau ** gamma_of(length)
        mean = np.average(tau, weights=share)
        assert np.average((tau - mean) ** 2, weights=share) ** 0.5 == pytest.approx(length, rel=2e-3)


@pytest.mark.parametrize("interval", [1, 5])
def test_recursion_gives_the_shares_of_a_power_function(interval):
    values, gamma = np.random.default_rng(0).normal(size=200), gamma_of(0.1)
    found = 0.0
    for step in range(interval, len(values) + 1, interval):
        factor = beta(step, gamma, interval)
        found = factor * found + (1 - factor) * values[step - 1]
    assert found == pytest.approx(average(values[interval - 1 :: interval], gamma)[-1])


def test_product_equals_its_integral():
    tau = np.linspace(0, 300, 1_000_001)

    def share(one: Share) -> np.ndarray:
        return np.where(tau <= one.t, (one.gamma + 1) * (tau / one.t) ** one.gamma / one.t, 0)

    for a, b in [(Share(300, 17.0), Share(200, 7.0)), (Share(100, 0.5), Share(300, 7.0)), (Share(200, 2.0), Share(200, 2.0))]:
        assert product(a, b) == product(b, a) == pytest.approx(np.trapezoid(share(a) * share(b), tau), rel=1e-3)


def reconstructed(values: np.ndarray, length: float, end: int) -> float:
    shares = [Share(t, gamma_of(one)) for one in LENGTHS for t in range(50, STEPS + 1, 50)]
    kept = [average(values, gamma_of(one))[t - 1] for one in LENGTHS for t in range(50, STEPS + 1, 50)]
    return float(np.dot(coefficients(shares, Share(end, gamma_of(length))), kept))


@pytest.mark.parametrize("length", [0.03, 0.05, 0.07, 0.1, 0.15, 0.2])
def test_other_lengths_are_reconstructed(length):
    values = np.cumsum(np.random.default_rng(1).normal(size=STEPS))
    spread = values.std()
    for end in (500, STEPS):
        exact = average(values, gamma_of(length))[end - 1]
        assert reconstructed(values, length, end) == pytest.approx(exact, abs=0.02 * spread)
    assert abs(values[-1] - exact) > 0.05 * spread, "the average differs from the last value"


def test_constant_weights_stay_constant():
    assert reconstructed(np.full(STEPS, 3.0), 0.2, STEPS) == pytest.approx(3.0, abs=1e-6)
    assert torch.tensor(coefficients([Share(10, 7.0)], Share(10, 2.0))).tolist() == [1.0]

import numpy as np
import torch

from dreambooth_lab import draw
from dreambooth_lab.draw import Purpose


def test_draws_are_independent_of_earlier_draws():
    alone = draw.normal(3, 17, Purpose.NOISE, (4, 8, 8))
    for n in range(40):
        draw.normal(3, n, Purpose.NOISE, (n + 1,))
        draw.uniform(3, n, Purpose.TIME)
    assert torch.equal(alone, draw.normal(3, 17, Purpose.NOISE, (4, 8, 8)))


def test_draws_depend_on_seed_index_and_purpose():
    base = draw.normal(0, 5, Purpose.NOISE, (16,))
    others = [draw.normal(1, 5, Purpose.NOISE, (16,)), draw.normal(0, 6, Purpose.NOISE, (16,)),
              draw.normal(0, 5, Purpose.POSTERIOR, (16,))]  # fmt: skip
    assert not any(torch.isin(base, other).any() for other in others)


def test_draws_follow_their_distribution():
    u = np.array([draw.uniform(0, n, Purpose.TIME) for n in range(4000)])
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.005
    z = torch.cat([draw.normal(0, n, Purpose.NOISE, (100,)) for n in range(200)])
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03 and z.dtype == torch.float32
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.05


def test_permutation_contains_each_index_once():
    order = draw.permutation(0, 2, Purpose.ORDER, 50)
    assert sorted(order) == list(range(50)) and list(order) != list(range(50))

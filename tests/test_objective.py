"""Prior, masks, rollout and weights together, in the training step, on a tiny SDXL."""

from __future__ import annotations

import math
import shutil
from contextlib import contextmanager

import pytest
import torch
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check, enums
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.diffusion.path import RectifiedFlow
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import build_adapter, build_family
from dreambooth_lab.run import run

WALK = ["rollout.enabled=true", "rollout.ramp_steps=0", "rollout.max_step_offset=3", "rollout.num_steps=28"]


@pytest.fixture
def made(small):
    def make(*overrides):
        module, data = build(lab.compose(*small, *overrides))
        return module, iter(Samples(data, data.schedule, 0, 0, 1))

    return make


def build(cfg):
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter = build_adapter(cfg)
    adapter.attach(family.denoiser, family.target_modules, seed=0)
    return DreamBooth(cfg, family, adapter).train(), data


def times(module, batch):
    return module.times(batch.u, batch.eps.shape[2:])


def move(module, scale=0.05):
    """Give the adapter weights as after training."""
    generator = torch.Generator().manual_seed(5)
    for p in module.trainable_parameters().values():
        p.data += scale * torch.randn(p.shape, generator=generator)


def strayed(module, batch):
    """A batch whose every row rolls out, well inside the path."""
    return batch._replace(u=torch.full_like(batch.u, 0.4), rollout_draws=torch.tensor([[0.0, 0.99]] * len(batch.u)))


def gradients(module, batch):
    module.zero_grad()
    module.training_step(batch, 0)["loss"].backward()
    return [p.grad.clone() for p in module.trainable_parameters().values()]


# prior preservation


@pytest.mark.parametrize("words", [["prior=teacher"], ["prior=teacher", *WALK], ["prior=bank"],
                                   ["prior=bank", "objective.noise_offset=0.1", "objective.shift=3"],
                                   ["prior=teacher", "objective.weight=min_snr", "objective.loss=huber"]])  # fmt: skip
def test_a_fresh_adapter_has_no_prior_loss(made, words):
    module, stream = made(*words)
    for _ in range(4):
        losses = module.training_step(next(stream), 0)
        assert losses["prior"] < 1e-9 < losses["instance"]


@pytest.mark.parametrize("kind", ["lora", "dora", "locon", "loha", "lokr", "oft", "full"])
def test_every_kind_of_adapter_has_the_base_as_teacher_to_the_bit(made, kind):
    """While it trains, with dropout, fresh and moved; and only what learns gets a gradient."""
    module, stream = made(f"adapter={kind}", *([] if kind in ("full", "oft") else ["adapter.dropout=0.5"]))
    batch = next(stream)
    rows, t = batch.class_rows, times(module, batch)
    x_t = module.path.noise(batch.latents(), batch.eps, t)
    base = build_family(module.cfg).denoise(x_t[rows], t[rows], batch.cond.select(rows))
    assert module.training_step(batch, 0)["prior"] < 1e-9, "a fresh adapter has no prior loss"
    move(module, 0.1)
    assert torch.equal(module.teacher.predict_base(batch, x_t, t, rows), base)
    losses = module.training_step(batch, 0)
    assert losses["prior"] > 1e-6
    losses["loss"].backward()
    learning = module.trainable_parameters()
    assert all(p.grad is None for name, p in module.named_parameters() if name not in learning)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.values())
    assert torch.equal(module.teacher.predict_base(batch, x_t, t, rows), base), "and after the gradients"


def test_the_teacher_sees_the_rolled_out_sample(made):
    module, stream = made("prior=teacher", *WALK)
    move(module, 0.2)
    batch = strayed(module, next(stream))
    at = module.rollout(batch.latents(), batch, batch.cond, times(module, batch), 0)
    off = (at.x_t - module.path.noise(batch.latents(), batch.eps, times(module, batch)))[batch.class_rows]
    assert at.rolled_out.all() and off.abs().max() > 1e-3
    seen = []
    real = module.teacher.predict
    module.teacher.predict = lambda x, *rest: seen.append(x) or real(x, *rest)
    module.training_step(batch, 0)
    assert len(seen) == 1 and torch.equal(seen[0], at.x_t[batch.class_rows])


def test_the_bank_is_the_teacher_without_its_forward(made, monkeypatch):
    banked, stream = made("prior=bank")
    taught, _ = made("prior=teacher")
    move(banked), move(taught)
    for _ in range(4):
        batch = next(stream)
        assert len(batch.class_rows)
        a, b = banked.training_step(batch, 0), taught.training_step(batch, 0)
        assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert a["prior"] > 1e-6
    monkeypatch.setattr(type(banked.adapter), "base", lambda self: pytest.fail("the base model was run"))
    banked.training_step(next(stream), 0)


@pytest.mark.parametrize("words", [[], WALK, ["objective.weight=min_snr", "objective.loss=huber"]])
def test_a_zero_weight_is_training_without_class_rows(made, words):
    module, stream = made("prior.weight=0", *words)
    move(module)
    batch = next(stream)
    rows = batch.instance_rows
    alone = batch._replace(**{name: getattr(batch, name)[rows] for name in
                                ("sample", "mean", "std", "z", "eps", "u", "rollout_draws")},
                           cond=batch.cond.select(rows), instance_rows=torch.arange(len(rows)), class_rows=rows[:0])  # fmt: skip
    for a, b in zip(gradients(module, batch), gradients(module, alone), strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("words", [["prior.class_fraction=0.25"], ["prior.class_fraction=0.25", "prior.weight=0.3", *WALK]])
def test_a_step_is_the_same_however_it_is_cut_up(small, photos, class_photos, tmp_path, words):
    """Micro-batches without a class row or without an instance row, and ranks: the mean of their gradients is the step's."""
    one = tmp_path / "one"
    for folder, own in ((photos, "photos"), (class_photos, "class")):
        (one / own).mkdir(parents=True)
        shutil.copy(folder / "00.png", one / own / "00.png")

    def step(batch_size, together, ranks=1):
        cfg = lab.compose(*small, *words, f"dataset.path={one / 'photos'}", f"prior.path={one / 'class'}",
                          f"dataset.batch_size={batch_size}", f"trainer.accumulate_grad_batches={together}")  # fmt: skip
        module, data = build(cfg)
        move(module)
        parts = []
        for rank in range(ranks):
            stream = iter(Samples(data, data._schedule(ranks), 0, rank, ranks))
            parts += [gradients(module, next(stream)) for _ in range(together)]
        return [torch.stack(grads).mean(0) for grads in zip(*parts, strict=True)]

    whole = step(8, 1)
    for cut in ((4, 2), (1, 8), (4, 1, 2), (1, 4, 2)):
        for a, b in zip(whole, step(*cut), strict=True):
            assert_close(a, b, atol=1e-5 * float(a.abs().max()) + 1e-8, rtol=1e-3)


@pytest.mark.parametrize("words", [["prior.class_fraction=0.25"], ["prior.class_fraction=0.6", "prior.weight=0.3"]])
def test_at_batch_1_the_mean_gradient_is_that_of_the_two_means(made, words):
    """The mean over batches of one row = gradient of (mean over their instance rows + λ · mean over their class rows)."""
    module, stream = made("prior=noise", "dataset.batch_size=1", "dataset.resolutions=[64]", "dataset.crop_aspect=square", *words)
    move(module)
    batches = [next(stream) for _ in range(20)]  # of one bucket, in which 20 rows hold each kind at its very share
    kinds = [len(batch.class_rows) for batch in batches]
    assert sum(kinds) == pytest.approx(20 * module.cfg.prior.class_fraction)
    mean = [torch.stack(each).mean(0) for each in zip(*(gradients(module, batch) for batch in batches), strict=True)]
    module.zero_grad()
    for batch, is_class in zip(batches, kinds, strict=True):
        x_t = module.path.noise(batch.latents(), batch.eps, times(module, batch))
        error = (module.predict(x_t, times(module, batch), batch.cond) - batch.eps).square().mean()
        (error * (module.cfg.prior.weight / sum(kinds) if is_class else 1 / (20 - sum(kinds)))).backward()
    for a, p in zip(mean, module.trainable_parameters().values(), strict=True):
        assert_close(a, p.grad, atol=1e-5 * float(p.grad.abs().max()) + 1e-8, rtol=1e-3)


@pytest.mark.parametrize("kind", ["min_snr", "soft_min_snr", "debiased"])
def test_each_rows_weight_follows_the_row(made, kind):
    module, stream = made(f"objective.weight={kind}", "prior=noise")
    move(module)
    batch = next(stream)._replace(u=torch.tensor([0.05, 0.9], dtype=torch.float64))
    plain, _ = made("prior=noise")
    move(plain)
    weights = module.weight(times(module, batch))
    assert weights.max() > 1.5 * weights.min()
    for name, rows in (("instance", batch.instance_rows), ("prior", batch.class_rows)):
        expected = plain.training_step(batch, 0)[name] * weights[rows].mean()
        assert_close(module.training_step(batch, 0)[name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("words", [["prior=teacher"], ["prior=bank"], ["prior=teacher", *WALK],
                                   ["prior=noise", "rollout.enabled=true", "rollout.kind=input_perturbation"]])  # fmt: skip
def test_gradients_reach_the_adapter_and_nothing_else(made, words):
    module, stream = made(*words)
    move(module)
    module.training_step(next(stream), 0)["loss"].backward()
    learning = module.trainable_parameters()
    assert all((p.grad is not None) == (name in learning) for name, p in module.named_parameters())


# rollout


def test_rollout_that_never_happens_is_training_without_it_to_the_bit(made):
    plain, stream = made()
    batch = next(stream)
    rolled, _ = made(*WALK, "rollout.probability=0")
    move(plain), move(rolled)
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain, batch), gradients(rolled, batch), strict=True))


def test_the_walk_has_no_dropout_and_leaves_the_modes_and_the_generator_as_they_were(made):
    module, stream = made(*WALK, "adapter.dropout=0.5")
    move(module, 0.2)
    batch = strayed(module, next(stream))
    modes = [(name, part.training) for name, part in module.named_modules()]
    dropouts = [part for part in module.modules() if isinstance(part, torch.nn.Dropout) and part.p == 0.5]
    assert dropouts and all(part.training for part in dropouts)
    state = torch.get_rng_state()
    reached = [module.rollout(batch.latents(), batch, batch.cond, times(module, batch), 0) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(reached[0].x_t, reached[1].x_t)
    assert modes == [(name, part.training) for name, part in module.named_modules()]


def test_a_schedule_free_optimiser_walks_with_the_weights_that_train(small, tmp_path, monkeypatch):
    pytest.importorskip("schedulefree")
    seen, real = [], DreamBooth.dropout_off

    @contextmanager
    def spied(module):
        before = [p.clone() for p in module.trainable_parameters().values()]
        with real(module):
            seen.append(all(torch.equal(a, b) for a, b in zip(before, module.trainable_parameters().values(), strict=True)))
            yield

    monkeypatch.setattr(DreamBooth, "dropout_off", spied)
    words = ["optimizer=schedulefree", "ema.enabled=false", "validation.every_n_steps=0", "trainer.max_steps=3", *WALK]
    run(lab.compose(*small, *words), tmp_path / "run")
    assert seen == [True] * 3


class Flow:
    """A family on a straight path, with the tiny network's predictions as velocities."""

    def __init__(self, family):
        self.__dict__.update(family=family, path=RectifiedFlow(1000), times=(0.0, 1.0))

    def __getattr__(self, name):
        return getattr(self.family, name)

    def denoise(self, x_t, t, cond):
        return self.family.denoise(x_t, t.clamp(max=0.999), cond)


@pytest.mark.parametrize("terms", [["direction=10"], ["frequency=1"], ["direction=10", "frequency=1"]])
def test_reflexflow_adds_to_the_subjects_strayed_rows_and_to_no_others(made, terms):
    plain, stream = made("prior=teacher", *WALK)
    batch = strayed(plain, next(stream))
    flow = DreamBooth(plain.cfg, Flow(plain.family), plain.adapter).train()
    cfg = plain.cfg.copy()
    for term in terms:
        name, value = term.split("=")
        cfg.rollout.reflexflow[name] = float(value)
    more = DreamBooth(cfg, Flow(plain.family), plain.adapter).train()
    a, b = flow.training_step(batch, 0), more.training_step(batch, 0)
    assert b["instance"] > a["instance"] + 1e-4
    assert b["prior"] < 1e-9, "a fresh adapter has no prior loss"
    still = batch._replace(rollout_draws=torch.ones_like(batch.rollout_draws), u=torch.full_like(batch.u, 0.001))
    assert_close(flow.training_step(still, 0), more.training_step(still, 0))


# masks


def halves(batch):
    mask = torch.zeros(len(batch.sample), 1, *batch.eps.shape[2:])
    mask[..., : mask.shape[-1] // 2] = 1
    return mask


@pytest.mark.parametrize("outside", ["ignore", "teacher"])
def test_a_mask_of_ones_is_the_plain_loss(made, outside):
    module, stream = made(f"mask.outside={outside}")
    move(module)
    batch = next(stream)
    masked = batch._replace(mask=torch.ones_like(batch.eps[:, :1]))
    assert_close(module.training_step(masked, 0), module.training_step(batch, 0))


def test_outside_the_mask_the_base_model_is_kept(made):
    ignoring, stream = made("mask.outside=ignore", "prior=none")
    keeping, _ = made("mask.outside=teacher", "prior=none")
    batch = next(stream)
    batch = batch._replace(mask=halves(batch))
    assert_close(keeping.training_step(batch, 0), ignoring.training_step(batch, 0)), "a fresh adapter has not left it"
    move(ignoring), move(keeping)
    apart = keeping.training_step(batch, 0)["loss"] - ignoring.training_step(batch, 0)["loss"]
    t = times(keeping, batch)
    x_t = keeping.path.noise(batch.latents(), batch.eps, t)
    with torch.no_grad():
        student = keeping.predict(x_t, t, batch.cond)
        with keeping.adapter.base():
            base = keeping.predict(x_t, t, batch.cond)
    expected = ((student - base).square() * (1 - batch.mask)).mean((1, 2, 3)).mean()
    assert expected > 1e-5
    assert_close(apart.detach(), expected, atol=1e-6, rtol=1e-3)


def test_what_lies_outside_the_mask_is_not_learned(made):
    module, stream = made("prior=none")
    move(module)
    batch = next(stream)
    batch = batch._replace(mask=halves(batch))
    inside = batch.mask.bool().expand_as(batch.eps)
    other = batch._replace(eps=batch.eps)
    t = times(module, batch)
    x_t = module.path.noise(batch.latents(), batch.eps, t)
    output = module.predict(x_t, t, batch.cond)
    loss = module.training_step(other, 0)["loss"]
    assert_close(loss, (output - batch.eps).square()[inside].mean(), rtol=1e-4, atol=1e-6)


# the other choices


def test_huber_pulls_less_on_outliers(made):
    module, stream = made("objective.loss=huber", "objective.huber_schedule=constant", "objective.huber_c=0.01", "prior=none")
    plain, _ = made("prior=none")
    batch = next(stream)
    assert 0 < module.training_step(batch, 0)["loss"] < 0.2 * plain.training_step(batch, 0)["loss"]


def test_times_are_the_objectives(made):
    module, stream = made(
        "objective.min_time=0.4", "objective.max_time=0.6", "objective.timesteps=logit_normal", "objective.shift=2"
    )
    t = torch.cat([times(module, next(stream)) for _ in range(20)])
    assert 0.4 <= t.min() < t.max() <= 0.6


DCO = ["prior=none", "prior.path=null", "objective.anchor=dco", "objective.anchor_beta=500"]


def test_dco_starts_with_the_plain_gradient_and_touches_instance_rows_only(made):
    """A fresh adapter is the base."""
    for words in ([], ["prior=teacher", "prior.source=captions"], ["objective.weight=min_snr"]):
        module, stream = made(*DCO, *words)
        batch = next(stream)
        anchored = gradients(module, batch)
        module.cfg.objective.anchor = enums.Anchor.none
        for ours, plain in zip(anchored, gradients(module, batch), strict=True):
            assert_close(ours, plain)


def test_dco_lets_go_of_what_is_better_than_the_base_and_pulls_at_what_is_worse(made):
    """The gradient is the plain one times 2 σ(β (e - e_base)) of the row."""
    module, stream = made(*DCO, "dataset.batch_size=1")
    move(module, 0.1)
    batch = next(stream)
    x0, t = batch.latents(), times(module, batch)
    x_t = module.path.noise(x0, batch.eps, t)
    with torch.no_grad():
        e = (module.predict(x_t, t, batch.cond) - module.path.target(x0, batch.eps, t)).square().mean()
        with module.adapter.base():
            e_base = (module.predict(x_t, t, batch.cond) - module.path.target(x0, batch.eps, t)).square().mean()
    assert abs(e - e_base) > 1e-5
    anchored = gradients(module, batch)
    module.cfg.objective.anchor = enums.Anchor.none
    for ours, plain in zip(anchored, gradients(module, batch), strict=True):
        assert_close(ours, 2 * torch.sigmoid(500 * (e - e_base)) * plain, rtol=1e-4, atol=1e-7)


def test_dco_compares_under_the_same_mask(made):
    module, stream = made(*DCO)
    batch = next(stream)
    mask = torch.zeros_like(batch.mean[:, :1])
    mask[..., :4] = 1
    loss = module.training_step(batch._replace(mask=mask), 0)["loss"]
    assert_close(loss.detach(), torch.tensor(2 / 500 * math.log(2)) * len(batch.instance_rows) / batch.row_counts.instances)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective.loss=huber"], "it compares squared errors"),
        (["rollout.enabled=true", "rollout.reflexflow.direction=1"], "which the base model has none of"),
        (["objective.anchor_beta=0"], "objective.anchor_beta is 0"),
    ],
)
def test_what_dco_can_not_be_of_is_refused(words, said):
    with pytest.raises(ConfigError) as caught:
        check(lab.compose("objective.anchor=dco", *words))
    assert said in str(caught.value)

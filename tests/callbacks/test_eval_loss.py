"""Held-out pictures, asked the same way every time."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import tiny
from dreambooth_lab import lab
from dreambooth_lab.callbacks.csv_log import CsvLog
from dreambooth_lab.callbacks.eval_loss import EvalRow, evaluate, summary
from dreambooth_lab.callbacks.periodic import Interval
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.data.eval_batches import eval_batches
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import build_adapter, build_family
from dreambooth_lab.run import run


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return tiny.save_photos(tmp_path_factory.mktemp("held"), [(80, 80), (60, 120), (70, 70)], seed=7)


def made(small, held, *overrides):
    cfg = lab.compose(*small, f"eval.path={held}", "eval.timesteps=3", *overrides)
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter = build_adapter(cfg)
    adapter.attach(family.denoiser, family.target_modules, seed=0)
    return data, DreamBooth(cfg, family, adapter).eval()


def losses(data, module, rows=4):
    asked = eval_batches(data, 3, rows)
    return {(a.dataset, a.image, a.t): a.loss for exam in asked for a in evaluate(exam, 0, module)}


def test_the_same_weights_give_the_same_bits_and_the_rows_are_fixed(small, held):
    data, module = made(small, held)
    first = losses(data, module)
    torch.randn(7), next(iter(data.build(data.schedule.batch(5))))  # whatever happens in between
    assert losses(data, module) == first
    assert sorted({t for _, _, t in first}) == [pytest.approx((k + 0.5) / 3) for k in range(3)] and len(first) == 9
    other, its = made(small, held, "seed=5", "dataset.flip=true", "dataset.caption_dropout=0.9", "dataset.crop=random",
                      "objective.weight=min_snr", "objective.noise_offset=0.5", "rollout.enabled=true")  # fmt: skip
    assert losses(other, its) == first, "neither the run's seed nor anything of the objective has a say"
    for key, loss in losses(data, module, rows=1).items():
        assert_close(loss, first[key], rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_plain_error_at_the_rows_own_time(small, held):
    data, module = made(small, held)
    exam = eval_batches(data, 3, 4)[0]
    batch, path = exam.batch, module.path
    noisy = path.noise(batch.latents(), batch.eps, batch.u)
    plain = (module.predict(noisy, batch.u, batch.cond) - batch.eps).square().mean((1, 2, 3))
    assert [a.loss for a in evaluate(exam, 0, module)] == plain.tolist()


def test_dropout_is_off_and_training_does_not_notice(small, held, tmp_path):
    """Everything that looks, against nothing that looks: the same weights, optimiser and numbers, to the bit."""
    clip = tiny.save_clip(tmp_path / "clip")
    quick = [*small, "adapter.dropout=0.5", "trainer.max_steps=4"]
    run(lab.compose(*quick, "validation.every_n_steps=0"), tmp_path / "blind")
    words = [f"eval.path={held}", "eval.every_n_steps=1", "eval.timesteps=2", "ema.validation=comparison",
             "validation.every_n_steps=2", f"eval.clip_model={clip}", "checkpoint.monitor=eval/loss"]  # fmt: skip
    run(lab.compose(*quick, *words), tmp_path / "seen")
    blind, seen = lab.load(tmp_path / "blind"), lab.load(tmp_path / "seen")
    a, b = (torch.load(r.folder.newest()[0], weights_only=True) for r in (blind, seen))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_close(a[part], b[part], rtol=0, atol=0)
    assert_close(a["callbacks"]["Ema"]["shadow"], b["callbacks"]["Ema"]["shadow"], rtol=0, atol=0)
    assert all(seen.series[name] == values for name, values in blind.series.items())
    base, *later = (values for _, values in sorted(seen.series["eval/loss"]))
    assert len(later) == 4 and base not in later and seen.series["ema/eval/loss"][0][1] == base
    assert seen.series["ema/eval/loss"][4] != seen.series["eval/loss"][4]
    assert (seen.folder.compared / "step_0000004.png").is_file() and sorted(seen.images) == [0, 2, 4]
    rows = CsvLog(seen.folder.eval, EvalRow).read()
    assert {(row.step, row.weights) for row in rows} == {(step, kind) for step in range(5) for kind in ("live", "ema")}
    assert seen.series["eval/loss"][2][1] == summary([r for r in rows if (r.step, r.weights) == (2, "live")])["eval/loss"]


def test_by_steps_and_by_parts_of_an_epoch():
    assert [s for s in range(1, 21) if Interval(6, 0, 10, 20).due(s)] == [6, 12, 18, 20]
    assert [s for s in range(1, 21) if Interval(0, 0.5, 7, 20).due(s)] == [4, 7, 11, 14, 18, 20]
    assert [s for s in range(1, 11) if Interval(3, 0.5, 10, 10).due(s)] == [3, 5, 6, 9, 10]
    assert all(Interval(0, 0.01, 10, 99).due(s) for s in range(1, 20)), "more often than every step is every step"


def test_a_number_of_pictures_is_a_fixed_choice(small, held):
    data, _ = made(small, held, "eval.num_images=2")
    again, _ = made(small, held, "eval.num_images=2", "seed=9")
    names = [entry.picture.name for entry in data.held_out]
    assert len(names) == 2 and names == [entry.picture.name for entry in again.held_out]


def test_a_step_told_again_replaces_what_was_told(tmp_path):
    ledger = CsvLog(tmp_path / "a.csv", EvalRow)
    for step in (0, 1, 2):
        ledger.add(step, [EvalRow(step, "live", "d", "p, q", 0.25, 0.1 + step, 0.25)])
    ledger.add(1, [EvalRow(1, "live", "d", "p, q", 0.25, 9.0, 0.25)])
    assert [(a.step, a.image, a.loss) for a in ledger.read()] == [(0, "p, q", 0.1), (1, "p, q", 9.0)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.path=./nowhere"], "eval.path is './nowhere', which does not exist"),
        (["eval.path=.", "eval.every_n_steps=0"], "so the eval loss is never computed"),
        (["eval.timesteps=0"], "eval.timesteps is 0"),
        (["eval.every_n_epochs=-1"], "eval.every_n_epochs is -1"),
    ],
)
def test_what_cannot_work_is_refused(small, words, said):
    with pytest.raises(ConfigError) as caught:
        check(lab.compose(*small, *words))
    assert said in str(caught.value)


def test_pictures_that_are_trained_on_are_refused_by_name(small, photos):
    with pytest.raises(ConfigError, match=r"eval\.path: 00\.png is also trained on \(instance-64px: 00\.png\)"):
        made(small, photos)

import io

import pytest
import torch
from rich.console import Console

from dreambooth_lab import lab
from dreambooth_lab.callbacks import progress
from dreambooth_lab.callbacks.metrics import StepMetrics
from dreambooth_lab.callbacks.periodic import Interval
from dreambooth_lab.callbacks.progress import FIRST, TimeLeft
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import build_adapter, build_family
from dreambooth_lab.profiling import speed


@pytest.fixture(scope="module")
def made(small):
    cfg = lab.compose(*small, "prior=none", "prior.path=null")
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter = build_adapter(cfg)
    adapter.attach(family.denoiser, family.target_modules, seed=0)
    return data, DreamBooth(cfg, family, adapter).train()


def test_flops_are_averaged_over_buckets_and_leave_no_gradients(made):
    data, module = made
    state = torch.get_rng_state()
    mean = speed.row_flops(module, data.text(""), data.schedule.buckets)
    each = [speed.row_flops(module, data.text(""), [bucket]) for bucket in data.schedule.buckets]
    rows = [sum(group.rows for group in bucket.groups) for bucket in data.schedule.buckets]
    assert len(each) == 2 and mean == pytest.approx(sum(n * f for n, f in zip(rows, each, strict=True)) / sum(rows))
    assert min(each) > 2 * 8 * 8 * 9 * 4 * 8, "more than the first convolution's forward pass alone"
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in module.parameters())


def test_flops_of_a_step_scale_with_its_rows(made):
    data, module = made
    state = torch.get_rng_state()
    each = {bucket.shape: speed.row_flops(module, data.text(""), [bucket]) for bucket in data.schedule.buckets}
    batches = [data.build(data.schedule.batch(number)).latents() for number in range(4)]
    expected = [len(x0) * each[x0.shape[2] * module.family.factor, x0.shape[3] * module.family.factor] for x0 in batches]
    assert speed.step_flops(module, data, 4) == pytest.approx(sum(expected) / 4, rel=1e-3)
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in module.parameters())


def test_bar_shows_speed_and_share_of_peak_flops(made, monkeypatch):
    data, module = made
    bar = progress.Bar(StepMetrics(1), data, 6, TimeLeft({}, 9))
    bar.console = Console(width=120)
    bar.metrics.last = {"train/loss": 0.125}
    assert "loss 0.1250  2.00 steps/s  12.0 samples/s  " in bar.status(2.0, torch.device("cpu"))
    assert "of peak" not in bar.status(2.0, torch.device("cpu")), "the peak of a CPU is unknown"
    monkeypatch.setattr(progress, "peak", lambda *_: 60 * speed.row_flops(module, data.text(""), data.schedule.buckets))
    trainer = type("At", (), {"max_steps": 9, "global_step": 0})()
    bar.on_train_start(trainer, module)
    bar.bar.stop()
    assert "  20% of peak  " in bar.status(2.0, torch.device("cpu"))


@pytest.mark.parametrize("start", [0, 12])
def test_remaining_time_includes_pending_steps_and_evaluations(start):
    """2 s a step, 30 s for the first ones; 10 s for each evaluation: of the base model, every 8 steps and at the end."""
    when = Interval(8, 0.0, 1.0, 44)
    left = TimeLeft({"images": when}, 44)
    now, took = (10.0, 10.0) if start == 0 else (0.0, 0.0)
    left.begin(start, now)
    for step in range(start + 1, 45):
        now += 30.0 if step <= start + FIRST else 2.0
        remaining = left.seconds(step, now, {"images": took})
        if step <= start + FIRST:
            assert remaining is None
        elif took:
            to_come = sum(when.due(one) for one in range(step, 45))
            assert remaining == pytest.approx((44 - step) * 2.0 + to_come * 10.0), step
        if when.due(step):
            now, took = now + 10.0, took + 10.0


@pytest.mark.parametrize(("width", "samples"), [(60, False), (80, False), (120, True)])
def test_bar_fits_the_terminal_width(made, width, samples, monkeypatch):
    data, _ = made
    on = Console(width=width, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(progress, "console", lambda: on)
    bar = progress.Bar(StepMetrics(1), data, 6, TimeLeft({}, 900))
    bar.metrics.last = {"train/loss": 0.125}
    status = bar.status(2.0, torch.device("cpu"), 700.0)
    assert ("samples/s" in status) == samples and status.endswith("12 min left")
    bar.bar.add_task("", total=900, completed=123, status=status)
    on.print(bar.bar.get_renderable())
    (line,) = [one for one in on.file.getvalue().splitlines() if "loss" in one]
    assert "12 min left" in line and "123/900" in line and "…" not in line


def test_bar_shows_its_status_after_a_step(made, monkeypatch):
    data, module = made
    terminal = Console(width=100, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(progress, "console", lambda: terminal)
    bar = progress.Bar(StepMetrics(1), data, 6, TimeLeft({}, 9))
    bar.metrics.last = {"train/loss": 0.125}
    trainer = type("At", (), {"max_steps": 9, "global_step": 0})()
    bar.on_train_start(trainer, module)
    trainer.global_step = 9
    bar.on_train_batch_end(trainer, module, None, None, 8)
    bar.bar.stop()
    assert "9/9" in terminal.file.getvalue() and "loss 0.1250" in terminal.file.getvalue()

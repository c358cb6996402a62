import pytest
import torch

from dreambooth_lab import lab, speed
from dreambooth_lab.callbacks import progress
from dreambooth_lab.callbacks.metrics import StepMetrics
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.run import build_adapter, build_family


@pytest.fixture(scope="module")
def made(small):
    cfg = lab.compose(*small, "prior=none", "prior.path=null")
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter = build_adapter(cfg)
    adapter.attach(family.denoiser, family.learns, seed=0)
    return data, DreamBooth(cfg, family, adapter).train()


def test_flops_are_counted_over_the_buckets_and_leave_no_gradient(made):
    data, module = made
    state = torch.get_rng_state()
    mean = speed.row_flops(module, data.text(""), data.schedule.buckets)
    each = [speed.row_flops(module, data.text(""), [bucket]) for bucket in data.schedule.buckets]
    rows = [sum(group.rows for group in bucket.groups) for bucket in data.schedule.buckets]
    assert len(each) == 2 and mean == pytest.approx(sum(n * f for n, f in zip(rows, each, strict=True)) / sum(rows))
    assert min(each) > 2 * 8 * 8 * 9 * 4 * 8, "more than the first convolution's forward pass alone"
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in module.parameters())


def test_the_bar_tells_the_pace_and_its_share_of_the_peak(made, monkeypatch):
    data, module = made
    bar = progress.Bar(StepMetrics(1), data, rows=6)
    bar.metrics.last = {"train/loss": 0.125}
    assert "loss 0.1250  2.00 steps/s  12.0 samples/s  " in bar.told(2.0, torch.device("cpu"))
    assert "of peak" not in bar.told(2.0, torch.device("cpu")), "a CPU's is not known"
    monkeypatch.setattr(progress, "peak", lambda *_: 60 * speed.row_flops(module, data.text(""), data.schedule.buckets))
    trainer = type("At", (), {"max_steps": 9, "global_step": 0})()
    bar.on_train_start(trainer, module)
    bar.bar.stop()
    assert "  20% of peak  " in bar.told(2.0, torch.device("cpu"))

import pytest

from dreambooth_lab import lab, memory
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.run import build_adapter, build_family

CASES = [
    ["dataset.batch_size=1", "prior=none"], ["dataset.batch_size=6"], ["dataset.batch_size=4", "adapter=full"],
    ["dataset.batch_size=4", "adapter=lokr"], ["dataset.batch_size=2", "model.gradient_checkpointing=true"],
]  # fmt: skip


@pytest.mark.parametrize("words", CASES, ids=[" ".join(words) for words in CASES])
def test_the_estimate_is_near_the_true_peak_of_a_step(small, words):
    cfg = lab.compose(*small, "model.resolution=512", "dataset.crop_aspect=square", *words)
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter = build_adapter(cfg)
    adapter.attach(family.denoiser, family.learns, 0)
    module = DreamBooth(cfg, family, adapter).train()
    estimated = memory.working(module, data.text(""), (512, 512), cfg.dataset.batch_size)
    batch = data.build(data.schedule.batch(0))
    assert batch.mean.shape[2] == 64
    true = memory.peak(lambda: module.training_step(batch, 0)["loss"].backward(), family.device)
    assert 0.75 < estimated / true < 1.35


def test_the_peak_counts_what_lives_at_once():
    import torch

    def work():
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(5000)  # gone before the next
        return kept

    assert 4 * 6000 <= memory.peak(work, torch.device("cpu")) < 4 * 6200

import pytest

from dreambooth_lab import lab
from dreambooth_lab.profiling import memory
from dreambooth_lab.tools.common.training import build_training

CASES = [
    ["dataset.batch_size=1", "prior=none"], ["dataset.batch_size=6"], ["dataset.batch_size=4", "adapter=full"],
    ["dataset.batch_size=4", "adapter=lokr"], ["dataset.batch_size=2", "model.gradient_checkpointing=true"],
]  # fmt: skip


@pytest.mark.parametrize("words", CASES, ids=[" ".join(words) for words in CASES])
def test_estimate_is_close_to_the_true_peak_of_a_step(small, words):
    cfg = lab.compose(*small, "model.resolution=512", "dataset.crop_aspect=square", *words)
    module, data = build_training(cfg)
    estimated = memory.working(module, data.text(""), (512, 512), cfg.dataset.batch_size)
    batch = data.build(data.schedule.batch(0))
    assert batch.mean.shape[2] == 64
    true = memory.peak(lambda: module.training_step(batch, 0)["loss"].backward(), module.family.device)
    assert 0.75 < estimated / true < 1.35


def test_peak_counts_tensors_that_are_alive_at_once():
    import torch

    def work():
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(5000)  # freed before the next
        return kept

    assert 4 * 6000 <= memory.peak(work, torch.device("cpu")) < 4 * 6200


def test_second_start_reuses_the_measurement(small, monkeypatch, tmp_path):
    cfg = lab.compose(*small, f"cache={tmp_path}")
    module, data = build_training(cfg)
    first = memory.working(module, data.text(""), (512, 512), 1)
    monkeypatch.setattr(memory, "_probe", lambda *_: pytest.fail("measured again"))
    assert memory.working(module, data.text(""), (512, 512), 1) == first
    with pytest.raises(pytest.fail.Exception):
        module.family.denoiser.requires_grad_(True)
        memory.working(module, data.text(""), (512, 512), 1)

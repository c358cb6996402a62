"""The target bank: fixed draws, verified predictions."""

from __future__ import annotations

import pytest
import torch

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.factory import build_family
from dreambooth_lab.models.sdxl import SDXL


@pytest.fixture
def banked(small, tmp_path):
    def make(*overrides):
        words = [w for w in small if not w.startswith("cache=")]
        cfg = lab.compose(*words, f"cache={tmp_path}", "prior=bank", "prior.bank.draws=4", "prior.bank.batch_size=3", *overrides)
        data = DreamBoothData(cfg, build_family(cfg))
        data.prepare()
        return data

    return make


def rows(data, count=60):
    stream = iter(Samples(data, data.schedule, 0, 0, 1))
    for batch in (next(stream) for _ in range(count)):
        for place, row in enumerate(batch.class_rows):
            yield batch, row, batch.teacher_output[place]


def test_stored_predictions_match_the_base_model(banked):
    data = banked()
    bare = build_family(data.cfg)
    for batch, row, stored in list(rows(data, 12)):
        one = row[None]
        t = batch.u[one]
        with torch.no_grad():
            own = bare.denoise(bare.path.noise(batch.latents()[one], batch.eps[one], t), t, batch.cond.select(one))[0]
        torch.testing.assert_close(stored, own, atol=1e-5, rtol=1e-5)


def test_draws_are_fixed_and_spread_over_all_times(banked):
    data = banked()
    seen = {}
    for batch, row, stored in rows(data):
        point = (tuple(batch.cond["size"][row].tolist()), tuple(batch.mean[row].flatten()[:4].tolist()))
        seen.setdefault(point, {})[float(batch.u[row])] = stored
    for times in seen.values():
        assert len(times) <= 4 and len({int(u * 4) for u in times}) == len(times), "one in each quarter"
    assert max(len(times) for times in seen.values()) == 4


def test_second_start_runs_no_forward_pass(banked, monkeypatch):
    first = banked()
    assert first.bank.built > 0
    monkeypatch.setattr(SDXL, "_load", lambda *a: pytest.fail("weights were loaded"))
    assert banked().bank.built == 0


def test_damaged_and_missing_predictions_are_rebuilt_bit_for_bit(banked):
    first = banked()
    before = [stored for *_, stored in rows(first, 8)]
    whole, damaged, *others = sorted(first.bank.targets.folder.rglob("*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    for path in others[::2]:
        path.unlink()
    time = whole.stat().st_mtime_ns
    again = banked()
    assert again.bank.built == 1 + len(others[::2]) and again.bank.targets.damaged == 1
    assert whole.stat().st_mtime_ns == time, "intact entries are kept"
    assert all(torch.equal(a, b) for a, (*_, b) in zip(before, rows(again, 8), strict=True))


def test_prediction_damaged_during_training_is_refused_with_a_fix(banked):
    data = banked()
    for path in data.bank.targets.folder.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"damaged during training .*; resume the run"):
        list(rows(data, 8))
    assert banked().bank.built > 0


@pytest.mark.parametrize("change", ["prior.bank.draws=5", "seed=1", "objective.shift=2", "objective.noise_offset=0.1",
                                    "prior.prompt=a cat", "model.dtype=bfloat16"])  # fmt: skip
def test_changed_settings_rebuild_the_predictions(banked, change):
    first = banked()
    other = banked(change)
    assert other.bank.built >= first.bank.built


def test_bank_does_not_change_instance_draws(banked):
    def instances(data):
        stream = iter(Samples(data, data.schedule, 0, 0, 1))
        return [(b.eps[r], b.u[r], b.z[r]) for b in (next(stream) for _ in range(10)) for r in b.instance_rows]

    for a, b in zip(instances(banked()), instances(banked("prior.kind=noise")), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

"""How much an adapter acts without its word."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tiny
from dreambooth_lab import lab
from dreambooth_lab.callbacks.builders import build_leakage
from dreambooth_lab.callbacks.csv_log import CsvLog
from dreambooth_lab.callbacks.ema import EvalWeights
from dreambooth_lab.callbacks.leakage import LeakageRow, leakage
from dreambooth_lab.config import ConfigError, check, enums
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import build_adapter, build_family
from dreambooth_lab.run import run
from dreambooth_lab.runfolder import RunFolder

ONE = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True, loggers=[])
LIVE = EvalWeights(None, enums.EmaValidation.none)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return tiny.save_photos(tmp_path_factory.mktemp("held"), [(80, 80), (60, 120)], seed=7)


def made(small, held, tmp_path, *overrides):
    cfg = lab.compose(*small, f"eval.path={held}", "eval.timesteps=3", "eval.leakage=true", *overrides)
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter = build_adapter(cfg)
    adapter.attach(family.denoiser, family.target_modules, seed=0)
    return build_leakage(cfg, RunFolder(tmp_path), data, LIVE), DreamBooth(cfg, family, adapter).eval()


def rows_of(callback, module, step=1):
    with torch.no_grad():
        callback.evaluate(step, ONE, module)
    return [row for row in callback.table.read() if row.step == step]


def move(module, scale=0.1):
    generator = torch.Generator().manual_seed(5)
    for p in module.trainable_parameters().values():
        p.data += scale * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "full"])
def test_an_adapter_without_effect_has_no_value_and_one_with_an_effect_has(small, held, tmp_path, kind):
    callback, module = made(small, held, tmp_path, f"adapter={kind}")
    assert leakage(rows_of(callback, module, 0)) is None
    move(module)
    rows = rows_of(callback, module)
    assert len(rows) == 6 and leakage(rows) > 0
    assert leakage(rows) == pytest.approx(sum(r.without_word for r in rows) / sum(r.with_word for r in rows))


def test_a_constant_effect_is_1_and_an_effect_on_the_word_alone_is_0(small, held, tmp_path, monkeypatch):
    callback, module = made(small, held, tmp_path)
    base, moved = module.family.denoise, torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(1))
    texts = [pair.without_word.batch.cond for pair in callback.pairs]

    def says_class(cond):
        return any(all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(cond.values(), text.values(), strict=True))
                   for text in texts)  # fmt: skip

    for strength, expected in ((1.0, 1.0), (0.5, 0.25), (0.0, 0.0)):

        def live(x, t, cond, strength=strength):
            return base(x, t, cond) + moved * (strength if says_class(cond) else 1)

        monkeypatch.setattr(module, "predict", live)
        callback.base = {}
        monkeypatch.setattr(module.adapter, "base", lambda: restored(module, base))
        assert leakage(rows_of(callback, module)) == pytest.approx(expected, abs=1e-5)


class restored:
    """A context in which the module predicts what the base does."""

    def __init__(self, module, base):
        self.module, self.base = module, base

    def __enter__(self):
        self.live, self.module.predict = self.module.predict, self.base

    def __exit__(self, *_):
        self.module.predict = self.live


def test_both_captions_share_every_draw(small, held, tmp_path):
    callback, _ = made(small, held, tmp_path)
    assert callback.pairs
    for pair in callback.pairs:
        a, b = pair.with_word.batch, pair.without_word.batch
        assert set(a.captions) == {"a photo of sks dog"} and set(b.captions) == {"a photo of a dog"}
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("mean", "std", "z", "eps", "u", "sample"))
        assert pair.with_word.rows == pair.without_word.rows


def test_a_run_logs_it_beside_the_eval_loss_and_trains_the_same(small, held, tmp_path):
    words = [*small, f"eval.path={held}", "eval.every_n_steps=3", "eval.timesteps=2", "validation.every_n_steps=0",
             "ema.validation=comparison"]  # fmt: skip
    run(lab.compose(*words, "eval.leakage=true"), tmp_path / "seen")
    run(lab.compose(*words), tmp_path / "blind")
    seen, blind = lab.load(tmp_path / "seen"), lab.load(tmp_path / "blind")
    assert [step for step, _ in seen.series["eval/leakage"]] == [3, 6], "there is none of the base model"
    assert seen.series["eval/leakage"] != seen.series["ema/eval/leakage"]
    assert all(seen.series[name] == values for name, values in blind.series.items())
    a, b = (torch.load(r.folder.newest()[0], weights_only=True)["state_dict"] for r in (seen, blind))
    assert all(torch.equal(a[name], b[name]) for name in b)
    rows = CsvLog(seen.folder.leakage, LeakageRow).read()
    last = [row for row in rows if (row.step, row.weights) == (6, "live")]
    assert leakage(last) == seen.series["eval/leakage"][-1][1]
    page = seen.folder.report.read_text()
    assert "eval/leakage over steps" in page and "Leakage is" in page and "Leakage is" not in blind.folder.report.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.path=null"], "eval.leakage is true, but there is no eval loss"),
        (["dataset.class_prompt=null", "prior=none", "prior.path=null"], "eval.leakage is true, but the rare word is not clear"),
        (["checkpoint.monitor=eval/leakage"], "checkpoint.monitor is 'eval/leakage', which is lowest where nothing is learned"),
    ],
)
def test_what_cannot_work_is_refused(small, held, words, said):
    with pytest.raises(ConfigError) as caught:
        check(lab.compose(*small, f"eval.path={held}", "eval.leakage=true", *words))
    assert said in str(caught.value)


def test_captions_without_the_word_are_refused(small, tmp_path):
    held = tiny.save_photos(tmp_path / "held", [(80, 80)], seed=7)
    for photo in held.glob("*.png"):
        (held / f"{photo.stem}.txt").write_text("a dog on a hill")
    own = tiny.save_photos(tmp_path / "own", [(80, 80)])
    (own / "00.txt").write_text("sks dog")
    with pytest.raises(ConfigError, match=r"no eval image's caption has the rare word \(the first: 'a dog on a hill'\)"):
        made(small, held, tmp_path, "dataset.caption=textfile", f"dataset.path={own}")

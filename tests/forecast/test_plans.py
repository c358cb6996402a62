"""memory=…: which plan is chosen, and that user overrides are kept."""

import pytest
import torch

import published
from commands import call
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.forecast import plans
from dreambooth_lab.forecast.phases import Need

GIB = 2**30


def needing(cfg):
    """A fake forecast: GiB by resolution, times 2 for each row and halved by each saving option."""
    saves = (
        cfg.model.gradient_checkpointing, cfg.quant.kind.value != "none", cfg.model.offload.value != "none",
        cfg.validation.batch_size == 1,
    )  # fmt: skip
    return [Need("training", {"all": int(64 * GIB * cfg.dataset.batch_size * 0.5 ** sum(saves))})]


@pytest.fixture
def choose(small, monkeypatch):
    monkeypatch.setattr(plans, "Forecast", lambda cfg, known: type("Known", (), {"phases": lambda _: needing(cfg)})())

    def choose(*words):
        overrides = [word for word in small if "batch_size" not in word and "accelerator" not in word] + list(words)

        def compose(more=()):
            cfg = lab.compose(*overrides, *more)
            check(cfg)
            return cfg

        return plans.choose_plan(compose(), overrides, compose)

    return choose


def test_first_fitting_plan_is_chosen(choose):
    assert choose("memory=80gb").words == []
    assert choose("memory=80gb", "dataset.batch_size=2").words == ["model.gradient_checkpointing=true"]
    chosen = choose("memory=24gb")
    assert chosen.words[:2] == ["model.gradient_checkpointing=true", "validation.batch_size=1"]
    assert chosen.cfg.model.gradient_checkpointing and chosen.fits and chosen.cfg.quant.kind.value == "none"
    assert "quant=int8" in choose("memory=12gb").words


def test_rows_per_step_are_unchanged(choose):
    chosen = choose("memory=12gb", "dataset.batch_size=1")
    assert chosen.cfg.dataset.batch_size == chosen.cfg.trainer.accumulate_grad_batches == 1
    four = plans._left(["dataset.batch_size=1", "trainer.accumulate_grad_batches={rows}"], set(), 4)
    assert four == ["dataset.batch_size=1", "trainer.accumulate_grad_batches=4"]


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ({"model"}, ["quant=int8", "model.offload=blocks", "dataset.batch_size=1", "trainer.accumulate_grad_batches=2"]),
        ({"quant"}, ["model.offload=blocks", "dataset.batch_size=1", "trainer.accumulate_grad_batches=2"]),
        ({"quant.kind"}, ["model.offload=blocks", "dataset.batch_size=1", "trainer.accumulate_grad_batches=2"]),
        ({"model.offload"}, ["quant=int8", "dataset.batch_size=1", "trainer.accumulate_grad_batches=2"]),
        ({"dataset.batch_size"}, ["quant=int8", "model.offload=blocks"]),
        ({"trainer.accumulate_grad_batches", "dataset"}, ["quant=int8", "model.offload=blocks"]),
    ],
)
def test_user_overrides_win(own, left):
    plan = ["quant=int8", "model.offload=blocks", "dataset.batch_size=1", "trainer.accumulate_grad_batches={rows}"]
    assert plans._left(plan, own, 2) == left


def test_plans_excluded_by_user_overrides_are_skipped(choose):
    chosen = choose("memory=12gb", "adapter=full", "adapter.rank=1", "memory.card_gib=40")
    assert chosen.words[0] == "model.gradient_checkpointing=true" and "quant=int8" not in chosen.words


def test_no_fitting_plan_is_refused_with_a_fix(choose):
    with pytest.raises(ConfigError, match=r"training needs a card of .* GiB even with .*quant=int8.*memory=none"):
        choose("memory=8gb", "memory.card_gib=2", "dataset.batch_size=64")
    choice = choose("memory=none", "memory.card_gib=2")
    assert not choice.fits and not choice.words and "needs a card of" in str(list(choice.table().columns[3].cells))


def test_without_a_gpu_no_plan_is_chosen(choose):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert choose("memory=none") is None
    with pytest.raises(ConfigError, match="set a size, such as memory=12gb"):
        choose("memory=auto")


def test_given_card_size_is_planned_for_without_weights(tmp_path):
    folder = published.outline("sd15", tmp_path / "sd15")
    overrides = [
        "model=sd15", f"model.pretrained={folder}", "model.resolution=256", "validation.resolution=128", f"cache={tmp_path}",
        "dataset=folder", f"dataset.path={tmp_path}", "dataset.instance_prompt='a photo of sks dog'", "memory=8gb",
    ]  # fmt: skip
    chosen = plans.choose_plan(lab.compose(*overrides), overrides, lambda more: lab.compose(*overrides, *more))
    assert chosen.fits and chosen.words == [] and 1.6 < chosen.needs[-1].parts["denoiser"] / 1e9 < 1.8


@pytest.mark.slow
def test_command_shows_and_saves_the_estimate(small, tmp_path):
    words = [*small, "memory=8gb", "preflight=only"]
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Device memory by phase" in done.stdout and "fits" in done.stdout
    (saved,) = tmp_path.rglob("preflight.txt")
    assert "Device memory by phase" in saved.read_text()


@pytest.mark.slow
def test_command_composes_every_plan_before_refusing(small, tmp_path):
    done = call(*small, "memory=8gb", "memory.card_gib=0.5", cwd=tmp_path)
    assert done.returncode == 2 and "even with model.gradient_checkpointing=true" in done.stderr and "quant=int8" in done.stderr
    assert "model.offload" not in done.stderr, "the run is on the CPU"


def test_failed_estimate_stops_the_run_only_if_a_plan_was_requested(choose, monkeypatch):
    def fails(cfg, known):
        raise NotImplementedError("no kernel\nfor it")

    monkeypatch.setattr(plans, "Forecast", fails)
    assert choose("memory.card_gib=8") is None
    with pytest.raises(ConfigError, match=r"can't be estimated .*NotImplementedError: no kernel\); set memory=none"):
        choose("memory=8gb")

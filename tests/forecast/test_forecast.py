"""Memory estimates made without weights, against the memory of real runs."""

import pytest
import torch

import tiny_families
from dreambooth_lab import lab
from dreambooth_lab.factory import build_family
from dreambooth_lab.forecast import counts, plans
from dreambooth_lab.forecast.cached_counts import CachedCounts
from dreambooth_lab.forecast.phases import Forecast
from dreambooth_lab.profiling import memory
from dreambooth_lab.tools.bench.memory import true_peak
from dreambooth_lab.tools.common.training import build_training

BIG = ["model.resolution=256", "dataset.crop_aspect=square", "adapter.rank=8"]
ROLLOUT = ["rollout.enabled=true", "rollout.probability=1.0", "rollout.ramp_steps=0", "rollout.max_step_offset=2", "prior=none"]
BY_VALUES = ["z_image", "qwen_image", "lumina2"]  # read lengths of captions from masks
TOKEN = ["adapter.train_token=true", "dataset.instance_prompt=a photo of q dog", "adapter.token=q"]
FULL = ["adapter=full", "adapter.rank=1"]
CASES = [["prior=teacher"], ["model.gradient_checkpointing=true"]]
MORE = [
    ROLLOUT, ["adapter=lokr"], ["adapter.text_encoders=[1,2]"], ["quant=int8"],
    ["prior=none"], ["adapter=dora"], ["adapter=loha"], ["adapter=locon"], FULL,
    ["optimizer=adafactor", *FULL], ["optimizer=adamw8bit", *FULL], ["optimizer=lion", *FULL], TOKEN, ["model.dtype=bfloat16"],
    ["model.dtype=bfloat16", "quant=int8"], ["quant=int4"], ["quant=nf4"], ["quant=int8_torchao"],
    ["mask.outside=teacher"], ["model.gradient_checkpointing=true", "adapter=lokr"],
    ["model.gradient_checkpointing=true", "quant=int8"], ["model.gradient_checkpointing=true", "quant=int4"],
]  # fmt: skip


def ratio(small, folder, words):
    """Estimate of the training phase divided by the true peak of a step."""
    cfg = lab.compose(*small, *BIG, *words)
    estimate = next(need for need in Forecast(cfg, CachedCounts(folder)).phases() if need.phase == "training")
    module, data = build_training(cfg)
    batches = (data.build(data.schedule.batch(number)) for number in range(20))
    batch = next(one for one in batches if len(one.class_rows) == (1 if data.schedule.class_share else 0))
    found = estimate.total / true_peak(module, batch)
    print(f"RATIO {' '.join(words)}: {found:.3f}")
    return found


@pytest.mark.parametrize("words", CASES, ids=[" ".join(words) for words in CASES])
def test_training_estimate_is_close_to_the_true_peak(small, tmp_path, words):
    assert 0.9 < ratio(small, tmp_path, words) < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("words", MORE, ids=[" ".join(words) for words in MORE])
def test_training_estimate_is_close_to_the_true_peak_for_all_kinds(small, tmp_path, words):
    assert 0.9 < ratio(small, tmp_path, words) < 1.25


def of_family(small, folders, name):
    model = [f"model={tiny_families.model_of(name)}", f"model.pretrained={folders(name)}", "model.tae=null", "prior=none"]
    return [*[word for word in small if not word.startswith(("model", "prior"))], *model, "model.resolution=64"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_VALUES)
def test_networks_with_value_dependent_shapes_are_estimated(folders, name, small, tmp_path):
    assert 0.9 < ratio(of_family(small, folders, name), tmp_path, []) < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_families.PIPELINES)
def test_every_family_is_estimated(folders, name, small, tmp_path):
    needs = plans._forecast(lab.compose(*of_family(small, folders, name)), CachedCounts(tmp_path))
    assert [need.phase for need in needs] == ["captions", "images", "training", "validation"]
    assert all(need.total > 0 for need in needs)


def test_counted_sizes_match_the_real_networks(small):
    cfg = lab.compose(*small)
    family = build_family(cfg)
    latents = torch.zeros(1, family.channels, 32, 32)
    text = family.encode_text([counts.CAPTION])
    inputs = memory.inputs(family, text, 32, 32, 4)
    works = {
        counts.decoding(cfg, 256): (lambda: family.decode(latents), family.vae),
        counts.encoding(cfg, 256): (lambda: family.encode_image(torch.zeros(1, 3, 256, 256)), family.vae),
        counts.sampling(cfg, 4, 256): (torch.no_grad()(lambda: family.denoise(*inputs)), family.denoiser),
    }
    for visit, (work, network) in works.items():
        assert visit.weights.size == memory.stored(network.parameters())
        work()  # one-time allocations exist
        assert 0.8 < visit.work / memory.peak(work, family.device) < 1.15  # convolutions on a CPU need workspace
    encoders = [encoder for _, encoder in family.text_encoders]
    assert counts.reading(cfg).weights.size == sum(memory.stored(one.parameters()) for one in encoders)


def test_offloaded_blocks_count_as_the_largest_block(small):
    words = ["trainer.accelerator=auto", "model.gradient_checkpointing=true"]
    whole, away = (counts.step(lab.compose(*small, *words, f"model.offload={offload}"), 2, 64) for offload in ("none", "blocks"))
    assert away.base.size + away.base.away == whole.base.size and 0 < away.base.block < away.base.away
    assert away.work > whole.work, "the running block"
    assert (away.learning, away.added) == (whole.learning, whole.added)


def test_divided_blocks_count_with_their_share(small):
    words = ["trainer.devices=4", "model.gradient_checkpointing=true"]
    whole, divided = (counts.step(lab.compose(*small, *words, f"trainer.strategy={kind}"), 2, 64) for kind in ("ddp", "fsdp"))
    away = counts.step(lab.compose(*small, "trainer.accelerator=auto", words[1], "model.offload=blocks"), 2, 64).base.away
    assert whole.base.size - divided.base.size == pytest.approx(away * 3 / 4, abs=1)
    assert 0 < divided.base.block < away and divided.base.away == 0


def test_estimates_are_cached(small, tmp_path, monkeypatch):
    cfg = lab.compose(*small)
    first = Forecast(cfg, CachedCounts(tmp_path)).phases()
    for name in ("reading", "encoding", "decoding", "sampling", "step"):
        count = getattr(counts, name)
        monkeypatch.setattr(counts, name, type("Never", (), {"__name__": name, "__call__": lambda *_: pytest.fail("counted")})())
        assert count.__name__ == name
    assert Forecast(lab.compose(*small, "optimizer.lr=1"), CachedCounts(tmp_path)).phases() == first
    with pytest.raises(pytest.fail.Exception):
        Forecast(lab.compose(*small, "model.gradient_checkpointing=true"), CachedCounts(tmp_path)).phases()
    (damaged := next(tmp_path.iterdir())).write_text("{")
    with pytest.raises(pytest.fail.Exception):
        Forecast(cfg, CachedCounts(tmp_path)).phases()
    assert damaged.is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "phases"),
    [
        ([], ["captions", "images", "training", "validation"]),
        (["validation.every_n_steps=0"], ["captions", "images", "training"]),
        (["prior.source=generated", "prior.prompt=a dog"], ["captions", "class images", "images", "training", "validation"]),
        (["prior=bank"], ["captions", "images", "bank", "training", "validation"]),
    ],
)
def test_every_phase_of_a_run_is_estimated(small, tmp_path, words, phases):
    assert [need.phase for need in Forecast(lab.compose(*small, *words), CachedCounts(tmp_path)).phases()] == phases

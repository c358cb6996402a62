import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.factory import build_family
from dreambooth_lab.models.sdxl import SDXL
from dreambooth_lab.run import run


@pytest.fixture
def prepared(small, tmp_path):
    def make(*overrides):
        cfg = lab.compose(*small, *overrides)
        data = DreamBoothData(cfg, build_family(cfg))
        data.prepare()
        return data

    return make


def batches(data, count, rank=0, world_size=1):
    stream = iter(Samples(data, data._schedule(world_size), 0, rank, world_size))
    return [next(stream) for _ in range(count)]


def test_rows_have_the_bucket_shape_and_their_captions(prepared):
    data = prepared()
    for batch in batches(data, 12):
        assert batch.latents().shape == batch.eps.shape and tuple(batch.latents().shape[2:]) in {
            (8, 8),
            (12, 6),
            (10, 6),
        }
        for rows, prompt in ((batch.instance_rows, "a photo of sks dog"), (batch.class_rows, "a photo of a dog")):
            for row in rows:
                assert torch.equal(batch.cond["prompt_embeds"][row], data.text(prompt)["prompt_embeds"][0])
        assert len(batch.instance_rows) == len(batch.class_rows) == 1


def test_instance_buckets_contain_class_rows(prepared):
    data = prepared()
    assert len(data.schedule.buckets) >= 2
    assert all(bucket.classes for bucket in data.schedule.buckets)


@pytest.mark.parametrize("words", [["prior=teacher"], ["prior=bank"]], ids=["teacher", "bank"])
def test_draws_are_independent_of_batch_size_ranks_and_workers(prepared, photos, tmp_path, words):
    one = tmp_path / "one-bucket"
    one.mkdir()
    for name in ("00.png", "01.png", "02.png"):
        shutil.copy(photos / name, one / name)
    random = ["dataset.flip=true", "dataset.caption_dropout=0.3", "objective.noise_offset=0.1", "prior.bank.draws=3"]
    random += ["rollout.enabled=true", "rollout.kind=input_perturbation"] if "prior=teacher" in words else []

    def rows(batch_size, ranks=1, workers=0):
        data = prepared(f"dataset.path={one}", f"dataset.batch_size={batch_size}", *random, *words)
        flat = {}
        for rank in range(ranks):
            stream = Samples(data, data._schedule(ranks), 0, rank, ranks)
            loader = iter(DataLoader(stream, batch_size=None, collate_fn=lambda b: b, num_workers=workers))
            for batch in (next(loader) for _ in range(16 // (batch_size * ranks))):
                classes = batch.class_rows.tolist()
                for i, n in enumerate(batch.sample.tolist()):
                    draws = (batch.cond["prompt_embeds"][i], batch.cond["size"][i], batch.u[i], batch.rollout_draws[i])
                    more = [] if batch.xi is None else [batch.xi[i]]
                    more += [batch.teacher_output[classes.index(i)]] if batch.teacher_output is not None and i in classes else []
                    flat[n] = (batch.latents()[i], batch.eps[i], *draws, *more)
        return flat

    reference = rows(1)
    for other in (rows(2), rows(4), rows(2, workers=2), rows(2, ranks=2), rows(1, ranks=2, workers=2)):
        assert other.keys() == reference.keys()
        assert all(torch.equal(a, b) for n in reference for a, b in zip(reference[n], other[n], strict=True))


def test_workers_keep_the_order_and_resume_at_any_batch(prepared):
    data = prepared()

    def order(workers):
        stream = Samples(data, data.schedule, 5, 0, 1)
        loader = iter(DataLoader(stream, batch_size=None, collate_fn=lambda b: b, num_workers=workers))
        return [next(loader).sample.tolist() for _ in range(9)]

    assert order(0) == order(2) == [[2 * n, 2 * n + 1] for n in range(5, 14)]


def test_posterior_noise_differs_between_passes(prepared):
    data = prepared("dataset.repeats=3")
    seen = torch.stack([batch.eps[0, 0] for batch in batches(data, 8) if batch.eps.shape[2:] == (8, 8)])
    assert len({tuple(x.flatten()[:3].tolist()) for x in seen}) == len(seen)


def test_all_mirrored_and_cropped_variants_are_used(prepared):
    data = prepared("dataset.flip=true", "dataset.crop=random", "dataset.crop_variants=3", "dataset.batch_size=4")
    assert {len(entry.variants) for entry in data.entries} <= {2, 4, 6}  # equal crops count once
    sizes = {tuple(size.tolist()) for batch in batches(data, 60) for size in batch.cond["size"]}
    assert len(sizes) > 8


def test_only_instance_captions_are_dropped(prepared):
    data = prepared("dataset.caption_dropout=0.5")
    empty, dropped, kept = data.text("")["prompt_embeds"][0], 0, 0
    for batch in batches(data, 40):
        assert all(not torch.equal(batch.cond["prompt_embeds"][row], empty) for row in batch.class_rows)
        dropped += sum(torch.equal(batch.cond["prompt_embeds"][row], empty) for row in batch.instance_rows)
        kept += len(batch.instance_rows)
    assert 0.25 < dropped / kept < 0.75


def test_rows_without_caption_follow_empty_caption_with_a_shared_cache(prepared):
    embeds = []
    for kind in ("zeros", "encoded", "auto", "encoded"):
        data = prepared("dataset.caption_dropout=1", f"model.empty_caption={kind}")
        batch = batches(data, 1)[0]
        embeds.append(batch.cond["prompt_embeds"][batch.instance_rows])
        assert batch.captions[int(batch.instance_rows[0])] == "" and data.text(None)["prompt_embeds"].abs().max() == 0
    zeros, encoded, auto, again = embeds
    assert zeros.abs().max() == 0 < encoded.abs().max() and torch.equal(auto, zeros) and torch.equal(again, encoded)


@pytest.mark.parametrize("kind", ["zeros", "encoded"])
def test_validation_uses_the_pipelines_unconditional_input(small, tmp_path, monkeypatch, kind):
    seen, real = [], SDXL.generate
    monkeypatch.setattr(
        SDXL, "generate", lambda family, text, negative, **k: seen.append(negative) or real(family, text, negative, **k)
    )
    run(lab.compose(*small, "trainer.max_steps=1", f"model.empty_caption={kind}"), tmp_path / "run")
    assert seen and all(float(negative["prompt_embeds"].abs().max()) == 0 for negative in seen)
    run(
        lab.compose(*small, "trainer.max_steps=1", f"model.empty_caption={kind}", "validation.negative_prompt=red"),
        tmp_path / "red",
    )
    assert float(seen[-1]["prompt_embeds"].abs().max()) > 0


def test_second_start_loads_no_encoder(prepared, monkeypatch):
    prepared()
    monkeypatch.setattr(SDXL, "_load", lambda *a: pytest.fail("an encoder was loaded"))
    data = prepared()
    assert sum(s.built for s in data.summaries()) == 0 and all(s.cached for s in data.summaries())


def test_only_changed_images_are_encoded_again(prepared, photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "own")
    prepared(f"dataset.path={own}")
    shutil.copy(own / "03.png", own / "00.png")
    data = prepared(f"dataset.path={own}", "prior=none")
    assert [s.built for s in data.summaries()] == [0]  # the same bytes at the same geometry were there already
    (own / "01.png").unlink()
    (own / "02.png").rename(own / "renamed.png")
    assert [s.built for s in prepared(f"dataset.path={own}", "prior=none").summaries()] == [0]
    assert [s.built for s in prepared(f"dataset.path={own}", "prior=none", "dataset.resolutions=[48]").summaries()] == [
        3
    ]  # of 4, two are equal


def test_truncated_photo_is_rejected_by_name_and_the_rest_trains(prepared, photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "own")
    data = (own / "02.png").read_bytes()
    (own / "cut.png").write_bytes(data[: len(data) // 2])
    made = prepared(f"dataset.path={own}")
    summary = made.summaries()[0]
    assert [r.name for r in summary.rejected] == ["cut.png"] and summary.found == 6
    assert all(entry.picture.name != "cut.png" for entry in made.entries)


def test_folder_without_images_is_refused(prepared, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"dataset.path is .* has no usable image \(no image files\)"):
        prepared(f"dataset.path={tmp_path}")

import json
import shutil
from contextlib import suppress

import pytest
import torch
from PIL import Image

import samples
import tiny
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check, enums
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.data.planning import plan
from dreambooth_lab.data.simpletuner import read
from dreambooth_lab.data.simpletuner.keys import KEYS
from dreambooth_lab.factory import build_family


def config(path, *overrides):
    return lab.compose("dataset=simpletuner", f"dataset.path={path}", *overrides)


def specs(path, *overrides):
    return plan(config(path, *overrides)).specs


@pytest.fixture
def of_file(small, tmp_path):
    """Prepared data of a dataset file on the tiny model."""
    words = [w for w in small if not w.startswith(("dataset", "prior", "cache"))]

    def make(path, *overrides):
        cfg = config(path, *words, f"cache={tmp_path / 'cache'}", *overrides)
        check(cfg)
        data = DreamBoothData(cfg, build_family(cfg))
        data.prepare()
        return data

    return make


@pytest.fixture
def training(tmp_path):
    """The folders of SimpleTuner's examples. Only the headers of the large images are read."""
    root = tmp_path / "training"
    tiny.save_photos(root / "datasets/test_datasets/dreambooth/deep", [(1024, 1300)])
    mask = Image.new("L", (1024, 1300), 0)
    mask.paste(255, (200, 200, 900, 900))
    masks = root / "datasets/test_datasets/dreambooth_mask/deep"
    masks.mkdir(parents=True)
    mask.save(masks / "00.bmp")
    tiny.save_photos(root / "datasets/subjectname", [(200, 200), (800, 800)])
    tiny.save_photos(root / "datasets/regularisation", [(300, 300), (800, 800), (100, 100)], seed=1)
    return root


def test_masked_example_runs_unchanged(of_file, training, tmp_path):
    data = of_file(samples.write(tmp_path / "a.json", samples.MASKED, training))
    assert [(e.picture.name, e.shape) for e in data.entries] == [("deep/00.png", (1024, 1024))]
    (summary,) = data.summaries()
    assert summary.masks == 1 and summary.found == 1
    batch = data.build(data.schedule.batch(0))
    assert tuple(batch.mask.shape) == (1, 1, 128, 128) and batch.mask.min() == 0 and batch.mask.max() == 1
    assert list((training / "cache/vae/sdxl/dreambooth-data").rglob("*.safetensors")), "cache_dir_vae places the latents"
    assert list((training / "cache/text/sdxl-base/masked_loss").rglob("*.safetensors")), "cache_dir places the texts"
    assert data.cfg.validation.prompts == ["an dreambooth"]


def test_subject_example_runs_unchanged(of_file, training, tmp_path):
    path = samples.write(tmp_path / "a.json", samples.SUBJECT, training)
    data = of_file(path, "prior=teacher", "dataset.batch_size=4")
    found = {s.spec.id: (s.found, len(s.rejected)) for s in data.summaries()}
    assert found == {"subjectname-data-512px": (2, 0), "subjectname-data-1024px": (2, 1),
                     "regularisation-data": (3, 1), "regularisation-data-1024px": (3, 2)}  # fmt: skip
    assert any("minimum_image_size=768" in r.reason for s in data.summaries() for r in s.rejected)
    rows = data.rows_per_epoch()
    assert rows == {"subjectname-data-512px": 202, "subjectname-data-1024px": 101, "regularisation-data": 2,
                    "regularisation-data-1024px": 1}  # fmt: skip
    classes = [e for e in data.entries if e.spec.is_class]
    assert {e.captions for e in classes} == {("a picture of a man",)}
    mixed = [bucket for bucket in data.schedule.buckets if bucket.instances and bucket.classes]
    assert mixed, "instance and class rows share buckets where shapes agree"


def test_regularisation_set_without_a_prior_is_explained(training, tmp_path):
    path = samples.write(tmp_path / "a.json", samples.SUBJECT, training)
    with pytest.raises(ConfigError, match=r"'regularisation-data', 'regularisation-data-1024px': .* add prior=teacher"):
        specs(path)
    assert sum(s.is_class for s in specs(path, "prior=noise")) == 2


def test_refiner_example_without_training_data_is_refused(training, tmp_path):
    with pytest.raises(ConfigError, match="no entry has images to train on"):
        specs(samples.write(tmp_path / "a.json", samples.REFINER, training))
    with_images = [samples.entry(training), *json.loads(samples.REFINER)]
    made = plan(config(samples.save(tmp_path / "b.json", *with_images)))
    assert made.texts == "/training/text_cache/sdxl_refiner" and len(made.specs) == 1


@pytest.mark.parametrize("spelling", ["is_regularisation_data", "is_regularization_data"])
def test_both_spellings_mean_class_images(photos, tmp_path, spelling):
    path = samples.save(tmp_path / "a.json", samples.entry(photos), samples.entry(photos, id="b", **{spelling: True}))
    assert [s.is_class for s in specs(path, "prior=teacher")] == [False, True]


def test_variables_are_expanded(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOS", str(photos.parent))
    path = samples.save(tmp_path / "a.json", samples.entry(photos, instance_data_dir="{env:PHOTOS}/" + photos.name))
    assert specs(path)[0].where.path == str(photos)


def test_every_key_is_mapped(photos, tmp_path):
    one = samples.entry(
        photos, repeats=3, probability=0.5, crop=True, crop_aspect="closest", crop_style="random", max_num_samples=2,
        crop_aspect_buckets=[0.5, 1, 2], minimum_image_size=32, maximum_image_size=96, target_downsample_size=80,
        minimum_aspect_ratio=0.4, maximum_aspect_ratio=2.5, max_upscale_threshold=3.0, cache_dir_vae="/tmp/x",
        instance_prompt=["a", "b"], caption_strategy="textfile", prepend_instance_prompt=True,
    )  # fmt: skip
    (made,) = specs(samples.save(tmp_path / "a.json", one))
    shaping = made.shaping
    assert (made.repeats, made.probability, made.most, made.latents) == (3, 0.5, 2, "/tmp/x")
    assert (shaping.aspect, shaping.place, shaping.aspects, shaping.variants) == (
        enums.CropAspect.closest,
        enums.Crop.random,
        (0.5, 1, 2),
        4,
    )
    assert (shaping.minimum, shaping.maximum, shaping.downsample, shaping.max_upscale) == (32, 96, 80, 3)
    assert (shaping.least_aspect, shaping.most_aspect) == (0.4, 2.5)
    assert made.captions.prompts == ("a", "b") and made.captions.prepend


def test_uncropped_bucket_keeps_the_image_aspect(photos, tmp_path):
    for changes in ({"crop": False}, {}, {"crop": False, "crop_style": "random", "crop_aspect": "square"}):
        shaping = specs(samples.save(tmp_path / "a.json", samples.entry(photos, **changes)))[0].shaping
        assert (shaping.aspect, shaping.place) == (enums.CropAspect.preserve, enums.Crop.center)


def notices_of(tmp_path, *entries):
    return plan(config(samples.save(tmp_path / "a.json", *entries))).notices


def test_unused_keys_are_reported_once(photos, tmp_path):
    notices = notices_of(
        tmp_path, samples.entry(photos, vae_batch_size=4, scan_for_errors=True), samples.entry(photos, id="c", vae_batch_size=8),
        samples.entry(photos, id="b", disabled=True),
    )  # fmt: skip
    assert len(notices) == 3 and any("'b' is disabled" in n for n in notices)
    assert any(n.startswith("entries 'photos', 'c': vae_batch_size has no effect here: ") for n in notices)


IDLE = [
    ({"maximum_image_size": 96, "target_downsample_size": 8}, "maximum_image_size, target_downsample_size have", "without crop"),
    ({"crop": False, "crop_style": "random", "crop_aspect": "square"}, "crop_aspect, crop_style have", "without crop=true"),
    ({"crop": True, "crop_aspect_buckets": [1.0]}, "crop_aspect_buckets has", "use them"),
    ({"caption_strategy": "filename"}, "instance_prompt has", "prepend_instance_prompt is not set"),
    ({"prepend_instance_prompt": True}, "prepend_instance_prompt has", "is the whole caption"),
    ({"caption_column": "text"}, "caption_column has", "not read from a column"),
    ({"csv_file": "x.csv"}, "csv_file has", "only type=csv"),
    ({"parquet": {"path": "x.parquet"}}, "parquet has", "only metadata_backend=parquet"),
    ({"cache_dir": "x"}, "cache_dir has", "a key of text_embeds entries"),
    ({"conditioning_type": "mask"}, "conditioning_type has", "contains no masks"),
    ({"dataset_type": "eval", "repeats": 9, "is_regularisation_data": True}, "repeats, is_regularisation_data have", "never"),
    ({"dataset_type": "eval", "conditioning_data": "other"}, "conditioning_data has", "uses no masks"),
    ({"dataset_type": "conditioning", "conditioning_type": "mask", "instance_prompt": None, "caption_strategy": None},
     "resolution, resolution_type have", "the same geometry as its image"),
    ({"dataset_type": "text_embeds", "resolution": None, "resolution_type": None, "instance_prompt": None,
      "caption_strategy": None}, "instance_data_dir has", "has no images"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "keys", "why"), IDLE, ids=[keys for _, keys, _ in IDLE])
def test_key_without_effect_in_its_place_gives_one_notice(photos, tmp_path, change, keys, why):
    other = samples.entry(photos, id="train")
    mask = {"id": "other", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "x"}
    (notice,) = notices_of(tmp_path, other, mask, samples.entry(photos, **change))
    assert notice.startswith(f"entry 'photos': {keys} no effect here: ") and why in notice


def test_masked_example_gives_one_notice_for_all_mask_geometry(training, tmp_path):
    notices = specs_notices(samples.write(tmp_path / "a.json", samples.MASKED, training))
    assert len(notices) == 1 and notices[0].startswith("entry 'dreambooth-conditioning': resolution, resolution_type, minimum")
    assert specs_notices(samples.write(tmp_path / "b.json", samples.SUBJECT, training), "prior=teacher") == []


def specs_notices(path, *overrides):
    return plan(config(path, *overrides)).notices


def test_only_one_text_cache_is_used_and_others_are_named(photos, tmp_path):
    texts = [{"id": f"t{i}", "dataset_type": "text_embeds", "type": "local", "cache_dir": f"/tmp/{i}"} for i in range(2)]
    made = plan(
        config(samples.save(tmp_path / "a.json", samples.entry(photos, text_embeds="t0"), texts[0], texts[1] | {"default": True}))
    )
    assert made.texts == "/tmp/1" and len(made.notices) == 2
    assert made.notices[0].startswith("entry 't0' is not used") and "text_embeds has no effect here" in made.notices[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.caption=textfile", "dataset.caption is textfile"),
        ("dataset.resolutions=[512]", "dataset.resolutions is [512.0]"),
        ("dataset.mask_from=alpha", "dataset.mask_from is alpha"),
        ("dataset.repeats=3", "dataset.repeats is 3"),
        ("prior.class_fraction=0.3", "prior.class_fraction is 0.3"),
        ("prior.prompt=x", "prior.prompt is 'x'"),
    ],
)
def test_keys_set_by_the_file_are_refused_beside_it(photos, tmp_path, override, message):
    path = samples.save(tmp_path / "a.json", samples.entry(photos))
    check(config(path, "dataset.flip=true", "dataset.class_prompt=x", "dataset.batch_size=2"))
    with pytest.raises(ConfigError, match=r"^1 problem") as caught:
        check(config(path, override))
    assert message in str(caught.value)


def test_arbitrary_values_never_crash(photos, tmp_path):
    """An invalid value is refused or used; no exception other than ConfigError is raised."""
    path = samples.save(tmp_path / "a.json", samples.entry(photos))
    cfg, used = config(path), 0
    for key in KEYS:
        for i, value in enumerate((None, True, -1, "x", [[]], {"caption_column": 1})):
            wrong = samples.entry(photos, id="b", dataset_type=("image", "conditioning")[i % 2])
            samples.save(path, samples.entry(photos), wrong | {key: value})
            with suppress(ConfigError):
                used += len(read(path, cfg).specs) > 0
    assert used > 80


def test_eval_entries_are_marked(photos, tmp_path):
    path = samples.save(tmp_path / "a.json", samples.entry(photos), samples.entry(photos, id="e", dataset_type="eval"),
                        samples.entry(photos, id="r", dataset_type="eval", is_regularization_data=True))  # fmt: skip
    assert [(s.id, s.is_eval, s.is_class) for s in specs(path)] == [
        ("photos", False, False),
        ("e", True, False),
        ("r", True, False),
    ]


def test_eval_sets_are_never_trained_on(of_file, photos, class_photos, tmp_path):
    eval_entry = samples.entry(class_photos, id="e", dataset_type="eval")
    data = of_file(samples.save(tmp_path / "a.json", samples.entry(photos), eval_entry))
    assert {e.spec.id for e in data.entries} == {"photos"} and data.rows_per_epoch()["e"] == 0
    assert {e.spec.id for e in data.held_out} == {"e"} and len(data.photos()) == 5


def test_eval_image_in_the_training_set_is_refused(of_file, photos, class_photos, tmp_path):
    shutil.copytree(class_photos, tmp_path / "held")
    shutil.copy(photos / "03.png", tmp_path / "held" / "renamed.png")
    eval_entry = samples.entry(tmp_path / "held", id="e", dataset_type="eval")
    with pytest.raises(ConfigError, match=r"'e': .*: renamed\.png is also trained on \(photos: 03\.png\)"):
        of_file(samples.save(tmp_path / "a.json", samples.entry(photos), eval_entry))


def test_one_folder_at_two_resolutions_shares_a_cache_folder(of_file, photos, tmp_path):
    """Equal cache folders for two resolutions collide in SimpleTuner; keys by content can't."""
    both = [samples.entry(photos, id=f"p{e}", resolution=e, cache_dir_vae=str(tmp_path / "vae")) for e in (64, 128)]
    data = of_file(samples.save(tmp_path / "a.json", *both))
    stream = iter(Samples(data, data.schedule, 0, 0, 1))
    shapes = {tuple(next(stream).mean.shape[2:]) for _ in range(40)}
    assert {(8, 8), (16, 16)} <= shapes


def test_probability_and_repeats_set_the_mixture(of_file, photos, class_photos, tmp_path):
    path = samples.save(
        tmp_path / "a.json", samples.entry(photos, repeats=1), samples.entry(class_photos, id="b", probability=0.5)
    )
    data = of_file(path, "dataset.batch_size=1")
    assert data.rows_per_epoch() == {"photos": 10, "b": 1.5}
    rows = [data.entries[data.schedule.batch(n)[0].entry].spec.id for n in range(230)]
    assert abs(rows.count("b") - 30) <= 4


def test_zero_probability_gives_no_rows(of_file, photos, tmp_path):
    data = of_file(samples.save(tmp_path / "a.json", samples.entry(photos), samples.entry(photos, id="b", probability=0)))
    assert data.rows_per_epoch()["b"] == 0
    with pytest.raises(ConfigError, match="probability above 0"):
        of_file(samples.save(tmp_path / "b.json", samples.entry(photos, probability=0)))


def test_listed_prompts_are_drawn_per_sample(of_file, photos, tmp_path):
    data = of_file(samples.save(tmp_path / "a.json", samples.entry(photos, instance_prompt=["one", "two"])))
    captions = [data.build.caption(data.schedule.batch(n)[0].sample, data.entries[0]) for n in range(60)]
    assert 15 < captions.count("one") < 45 and set(captions) == {"one", "two"}
    assert captions == [data.build.caption(data.schedule.batch(n)[0].sample, data.entries[0]) for n in range(60)]


def test_rows_without_mask_get_ones(of_file, photos, class_photos, tmp_path):
    masks = tmp_path / "masks"
    for file in photos.iterdir():
        with Image.open(file) as image:
            masks.mkdir(exist_ok=True)
            Image.new("L", image.size, 128).save(masks / f"{file.stem}.jpg")
    path = samples.save(
        tmp_path / "a.json", samples.entry(photos, conditioning_data="m"),
        samples.entry(masks, id="m", dataset_type="conditioning", conditioning_type="mask"),
        samples.entry(class_photos, id="reg", is_regularisation_data=True, repeats=5),
    )  # fmt: skip
    data = of_file(path, "prior=teacher", "dataset.batch_size=4")
    stream = iter(Samples(data, data.schedule, 0, 0, 1))
    mixed = 0
    for batch in (next(stream) for _ in range(20)):
        if batch.mask is None:
            assert not len(batch.instance_rows)
            continue
        mixed += bool(len(batch.class_rows))
        assert torch.allclose(batch.mask[batch.instance_rows], torch.tensor(128 / 255))
        assert (batch.mask[batch.class_rows] == 1).all()
    assert mixed

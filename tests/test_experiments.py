import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from dreambooth_lab import lab
from dreambooth_lab.compare import arms as grouping
from dreambooth_lab.compare import runs
from dreambooth_lab.config import ConfigError, check, conf_dir, dreambench
from dreambooth_lab.run import run
from dreambooth_lab.tools import draw_toybox, judge_toybox
from dreambooth_lab.toybox import base_folder

EXPERIMENTS = sorted((conf_dir().parent / "experiments" / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def working_directory(tmp_path_factory):
    """A working directory with the images of mask_study, generated as its header says."""
    folder = tmp_path_factory.mktemp("experiments")
    draw_toybox.write(folder / "at_home", ("in the city",))
    return folder


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_pinned_experiment_states_its_question_and_composes(path, working_directory, monkeypatch, tmp_path):
    """Keys without a default, such as the photos' folder, are set to an existing folder."""
    monkeypatch.chdir(working_directory)
    head = path.read_text().split("defaults:")[0]
    assert all(f"# {word}" in head for word in ("Question:", "Cost:", "Expected:"))
    words = [f"experiment={path.stem}", "resume=null"]
    if "dream" in path.stem:  # its photos are in folders of the user
        monkeypatch.setenv("DREAMBENCH", str(tmp_path))
        (tmp_path / "dog").mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / "dog" / "0.png")
    missing = OmegaConf.missing_keys(lab.compose(*words))
    check(lab.compose(*words, *(f"{key}={tmp_path}" for key in missing)))


GROUPS = {"preservation_study": "remedy", "rollout_study": "rollout_arm"}
ARMS = [
    (study, group, path) for study, group in GROUPS.items() for path in sorted((EXPERIMENTS[0].parents[1] / group).glob("*.yaml"))
]


@pytest.mark.parametrize(("study", "group", "path"), ARMS, ids=lambda value: getattr(value, "stem", value))
def test_each_arm_of_a_study_is_valid_and_swept(study, group, path):
    assert path.stem in OmegaConf.load(EXPERIMENTS[0].with_stem(study)).hydra.sweeper.params[f"+{group}"].split(",")
    check(lab.compose(f"experiment={study}", "resume=null", f"+{group}={path.stem}"))


def test_arms_of_a_study_differ_in_their_own_keys_only():
    """Prior, objective, adapter: what the remedies are about; everything else is equal."""
    found = [runs.flat(OmegaConf.to_container(lab.compose("experiment=preservation_study", f"+remedy={path.stem}"), resolve=True))
            for study, _, path in ARMS if study == "preservation_study"]  # fmt: skip
    keys = grouping.differing(found)
    assert {key.split(".")[0] for key in keys} == {"prior", "objective", "adapter"}
    assert len({repr([arm.get(key) for key in keys]) for arm in found}) == len(found) == 10


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if "dream" in path.stem], ids=lambda p: p.stem)
def test_dreambench_sweep_has_the_papers_subjects_and_prompts(path):
    values = lab.compose(f"experiment={path.stem}", "dataset.subject=cat2")
    assert values.dataset.class_prompt == "a photo of a cat" and values.dataset.instance_prompt == "a photo of sks cat"
    assert len(values.validation.prompts) == 25 and "a sks cat in a chef outfit" in values.validation.prompts
    assert values.validation.num_images == 4 and values.eval.dino_model == "facebook/dino-vits16"
    toy = lab.compose(f"experiment={path.stem}", "dataset.subject=rc_car")
    assert toy.dataset.class_prompt == "a photo of a toy" and "a sks toy floating on top of water" in toy.validation.prompts
    common = OmegaConf.load(path.with_stem("dreambench"))
    assert common.hydra.sweeper.params["dataset.subject"].split(",") == list(dreambench.CLASSES)
    with pytest.raises(ConfigError, match="which DreamBench does not have"):
        check(lab.compose(f"experiment={path.stem}", "dataset.subject=hamster"))


def test_dreambench_classes_match_the_dataset():
    listed = Path(os.environ.get("SUBJECTS", conf_dir().parents[1] / "shared/data/dreambooth")) / "prompts_and_classes.txt"
    if not listed.is_file():
        pytest.skip("the photos of the DreamBooth paper are not here")
    pairs = listed.read_text().split("subject_name,class\n")[1].split("\n\n")[0].splitlines()
    assert len(pairs) == 30 and dict(pair.split(",") for pair in pairs) == dreambench.CLASSES


def test_embedded_model_stays_within_its_size_limit():
    files = [path for path in base_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}


def test_more_photos_of_a_subject_keep_the_first_and_the_unseen_ones(tmp_path):
    """So that runs on 1, 5 and 10 photos are judged by the same held-out photos."""
    draw_toybox.write(tmp_path, photos=7)
    read = lambda folder: [path.read_bytes() for path in sorted(folder.glob("*.png"))]  # noqa: E731
    made, unseen = (read(tmp_path / name / "robot") for name in ("photos", "unseen"))
    assert made[:5] == read(draw_toybox.SHIPPED / "photos/robot") and unseen == read(draw_toybox.SHIPPED / "unseen/robot")
    assert len({*made, *unseen}) == 7 + 4
    with pytest.raises(ConfigError, match="--photos is 7"):
        draw_toybox.main(photos=7)


def test_demo_runs(tmp_path):
    quick = ["trainer.max_steps=2", "validation.num_images=2", "validation.num_inference_steps=2", "trainer.progress=false"]
    run(lab.compose("experiment=demo", *quick, f"cache={tmp_path / 'cache'}"), tmp_path / "run")
    done = lab.load(tmp_path / "run")
    assert sorted(done.images) == [0, 2] and done.folder.before_after.is_file()
    assert (done.folder.export / "embeddings").is_dir()
    assert {"subject/clip_i", "class/pres_clip_i", "train/loss_prior"} < done.series.keys()
    done.config.validation.prompts = done.config.validation.prompts[:2]
    shown, again = judge_toybox.saved_images(done), judge_toybox.generated_images(done, 2, {})
    for step in (0, 2):
        for a, b in zip(chain(*shown[step]), chain(*again[step]), strict=True):
            assert np.abs(np.asarray(a, dtype=float) - np.asarray(b)).max() <= 2, (
                "equal numbers of sampler steps give equal images"
            )
    records = judge_toybox.judge(done, judge_toybox.Judge(), again)
    assert [r["leak"] for r in records if r["step"] == 0] == [0.0] * 2

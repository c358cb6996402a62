import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, anchor, check, conf_dir


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(lab.compose("model=sdxl", "dataset=folder", *overrides))
    return str(caught.value)


def test_the_readme_command_composes():
    cfg = lab.compose("model=sdxl", "quant=int8", "rollout.enabled=true")
    assert cfg.quant.kind.name == "int8" and cfg.rollout.enabled


@pytest.mark.parametrize("path", sorted(conf_dir().glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_option_of_every_group_fits_the_schema(path):
    if path.parent.name == "pretrain":
        pytest.skip("the configuration of another program")
    cfg = lab.compose(
        f"{path.parent.name}={path.stem}",
        "dataset.path=.",
        *(["model.pretrained=owner/name"] if path.stem == "diffusers" else []),
    )
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_a_good_config_passes(photos):
    check(lab.compose("model=sdxl", f"dataset.path={photos}"))


def test_all_problems_come_at_once():
    text = problems(
        "rollout.grid=0",
        "+dataset.bathc_size=2",
        "adapter.rank=0",
        "adapter.alpha=1",
        "prior=teacher",
    )
    for said in ("dataset.path has no value", "rollout.grid is 0", "did you mean dataset.batch_size",
                 "adapter.rank is 0; it must be at least 1", "prior.path is null", "prior.prompt is empty"):  # fmt: skip
        assert said in text
    assert text.startswith("6 problem(s)")


def test_local_paths_mean_the_same_from_any_folder(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    cfg = anchor(lab.compose(f"dataset.path={photos.name}", "model.pretrained=owner/name", "cache=new"))
    assert cfg.dataset.path == str(photos) and cfg.cache == str(photos.parent / "new")
    assert cfg.model.pretrained == "owner/name" and cfg.prior.path is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dataset.path=/no/such/folder", "which does not exist"),
        ("model.pretrained=./nowhere", "model.pretrained is './nowhere'"),
        ("dataset.resolutions=[]", "dataset.resolutions is []"),
        ("dataset.crop_variants=3", "use dataset.crop=random"),
        ("dataset.crop_aspect=closest", "dataset.crop_aspects is empty"),
        ("dataset.crop_aspects=[0]", "each is width / height"),
        ("dataset.crop_aspects=[0.5,1]", "which dataset.crop_aspect=preserve does not read"),
        ("dataset.caption_column=text", "captions are no column"),
        ("dataset.prepend_instance_prompt=true", "the instance prompt is the whole caption"),
        ("dataset.maximum_image_size=512", "come together"),
        ("dataset.max_upscale=-1", "dataset.max_upscale is -1"),
        ("dataset.resolution_type=area", "use dataset.resolution_type=pixel_area"),
        ("dataset.caption=column", "it needs dataset.caption_column"),
        ("dataset.streaming=true", "only dataset.type=huggingface"),
        ("dataset.instance_prompt=''", "dataset.instance_prompt is empty"),
        ("dataset.mask_path=.", "but dataset.mask_from=none"),
        ("dataset.type=table", "it must be a .csv or .parquet file"),
        ("dataset.type=simpletuner", "it must be a SimpleTuner dataset file"),
        ("trainer.max_steps=0", "trainer.max_steps is 0"),
        ("name=../up", "it names a folder"),
        ("preflight=maybe", "preflight is 'maybe'"),
        ("validation.resolution=100", "a multiple of 8"),
        ("adapter.parts=[]", "nothing would be trained"),
        ("ema.device=tpu", "ema.device is 'tpu'"),
        ("+model.foo=1", "model.foo is not a key"),
        ("++typo=1", "typo is not a key"),
        ("seed=-1", "seed is -1"),
        ("rollout.grid=nativ", "rollout.grid is 'nativ'; it must be a number of inference steps, at least 1, or native"),
        ("objective.shift=0", "objective.shift is 0; it must be a number above 0, or model (as the model was trained)"),
        ("objective.shift=none", "objective.shift is 'none'; it must be a number above 0, or model"),
        ("rollout.shift=-1", "rollout.shift is -1; it must be a number above 0, or model"),
        ("rollout.probability=1.5", "rollout.probability is 1.5; it must be between 0 and 1"),
        ("objective.low=1", "objective.low is 1 and objective.high 1"),
        ("objective.gamma=0", "objective.gamma is 0"),
        ("mask.drop_probability=2", "mask.drop_probability is 2"),
    ],
)
def test_bad_values_are_refused_with_their_key(override, said):
    assert said in problems("dataset.path=.", override)


def test_prompts_that_no_caption_takes_up_are_refused():
    words = ["dataset.path=.", "dataset.prompts=[a,b]", "dataset.caption=filename"]
    assert "dataset.caption=filename reads none" in problems(*words)
    check(lab.compose("model=sdxl", "dataset=folder", *words, "dataset.prepend_instance_prompt=true"))


CLASS = 'dataset.class_prompt="a photo of a dog"'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prior=teacher"], "set prior.path=FOLDER, prior.source=generated"),
        (["prior=teacher", "prior.source=generated", "prior.path=."], "which prior.source=generated does not read"),
        (["prior=noise", "prior.source=captions"], "would teach the class to look like the subject"),
        (["prior=bank", "prior.path=.", "rollout.enabled=true"], "use prior=teacher, or set rollout.enabled=false"),
        (["prior=bank", "prior.path=.", "prior.bank.draws=0"], "prior.bank.draws is 0; it must be at least 1"),
        (["rollout.kind=input_perturbation", "rollout.reflexflow.direction=1"], "makes no walk they speak of"),
        (["prior.generated.resolution=100"], "prior.generated.resolution is 100; it must be a multiple of 8"),
    ],
)
def test_contradictions_are_refused_with_a_way_out(words, said):
    assert said in problems("dataset.path=.", CLASS, *words)


def test_help_is_instant_and_loads_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['dreambooth_lab', '--help']\n"
        "try: runpy.run_module('dreambooth_lab', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('TORCH' if 'torch' in sys.modules else 'NONE')"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sdxl_refiner" in done.stdout and "dataset.path=PHOTOS" in done.stdout
    assert done.stdout.strip().endswith("NONE")
    assert time.monotonic() - start < 20  # hangs only; the time itself is in the README

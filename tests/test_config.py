import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from math import isfinite
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import ValidationError

from dreambooth_lab import lab
from dreambooth_lab.config import Config, ConfigError, check, conf_dir, ranges, resolve_paths
from dreambooth_lab.config.ranges import RANGES
from dreambooth_lab.config.reader import Reader

PROMPT = "dataset.instance_prompt=a photo of sks dog"


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(lab.compose("model=sdxl", "dataset=folder", PROMPT, *overrides))
    return str(caught.value)


def test_readme_command_composes():
    cfg = lab.compose("model=sdxl", "quant=int8", "rollout.enabled=true")
    assert cfg.quant.kind.name == "int8" and cfg.rollout.enabled


@pytest.mark.parametrize("path", sorted(conf_dir().glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}")
def test_all_group_options_fit_the_schema(path):
    if path.parent.name == "pretrain":
        pytest.skip("the configuration of another program")
    cfg = lab.compose(
        f"{path.parent.name}={path.stem}",
        "dataset.path=.",
        *(["model.pretrained=owner/name"] if path.stem == "diffusers" else []),
    )
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_valid_config_passes(photos):
    check(lab.compose("model=sdxl", f"dataset.path={photos}", PROMPT))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ([], "'dataset.instance_prompt=a photo of ohwx dog'"),
        (["dataset.class_prompt=a photo of a red cat"], "'dataset.instance_prompt=a photo of a red ohwx cat'"),
        (["dataset.caption=textfile", "dataset.prepend_instance_prompt=true"], "'dataset.instance_prompt=a photo of ohwx dog'"),
    ],
)
def test_missing_instance_prompt_is_an_error_with_the_line_to_add(photos, more, line):
    words = ["model=sdxl", f"dataset.path={photos}", *more]
    with pytest.raises(ConfigError) as caught:
        check(lab.compose(*words))
    assert str(caught.value).startswith("1 problem(s)") and f"add {line}" in str(caught.value)
    check(lab.compose(*words, line.strip("'")))


def test_photos_with_captions_need_no_instance_prompt(photos):
    own = [f"dataset.path={photos}", "dataset.caption=textfile"]
    check(lab.compose(*own, "validation.prompts=[a dog, a cat]"))
    with pytest.raises(ConfigError, match=r"validation\.prompts is empty"):
        check(lab.compose(*own))


def test_all_problems_are_reported_at_once():
    text = problems(
        "rollout.num_steps=0",
        "+dataset.bathc_size=2",
        "adapter.rank=0",
        "adapter.alpha=1",
        "prior=teacher",
    )
    for message in ("dataset.path has no value", "rollout.num_steps is 0", "did you mean dataset.batch_size",
                 "adapter.rank is 0; it must be at least 1", "prior.path is null", "prior.prompt is empty"):  # fmt: skip
        assert message in text
    assert text.startswith("6 problem(s)")


def test_relative_paths_are_resolved_independently_of_the_working_directory(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    cfg = resolve_paths(lab.compose(f"dataset.path={photos.name}", "model.pretrained=owner/name", "cache=new"))
    assert cfg.dataset.path == str(photos) and cfg.cache == str(photos.parent / "new")
    assert cfg.model.pretrained == "owner/name" and cfg.prior.path is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.path=/no/such/folder", "which does not exist"),
        ("model.pretrained=./nowhere", "model.pretrained is './nowhere'"),
        ("dataset.resolutions=[]", "dataset.resolutions is []"),
        ("dataset.crop_variants=3", "use dataset.crop=random"),
        ("dataset.crop_aspect=closest", "dataset.crop_aspects is empty"),
        ("dataset.crop_aspects=[0]", "dataset.crop_aspects is 0"),
        ("dataset.crop_aspects=[0.5,1]", "which dataset.crop_aspect=preserve does not read"),
        ("dataset.caption_column=text", "captions are not read from a column"),
        ("dataset.prepend_instance_prompt=true", "the instance prompt is the whole caption"),
        ("dataset.maximum_image_size=512", "must be set together"),
        ("dataset.max_upscale=-1", "dataset.max_upscale is -1"),
        ("dataset.resolution_type=area", "use dataset.resolution_type=pixel_area"),
        ("dataset.caption=column", "it needs dataset.caption_column"),
        ("dataset.streaming=true", "only dataset.type=huggingface"),
        ("dataset.instance_prompt=''", "dataset.instance_prompt is empty"),
        ("dataset.mask_path=.", "but dataset.mask_from=none"),
        ("dataset.type=table", "it must be a .csv or .parquet file"),
        ("dataset.type=simpletuner", "it must be a SimpleTuner dataset file"),
        ("trainer.max_steps=0", "trainer.max_steps is 0"),
        ("name=../up", "it is part of a folder's name"),
        ("preflight=maybe", "preflight is 'maybe'"),
        ("validation.resolution=100", "a multiple of 8"),
        ("adapter.parts=[]", "nothing would be trained"),
        ("ema.device=tpu", "ema.device is 'tpu'"),
        ("+model.foo=1", "model.foo is not a key"),
        ("++typo=1", "typo is not a key"),
        ("seed=-1", "seed is -1"),
        (
            "rollout.num_steps=nativ",
            "rollout.num_steps is 'nativ'; it must be a whole number, at least 1, at most 10000, or native",
        ),
        (
            "objective.shift=0",
            "objective.shift is 0; it must be at least 0.001, at most 1000, or model (as the model was trained)",
        ),
        ("objective.shift=none", "objective.shift is 'none'; it must be a number, at least 0.001, at most 1000, or model"),
        ("rollout.shift=-1", "rollout.shift is -1; it must be at least 0.001, at most 1000, or model"),
        ("rollout.probability=1.5", "rollout.probability is 1.5; it must be between 0 and 1"),
        ("objective.min_time=1", "objective.min_time is 1 and objective.max_time 1"),
        ("objective.gamma=0", "objective.gamma is 0"),
        ("mask.drop_probability=2", "mask.drop_probability is 2"),
        ("rollout.num_steps=true", "rollout.num_steps is True"),
        ("rollout.num_steps=2.5", "rollout.num_steps is 2.5; it must be a whole number"),
        ("optimizer.lr=inf", "optimizer.lr is inf; it must be at least"),
        ("optimizer.lr=nan", "optimizer.lr is nan"),
        ("optimizer.options={eps: inf}", "optimizer.options.eps is inf; it must be a finite number"),
        ("adapter.blocks=[{match: a, rank: 0, lr_ratio: 1}]", "adapter.blocks.rank is 0"),
        ("adapter.blocks=[{match: a, rank: 1, lr_ratio: -1}]", "adapter.blocks.lr_ratio is -1"),
        ("dataset.resolutions=[64,nan]", "dataset.resolutions is nan"),
        ("prior.generated.count=1000000000000", "prior.generated.count is 1000000000000"),
        ("trainer.accelerator=banana", "trainer.accelerator is 'banana'; it must be auto, cpu, gpu, cuda or mps"),
        ("trainer.accelerator=xpu", "trainer.accelerator is 'xpu', which is not supported"),
        ("adapter.blocks=[{match: a}]", "which lacks adapter.blocks[0].lr_ratio, adapter.blocks[0].rank"),
        ("dataset.resolutions=${seed}", "dataset.resolutions is '${seed}', which can't be used"),
        ("dataset.batch_size=${name}", "dataset.batch_size is '${name}', which can't be used"),
        ("optimizer.lr=${resume}", "optimizer.lr is '${resume}', which can't be used"),
        ("dataset.instance_prompt='a ${x} dog'", "a plain ${ in a text is written"),
        ("dataset.path='${.path}'", "which can't be used: Recursive"),
    ],
)
def test_bad_values_are_refused_with_their_key(override, message):
    assert message in problems("dataset.path=.", override)


def test_unused_prompts_are_refused():
    words = ["dataset.path=.", "dataset.prompts=[a,b]", "dataset.caption=filename", "validation.prompts=[a]"]
    assert "dataset.caption=filename ignores it" in problems(*words)
    check(lab.compose("model=sdxl", "dataset=folder", *words, "dataset.prepend_instance_prompt=true"))


CLASS = 'dataset.class_prompt="a photo of a dog"'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prior=teacher"], "set prior.path=FOLDER, prior.source=generated"),
        (["prior=teacher", "prior.source=generated", "prior.path=."], "which prior.source=generated does not read"),
        (["prior=noise", "prior.source=captions"], "would train the class towards the subject"),
        (["prior=noise", "prior.source=blank"], "prior.source=blank, which would train the class towards the subject"),
        (["prior=bank", "prior.path=.", "rollout.enabled=true"], "use prior=teacher, or set rollout.enabled=false"),
        (["prior=bank", "prior.path=.", "prior.bank.draws=0"], "prior.bank.draws is 0; it must be at least 1"),
        (["rollout.kind=input_perturbation", "rollout.reflexflow.direction=1"], "has no rollout for them"),
        (["prior.generated.resolution=100"], "prior.generated.resolution is 100; it must be a multiple of 8"),
    ],
)
def test_contradictory_values_are_refused_with_a_fix(words, message):
    assert message in problems("dataset.path=.", CLASS, *words)


def test_help_does_not_import_torch():
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
    assert time.monotonic() - start < 20  # only against hanging


def numeric_keys(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the schema that may hold a number, those in lists and in records of lists included."""
    for name, kind in get_type_hints(schema).items():
        inside = [each for each in (kind, *get_args(kind)) if each is not type(None)]
        if record := next((each for each in inside if is_dataclass(each)), None):
            yield from numeric_keys(record, f"{prefix}{name}.")
        elif get_origin(kind) is not dict and any(each in (int, float, Any) for each in inside):
            yield prefix + name


def test_every_number_of_the_schema_has_a_range():
    keys = set(numeric_keys())
    assert keys == set(RANGES) and len(keys) > 80
    assert all(isfinite(low) and isfinite(high) and low < high for low, high in RANGES.values())


@pytest.fixture(scope="module")
def good():
    return lab.compose("model=sdxl", "dataset=folder", "dataset.path=.", "adapter.blocks=[{match: a, rank: 1, lr_ratio: 1}]")


@pytest.mark.parametrize("key", sorted(RANGES))
def test_numbers_outside_their_range_are_refused(good, key):
    low, high = RANGES[key]
    for wrong in (low - 1, high * 2, float("inf"), float("nan")):
        cfg = good.copy()
        parent, _, field = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        node = node[0] if isinstance(node, ListConfig) else node
        with suppress(ValidationError):  # refused by the schema's types
            node[field] = [wrong] if isinstance(node[field], ListConfig) else wrong
            messages = "|".join(text for text in ranges.problems(Reader(cfg)))
            assert f"{key} is {node[field][0] if isinstance(node[field], ListConfig) else node[field]}; it must be" in messages


def test_unreadable_key_is_reported_once_and_paths_are_still_resolved():
    cfg = lab.compose("dataset.path='${nowhere}'", "rollout.num_steps=0", PROMPT)
    with pytest.raises(ConfigError) as caught:
        check(resolve_paths(cfg))
    text = str(caught.value)
    assert text.startswith("2 problem(s)") and text.count("dataset.path is") == 1 and "rollout.num_steps is 0" in text

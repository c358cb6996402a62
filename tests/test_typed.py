"""Prompts and paths are taken as they are typed."""

from __future__ import annotations

import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.config.typed import QUOTED, as_hydra_reads
from dreambooth_lab.runfolder import RunFolder, new_folder
from dreambooth_lab.tools import generate

LETTERS = st.one_of(st.sampled_from(list("\\\"'${}[](),=~ \n:ab")), st.characters(exclude_categories=("Cs",)))


def value(word: str):
    """The value of an argument after Hydra and OmegaConf."""
    converted, *_ = as_hydra_reads([word])
    parsed = OverridesParser.create().parse_override(converted).value()
    return OmegaConf.create({"a": getattr(parsed, "text", parsed)}).a


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=LETTERS))
def test_arbitrary_text_is_the_value_and_conversion_is_idempotent(text):
    is_hydras = text == "null" or re.fullmatch(f"{QUOTED}(,{QUOTED})*", text, re.DOTALL)
    if is_hydras or re.search(r"\$\{[^{}$\s]+\}", text):
        return
    (once,) = as_hydra_reads([f"dataset.instance_prompt={text}"])
    assert value(f"dataset.instance_prompt={text}") == text and as_hydra_reads([once]) == [once]


PLACES = ["~/My Photos (1)", "C:\\My Photos\\", "it's [mine], Ünïcode {2} = 50%"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "key", ["dataset.path", "+dataset.mask_path", "prior.path", "webhook.receivers.raw.url", "resume", "cache"]
)
def test_paths_and_urls_are_taken_as_typed(key, place):
    assert value(f"{key}={place}") == place


def test_hydra_quotes_and_interpolations_are_unchanged():
    for word in ('dataset.instance_prompt="a, b"', "dataset.instance_prompt='a'", "dataset.class_prompt=null", "seed=3",
                 'dataset.instance_prompt="a","b"', "model=sdxl", "optimizer.options={a: 1}", "~logger", "--cfg"):  # fmt: skip
        assert as_hydra_reads([word]) == [word]
    cfg = lab.compose("dataset.instance_prompt=a photo of [sks] ${dataset.subject}", "dataset.subject=cat")
    assert cfg.dataset.instance_prompt == "a photo of [sks] cat"


def test_lists_of_prompts_take_each_prompt_as_typed():
    typed = {
        "[a photo of [sks] dog, a dog (asleep)]": ["a photo of [sks] dog", "a dog (asleep)"],
        '["a, b", it\'s c]': ["a, b", "it's c"],
        "a photo of sks dog, outdoors": ["a photo of sks dog, outdoors"],
        "[]": [],
    }
    for text, prompts in typed.items():
        assert list(lab.compose(f"validation.prompts={text}").validation.prompts) == prompts
    assert value("adapter.targets=[^to_(q|k)$, x{1}]") == ["^to_(q|k)$", "x{1}"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('"a photo of ohwx dog","a photo of zwx dog"', ["a photo of ohwx dog", "a photo of zwx dog"]),
        ("a photo of ohwx dog,a photo of zwx dog", ["a photo of ohwx dog", "a photo of zwx dog"]),
        ('a photo of [a, b] dog, "one, two", it\'s (c', ["a photo of [a, b] dog", "one, two", "it's (c"]),
        ("choice(a,b)", ["a", "b"]),
    ],
)
def test_commas_separate_the_runs_of_a_sweep(text, values):
    _, converted = as_hydra_reads(["-m", f"dataset.instance_prompt={text}"])
    swept = OverridesParser.create().parse_override(converted).value().list
    assert [getattr(one, "text", one) for one in swept] == values


def test_prompt_split_by_the_shell_is_shown_quoted():
    with pytest.raises(ConfigError) as caught:
        as_hydra_reads(["dataset.class_prompt=a", "photo", "of", "a", "dog", "seed=1"])
    shown = shlex.split(str(caught.value).partition("around both: ")[2])
    assert shown == ["dataset.class_prompt=a photo of a dog"]
    assert as_hydra_reads(["name=x", "--config-dir", "y"]) == ['name="x"', "--config-dir", "y"]


def test_generate_and_resume_take_paths_as_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    ask = generate.read(["run=~/My Runs (1): [x]", "prompt=a ${b} [sks] dog", "out=o u t, 2"])
    assert (ask.run, ask.prompt, ask.out) == ("~/My Runs (1): [x]", ["a ${b} [sks] dog"], "o u t, 2")
    assert RunFolder(ask.run).root == tmp_path / "My Runs (1): [x]"
    assert new_folder("~/a b", "runs", "x") == str(tmp_path / "a b")

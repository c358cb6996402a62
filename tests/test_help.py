"""The help pages, which are read from conf/ without starting a run."""

from __future__ import annotations

import shlex

import pytest

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.config.help import groups, page
from dreambooth_lab.config.keys import all_keys, kind_of, nearest
from dreambooth_lab.config.typed import as_hydra_reads


def test_no_arguments_show_a_short_page_whose_commands_compose():
    text = page([])
    assert len(text.splitlines()) < 25 and max(map(len, text.splitlines())) <= 105
    ours = "  python -m dreambooth_lab "
    commands = [shlex.split(line)[3:] for line in text.splitlines() if line.startswith(ours) and "--" not in line]
    assert len(commands) == 3
    for words in commands:
        assert lab.compose(*words)
    assert "experiment=demo" in text and "resume=latest" in text and "-sc install=bash" in text
    assert page(["model=sdxl"]) is None and page(["--cfg", "job"]) is None


def test_every_group_has_a_description_and_its_default():
    text = page(["--help"])
    for group in groups().values():
        assert group.what in " ".join(text.split()) and all(option in text for option in group.options), group.name
        assert group.chosen == "null" or f"{group.chosen}*" in text
    assert {key.partition(".")[0] for key in all_keys() if "." in key} < {*groups()}


@pytest.mark.parametrize("group", sorted(groups()))
def test_group_is_shown_with_keys_and_comments(group):
    text = page(["--help", group])
    missing = [key for key in all_keys() if key.startswith(f"{group}.") and f"{key.split('.')[-1]}:" not in text]
    assert not missing


def test_options_and_keys_are_shown_with_type_and_comment():
    assert "_target_: lion_pytorch.Lion" in page(["--help", "optimizer=lion"])
    assert page(["--help", "dataset.crop"]).startswith("dataset.crop: one of center, random, corner\ncrop: center  ")
    assert page(["--help", "resume"]).startswith("resume: text, or null\nresume: null ") and "auto:" in page(["--help", "resume"])


@pytest.mark.parametrize("key", list(all_keys()))
def test_every_key_has_a_help_line(key):
    lines = page(["--help", key]).splitlines()
    assert lines[0].startswith(f"{key}: ") and len(lines) > 1


@pytest.mark.parametrize(
    ("word", "near"),
    [("optimiser", "optimizer"), ("trainer.max_stps", "trainer.max_steps"), ("model=flx", "flux"), ("lr", "optimizer.lr")],
)
def test_unknown_name_is_answered_with_similar_names(word, near):
    with pytest.raises(ConfigError, match=near):
        page(["--help", word])


def test_similar_keys_are_found_in_any_group():
    assert nearest("max_stepz") == ["trainer.max_steps"] and nearest("dataset.rank")[0] == "adapter.rank"
    assert nearest("zzzz") == [] and kind_of("no.such") is None
    assert as_hydra_reads(["dataset.path=x"]) == ['dataset.path="x"', "dataset=folder"]
    assert as_hydra_reads(["dataset.path=x", "experiment=demo"])[-1] == "experiment=demo"

"""Hydra's errors as the command line reports them: key, value and fix."""

from __future__ import annotations

import shlex

import pytest
from typer.testing import CliRunner

from commands import call
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.config.hydra_errors import explain
from dreambooth_lab.tools.bench.__main__ import app as bench
from dreambooth_lab.tools.look import application as look


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.lr=banana", "optimizer.lr is banana; it must be a number"),
        ("adapter.rank=2.5", "adapter.rank is 2.5; it must be a whole number"),
        ("ema.enabled=maybe", "ema.enabled is maybe; it must be true or false"),
        ("checkpoint.mode=up", "checkpoint.mode is up; it must be one of min, max"),
        ("seed=null", "seed is null, which is not allowed; set a value or remove it"),
        ("dataset.resolutions=[a]", "dataset.resolutions[0] is a; it must be a number"),
        ("adapter.blocks=3", "adapter.blocks is of another type; it must be a list"),
        ("optimizer.options=3", "optimizer.options is of another type; it must be a mapping"),
        ("trainer.max_stepz=3", "trainer.max_stepz is not a key; did you mean trainer.max_steps"),
        ("modell=sdxl", "modell is not a key; did you mean model?"),
        ("ema.zzz=1", "ema.zzz is not a key; the keys of ema are enabled, "),
        ("webhook.receivers.raw=3", "webhook.receivers.raw does not exist; add it"),
        ("model=sdxll", "model is 'sdxll', which does not exist (did you mean sdxl?); choose one of "),
        ("trainer=3", "use the name of a file of that group"),
        ("banana", "'banana' is not KEY=VALUE"),
        ("prior=teacher ema.enabled=true", "or write each key as a separate argument"),
    ],
)
def test_hydra_errors_are_reported_with_a_fix(word, message):
    with pytest.raises(ConfigError) as caught:
        lab.compose(word)
    assert message in str(caught.value)


@pytest.mark.parametrize("prompt", ["a photo (of sks dog", 'a "good" [dog]', "dogs: 100% = all", "a ${dog", "it's {sks} dog"])
def test_value_outside_the_grammar_is_shown_quoted_and_the_shown_form_works(prompt):
    try:
        composed = lab.compose(f"dataset.instance_prompt={prompt}")
    except ConfigError as error:
        (shown,) = shlex.split(str(error).partition("quotes: ")[2])
        composed = lab.compose(shown)
    assert composed.dataset.instance_prompt == prompt


def test_other_errors_are_not_changed():
    assert explain(ValueError("boom")) is None and explain(KeyError("x")) is None


def test_command_line_errors_are_one_line_with_exit_code_2(tmp_path):
    for word in ("optimizer.lr=banana", "model=sdxll"):
        done = call(word, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_tools_report_errors_the_same_way():
    for tool, words in ((bench, ["--plan"]), (look, [])):
        result = CliRunner().invoke(tool, [*words, "modle=sdxl"])
        assert isinstance(result.exception, ConfigError) and "did you mean model?" in str(result.exception)

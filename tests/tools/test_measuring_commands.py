"""The measuring commands refuse what a training run refuses, without a traceback."""

import pytest

from dreambooth_lab.tools.common.training_config import command, compose_checked


@pytest.mark.parametrize(
    ("word", "message"), [("nosuch=1", "nosuch is not a key"), ("dataset.batch_size=0", "dataset.batch_size is 0")]
)
def test_invalid_overrides_end_a_measuring_command_with_the_key(capsys, word, message):
    with pytest.raises(SystemExit) as ended:
        command(compose_checked, "What it measures.", [word])
    output = capsys.readouterr().err
    assert ended.value.code == 2 and output.startswith("error: ") and message in output


def test_help_describes_what_a_command_measures(capsys):
    with pytest.raises(SystemExit) as ended:
        command(compose_checked, "What it measures:\n\n    python -m it key=value\n", ["--help"])
    output = capsys.readouterr().out
    assert ended.value.code == 0 and "What it measures" in output and "python -m it key=value" in output


def test_valid_overrides_give_the_run_config():
    assert compose_checked(["dataset.batch_size=3"]).dataset.batch_size == 3

"""The measuring commands refuse what a training run refuses, without a traceback."""

import sys

import pytest

from dreambooth_lab.tools.words import checked, command


@pytest.mark.parametrize(("word", "told"), [("nosuch=1", "'nosuch'"), ("dataset.batch_size=0", "dataset.batch_size is 0")])
def test_bad_words_end_a_measuring_command_with_the_key(monkeypatch, word, told):
    monkeypatch.setattr(sys, "argv", ["measure", word])
    with pytest.raises(SystemExit, match=r"^error: ") as ended:
        command(checked)
    assert told in str(ended.value)


def test_good_words_give_the_config_of_the_run():
    assert checked(["dataset.batch_size=3"]).dataset.batch_size == 3

"""Common behaviour of all tools: both spellings of options, exit codes, fast help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dreambooth_lab.config import ConfigError
from dreambooth_lab.tools import draw_toybox, judge_toybox
from dreambooth_lab.tools.common import cli

LIGHT = ["caption", "draw_toybox", "generate", "bench.load_time", "rank_prompts", "rare_tokens", "watch.__main__"]


def test_help_does_not_import_torch():
    """The help only imports the tool."""
    names = ", ".join(f"dreambooth_lab.tools.{name}" for name in LIGHT)
    code = f"import sys, {names}; assert not {{'torch', 'transformers', 'diffusers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("word", ["--max_size", "--max-size"])
def test_options_accept_dashes_and_underscores(word):
    tool, received = cli.app(), []

    @tool.command()
    def main(max_size: int = 0) -> None:
        received.append(max_size)

    assert CliRunner().invoke(tool, [word, "3"]).exit_code == 0 and received == [3]


def test_errors_are_one_line_with_exit_code_2(capsys):
    def fail():
        raise ConfigError("--size is 0; it must be at least 1")

    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert ended.value.code == 2 and capsys.readouterr().err == "error: --size is 0; it must be at least 1\n"


def test_indented_help_paragraphs_keep_their_lines():
    assert cli.text("One\nline.\n\n    a = 1\n    b = 2\n") == "One line.\n\n\b\n    a = 1\n    b = 2\n"


def test_photographs_require_a_folder(tmp_path: Path):
    failed = CliRunner().invoke(draw_toybox.application, ["--place", "in the city"])
    assert isinstance(failed.exception, ConfigError) and "--place" in str(failed.exception)
    assert CliRunner().invoke(draw_toybox.application, [str(tmp_path), "--place", "on the moon"]).exit_code == 2


def test_judge_requires_a_run(tmp_path: Path):
    failed = CliRunner().invoke(judge_toybox.application, [str(tmp_path)])
    assert isinstance(failed.exception, ConfigError) and str(tmp_path) in str(failed.exception)

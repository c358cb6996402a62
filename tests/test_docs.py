"""README and docs: every command is composed and checked or parsed, every Python block runs, every key and link exists."""

from __future__ import annotations

import copy
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import typer
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import tiny
from dreambooth_lab import lab
from dreambooth_lab.callbacks import card_files
from dreambooth_lab.config import check, help
from dreambooth_lab.config.keys import all_keys, kind_of
from dreambooth_lab.config.typed import as_hydra_reads
from dreambooth_lab.runfolder import AUTO
from dreambooth_lab.tools import generate, import_simpletuner

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
MODULE = ("python", "-m")
ELSEWHERE = {  # beginning of a line → why it is not run here
    "uv ": "installs", "pip ": "installs", "py ": "Windows", "docker ": "needs docker",
    "python -m venv": "makes an environment", ". .venv/bin/activate": "needs that environment",
    ".venv\\Scripts\\Activate.ps1": "Windows",
    "export DREAMBOOTH_WATCH_TOKEN=": "sets a variable of the shell", "eval ": "changes the shell",
}  # fmt: skip
NOT_COMPOSED = {  # arguments of the program → why
    "--config-dir imported experiment=NAME": "the importer writes it; tests/tools/test_import_simpletuner.py runs it",
}
OF_THE_SHELL = (
    "-",
    "job",
    "memory=",
    "sweep=",
    "preflight=",
    'resume="auto',
    'resume="latest',
)  # arguments that are not part of a composed configuration
NOT_RUN = {"load_lora_weights": "needs SDXL's weights; tests/adapter/test_exports.py does the same with tiny ones"}


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks(*languages: str) -> Iterator[Block]:
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if not languages or language in languages:
                yield Block(page.relative_to(ROOT).as_posix(), language, text)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Page and arguments of each command line."""
    for block in blocks("bash", "powershell"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip() and not any(line.startswith(word) for word in ELSEWHERE):
                yield block.page, shlex.split(line, comments=True)


def of_module(prefix: str) -> list[tuple[str, str, list[str]]]:
    """Page, module and arguments of the commands that start a module with this prefix, each once."""
    found = {}
    for page, words in commands():
        if tuple(words[:2]) == MODULE and words[2].startswith(prefix):
            found.setdefault(tuple(words[2:]), page)
    return [(page, words[0], list(words[1:])) for words, page in found.items()]


PROGRAM = [(page, words) for page, module, words in of_module("dreambooth_lab") if module == "dreambooth_lab"]
TOOLS = of_module("dreambooth_lab.tools")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the files that pages refer to."""
    folder = tmp_path_factory.mktemp("place")
    photos = tiny.save_photos(folder / "PHOTOS", [(40, 40), (40, 50)])
    for name in ("MASKS", "CLASS_PHOTOS", "FOLDER"):
        shutil.copytree(photos, folder / name)
    tiny.save_photos(folder / "HELD_BACK", [(44, 44)], seed=5)
    for name in ("config.json", "model.safetensors", "lora.safetensors", "a.safetensors", "b.safetensors"):
        (folder / name).write_text("{}")
    (folder / "multidatabackend.json").write_text(
        '[{"id": "p", "type": "local", "instance_data_dir": "PHOTOS", "caption_strategy": "instanceprompt",'
        ' "instance_prompt": "a photo of ohwx dog", "resolution": 512, "resolution_type": "pixel_area"},'
        ' {"id": "t", "dataset_type": "text_embeds", "type": "local", "default": true}]'
    )
    for name in ("RUN", "A", "B"):
        run = shutil.copytree(ROOT / "tests" / "old_runs" / "version_0", folder / "runs" / name)
        config = run / "config.yaml"
        package = str(Path(lab.__file__).parent)
        config.write_text(config.read_text().replace("PACKAGE", package).replace("HERE", str(folder)))
        (run / "environment.json").write_text("[]")
    return folder


@cache
def chosen(groups: tuple[str, ...]) -> DictConfig:
    """The configuration with these group options, cached."""
    return lab.compose(*groups)


def composed(words: Sequence[str]) -> None:
    """Compose and check what a command line would run; of a sweep its first and last job."""
    read = [word for word in as_hydra_reads(words) if not word.startswith(OF_THE_SHELL)]
    jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(read), None)[0] if "-m" in words else [read]
    for job in {tuple(jobs[0]), tuple(jobs[-1])}:
        overrides = OverridesParser.create().parse_overrides(list(job))
        of_groups = tuple(one.input_line for one in overrides if one.key_or_group in help.groups())
        cfg = copy.deepcopy(chosen(of_groups))
        for one in overrides:
            if one.input_line not in of_groups:
                OmegaConf.update(cfg, one.key_or_group, one.value(), force_add=one.is_add())
        if cfg.resume == AUTO:  # a sweep's file sets it; there is nothing to continue yet
            cfg.resume = None
        check(cfg)


def shape(words: Sequence[str]) -> str:
    """Equal for commands that differ in the card, or in stopping before training."""
    return shlex.join(word for word in words if not word.startswith(("memory=", "preflight=")))


@pytest.mark.parametrize("words", {shape(words): words for _, words in PROGRAM}.values(), ids=lambda words: " ".join(words)[:60])
def test_documented_run_commands_compose(words, place, monkeypatch):
    monkeypatch.chdir(place)
    if " ".join(words) in NOT_COMPOSED:
        return
    monkeypatch.setenv("DREAMBOOTH_WATCH_TOKEN", "a token")
    for word in words:
        assert not word.startswith("memory=") or word.partition("=")[2] in help.groups()["memory"].options
        assert not word.startswith("sweep=") or word.partition("=")[2] in help.groups()["sweep"].options
    if help.page(words) is None:
        composed(words)


@pytest.mark.parametrize(("page", "module", "words"), TOOLS, ids=[f"{module[21:]}-{i}" for i, (_, module, _) in enumerate(TOOLS)])
def test_documented_tool_commands_parse(page, module, words, place, monkeypatch):
    monkeypatch.chdir(place)
    params = parsed(module, words).params
    if module.endswith("generate"):
        generate.read(words)
    elif (
        overrides := params.get("overrides") or params.get("words") if not module.endswith("rare_tokens") else params["overrides"]
    ):
        composed(overrides)


def parsed(module: str, words: list[str]) -> click.Context:
    """A tool's command line, read by its own options and not run."""
    loaded = importlib.import_module(module)
    if hasattr(loaded, "__path__"):
        loaded = importlib.import_module(f"{module}.__main__")
    app = getattr(loaded, "application", None) or getattr(loaded, "app", None)
    if app is None:  # it takes only a run's overrides
        return click.Context(click.Command(module), info_name=module, obj=composed(words))
    command = typer.main.get_command(app)
    context = command.make_context(module, list(words))
    if not isinstance(command, click.Group):
        return context
    name, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return inner.make_context(name, rest, parent=context)


def test_other_documented_commands_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page, words in commands():
        if tuple(words[:2]) == MODULE:
            assert words[2].split(".")[0] in ("dreambooth_lab", "pytest", "hatchling"), (page, words)
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), (page, words)
        else:
            assert words[0] == "python" and (ROOT / words[1]).is_file(), (page, words)


def test_python_blocks_run(place, monkeypatch):
    monkeypatch.chdir(place)
    for block in blocks("python"):
        code = compile(block.text, block.page, "exec")
        if not any(word in block.text for word in NOT_RUN):
            exec(code, {})


def test_code_blocks_name_their_language_and_yaml_blocks_parse():
    for block in blocks():
        assert block.language in ("bash", "powershell", "python", "yaml", "text"), block
    for block in blocks("yaml"):
        yaml.safe_load(block.text)
    for page in PAGES:
        indented = re.search(r"^\n {4,}[\w$]", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
        assert indented is None, f"{page}: a block that no test sees: {indented[0]}"


def test_exclusion_lists_have_no_unused_entries():
    lines = [line for block in blocks("bash", "powershell") for line in block.text.splitlines()]
    assert all(any(line.startswith(word) for line in lines) for word in ELSEWHERE)
    assert all(any(words == shlex.split(command) for _, words in PROGRAM) for command in NOT_COMPOSED)
    assert all(any(word in block.text for block in blocks("python")) for word in NOT_RUN)


def test_documented_keys_and_options_exist():
    known = help.groups()
    of_generate = {field.name for field in fields(generate.GenerateArgs)} - {"model"}
    names = {page: set(re.findall(r"`([a-z_]+(?:\.\w+)*(?:=[^`]*)?)`", page.read_text(encoding="utf-8"))) for page in PAGES}
    for page, found in names.items():
        for word in sorted(found):
            for part in word.split():
                name, equals, value = part.partition("=")
                if name in known and equals and re.fullmatch(r"\w+", value) and name not in of_generate:
                    assert value in known[name].options, (page.name, part)
                elif (
                    name.partition(".")[0] in known
                    and "." in name
                    and not name.endswith((".png", ".csv", ".yaml", ".html", ".py"))
                ):
                    assert kind_of(name) is not None, (page.name, part)


def test_documented_simpletuner_options_are_read_by_the_importer():
    section = (ROOT / "docs" / "coming-from.md").read_text().split("| SimpleTuner | here |")[1].split("##")[0]
    cells = " ".join(row.split("|")[1] for row in section.splitlines() if row.startswith("| `"))
    read = importlib.import_module(f"{import_simpletuner.__name__}.options").OPTIONS
    of_data_files = {"is_regularisation_data", "conditioning_type: mask"}
    families = {"model_family", "model_flavour", "pretrained_model_name_or_path"}
    assert set(re.findall(r"`([^`]+)`", cells)) - of_data_files - families <= set(read)


def test_documented_file_locations_match_the_export_card():
    """The page names the files of a run called `dreambooth` with the token `ohwx`."""
    page = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    texts = [text.format(name="dreambooth") for text in card_files.COPY.values()]
    texts += [text.format(file="embeddings/ohwx.safetensors", stem="ohwx", word="ohwx") for text in card_files.SAY.values()]
    assert {span for text in texts for span in re.findall(r"`[^`]+`", text) if span not in page} == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return runpy.run_path(str(ROOT / "docs" / "build.py"))["stage"](tmp_path_factory.mktemp("site") / "build" / "docs")


def test_reference_lists_every_key_with_its_comment(site):
    text = "\n".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.md"))
    assert {key for key in all_keys() if f"{{ #{key} }}" not in text} == set()
    dataset_page = (site / "reference" / "dataset.md").read_text(encoding="utf-8")
    about = dataset_page.split("{ #dataset.crop }")[1].split("###")[0]
    assert "one of center, random, corner" in about and "default `center`" in about and "position of the crop" in about
    about = dataset_page.split("{ #dataset.path }")[1].split("###")[0]
    assert "folder of the subject's photos" in about and "package:toybox/pictures" in about, (
        "the comment of folder.yaml, the value of toybox.yaml"
    )
    assert "ablation" not in text and "In the lab log: [" in text


def test_relative_links_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "experiments" / "README.md"):
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            if not re.match(r"https?:", link):
                assert (page.parent / link.partition("#")[0]).exists(), (page.name, link)


def test_site_builds_without_warnings_or_external_resources(site):
    pytest.importorskip("zensical")
    shutil.copy(ROOT / "zensical.toml", site.parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=site.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((site.parent / "site").rglob("*.html"))
    assert len(pages) > 40
    external = r"""<(?:script|img|link)[^>]*\b(?:src|href)=["'](?:https?:)?//"""
    assert [page for page in pages if re.search(external, page.read_text(encoding="utf-8"))] == []

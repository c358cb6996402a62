"""The preflight's tables of prompts, captions and output files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from ..config import rare_word
from ..data.module import DreamBoothData
from ..runfolder import RunFolder
from ..terminal import table

PROMPTS = 8  # validation prompts that are shown
CAPTIONS = 5  # images whose captions are shown
LONG = 200  # characters of a caption that are shown


def prompts(cfg: DictConfig) -> Table:
    """The training prompts, the rare word, and the validation prompts."""
    made = table("Prompts", "for", "prompt", wraps=("prompt",))
    data = cfg.dataset
    word = cfg.adapter.token or rare_word(data.instance_prompt, data.class_prompt)
    rows = [("photos", one) for one in data.prompts or [data.instance_prompt]]
    rows += [("class images", data.class_prompt), ("the rare word", word)]
    drawn = list(cfg.validation.prompts) if cfg.validation.every_n_steps or cfg.validation.every_n_epochs else []
    rows += [("validation", one) for one in drawn[:PROMPTS]]
    rows += [("validation", f"and {len(drawn) - PROMPTS} more")] if len(drawn) > PROMPTS else []
    for use, text in rows:
        if text:
            made.add_row(use, Text(text))
    return made


def captions(data: DreamBoothData) -> Table:
    """The captions of the first images, if not all have the same."""
    every = {(entry.picture.name, caption) for entry in data.entries for caption in entry.captions}
    made = table("Captions, the first", "image", "caption", wraps=("image", "caption"))
    first = list(dict.fromkeys((entry.picture.name, entry.captions) for entry in data.entries))[:CAPTIONS]
    for name, own in first if len({caption for _, caption in every}) > 1 else []:
        made.add_row(Text(name), Text(textwrap.shorten(" | ".join(own), LONG, placeholder=" …")))
    return made


def files(cfg: DictConfig, folder: RunFolder, needed: Mapping[str, float]) -> Table:
    """The files that the run will write, with the larger sizes."""
    made = table(f"Files that will be written to {folder.root}", "contents", "MB at most", "file", wraps=("contents", "file"))
    for what, size in needed.items():
        if size:
            made.add_row(what, f"{size / 10**6:,.1f}", "")
    made.add_row("a sheet of the crops, written now", "", folder.crops.name)
    made.add_row("the report, at the end of the run", "", folder.report.name)
    made.add_row("latents and text embeddings, shared by all runs", "", str(cfg.cache))
    return made

"""What is said to the model, and what will be written where."""

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
CAPTIONS = 5  # pictures whose captions are shown
LONG = 200  # characters of a caption that are shown


def prompts(cfg: DictConfig) -> Table:
    """Those that are trained with, the rare word among them, and those that are drawn."""
    made = table("Prompts", "for", "prompt", wraps=("prompt",))
    data = cfg.dataset
    word = cfg.adapter.token or rare_word(data.instance_prompt, data.class_prompt)
    rows = [("photos", one) for one in data.prompts or [data.instance_prompt]]
    rows += [("class pictures", data.class_prompt), ("the rare word", word)]
    drawn = list(cfg.validation.prompts) if cfg.validation.every_n_steps or cfg.validation.every_n_epochs else []
    rows += [("validation", one) for one in drawn[:PROMPTS]]
    rows += [("validation", f"and {len(drawn) - PROMPTS} more")] if len(drawn) > PROMPTS else []
    for use, text in rows:
        if text:
            made.add_row(use, Text(text))
    return made


def captions(data: DreamBoothData) -> Table:
    """Of the first pictures, where not all have the same."""
    every = {(entry.picture.name, caption) for entry in data.entries for caption in entry.captions}
    made = table("Captions, the first", "picture", "caption", wraps=("picture", "caption"))
    first = list(dict.fromkeys((entry.picture.name, entry.captions) for entry in data.entries))[:CAPTIONS]
    for name, own in first if len({caption for _, caption in every}) > 1 else []:
        made.add_row(Text(name), Text(textwrap.shorten(" | ".join(own), LONG, placeholder=" …")))
    return made


def files(cfg: DictConfig, folder: RunFolder, needed: Mapping[str, float]) -> Table:
    """What the run will write, with the sizes that count."""
    made = table(f"What will be written to {folder.root}", "what", "MB at most", "file", wraps=("what", "file"))
    for what, size in needed.items():
        if size:
            made.add_row(what, f"{size / 10**6:,.1f}", "")
    made.add_row("the crops at a glance, written now", "", folder.crops.name)
    made.add_row("the page of the run, when it ends", "", folder.report.name)
    made.add_row("latents and text embeddings, shared by all runs", "", str(cfg.cache))
    return made

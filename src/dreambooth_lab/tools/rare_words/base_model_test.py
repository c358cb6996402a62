"""Tests of words with a model: the change of its prediction, and its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from ... import sheet
from ...config import prompts
from ..common import base_model
from .vocabulary import Candidate

EACH = 2  # images of a word before the class word, and of the word alone


class BaseModelTest:
    """Tests words with the base model of a configuration.

    Args:
        class_word: the subject's class; None: the last word of the class prompt, or of the instance prompt.
    """

    def __init__(self, cfg: DictConfig, class_word: str | None):
        self.cfg, self.family = cfg, base_model.load(cfg)
        self.kind = class_word or prompts.words(cfg.dataset.class_prompt or cfg.dataset.instance_prompt)[-1]
        self.alone = f"a photo of {self.kind}"

    def movements(self, words: Sequence[str]) -> list[float]:
        """The change of the prediction from the class prompt's when each word is put before the class word."""
        before = [f"a photo of {word} {self.kind}" for word in words]
        moved: list[float] = base_model.movement(self.cfg, self.family, self.alone, before).tolist()
        return moved

    def moved(self, words: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with the change of the prediction."""
        found = self.movements([one.word for one in words])
        return [one._replace(movement=movement) for one, movement in zip(words, found, strict=True)]

    def draw(self, words: Sequence[str], path: Path) -> None:
        """A sheet: the class prompt, then of each word the word before the class word, and the word alone."""
        lines = [prompt for word in words for prompt in (f"a photo of {word} {self.kind}", f"a photo of {word}")]
        first, *rows = base_model.images(self.cfg, self.family, [self.alone, *lines], EACH)
        pairs = zip(words, rows[::2], rows[1::2], strict=True)
        titles = [sheet.Row(f"{word} {self.kind} | {word}", [*before, *alone]) for word, before, alone in pairs]
        self._save([sheet.Row(self.alone, first), *titles], path)

    def draw_audit(self, text: str, path: Path) -> None:
        """A sheet: the class prompt, the whole text, and each of its words alone."""
        lines = list(dict.fromkeys([self.alone, f"a photo of {text}", *(f"a photo of {word}" for word in text.split())]))
        rows = base_model.images(self.cfg, self.family, lines, 2 * EACH)
        self._save([sheet.Row(prompt, row) for prompt, row in zip(lines, rows, strict=True)], path)

    def _save(self, rows: Sequence[sheet.Row], path: Path) -> None:
        sheet.save(sheet.draw(rows), path)
        print(f"see {path}")

"""`python -m dreambooth_lab.tools.rare_tokens model=sdxl …`: rare words for a subject.

Lists strings of a few letters that are one token for every text encoder, the rarest first. Three measures have equal weight: the
position in the vocabulary (which is ordered by frequency), the distance to all other embeddings, and how little the prediction
changes when the word is put before the class word. Real words, names and code are left out, with their reason.

KEY=VALUE arguments are those of a training run; without them --tokenizer sets a tokenizer, and no model is used.
`--audit "sks dog"` instead counts the tokens of words, and generates images of them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ..config import ConfigError
from .common import cli

if TYPE_CHECKING:
    from .rare_words.base_model_test import BaseModelTest
    from .rare_words.vocabulary import Candidate, Reader

app = cli.app(help=__doc__)
TOYBOX = Path(__file__).parents[1] / "toybox" / "base"
AUDIT_SHEET = Path("audit.png")
SHOWN = 12  # number of listed words per reason


@app.command(help=__doc__)
def rare_tokens(
    overrides: Annotated[list[str] | None, typer.Argument(help="as for python -m dreambooth_lab", metavar="KEY=VALUE …")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Instead of a model: its folder or hub id; else the toybox.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many to list.")] = 20,
    longest: Annotated[int, typer.Option(min=1, help="Maximum letters of a word.")] = 4,
    words: Annotated[Path | None, typer.Option(help="A text file of further words to leave out.")] = None,
    class_word: Annotated[str | None, typer.Option(help="The subject's class; default: the class prompt's last word.")] = None,
    drawn: Annotated[
        int | None, typer.Option(min=1, help="How many of the rarest words are tested with the model; default: --count.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="A file for the whole list.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="A PNG of the model's images for each word; needs KEY=VALUE arguments.")
    ] = None,
    audit: Annotated[str | None, typer.Option(help="Words to count the tokens of, instead of a list.")] = None,
) -> None:
    _require(overrides, tokenizer, words, sheet)
    from .rare_words import vocabulary
    from .rare_words.dictionary import known

    asked = _model(overrides, class_word, audit) if overrides else None
    readers = vocabulary.of_family(asked.family) if asked else vocabulary.load(tokenizer or str(TOYBOX))
    if audit is not None:
        show_audit(audit, readers, known(words), asked)
        if asked:
            asked.draw_audit(audit, sheet or AUDIT_SHEET)
        return
    found = find(readers, longest, known(words))
    listed = vocabulary.ranked(asked.moved(found.good[: drawn or count])) if asked else found.good
    show(listed[:count], len(found.good), readers)
    found.print()
    if csv_file:
        write_csv(csv_file, [*listed, *(found.good[drawn or count :] if asked else [])], readers)
    if asked and sheet:
        asked.draw([one.word for one in listed[:count]], sheet)


def _require(overrides: list[str] | None, tokenizer: str | None, words: Path | None, sheet: Path | None) -> None:
    if words and not words.is_file():
        raise ConfigError(f"--words is {str(words)!r}, which is not a file; give a text file of words")
    if overrides and tokenizer:
        raise ConfigError(
            f"--tokenizer is {tokenizer!r}, but KEY=VALUE arguments set a model, which has its own; remove one of them"
        )
    if sheet and not overrides:
        raise ConfigError(f"--sheet is {str(sheet)!r}, but no model is set; add arguments such as model=sdxl")


def _model(overrides: list[str], class_word: str | None, audit: str | None) -> BaseModelTest:
    from .common import training_config
    from .rare_words.base_model_test import BaseModelTest

    audited = (audit or "").split()
    return BaseModelTest(training_config.compose_checked(overrides), class_word or (audited[-1] if len(audited) > 1 else None))


class Found(NamedTuple):
    good: list[Candidate]  # the rarest first
    refused: dict[str, list[str]]  # reason → words
    partly: dict[str, list[str]]  # reader, or several → words that are one token only for these

    def print(self) -> None:
        """Print the excluded words."""
        for reason, some in self.refused.items():
            print(f"left out, {reason}: {_some(some)}")
        for names, some in self.partly.items():
            print(f"left out, one token for {names} only: {_some(some)}")


def _some(words: list[str]) -> str:
    more = f" and {len(words) - SHOWN:,} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


def find(readers: Sequence[Reader], longest: int, known: dict[str, str]) -> Found:
    """Candidates by vocabulary and embeddings, and excluded words."""
    from .rare_words import vocabulary
    from .rare_words.dictionary import split

    by_word, partly = vocabulary.single(readers, longest), dict[str, list[str]]()
    good, refused = split([word for word, own in by_word.items() if len(own) == len(readers)], known)
    free, _ = split([word for word, own in by_word.items() if len(own) < len(readers)], known)
    for word in free:
        partly.setdefault(", ".join(by_word[word]), []).append(word)
    return Found(vocabulary.ranked(vocabulary.measured(good, readers)), refused, partly)


def show(words: Sequence[Candidate], total: int, readers: Sequence[Reader]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    print(f"{total} candidates, one token each for {', '.join(reader.name for reader in readers)}")
    table = Table("word", "position in the vocabulary", "isolation of the embedding", "change of the prediction")
    for one in words:
        isolation = "no weights here" if one.isolation is None else f"{one.isolation:.3f}"
        table.add_row(one.word, f"{one.rank:.3f}", isolation, "not asked" if one.movement is None else f"{one.movement:.4f}")
    Console().print(table)


def write_csv(path: Path, words: Sequence[Candidate], readers: Sequence[Reader]) -> None:
    """One row per word, with its token id for each reader."""
    from ..storage.durable import write_text

    names = [one.word for one in words]
    ids = zip(*(reader.ids(names) for reader in readers), strict=True) if names else []
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["word", "place", "isolation", "movement", *(reader.name for reader in readers)])
    table.writerows([*one, *(own[0] for own in tokens)] for one, tokens in zip(words, ids, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def show_audit(text: str, readers: Sequence[Reader], known: dict[str, str], asked: BaseModelTest | None) -> None:
    """Print how many tokens each word has for each reader, and how much it changes the model's prediction."""
    from rich.console import Console
    from rich.table import Table

    words = list(dict.fromkeys(text.split()))
    moved = asked.movements(words) if asked else [None] * len(words)
    table = Table("word", *(reader.name for reader in readers), "also", *(["movement"] if asked else []))
    for word, movement in zip(words, moved, strict=True):
        tokens = [reader.pieces(word) for reader in readers]
        one = [reader.name for reader, own in zip(readers, tokens, strict=True) if len(own) == 1]
        partly = f"one token for {', '.join(one)} only" if 0 < len(one) < len(readers) else ""
        also = "; ".join(filter(None, (known.get(word.lower(), ""), partly)))
        table.add_row(word, *(f"{len(own)}: {' '.join(own)}" for own in tokens), also, *([f"{movement:.4f}"] if asked else []))
    Console().print(table)


def main(words: list[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: app(words))


if __name__ == "__main__":
    main()

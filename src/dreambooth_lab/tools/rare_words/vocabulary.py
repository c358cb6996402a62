"""The vocabularies of a model's text encoders: which words are one token, their positions, and the isolation of their
embeddings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ...config import ConfigError
from ...models.family import Family

EMBEDDINGS = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")  # of CLIP, T5, language models
AROUND = "a"  # a word that stands before and after another in `Reader.ids`


class Reader(NamedTuple):
    """A text encoder's tokenizer."""

    name: str  # tokenizer, tokenizer_2, …
    tokenizer: Any
    rows: Tensor | None  # [tokens width], if its encoder's weights exist locally

    def ids(self, words: Sequence[str]) -> list[list[int]]:
        """Tokens of words as they stand inside a prompt: many tokenizers have one for a word after a space, and another for the
        same word at a text's start."""
        lines = [f"{AROUND} {word} {AROUND}" for word in words]
        before, both, *found = self.tokenizer([AROUND, f"{AROUND} {AROUND}", *lines], add_special_tokens=False).input_ids
        return [own[len(before) : len(own) - (len(both) - len(before))] for own in found]

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The texts of single tokens, without the space before them."""
        return [text.strip() for text in self.tokenizer.batch_decode([[i] for i in ids])]

    def pieces(self, word: str) -> list[str]:
        """A word's tokens."""
        return list(self.tokenizer.convert_ids_to_tokens(self.ids([word])[0]))

    def single(self, words: Sequence[str]) -> list[str]:
        """The words that are one token, and are decoded unchanged."""
        one = [(word, own[0]) for word, own in zip(words, self.ids(words), strict=True) if len(own) == 1]
        back = self.texts([i for _, i in one])
        return [word for (word, _), text in zip(one, back, strict=True) if text == word]


class Candidate(NamedTuple):
    """A word that is one token for all encoders."""

    word: str
    rank: float  # position in the vocabulary, 0 … 1, mean over the encoders
    isolation: float | None  # 1 − largest cosine with another token's embedding, mean over the encoders that have weights
    movement: float | None = None  # change of the model's prediction from the class prompt's, with the word before the class word


def load(source: str) -> list[Reader]:
    """The tokenizers of a pipeline, with their encoders' embeddings if the weights exist locally; or a single tokenizer.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(source).expanduser()
    folder = folder if folder.is_dir() else _from_hub(source)
    places = sorted(place for place in folder.glob("tokenizer*") if place.is_dir()) or [folder]
    try:
        from transformers import AutoTokenizer

        return [Reader(place.name, AutoTokenizer.from_pretrained(place), _rows(folder, place)) for place in places]
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--tokenizer is {source!r}, which contains no tokenizer ({reason}); give a model's folder or id"
        ) from error


def of_family(family: Family) -> list[Reader]:
    """The text encoders of a model."""
    names = [part.replace("text_encoder", "tokenizer") for part in family.text_encoder_parts]
    pairs = zip(names, family.text_encoders, strict=True)
    return [Reader(name, tokenizer, _embedding(encoder)) for name, (tokenizer, encoder) in pairs]


def _embedding(encoder: Any) -> Tensor:
    weight: Tensor = encoder.get_input_embeddings().weight
    return weight.detach().float().cpu()


def _from_hub(source: str) -> Path:
    """The folder of a hub id's files; weights only if they are already cached."""
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(source, local_files_only=True))
        if [*found.glob("tokenizer*")]:
            return found
    except Exception:  # the hub's client raises a dozen kinds
        pass
    try:
        return Path(snapshot_download(source, allow_patterns=["*token*", "vocab*", "merges.txt", "config.json", "tokenizer*/*"]))
    except Exception as error:
        raise ConfigError(
            f"--tokenizer is {source!r}, which is no folder and could not be downloaded ({type(error).__name__}); give a folder"
        ) from error


def _rows(folder: Path, place: Path) -> Tensor | None:
    """Token embeddings of the encoder that a tokenizer belongs to, float32."""
    encoder = folder / place.name.replace("tokenizer", "text_encoder")
    for path in sorted(encoder.glob("*.safetensors")) if encoder.is_dir() else ():
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.endswith(EMBEDDINGS):
                    return file.get_tensor(key).float()
    return None


def single(readers: Sequence[Reader], longest: int) -> dict[str, list[str]]:
    """Words of lower-case letters and digits → names of the readers for which they are one token."""
    texts = {text for reader in readers for text in reader.texts(range(len(reader.tokenizer)))}
    words = sorted(w for w in texts if 0 < len(w) <= longest and w.isascii() and w.isalnum() and w == w.lower())
    found: dict[str, list[str]] = {}
    for reader in readers:
        for word in reader.single(words) if words else []:
            found.setdefault(word, []).append(reader.name)
    return dict(sorted(found.items()))


def measured(words: Sequence[str], readers: Sequence[Reader]) -> list[Candidate]:
    """Their positions in the vocabularies, and the distances of their embeddings from any other."""
    ranks, far = torch.zeros(len(words)), list[Tensor]()
    for reader in readers:
        ids = [own[0] for own in reader.ids(words)] if words else []
        ranks += torch.tensor(ids, dtype=torch.float32) / len(reader.tokenizer) / len(readers)
        if reader.rows is not None:
            far.append(isolation(reader.rows, torch.tensor(ids, dtype=torch.long)))
    means = torch.stack(far).mean(0).tolist() if far else [None] * len(words)
    return [Candidate(word, rank, away) for word, rank, away in zip(words, ranks.tolist(), means, strict=True)]


def isolation(rows: Tensor, ids: Tensor) -> Tensor:
    """1 − largest cosine of each of some rows with any other row of [tokens width]."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    found = list[Tensor]()
    for some in ids.split(512):
        cosines = unit[some] @ unit.T
        cosines[torch.arange(len(some)), some] = -1
        found.append(1 - cosines.amax(1))
    return torch.cat(found) if found else torch.zeros(0)


def ranked(words: Sequence[Candidate]) -> list[Candidate]:
    """Sort by rarity: by the mean rank over the measures that all words have."""
    places: dict[str, float] = defaultdict(float)
    for measure, sign in (("rank", 1), ("isolation", 1), ("movement", -1)):
        values = [(getattr(one, measure), one.word) for one in words]
        if all(value is not None for value, _ in values):
            for place, (_, word) in enumerate(sorted((sign * value, word) for value, word in values)):
                places[word] += place
    return sorted(words, key=lambda one: (-places[one.word], one.word))

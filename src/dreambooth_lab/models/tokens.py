"""A trained token's embeddings: their location in text encoders, and the file for other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import ConfigError
from ..embedding import Slot
from .family import TextEncoders

FOLDER = "embeddings"  # in an export; the same name as in ComfyUI and A1111
OLD_FILE = "learned_embeds.safetensors"  # beside the weights, in exports of earlier versions


def slot(tokenizer: Any, encoder: Any, word: str) -> Slot:
    """The embedding of a word in a text encoder.

    Raises:
        ConfigError: the word is several tokens.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ConfigError(
            f"adapter.train_token is true, but {word!r} is {len(ids)} tokens for the text encoder ({pieces}); "
            "choose a word that is one token, or set adapter.train_token=false"
        )
    return encoder.get_input_embeddings(), ids[0]


def file_name(word: str) -> str:
    """The file of a word's embedding; ComfyUI and A1111 use the file's name."""
    return re.sub(r"[^\w.-]+", "_", word).strip(".") + ".safetensors"


def save(folder: Path, word: str, keys: Sequence[str], rows: Sequence[Tensor], header: Mapping[str, str]) -> Path:
    """Write one embedding per text encoder, each under its key; returns the file, relative to the folder."""
    file = Path(FOLDER) / file_name(word)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    named = {key: row.detach().cpu().float()[None] for key, row in zip(keys, rows, strict=True)}
    save_file(named, folder / file, {"format": "pt", **header})
    return file


def load(folder: Path, keys: Sequence[str], pairs: TextEncoders, word: str) -> Callable[[float], None]:
    """Replace a word's embedding by a saved one; see `Family.load_token`."""
    file = folder / FOLDER / file_name(word)
    file = file if file.is_file() else folder / OLD_FILE
    if not file.is_file():
        prefix = f"{str(folder)!r} has no {FOLDER}/{file_name(word)}"
        raise ConfigError(f"{prefix}, which this export needs: the embedding of {word!r} was trained too")
    saved = load_file(file)
    if lacking := [key for key in keys if key not in saved]:
        raise ConfigError(f"{str(file)!r} has no embedding {lacking[0]!r}; give an export of this model")
    slots = [slot(tokenizer, encoder, word) for tokenizer, encoder in pairs]
    before = [layer.weight[row].detach().clone() for layer, row in slots]

    def mean(strength: float) -> None:
        for key, (layer, row), base in zip(keys, slots, before, strict=True):
            learned = saved[key][0].to(base)
            layer.weight.data[row] = torch.lerp(base, learned, strength).to(layer.weight.device)

    mean(1.0)
    return mean


def usage(keys: Mapping[str, str], word: str) -> str:
    """Code that loads the embedding in the folder `export` into `pipeline`.

    Args:
        keys: text encoder's name in the pipeline → its key in the file.
    """
    pairs = ", ".join(f'("{key}", "{part.removeprefix("text_encoder")}")' for part, key in keys.items())
    return f"""\
from safetensors.torch import load_file
learned = load_file(export + {json.dumps(f"/{FOLDER}/{file_name(word)}", ensure_ascii=False)})
for name, end in ({pairs},):
    tokenizer, encoder = getattr(pipeline, "tokenizer" + end), getattr(pipeline, "text_encoder" + end)
    (row,) = tokenizer({json.dumps(word, ensure_ascii=False)}, add_special_tokens=False).input_ids
    weight = encoder.get_input_embeddings().weight
    weight.data[row] = learned[name][0].to(weight)"""

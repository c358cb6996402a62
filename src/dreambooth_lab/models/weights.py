"""Which files of a component are read: the weights of one variant, whole or in shards, and the small files."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..config import ConfigError

STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' and of transformers' weight files
SMALL = (".json", ".txt", ".model", ".jinja")  # configs and vocabularies
LEFT_OUT = ("safety_checker", "feature_extractor", "watermarker", "image_encoder")  # components that are not needed here
AUTO, HALF = "auto", "fp16"
OTHER_KINDS = (".bin", ".pt", ".ckpt", ".msgpack", ".h5")  # formats that are never read


class Pick(NamedTuple):
    """A component's weights: one file, or the index of several."""

    variant: str | None
    name: str
    sharded: bool


class Weights(NamedTuple):
    """A component's weights on disk."""

    variant: str | None
    files: tuple[Path, ...]  # in order of their names
    table: Path | None  # the index of tensors, if there are several files


def named(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Component → library and class, from model_index.json; without empty and unneeded components."""
    values = {part: values for part, values in index.items() if not part.startswith("_") and part not in LEFT_OUT}
    return {
        part: values for part, values in values.items() if isinstance(values, list) and len(values) == 2 and values[0] is not None
    }


def variants_to_try(variant: str | None) -> tuple[str | None, ...]:
    """Variants in the order of the search."""
    return (None,) if variant is None else (HALF, None) if variant == AUTO else (variant, None)


def pick(names: Collection[str], variant: str | None) -> Pick | None:
    """The weights to read among a folder's file names; None if there are none."""
    for wish in variants_to_try(variant):
        dotted = f".{wish}" if wish else ""
        for stem in STEMS:
            both = [
                Pick(wish, f"{stem}.safetensors.index{dotted}.json", True),
                Pick(wish, f"{stem}{dotted}.safetensors", False),
            ]
            # If a folder has both, diffusers reads the shards and transformers the single file.
            for found in both if stem == STEMS[0] else reversed(both):
                if found.name in names:
                    return found
    return None


def needed(names: Collection[str], variant: str | None) -> set[str]:
    """The files of a component's folder to download: small ones, and the weights of one variant."""
    found = pick(names, variant)
    small = {name for name in names if name.endswith(SMALL) and ".index." not in name}
    if found is None:
        return small
    if not found.sharded:
        return small | {found.name}
    stem, dotted = found.name.partition(".safetensors")[0], f".{found.variant}" if found.variant else ""
    shard = re.compile(rf"{re.escape(stem)}({re.escape(dotted)}-\d+-of-\d+|-\d+-of-\d+{re.escape(dotted)})\.safetensors")
    return small | {found.name} | {name for name in names if shard.fullmatch(name)}


def read(folder: Path, variant: str | None, prefix: str) -> Weights:
    """A component's weights, after checking that all files are complete.

    Args:
        said: prefix of error messages: the owner of the folder.

    Raises:
        ConfigError: there are none, some are missing or truncated, or they have an unsupported format.
    """
    names = [path.name for path in folder.iterdir()]
    found = pick(names, variant)
    if found is None:
        raise ConfigError(f"{prefix} {_lacks(names, variant)}")
    files = tuple(folder / name for name in (_shards(folder / found.name, prefix) if found.sharded else [found.name]))
    for file in files:
        _require_whole(file, prefix)
    return Weights(found.variant, files, folder / found.name if found.sharded else None)


def _lacks(names: Collection[str], variant: str | None) -> str:
    """Why a folder's weights can't be read, and a fix."""
    if others := sorted(has for name in names if (has := variant_of(name))):
        value = "null" if variant is None else variant
        return (
            f"has only weights of the variant {' and '.join(sorted(set(others)))}, and model.variant is {value}; set it to auto"
        )
    if unread := sorted(name for name in names if name.endswith(OTHER_KINDS)):
        return (
            f"has {unread[0]} and no .safetensors; pickles can run code and are never read; save the pipeline again with "
            f"diffusers' "
            "save_pretrained(folder, safe_serialization=True), or use a checkpoint with safetensors"
        )
    return "has no weight files (.safetensors); download the checkpoint again, or write it by save_pretrained"


def variant_of(name: str) -> str | None:
    """The variant in a weight file's name; None for a plain file or another file."""
    stems = "|".join(STEMS)
    match = re.fullmatch(rf"(?:{stems})(?:\.(\w+)(?:-\d+-of-\d+)?|-\d+-of-\d+\.(\w+))\.safetensors", name)
    return match and (match[1] or match[2])


def _shards(index: Path, prefix: str) -> list[str]:
    placed = read_json(index, prefix).get("weight_map")
    names = sorted(set(placed.values())) if isinstance(placed, dict) and placed else []
    if not names or not all(isinstance(name, str) and plain(name) for name in names):
        raise ConfigError(f"{prefix} has {index.name} without a weight_map of plain file names; download the checkpoint again")
    return names


def plain(name: str) -> bool:
    """Whether it is a name inside a folder, and no path out of it."""
    return bool(re.fullmatch(r"[\w-][\w.-]*", name))


def _require_whole(file: Path, prefix: str) -> None:
    """Refuse a file that is missing or shorter than its header states."""
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        how = "lacks" if not file.is_file() else "has a damaged"
        raise ConfigError(f"{prefix} {how} {file.name} ({_first_line(error)}); download or save the checkpoint again") from error


def read_json(path: Path, prefix: str) -> dict[str, Any]:
    """Read a JSON config.

    Raises:
        ConfigError: there is no such file, or it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        how = "lacks" if not path.is_file() else "can't be read from"
        raise ConfigError(f"{prefix} {how} {path.name} ({_first_line(error)}); download or save the checkpoint again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{prefix} has a {path.name} that is not a JSON object; download or save the checkpoint again")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]

"""A hub id's files: from the hub's cache if it has all files that a load needs, else from the network."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from textwrap import shorten

from ..config import ConfigError
from . import weights

INDEX = "model_index.json"
NO_NETWORK = re.compile(
    r"(Tokenizer|Scheduler|Processor|Extractor)(Fast)?$"
)  # suffixes of the classes of components without weights
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"vocab.txt"}, {"spiece.model"}, {"tokenizer.model"})
SETTINGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
PATIENCE = 10  # timeout of requests to the hub, seconds


def folder(hub_id: str, revision: str | None, variant: str | None, way_out: str) -> Path:
    """The folder of a hub id's pipeline.

    Args:
        way_out: the end of error messages.

    Raises:
        ConfigError: neither the cache nor the hub has it.
    """
    found = cached(hub_id, revision, variant)
    if found:
        return found
    try:
        return _fetch(hub_id, revision, variant)
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"model.pretrained is {hub_id!r}, which is not a folder, is not complete in the hub's cache and could not be "
            f"downloaded "
            f"({type(error).__name__}: {shorten(reason, 160)}); {way_out}"
        ) from error


def cached(hub_id: str, revision: str | None, variant: str | None) -> Path | None:
    """The hub cache's folder of a revision, if it is complete for a load; no network access."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(hub_id, INDEX, revision=revision)
    except HFValidationError:
        return None
    found = Path(index).parent if isinstance(index, str) else None
    return found if found and whole(found, variant) else None


def whole(folder: Path, variant: str | None) -> bool:
    """Whether a folder has all files that a load of a pipeline needs."""
    try:
        parts = weights.named(weights.read_json(folder / INDEX, str(folder)))
        return all(_whole(folder / part, str(kind), variant) for part, (_, kind) in parts.items())
    except (ConfigError, OSError):
        return False


def _whole(folder: Path, kind: str, variant: str | None) -> bool:
    names = {path.name for path in folder.iterdir()}
    if "Tokenizer" in kind:
        return any(vocabulary <= names for vocabulary in VOCABULARIES)
    if NO_NETWORK.search(kind):
        return any(name.endswith("config.json") for name in names)
    weights.read(folder, variant, str(folder))
    return "config.json" in names


def _fetch(hub_id: str, revision: str | None, variant: str | None) -> Path:
    """Download into the hub's cache the small files and one variant of the weights of every component."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    constants.HF_HUB_ETAG_TIMEOUT = min(constants.HF_HUB_ETAG_TIMEOUT, PATIENCE)
    index = weights.read_json(Path(hf_hub_download(hub_id, INDEX, revision=revision)), hub_id)
    wanted = to_fetch(HfApi().list_repo_files(hub_id, revision=revision), index, variant)
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))


def to_fetch(names: Collection[str], index: dict[str, object], variant: str | None) -> list[str]:
    """Which of a repository's files a load needs."""
    wanted = [INDEX]
    for part in weights.named(index):
        within = {name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")}
        wanted += [f"{part}/{name}" for name in weights.needed(within, variant)]
    return sorted(wanted)


def settings(hub_id: str) -> Path:
    """The folder with the configs and tokenizers of a hub id's pipeline; no weights are downloaded.

    Raises:
        ConfigError: neither the cache nor the hub has them.
    """
    from huggingface_hub import snapshot_download

    small = [INDEX, *(f"*/*{suffix}" for suffix in weights.SMALL)]
    for local in (True, False):
        try:
            found = Path(snapshot_download(hub_id, allow_patterns=small, ignore_patterns=["*.index.*"], local_files_only=local))
            if not local or _has_settings(found):
                return found
        except Exception as error:  # the hub's client raises a dozen kinds
            if not local:
                raise ConfigError(
                    f"model.config is {hub_id!r}, which is not a folder and could not be downloaded ({type(error).__name__}); "
                    f"set it "
                    "to a folder in diffusers' layout, or to a reachable hub id"
                ) from error
    raise AssertionError("unreachable")


def _has_settings(folder: Path) -> bool:
    """Whether every component has its config, and every tokenizer its vocabulary."""
    try:
        for part, (_, kind) in weights.named(weights.read_json(folder / INDEX, str(folder))).items():
            names = {path.name for path in (folder / part).iterdir()}
            wanted = VOCABULARIES if "Tokenizer" in str(kind) else tuple({name} for name in SETTINGS)
            if not any(each <= names for each in wanted):
                return False
    except (ConfigError, OSError):
        return False
    return True

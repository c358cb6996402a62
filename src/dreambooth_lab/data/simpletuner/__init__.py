"""Reads SimpleTuner's dataset files unchanged: a JSON list of entries → `DatasetSpec`s.

All problems of a file are reported together, each with its entry and a fix.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ...config import ConfigError, enums
from ..spec import Captions, DataPlan, DatasetSpec, Masks, Shaping, Where
from .check import entry_problems, file_problems
from .entry import (
    COLUMN_STRATEGIES,
    Entry,
    columns_of,
    folder_of,
    has_images,
    has_table,
    is_class,
    kind_of,
    mask_entries,
    options_of,
    place_key,
    place_of,
    strategy_of,
    type_of,
)
from .unused import notices as idle_notices

ENV = re.compile(r"\{env:([^}]*)\}")
SOURCES = {"local": enums.DatasetType.folder, "aws": enums.DatasetType.folder, "csv": enums.DatasetType.table,
           "huggingface": enums.DatasetType.huggingface}  # fmt: skip
CAPTIONS = {
    "instanceprompt": enums.CaptionKind.instanceprompt,
    "textfile": enums.CaptionKind.textfile,
    "filename": enums.CaptionKind.filename,
}


def read(path: Path, cfg: DictConfig) -> DataPlan:
    """The datasets of a file.

    Args:
        cfg: for settings that a file can't have: crop variants, mirroring, the maximum aspect, the kind of prior.

    Raises:
        ConfigError: lists every problem of the file.
    """
    entries, notices, problems = _entries(path)
    named = [(_name(entry, i), entry) for i, entry in enumerate(entries)]
    problems += [f"entry {name}: {text}" for name, entry in named for text in entry_problems(entry)]
    problems += file_problems(entries, cfg)
    if problems:
        listed = "\n".join(f"  - {text}" for text in dict.fromkeys(problems))
        raise ConfigError(f"{len(dict.fromkeys(problems))} problem(s) in the dataset file {str(path)!r}:\n{listed}")
    specs = [_spec(entry, entries, cfg, path) for entry in entries if has_images(entry)]
    texts = _text_entries(entries)
    notices += idle_notices(named) + list(_text_notices(entries, texts))
    return DataPlan(specs, notices, texts[0].get("cache_dir") if texts else None)


def first_prompt(path: str | None) -> str:
    """The first instance prompt of a file's training entries; "" if there is none, or no readable file (resolver)."""
    try:
        entries, _, _ = _entries(Path(path or "").expanduser())
    except ConfigError:
        return ""
    for entry in entries:
        prompt = entry.get("instance_prompt")
        if kind_of(entry) == "image" and not is_class(entry) and prompt:
            return str(prompt[0] if isinstance(prompt, list) else prompt)
    return ""


def _entries(path: Path) -> tuple[list[Entry], list[str], list[str]]:
    """Enabled entries with their variables expanded; notices; problems so far."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = json.loads(text, object_pairs_hook=_refuse_duplicate_keys)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"dataset.path is {str(path)!r}, invalid JSON at {where}: {error.msg}; the line is {line!r}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"dataset.path is {str(path)!r}, which is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (OSError, RecursionError) as error:
        raise ConfigError(
            f"dataset.path is {str(path)!r}, which can't be read ({error}); give a SimpleTuner dataset file"
        ) from error
    if not isinstance(data, list) or not data:
        raise ConfigError(
            f"dataset.path is {str(path)!r}, which contains no list of datasets; it must have the form [{{…}}, {{…}}]"
        )
    problems = [
        f"entry {i + 1} is {entry!r}; it must be an object {{…}}" for i, entry in enumerate(data) if not isinstance(entry, dict)
    ]
    notices: list[str] = []
    entries = []
    for i, entry in enumerate(e for e in data if isinstance(e, dict)):
        if entry.get("disabled") is True or entry.get("disable") is True:
            notices.append(f"entry {_name(entry, i)} is disabled")
            continue
        problems += [f"{where} uses {{env:{name}}}, which is not set; export {name}=…" for where, name in _unset(entry)]
        entries.append(_expand(entry))
    return entries, notices, problems


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> Entry:
    """JSON objects that record duplicate keys, which are refused instead of silently dropped."""
    twins = {key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1}
    made = dict(pairs)
    if twins:
        made["\0twins"] = sorted(twins)
    return made


def _expand(value: Any) -> Any:
    if isinstance(value, str):
        return ENV.sub(lambda match: os.environ.get(match[1], ""), value)
    if isinstance(value, list):
        return [_expand(v) for v in value]
    return {k: _expand(v) for k, v in value.items()} if isinstance(value, dict) else value


def _unset(value: Any, where: str = "an entry") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield from ((where, name) for name in ENV.findall(value) if name not in os.environ)
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _unset(child, where if isinstance(key, int) else f"key {key!r}")


def _name(entry: Entry, i: int) -> str:
    return repr(entry["id"]) if isinstance(entry.get("id"), str) else f"number {i + 1} (it has no id)"


def _text_entries(entries: list[Entry]) -> list[Entry]:
    """Text caches, the default one first."""
    return sorted((e for e in entries if kind_of(e) == "text_embeds"), key=lambda e: not e.get("default", False))


def _text_notices(entries: list[Entry], texts: list[Entry]) -> Iterator[str]:
    """All text embeddings are in one cache, the default one."""
    for other in texts[1:]:
        yield f"entry {other['id']!r} is not used: all captions are cached in {texts[0]['id']!r}"
    for entry in entries:
        if has_images(entry) and entry.get("text_embeds") not in (None, *(text["id"] for text in texts[:1])):
            yield f"entry {entry['id']!r}: text_embeds has no effect here: all captions are cached in {texts[0]['id']!r}"


def _where(entry: Entry, beside: Path) -> Where:
    options, place, folder = options_of(entry), str(place_of(entry)), folder_of(entry)
    columns = columns_of(entry) if strategy_of(entry) in COLUMN_STRATEGIES else ()
    kind, root = SOURCES[type_of(entry)], folder if type_of(entry) == "csv" else None
    if has_table(entry) and "path" in options:
        kind, root, place = enums.DatasetType.table, place, options["path"]
    place, root = _located(place, beside), root and _located(root, beside)
    column = options.get("filename_column") or options.get("csv_url_column") or options.get("image_column") or "image"
    split, streaming = options.get("split") or "train", options.get("streaming") is True
    return Where(kind, place, column, columns, root, split, streaming, options.get("fallback_caption_column"))


def _located(place: str, beside: Path) -> str:
    """Resolve a relative path like SimpleTuner, from the working directory; if it does not exist, from the file's folder."""
    near = beside.parent / Path(place).expanduser()
    return str(near) if "://" not in place and not Path(place).expanduser().exists() and near.exists() else place


def _spec(entry: Entry, entries: list[Entry], cfg: DictConfig, path: Path) -> DatasetSpec:
    asked = mask_entries(entry)
    prompts, is_eval = entry.get("instance_prompt") or (), kind_of(entry) == "eval"
    mask = next((e for e in entries if asked and not is_eval and e.get("id") == asked[0]), None)
    captions = Captions(
        CAPTIONS.get(strategy_of(entry), enums.CaptionKind.column), (prompts,) if isinstance(prompts, str) else tuple(prompts),
        bool(entry.get("prepend_instance_prompt")), bool(entry.get("only_instance_prompt")),
        bool(entry.get("disable_multiline_split")),
    )  # fmt: skip
    return DatasetSpec(
        entry["id"], _where(entry, path), captions, _shaping(entry, cfg), is_class(entry) and not is_eval, is_eval,
        entry.get("repeats") or 0, 1.0 if entry.get("probability") is None else entry["probability"],
        masks=Masks(enums.MaskFrom.files, mask["id"], _where(mask, path)) if mask else None,
        most=entry.get("max_num_samples"), latents=entry.get("cache_dir_vae"), named=f"{entry['id']!r}: {place_key(entry)}",
    )  # fmt: skip


def _shaping(entry: Entry, cfg: DictConfig) -> Shaping:
    """Without `crop`, images are centre-cropped to the bucket's shape."""
    crop = entry.get("crop") is True
    style = str(entry.get("crop_style") or "random").replace("centre", "center")
    unit = enums.ResolutionType[entry.get("resolution_type") or "pixel_area"]
    return Shaping(
        float(entry.get("resolution") or (1.0 if unit is enums.ResolutionType.area else cfg.model.resolution)), unit,
        float(entry.get("minimum_image_size") or 0),
        entry.get("maximum_image_size") if crop else None, entry.get("target_downsample_size") if crop else None,
        enums.CropAspect[entry.get("crop_aspect") or "square"] if crop else enums.CropAspect.preserve,
        tuple(entry.get("crop_aspect_buckets") or ()), enums.Crop[style] if crop else enums.Crop.center,
        cfg.dataset.crop_variants, cfg.dataset.flip, cfg.dataset.max_aspect,
        entry.get("minimum_aspect_ratio"), entry.get("maximum_aspect_ratio"), entry.get("max_upscale_threshold") or None,
    )  # fmt: skip

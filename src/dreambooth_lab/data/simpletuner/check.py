"""Checks of a SimpleTuner dataset file; each problem has a fix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig

from .entry import COLUMN_STRATEGIES, Entry, columns_of, is_class, kind_of, mask_entries, place_key, place_of, strategy_of
from .keys import KEYS, NESTED, Key, Use

TYPE_NAMES = {str: "a string", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def entry_problems(entry: Entry) -> Iterator[str]:
    for key in entry.get("\0twins", []):
        yield f"key {key!r} occurs twice; keep one"
    yield from _key_problems({k: v for k, v in entry.items() if k != "\0twins"}, KEYS, "")
    for outer, legal in NESTED.items():
        if isinstance(entry.get(outer), dict):
            yield from _key_problems(entry[outer], legal, f"{outer}.")
    if not isinstance(entry.get("id"), str) or not entry["id"].strip():
        yield 'it needs an id, such as "id": "my-photos"'
    elif re.search(r"[/\\\x00-\x1f]|^\.\.?$", entry["id"]):
        yield "an id names a dataset, not a path; remove /, \\ and control characters"
    yield from _meaning_problems(entry)


def _key_problems(entry: Entry, legal: dict[str, Key], prefix: str) -> Iterator[str]:
    for key, value in entry.items():
        if key not in legal:
            near = get_close_matches(key, legal, n=1, cutoff=0.5)
            yield f"unknown key {prefix}{key!r}" + (f"; did you mean {near[0]!r}?" if near else "; remove it")
            continue
        known = legal[key]
        if problem := _value_problem(known, value):
            yield f"{prefix}{key} is {json.dumps(value, ensure_ascii=False)}; {problem}"
        elif known.use is Use.refused and value is not None and value not in known.neutral:
            yield f"{prefix}{key} is not supported here: {known.why}"


def _value_problem(key: Key, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, key.types) or (isinstance(value, bool) and bool not in key.types):
        quoted = isinstance(value, str) and str not in key.types
        names = " or ".join(dict.fromkeys(TYPE_NAMES[t] for t in key.types if not (t is int and float in key.types)))
        return f"it must be {names}" + (", without quotes" if quoted else "")
    if key.legal and value not in key.legal:
        near = get_close_matches(str(value), [str(v) for v in key.legal], n=1)
        return "it must be one of " + ", ".join(map(str, key.legal)) + (f"; did you mean {near[0]!r}?" if near else "")
    if key.low is not None and isinstance(value, int | float) and not value >= key.low:
        return f"it must be at least {key.low:g}"
    return None


def _meaning_problems(entry: Entry) -> Iterator[str]:
    """Checks across keys; wrong types are already reported and skipped here."""
    kind = kind_of(entry)
    if kind == "conditioning" and entry.get("conditioning_type") is None:
        yield 'it needs "conditioning_type": "mask"'
    if kind not in ("image", "eval", "conditioning"):
        return
    if not place_of(entry):
        yield f"it needs {place_key(entry)}"
    if kind == "conditioning":
        return
    strategy = strategy_of(entry)
    prompts = entry.get("instance_prompt")
    if not prompts and (
        strategy == "instanceprompt" or entry.get("prepend_instance_prompt") or entry.get("only_instance_prompt")
    ):
        yield 'it needs an "instance_prompt"'
    if isinstance(prompts, list) and not all(isinstance(p, str) and p.strip() for p in prompts):
        yield "instance_prompt must be a list of strings"
    if "${" in str(prompts):
        yield "instance_prompt has ${, which the run's config.yaml would interpret as a reference to another key; remove it"
    if strategy in COLUMN_STRATEGIES and not columns_of(entry):
        yield f"caption_strategy is {strategy!r}, so it needs a caption_column"
    yield from _size_problems(entry)


def _size_problems(entry: Entry) -> Iterator[str]:
    large, shrink = entry.get("maximum_image_size"), entry.get("target_downsample_size")
    if (large is None) != (shrink is None):
        yield "maximum_image_size and target_downsample_size must be given together; give both or neither"
    numbers = [entry.get(k) for k in ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")]
    if any(isinstance(n, bool) or not isinstance(n, int | float | None) for n in numbers):
        return
    edge, least, most, shrunk = numbers
    unit = entry.get("resolution_type", "pixel_area")
    if edge is not None and unit != "area" and 0 < edge < 16:
        yield f'resolution is {edge:g} px; for megapixels set "resolution_type": "area"'
    if edge is not None and unit == "area" and edge > 16:
        yield f'resolution is {edge:g} megapixels; for pixels set "resolution_type": "pixel_area"'
    if least is not None and most is not None and least > most:
        yield f"minimum_image_size {least:g} is above maximum_image_size {most:g}: every image would be rejected or downscaled"
    if shrunk is not None and most is not None and shrunk > most:
        yield f"target_downsample_size {shrunk:g} is above maximum_image_size {most:g}: images would be enlarged"
    aspects = entry.get("crop_aspect_buckets")
    if entry.get("crop") is True and entry.get("crop_aspect") in ("closest", "random") and not aspects:
        yield f'crop_aspect is {entry["crop_aspect"]!r}, so it needs "crop_aspect_buckets", such as [0.75, 1.0, 1.33]'
    if isinstance(aspects, list) and not all(isinstance(a, int | float) and not isinstance(a, bool) and a > 0 for a in aspects):
        yield "crop_aspect_buckets must be numbers above 0 (width / height)"


def file_problems(entries: list[Entry], cfg: DictConfig) -> Iterator[str]:
    """Checks across entries."""
    ids = [entry.get("id") for entry in entries if isinstance(entry.get("id"), str)]
    yield from (f"id {i!r} is used by {ids.count(i)} entries; each needs its own" for i in dict.fromkeys(ids) if ids.count(i) > 1)
    pictures = [entry for entry in entries if kind_of(entry) == "image"]
    if not pictures:
        yield 'no entry has images to train on; add one with "dataset_type": "image" that is not disabled'
    masks = [entry.get("id") for entry in entries if kind_of(entry) == "conditioning"]
    texts = [entry.get("id") for entry in entries if kind_of(entry) == "text_embeds"]
    for entry in entries:
        for asked in mask_entries(entry):
            if asked not in masks:
                near = get_close_matches(str(asked), [str(m) for m in masks], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else '; give it "dataset_type": "conditioning"'
                yield f"entry {entry.get('id')!r}: conditioning_data is {asked!r}, and no conditioning entry has that id{hint}"
        if len(mask_entries(entry)) > 1:
            yield f"entry {entry.get('id')!r}: conditioning_data names {len(mask_entries(entry))} entries; an image has one mask"
        if isinstance(entry.get("text_embeds"), str) and entry["text_embeds"] not in texts:
            yield f"entry {entry.get('id')!r}: text_embeds is {entry['text_embeds']!r}, and no text_embeds entry has that id"
    classes = [entry.get("id") for entry in pictures if is_class(entry)]
    if classes and not cfg.prior.kind.has_class_rows:
        yield (
            f"{', '.join(map(repr, classes))}: regularisation data needs a prior: add prior=teacher (the base model's own "
            'prediction, as in SimpleTuner) or prior=noise; or set "disabled": true; or remove the flag to train on them as usual'
        )
    if pictures and len(classes) == len(pictures):
        yield "every image entry is regularisation data; no entry shows the subject"

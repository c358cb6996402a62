"""Known keys of SimpleTuner's dataset files that have no effect in their entry, and why. Each gives one notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .entry import COLUMN_STRATEGIES, Entry, folder_of, has_images, has_table, kind_of, place_of, strategy_of, type_of
from .keys import KEYS, NESTED, Key, Use

GEOMETRY = ("resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size",
            "minimum_aspect_ratio", "maximum_aspect_ratio", "max_upscale_threshold", "crop", "crop_aspect",
            "crop_aspect_buckets", "crop_style")  # fmt: skip
CUT = ("maximum_image_size", "target_downsample_size", "crop_aspect", "crop_aspect_buckets", "crop_style")
SAID = ("caption_strategy", "instance_prompt", "prepend_instance_prompt", "only_instance_prompt", "disable_multiline_split",
        "caption_column", "csv_caption_column")  # fmt: skip
TRAINED = ("repeats", "probability", "is_regularisation_data", "is_regularization_data")
TYPED = {
    "csv": ("csv_file", "csv_url_column", "csv_caption_column"),
    "aws": ("aws_bucket_name", "aws_data_prefix"),
    "huggingface": ("huggingface", "dataset_name", "split", "streaming", "image_column"),
}
FOLDER = ("instance_data_dir", "instance_data_root")
PLACED = (*(key for keys in TYPED.values() for key in keys), *FOLDER, "metadata_backend", "parquet")
PICTURED = (*GEOMETRY, *SAID, *TRAINED, *PLACED, "conditioning_data", "max_num_samples", "text_embeds")


class Rule(NamedTuple):
    keys: tuple[str, ...]
    holds: Callable[[Entry], bool]  # whether the keys have no effect in an entry
    why: str


def _kind(*kinds: str) -> Callable[[Entry], bool]:
    return lambda entry: kind_of(entry) in kinds


def _one_caption(entry: Entry) -> bool:
    return has_images(entry) and (strategy_of(entry) == "instanceprompt" or entry.get("only_instance_prompt") is True)


def _no_prompt(entry: Entry) -> bool:
    asks = entry.get("prepend_instance_prompt") or entry.get("only_instance_prompt")
    return has_images(entry) and strategy_of(entry) != "instanceprompt" and not asks


def _only(kind: str, keys: tuple[str, ...]) -> Rule:
    return Rule(keys, lambda entry: type_of(entry) != kind, f"only type={kind} reads it")


RULES = (
    Rule(PICTURED, _kind("text_embeds", "image_embeds"), "this entry is a cache and has no images"),
    Rule(("cache_dir_vae",), _kind("text_embeds", "conditioning"), "this entry has no latents"),
    Rule(("cache_dir",), _kind("image_embeds"), "latents are in the run's cache, or in an image entry's cache_dir_vae"),
    Rule(("cache_dir", "default"), _kind("image", "eval", "conditioning"), "it is a key of text_embeds entries"),
    Rule(GEOMETRY, _kind("conditioning"), "a mask has the same geometry as its image"),
    Rule(SAID, _kind("conditioning"), "a mask has no caption"),
    Rule((*TRAINED, "max_num_samples", "conditioning_data"), _kind("conditioning"), "a mask is used with its image"),
    Rule(("conditioning_type",), _kind("image", "eval", "text_embeds", "image_embeds"), "this entry contains no masks"),
    Rule(TRAINED, _kind("eval"), "eval images are never trained on"),
    Rule(("conditioning_data",), _kind("eval"), "the eval loss uses no masks"),
    Rule(CUT, lambda e: has_images(e) and e.get("crop") is not True, "without crop=true an image keeps its own aspect"),
    Rule(
        ("crop_aspect_buckets",),
        lambda e: e.get("crop_aspect") not in ("closest", "random"),
        "crop_aspect does not use them",
    ),
    Rule(("instance_prompt",), _no_prompt, "captions come from another source, and prepend_instance_prompt is not set"),
    Rule(("prepend_instance_prompt", "disable_multiline_split"), _one_caption, "the instance prompt is the whole caption"),
    Rule(("disable_multiline_split",), lambda e: strategy_of(e) != "textfile", "only captions of text files have lines"),
    Rule(
        ("caption_column", "csv_caption_column"),
        lambda e: strategy_of(e) not in COLUMN_STRATEGIES,
        "captions are not read from a column",
    ),
    *(_only(kind, keys) for kind, keys in TYPED.items()),
    Rule(
        FOLDER,
        lambda e: type_of(e) == "huggingface" and place_of(e) != folder_of(e),
        "dataset_name sets the location of the images",
    ),
    Rule(("parquet",), lambda e: not has_table(e), "only metadata_backend=parquet reads it"),
)


def unused_keys(entry: Entry) -> Iterator[tuple[str, str]]:
    """(key, why) for each; keys that are off or at their neutral value are skipped."""
    message: set[str] = set()
    for key, known in _known(entry):
        if known.use is Use.idle:
            yield key, known.why
    for rule in RULES:
        if rule.holds(entry):
            lines = [key for key in rule.keys if entry.get(key) not in (None, False) and key not in message]
            message.update(lines)
            yield from ((key, rule.why) for key in lines)


def _known(entry: Entry) -> Iterator[tuple[str, Key]]:
    yield from ((key, KEYS[key]) for key in entry if key in KEYS)
    for outer, legal in NESTED.items():
        nested: Any = entry.get(outer)
        if isinstance(nested, dict):
            yield from ((f"{outer}.{key}", legal[key]) for key in nested if key in legal)


def notices(named: list[tuple[str, Entry]]) -> list[str]:
    """One line for all keys without effect that have the same reason, in all entries."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, entry in named:
        by_why: dict[str, list[str]] = {}
        for key, why in unused_keys(entry):
            by_why.setdefault(why, []).append(key)
        for why, keys in by_why.items():
            lines.setdefault((", ".join(keys) + (" has" if len(keys) == 1 else " have"), why), []).append(name)
    return [
        f"{'entry' if len(names) == 1 else 'entries'} {', '.join(names)}: {keys} no effect here: {why}"
        for (keys, why), names in lines.items()
    ]

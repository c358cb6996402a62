"""The properties of an entry of a SimpleTuner dataset file, with SimpleTuner's defaults."""

from __future__ import annotations

from typing import Any

Entry = dict[str, Any]
COLUMN_STRATEGIES = ("parquet", "csv", "huggingface")
PLACE_KEYS = {"csv": "csv_file", "huggingface": "dataset_name", "aws": "aws_bucket_name"}


def text_of(entry: Entry, key: str, default: str) -> str:
    """A string or its default; other types are reported elsewhere, and give the default."""
    value = entry.get(key)
    return value if isinstance(value, str) else default


def kind_of(entry: Entry) -> str:
    return text_of(entry, "dataset_type", "image")


def type_of(entry: Entry) -> str:
    return text_of(entry, "type", "local")


def strategy_of(entry: Entry) -> str:
    return text_of(entry, "caption_strategy", "filename")


def has_images(entry: Entry) -> bool:
    return kind_of(entry) in ("image", "eval")


def is_class(entry: Entry) -> bool:
    return entry.get("is_regularisation_data") is True or entry.get("is_regularization_data") is True


def mask_entries(entry: Entry) -> list[Any]:
    asked = entry.get("conditioning_data")
    return [] if asked is None else asked if isinstance(asked, list) else [asked]


def options_of(entry: Entry) -> Entry:
    """The entry with the options of its table or hub dataset, wherever they are set."""
    nested = (part for part in (entry.get("parquet"), entry.get("huggingface")) if isinstance(part, dict))
    return {**entry, **{key: value for part in nested for key, value in part.items()}}


def has_table(entry: Entry) -> bool:
    """Whether images are listed in a parquet file instead of found in their folder."""
    return type_of(entry) in ("local", "aws") and entry.get("metadata_backend") == "parquet"


def folder_of(entry: Entry) -> str | None:
    return entry.get("instance_data_dir") or entry.get("instance_data_root")


def place_key(entry: Entry) -> str:
    """The key of an entry that sets the location of its images."""
    return PLACE_KEYS.get(type_of(entry), "instance_data_dir")


def place_of(entry: Entry) -> str | None:
    """The location of an entry's images; None if it is not set."""
    kind, folder = type_of(entry), folder_of(entry)
    if kind == "aws":
        bucket, prefix = entry.get("aws_bucket_name"), entry.get("aws_data_prefix") or folder or ""
        return bucket and f"s3://{bucket}/{prefix}".rstrip("/")
    if kind == "csv":
        return entry.get("csv_file")
    return options_of(entry).get("dataset_name") or folder if kind == "huggingface" else folder


def columns_of(entry: Entry) -> tuple[str, ...]:
    """The caption columns."""
    columns = entry.get("csv_caption_column") or options_of(entry).get("caption_column")
    return tuple(columns) if isinstance(columns, list) else (columns,) if columns else ()

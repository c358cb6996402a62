"""Every key of SimpleTuner's dataset files: its legal values, and how it is handled here."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple


class Use(Enum):
    honoured = "honoured"
    idle = "idle"  # has no effect here: one notice
    refused = "refused"  # changes the training and is not supported: refused unless it has its neutral value


class Key(NamedTuple):
    types: tuple[type, ...]
    use: Use = Use.honoured
    legal: tuple[Any, ...] = ()  # legal values; empty: any of its types
    why: str = ""
    neutral: tuple[Any, ...] = ()
    low: float | None = None  # minimum


TEXT, FLAG, WHOLE, NUMBER, LIST, TABLE = (str,), (bool,), (int,), (int, float), (list,), (dict,)


def unused(types: tuple[type, ...], why: str) -> Key:
    return Key(types, Use.idle, (), why)


def refused(types: tuple[type, ...], why: str, *neutral: Any) -> Key:
    return Key(types, Use.refused, (), why, neutral)


SCANNED = "images are listed again at every start, and only changed ones are read"
ADDRESSED = "caches are addressed by content, so entries can't be stale"
SCHEDULE = "a dataset is used during the whole run here; remove the key, and use two runs"
SCANNED_KINDS = ("discovery", "parquet", "csv", "huggingface", "json")

KEYS: dict[str, Key] = {
    "id": Key(TEXT),
    "type": Key(TEXT, legal=("local", "csv", "huggingface", "aws")),
    "dataset_type": Key(TEXT, legal=("image", "conditioning", "eval", "text_embeds", "image_embeds")),
    "disabled": Key(FLAG),
    "disable": Key(FLAG),
    "default": Key(FLAG),
    "instance_data_dir": Key(TEXT),
    "instance_data_root": Key(TEXT),
    "aws_bucket_name": Key(TEXT),
    "aws_data_prefix": Key(TEXT),
    "cache_dir_vae": Key(TEXT),
    "cache_dir": Key(TEXT),
    "csv_file": Key(TEXT),
    "csv_url_column": Key(TEXT),
    "csv_caption_column": Key(TEXT),
    "parquet": Key(TABLE),
    "huggingface": Key(TABLE),
    "dataset_name": Key(TEXT),
    "split": Key(TEXT),
    "streaming": Key(FLAG),
    "image_column": Key(TEXT),
    "caption_column": Key((str, list)),
    "caption_strategy": Key(TEXT, legal=("instanceprompt", "textfile", "filename", "parquet", "csv", "huggingface")),
    "instance_prompt": Key((str, list)),
    "prepend_instance_prompt": Key(FLAG),
    "only_instance_prompt": Key(FLAG),
    "disable_multiline_split": Key(FLAG),
    "metadata_backend": Key(TEXT, legal=SCANNED_KINDS),
    "repeats": Key(WHOLE, low=0),
    "probability": Key(NUMBER, low=0),
    "resolution": Key(NUMBER, low=1e-6),
    "resolution_type": Key(TEXT, legal=("pixel", "area", "pixel_area")),
    "minimum_image_size": Key(NUMBER, low=0),
    "maximum_image_size": Key(NUMBER, low=1e-6),
    "target_downsample_size": Key(NUMBER, low=1e-6),
    "minimum_aspect_ratio": Key(NUMBER, low=1e-6),
    "maximum_aspect_ratio": Key(NUMBER, low=1e-6),
    "max_upscale_threshold": Key(NUMBER, low=0),
    "crop": Key(FLAG),
    "crop_aspect": Key(TEXT, legal=("square", "preserve", "closest", "random")),
    "crop_aspect_buckets": Key(LIST),
    "crop_style": Key(TEXT, legal=("center", "centre", "random", "corner")),
    "is_regularisation_data": Key(FLAG),
    "is_regularization_data": Key(FLAG),
    "conditioning_data": Key((str, list)),
    "conditioning_type": Key(TEXT, legal=("mask",)),
    "max_num_samples": Key(WHOLE, low=1),
    "text_embeds": Key(TEXT),
    "image_embeds": unused(TEXT, "latents are in the run's cache, or in cache_dir_vae"),
    "skip_file_discovery": unused((str, list), SCANNED),
    "metadata_update_interval": unused(WHOLE, SCANNED),
    "preserve_data_backend_cache": unused(FLAG, ADDRESSED),
    "vae_cache_clear_each_epoch": unused(FLAG, "crops are drawn from cached variants (dataset.crop_variants)"),
    "vae_cache_ondemand": unused(FLAG, "every image is encoded before step 0, so problems are found before step 0"),
    "vae_cache_disable": unused(FLAG, "latents are always cached; the encoder is then freed"),
    "vae_cache_scan_behaviour": unused(TEXT, ADDRESSED),
    "scan_for_errors": unused(FLAG, "every image is always checked"),
    "delete_unwanted_images": unused(FLAG, "your files are never deleted; rejected images are listed"),
    "delete_problematic_images": unused(FLAG, "your files are never deleted; rejected images are listed"),
    "hash_filenames": unused(FLAG, ADDRESSED),
    "compress_cache": unused(FLAG, "cached tensors are stored uncompressed"),
    "write_batch_size": unused(WHOLE, "entries are written one by one, atomically"),
    "read_batch_size": unused(WHOLE, "entries are read when a batch needs them"),
    "image_processing_batch_size": unused(WHOLE, "images are encoded one by one, so latents don't depend on a batch"),
    "vae_batch_size": unused(WHOLE, "images are encoded one by one, so latents don't depend on a batch"),
    "disable_bucket_pruning": unused(FLAG, "no bucket is ever pruned"),
    "disable_validation": unused(FLAG, "validation has its own prompts"),
    "csv_cache_dir": unused(TEXT, "files are read from their original location"),
    "aws_endpoint_url": unused(TEXT, "s3fs takes it from AWS_ENDPOINT_URL"),
    "aws_region_name": unused(TEXT, "s3fs takes it from AWS_REGION"),
    "aws_access_key_id": unused(TEXT, "s3fs takes it from AWS_ACCESS_KEY_ID"),
    "aws_secret_access_key": unused(TEXT, "s3fs takes it from AWS_SECRET_ACCESS_KEY"),
    "source_dataset_id": unused(TEXT, "a mask belongs to the image entries that name it in conditioning_data"),
    "num_frames": unused(WHOLE, "video is not supported"),
    "train_batch_size": refused(WHOLE, "all datasets share dataset.batch_size; set it on the command line"),
    "start_epoch": refused(WHOLE, SCHEDULE, 0, 1),
    "end_epoch": refused(WHOLE, SCHEDULE),
    "start_step": refused(WHOLE, SCHEDULE, 0),
    "end_step": refused(WHOLE, SCHEDULE),
    "caption_shuffle": refused((dict, bool), "write the shuffled captions as lines of a text file", False),
    "caption_filter_list": refused((str, list), "clean the captions themselves"),
    "timestep_sampling_offset": refused(NUMBER, "all datasets share their timesteps", 0),
    "slider_strength": refused(NUMBER, "sliders are not supported"),
    "video": refused(TABLE, "video is not supported"),
    "audio": refused(TABLE, "audio is not supported"),
    "conditioning": refused((dict, list), "images derived from a dataset (edges, depth, references) are not supported"),
    "mask": refused(TABLE, "use a conditioning_data entry with conditioning_type=mask"),
}
NESTED = {
    "parquet": {
        "path": Key(TEXT), "filename_column": Key(TEXT), "caption_column": Key((str, list)),
        "fallback_caption_column": Key(TEXT), "width_column": unused(TEXT, "sizes are read from the images"),
        "height_column": unused(TEXT, "sizes are read from the images"),
        "identifier_includes_extension": unused(FLAG, "images are found with and without"),
    },
    "huggingface": {
        "image_column": Key(TEXT), "caption_column": Key((str, list)), "dataset_name": Key(TEXT), "split": Key(TEXT),
        "streaming": Key(FLAG),
    },
}  # fmt: skip

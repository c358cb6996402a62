"""Checks of the training data: dataset and prior."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from . import enums, file_rules
from .prompts import proposal
from .reader import Reader


def problems(read: Reader) -> Iterator[str | None]:
    yield from _data_problems(read)
    yield from _prior_problems(read)


def _data_problems(read: Reader) -> Iterator[str | None]:
    from_file = read("dataset.type") is enums.DatasetType.simpletuner
    yield _place_problem(read)
    if from_file:
        yield from file_rules.problems(read)
        return
    yield from _shape_problems(read)
    yield from _caption_and_mask_problems(read)


def _prior_problems(read: Reader) -> Iterator[str | None]:
    kind, source, path = read("prior.kind"), read("prior.source"), read("prior.path")
    if kind is None or not kind.has_class_rows or read("dataset.type") is enums.DatasetType.simpletuner:
        return
    if source is enums.PriorSource.folder and path is None:
        ways = "prior.path=FOLDER, prior.source=generated (by the base model), or prior=none"
        yield f"prior.path is null, but prior.kind={kind.name} needs class images; set {ways}"
    elif source is enums.PriorSource.folder:
        yield read.pictures("prior.path", "class images")
    elif path is not None and source is not None:
        yield f"prior.path is {path!r}, which prior.source={source.name} does not read; use prior.source=folder, or remove it"
    if source is not None and source.recaptions and kind is enums.PriorKind.noise:
        wrong = f"prior.kind is noise with prior.source={source.name}, which would train the class towards the subject"
        yield f"{wrong}; use prior=teacher or prior=bank"
    if not read("prior.prompt") and source is not enums.PriorSource.blank:
        yield 'prior.prompt is empty; set dataset.class_prompt="a photo of a dog" (the subject\'s class)'
    if read("prior.class_fraction") in (0, 1):
        yield f"prior.class_fraction is {read('prior.class_fraction')}; it must be between 0 and 1, or use prior=none"
    if kind is enums.PriorKind.bank and read("rollout.enabled"):
        off = "the bank's predictions are for noised samples without rollout"
        yield f"prior.kind is bank with rollout.enabled=true: {off}; use prior=teacher, or set rollout.enabled=false"


def _place_problem(read: Reader) -> str | None:
    place, kind = read("dataset.path"), read("dataset.type")
    if place is None or kind in (None, enums.DatasetType.huggingface):
        return None
    if kind is enums.DatasetType.folder:
        return read.pictures("dataset.path", "the subject's photos")
    what = "a SimpleTuner dataset file (.json)" if kind is enums.DatasetType.simpletuner else "a .csv or .parquet file"
    if Path(place).expanduser().is_file():
        return None
    state = "is a folder" if Path(place).expanduser().exists() else "does not exist"
    return f"dataset.path is {place!r}, which {state}; it must be {what}"


def _shape_problems(read: Reader) -> Iterator[str | None]:
    sizes, unit = read("dataset.resolutions"), read("dataset.resolution_type")
    least, what = (0.01, "area of 0.01") if unit is enums.ResolutionType.area else (16, "edge of 16 px")
    if sizes is not None and (not sizes or min(sizes) < least):
        yield f"dataset.resolutions is {sizes}; list at least one {what} or more"
    elif sizes is not None and unit is enums.ResolutionType.area and max(sizes) > 64:
        yield f"dataset.resolutions is {sizes} times 1024² px; for edges in px use dataset.resolution_type=pixel_area"
    random = read("dataset.crop") is enums.Crop.random or read("dataset.crop_aspect") is enums.CropAspect.random
    if read("dataset.crop_variants") not in (None, 1) and not random:
        several = f"dataset.crop_variants is {read('dataset.crop_variants')} with dataset.crop={read('dataset.crop').name}"
        yield f"{several}, which has only one; use dataset.crop=random"
    aspects, kind = read("dataset.crop_aspects"), read("dataset.crop_aspect")
    if kind in (enums.CropAspect.closest, enums.CropAspect.random) and not aspects:
        yield f"dataset.crop_aspects is empty with dataset.crop_aspect={kind.name}; list some, such as [0.75,1.0,1.33]"
    if aspects and kind in (enums.CropAspect.preserve, enums.CropAspect.square):
        yield f"dataset.crop_aspects is {aspects}, which dataset.crop_aspect={kind.name} does not read; use closest or random"
    if (read("dataset.maximum_image_size") is None) != (read("dataset.target_downsample_size") is None):
        yield "dataset.maximum_image_size and dataset.target_downsample_size must be set together; set both or neither"


def _caption_and_mask_problems(read: Reader) -> Iterator[str | None]:
    columns = read("dataset.type") in (enums.DatasetType.table, enums.DatasetType.huggingface)
    if read("dataset.caption") is enums.CaptionKind.column and not (columns and read("dataset.caption_column")):
        yield "dataset.caption is column; it needs dataset.caption_column=… and dataset.type=table or huggingface"
    yield from _unused_caption_keys(read)
    if read("dataset.streaming") and read("dataset.type") is not enums.DatasetType.huggingface:
        yield "dataset.streaming is true; only dataset.type=huggingface can be streamed"
    if lacks_prompt(read):
        line = shlex.quote(f"dataset.instance_prompt={proposal(read('dataset.class_prompt'))}")
        kind = "" if read("dataset.class_prompt") else " (with your subject's class instead of dog)"
        yield (
            f"dataset.instance_prompt is empty, so the photos have no caption; add {line}{kind}, or choose another source of "
            f"captions "
            "with dataset.caption=textfile (a.txt beside a.jpg), filename or column"
        )
    files = read("dataset.mask_from") is enums.MaskFrom.files
    if files and read("dataset.mask_path") is None:
        yield "dataset.mask_from is files; it needs dataset.mask_path=FOLDER"
    if read("dataset.mask_path") is not None and not files:
        prefix = f"dataset.mask_path is {read('dataset.mask_path')!r}"
        yield f"{prefix}, but dataset.mask_from={read('dataset.mask_from').name}; use files"
    else:
        yield read.pictures("dataset.mask_path", "masks")


def lacks_prompt(read: Reader) -> bool:
    """Whether captions need an instance prompt that is not set."""
    needs = read("dataset.caption") is enums.CaptionKind.instanceprompt or read("dataset.prepend_instance_prompt")
    return bool(
        (needs or read("dataset.only_instance_prompt")) and not read("dataset.instance_prompt") and not read("dataset.prompts")
    )


def _unused_caption_keys(read: Reader) -> Iterator[str]:
    """Keys that would be ignored, since captions come from another source."""
    kind, only, put_before = (read(f"dataset.{key}") for key in ("caption", "only_instance_prompt", "prepend_instance_prompt"))
    if kind is None:
        return
    prompt_alone = kind is enums.CaptionKind.instanceprompt or only
    if read("dataset.caption_column") is not None and (kind is not enums.CaptionKind.column or only):
        prefix = f"dataset.caption_column is {read('dataset.caption_column')!r}"
        yield f"{prefix}, but captions are not read from a column; use dataset.caption=column"
    if put_before and prompt_alone:
        yield "dataset.prepend_instance_prompt is true, but the instance prompt is the whole caption; remove it"
    if read("dataset.prompts") and not (prompt_alone or put_before):
        yield f"dataset.prompts is set, but dataset.caption={kind.name} ignores it; use dataset.prepend_instance_prompt=true"

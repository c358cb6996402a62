"""Dataset specifications as typed records, whatever their source. Imports no torch, so errors are reported fast."""

from __future__ import annotations

from typing import NamedTuple

from ..config import enums


class Where(NamedTuple):
    """Where images come from."""

    type: enums.DatasetType
    path: str  # a folder, an fsspec URL, a table, or a hub dataset
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ()
    root: str | None = None  # base of a table's relative paths; None: the table's own folder
    split: str = "train"
    streaming: bool = False
    fallback_column: str | None = None  # a table's caption column if the others are empty
    without: str | None = None  # a subfolder that is skipped: the masks'


class Shaping(NamedTuple):
    """How the training size of an image follows from its size. Sizes are in the unit of `unit`."""

    resolution: float
    unit: enums.ResolutionType = enums.ResolutionType.pixel_area
    minimum: float = 0
    maximum: float | None = None
    downsample: float | None = None  # images larger than `maximum` are downscaled to this before the crop
    aspect: enums.CropAspect = enums.CropAspect.preserve
    aspects: tuple[float, ...] = ()  # width / height, for closest and random
    place: enums.Crop = enums.Crop.center
    variants: int = 1  # number of cached crops, if they are random
    mirror: bool = False
    max_aspect: float = 4.0  # longest : shortest side; beyond it the image is cropped
    least_aspect: float | None = None  # width / height; beyond these the image is rejected
    most_aspect: float | None = None
    max_upscale: float | None = None


class Captions(NamedTuple):
    """The source of an image's captions; of several captions, each sample draws one."""

    kind: enums.CaptionKind
    prompts: tuple[str, ...] = ()
    prepend: bool = False
    only_prompt: bool = False
    whole_file: bool = False  # a text file is one caption, instead of one per line


class Masks(NamedTuple):
    """Where masks come from."""

    kind: enums.MaskFrom
    id: str  # of the dataset with the masks
    where: Where | None  # None: the images' own alpha channel


class DatasetSpec(NamedTuple):
    """Images from one location, with one shaping and captioning rule."""

    id: str
    where: Where
    captions: Captions
    shaping: Shaping
    is_class: bool = False
    is_eval: bool = False  # never trained on
    repeats: int = 0  # extra passes per epoch
    probability: float = 1.0  # multiplies the rows of an epoch
    share_shapes: bool = False  # class images get the shapes of the subject's photos
    masks: Masks | None = None
    most: int | None = None  # maximum number of images, chosen by id
    latents: str | None = None  # its own cache folder
    recaptioned: bool = False  # the subject's own photos with the class prompt, or without one
    named: str = "dataset.path"  # the key of its location, for messages


class DataPlan(NamedTuple):
    """The datasets of a run."""

    specs: list[DatasetSpec]
    notices: list[str]  # keys without effect
    texts: str | None = None  # its own cache folder for text embeddings

"""What each dataset is: one typed record, whatever it came from. Imports no torch: a wrong one is refused at once."""

from __future__ import annotations

from typing import NamedTuple

from ..config import enums


class Where(NamedTuple):
    """Where pictures come from."""

    type: enums.DatasetType
    path: str  # a folder, a URL of fsspec's, a table, or a dataset of the hub
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ()
    root: str | None = None  # what a table's relative paths are relative to; None: the table's own folder
    split: str = "train"
    streaming: bool = False
    fallback_column: str | None = None  # a table's captions where those columns are empty
    without: str | None = None  # a folder in it that is left out: the masks'


class Shaping(NamedTuple):
    """How a picture's size becomes the size it is trained at. Sizes are in the unit of `unit`."""

    resolution: float
    unit: enums.ResolutionType = enums.ResolutionType.pixel_area
    minimum: float = 0
    maximum: float | None = None
    downsample: float | None = None  # what larger pictures than `maximum` are shrunk to before the crop
    aspect: enums.CropAspect = enums.CropAspect.preserve
    aspects: tuple[float, ...] = ()  # width / height, for closest and random
    place: enums.Crop = enums.Crop.center
    variants: int = 1  # cached crops, where they are random
    mirror: bool = False
    max_aspect: float = 4.0  # longest : shortest side; beyond it the picture is cropped
    least_aspect: float | None = None  # width / height; beyond these the picture is rejected
    most_aspect: float | None = None
    max_upscale: float | None = None


class Captions(NamedTuple):
    """What a picture's captions are; of several, each sample draws one."""

    kind: enums.CaptionKind
    prompts: tuple[str, ...] = ()
    prepend: bool = False
    only_prompt: bool = False
    whole_file: bool = False  # a text file is one caption, rather than one a line


class Masks(NamedTuple):
    """Where masks come from."""

    kind: enums.MaskFrom
    id: str  # of the dataset that holds them
    where: Where | None  # None: the pictures' own alpha channel


class DatasetSpec(NamedTuple):
    """Pictures of one place, shaped and captioned in one way."""

    id: str
    where: Where
    captions: Captions
    shaping: Shaping
    is_class: bool = False
    is_eval: bool = False  # never trained on
    repeats: int = 0  # extra passes per epoch
    probability: float = 1.0  # multiplies the rows of an epoch
    share_shapes: bool = False  # class pictures take the shapes that the subject's photos have
    masks: Masks | None = None
    most: int | None = None  # at most so many pictures, chosen by id
    latents: str | None = None  # a cache folder of its own
    recaptioned: bool = False  # the subject's own photos under the class prompt
    named: str = "dataset.path"  # how the user said where, for messages


class DataPlan(NamedTuple):
    """Everything a run's dataset description says."""

    specs: list[DatasetSpec]
    notices: list[str]  # what was said but has no meaning here
    texts: str | None = None  # a cache folder for text embeddings of its own

"""What each dataset is: one typed record, whatever it came from. Imports no torch: a wrong one is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from ..config import CaptionKind, Crop, CropAspect, DatasetType, MaskFrom, PriorKind, PriorSource, ResolutionType


class Where(NamedTuple):
    """Where pictures come from."""

    type: DatasetType
    path: str  # a folder, a URL of fsspec's, a table, or a dataset of the hub
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ()
    root: str | None = None  # what a table's relative paths are relative to; None: the table's own folder
    split: str = "train"
    streaming: bool = False
    fallback_column: str | None = None  # a table's captions where those columns are empty


class Shaping(NamedTuple):
    """How a picture's size becomes the size it is trained at. Sizes are in the unit of `unit`."""

    resolution: float
    unit: ResolutionType = ResolutionType.pixel_area
    minimum: float = 0
    maximum: float | None = None
    downsample: float | None = None  # what larger pictures than `maximum` are shrunk to before the crop
    aspect: CropAspect = CropAspect.preserve
    aspects: tuple[float, ...] = ()  # width / height, for closest and random
    place: Crop = Crop.center
    variants: int = 1  # cached crops, where they are random
    mirror: bool = False
    max_aspect: float = 4.0  # longest : shortest side; beyond it the picture is cropped
    least_aspect: float | None = None  # width / height; beyond these the picture is rejected
    most_aspect: float | None = None
    max_upscale: float | None = None


class Captions(NamedTuple):
    """What a picture's captions are; of several, each sample draws one."""

    kind: CaptionKind
    prompts: tuple[str, ...] = ()
    prepend: bool = False
    only_prompt: bool = False
    whole_file: bool = False  # a text file is one caption, rather than one a line


class Masks(NamedTuple):
    """Where masks come from."""

    kind: MaskFrom
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
    named: str = "dataset.path"  # how the user said where, for messages


class DataPlan(NamedTuple):
    """Everything a run's dataset description says."""

    specs: list[DatasetSpec]
    notices: list[str]  # what was said but has no meaning here
    texts: str | None = None  # a cache folder for text embeddings of its own


def plan(cfg: DictConfig, classes: str | None = None) -> DataPlan:
    """The datasets of a checked configuration.

    Args:
        classes: the folder of class pictures, or its URL, where they are not a dataset file's.

    Raises:
        ConfigError: a dataset file is wrong; lists everything that is.
    """
    if cfg.dataset.type is DatasetType.simpletuner:
        from .simpletuner import read

        made = read(Path(cfg.dataset.path).expanduser(), cfg)
    else:
        made = DataPlan(_own(cfg, classes), [])
    return _with_eval(made, cfg)


def _with_eval(made: DataPlan, cfg: DictConfig) -> DataPlan:
    """With the folder of eval pictures, if there is one; without any eval dataset if nobody looks at them."""
    specs = [*made.specs, *_at_each_size(cfg, [_held_out(cfg)] if cfg.eval.path else [])]
    training = [spec for spec in specs if not spec.is_eval]
    watched = [spec._replace(most=min(spec.most or cfg.eval.num_images, cfg.eval.num_images)) for spec in specs if spec.is_eval]
    if cfg.eval.every_n_steps or cfg.eval.every_n_epochs:
        return made._replace(specs=training + watched)
    off = [f"{spec.id} is left alone: eval.every_n_steps and eval.every_n_epochs are both 0" for spec in watched]
    return made._replace(specs=training, notices=[*made.notices, *off])


def _held_out(cfg: DictConfig) -> DatasetSpec:
    where = Where(DatasetType.folder, str(cfg.eval.path))
    return DatasetSpec("eval", where, _captions(cfg), _shaping(cfg, 0), is_eval=True, named="eval.path")


def _captions(cfg: DictConfig) -> Captions:
    data = cfg.dataset
    prompts = tuple(data.prompts) or (data.instance_prompt,)
    return Captions(data.caption, prompts, data.prepend_instance_prompt, data.only_instance_prompt)


def _own(cfg: DictConfig, classes: str | None) -> list[DatasetSpec]:
    """The subject's photos at each resolution, then the class pictures at each resolution."""
    data, prior = cfg.dataset, cfg.prior
    columns = (data.caption_column,) if data.caption_column else ()
    where = Where(data.type, str(data.path), data.image_column, columns, None, data.split, data.streaming)
    made = [DatasetSpec("instance", where, _captions(cfg), _shaping(cfg, 0), repeats=data.repeats, masks=_masks(cfg))]
    if prior.kind is not PriorKind.none and (classes or prior.source is PriorSource.captions):
        said = Captions(CaptionKind.instanceprompt, (prior.prompt,))
        place = where if prior.source is PriorSource.captions else Where(DatasetType.folder, classes or "")
        made.append(
            DatasetSpec("class", place, said, _shaping(cfg, 0), True, share_shapes=True, named="prior.path", repeats=data.repeats)
        )
    return _at_each_size(cfg, made)


def _at_each_size(cfg: DictConfig, specs: list[DatasetSpec]) -> list[DatasetSpec]:
    suffix = _suffix(cfg.dataset.resolution_type)
    return [
        spec._replace(id=f"{spec.id}-{edge:g}{suffix}", shaping=_shaping(cfg, edge))
        for spec in specs
        for edge in cfg.dataset.resolutions
    ]


def _suffix(unit: ResolutionType) -> str:
    return "mp" if unit is ResolutionType.area else "px"


def _masks(cfg: DictConfig) -> Masks | None:
    data = cfg.dataset
    if data.mask_from is MaskFrom.none:
        return None
    files = data.mask_from is MaskFrom.files
    return Masks(data.mask_from, "masks", Where(DatasetType.folder, str(data.mask_path)) if files else None)


def _shaping(cfg: DictConfig, resolution: float) -> Shaping:
    data = cfg.dataset
    return Shaping(
        resolution, data.resolution_type, data.minimum_image_size, data.maximum_image_size, data.target_downsample_size,
        data.crop_aspect, tuple(data.crop_aspects), data.crop, data.crop_variants, data.flip, data.max_aspect,
        max_upscale=data.max_upscale,
    )  # fmt: skip

"""The datasets of a run, from its configuration or from SimpleTuner's dataset file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..config import enums
from . import simpletuner
from .spec import Captions, DataPlan, DatasetSpec, Masks, Shaping, Where


def plan(cfg: DictConfig, classes: str | None = None) -> DataPlan:
    """The datasets of a checked configuration.

    Args:
        classes: the folder of class images, or its URL, if they are not in a dataset file.

    Raises:
        ConfigError: a dataset file has errors; lists all of them.
    """
    if cfg.dataset.type is enums.DatasetType.simpletuner:
        made = simpletuner.read(Path(cfg.dataset.path).expanduser(), cfg)
    else:
        made = DataPlan(_own(cfg, classes), [])
    return _with_eval(made, cfg)


def _with_eval(made: DataPlan, cfg: DictConfig) -> DataPlan:
    """Add the folder of eval images, if there is one; remove all eval datasets if the eval loss is off."""
    specs = [*made.specs, *_at_each_size(cfg, [_held_out(cfg)] if cfg.eval.path else [])]
    training = [spec for spec in specs if not spec.is_eval]
    watched = [spec._replace(most=min(spec.most or cfg.eval.num_images, cfg.eval.num_images)) for spec in specs if spec.is_eval]
    if cfg.eval.every_n_steps or cfg.eval.every_n_epochs:
        return made._replace(specs=training + watched)
    off = [f"{spec.id} is not used: eval.every_n_steps and eval.every_n_epochs are both 0" for spec in watched]
    return made._replace(specs=training, notices=[*made.notices, *off])


def _held_out(cfg: DictConfig) -> DatasetSpec:
    where = Where(enums.DatasetType.folder, str(cfg.eval.path))
    return DatasetSpec("eval", where, _captions(cfg), _shaping(cfg, 0), is_eval=True, named="eval.path")


def _captions(cfg: DictConfig) -> Captions:
    data = cfg.dataset
    prompts = tuple(data.prompts) or (data.instance_prompt,)
    return Captions(data.caption, prompts, data.prepend_instance_prompt, data.only_instance_prompt)


def _own(cfg: DictConfig, classes: str | None) -> list[DatasetSpec]:
    """The subject's photos at each resolution, then the class images at each resolution."""
    data, prior = cfg.dataset, cfg.prior
    columns = (data.caption_column,) if data.caption_column else ()
    where = Where(data.type, str(data.path), data.image_column, columns, None, data.split, data.streaming)
    made = [DatasetSpec("instance", where, _captions(cfg), _shaping(cfg, 0), repeats=data.repeats, masks=_masks(cfg))]
    if prior.kind.has_class_rows and (classes or prior.source.recaptions):
        class_captions = Captions(enums.CaptionKind.instanceprompt, _class_prompts(cfg))
        recaptioned = prior.source.recaptions
        place = where if recaptioned else Where(enums.DatasetType.folder, classes or "")
        shared: dict[str, Any] = {
            "share_shapes": True,
            "repeats": data.repeats,
            "recaptioned": recaptioned,
            "named": "prior.path",
        }
        made.append(DatasetSpec("class", place, class_captions, _shaping(cfg, 0), True, **shared))
    return _at_each_size(cfg, made)


def _class_prompts(cfg: DictConfig) -> tuple[str, ...]:
    """What class rows say; each draws one. With `prior.source=blank` the empty prompt, and the class prompt if there is one."""
    blank = cfg.prior.source is enums.PriorSource.blank
    own = (cfg.prior.prompt,) if cfg.prior.prompt or not blank else ()
    return ("", *own) if blank else own


def _at_each_size(cfg: DictConfig, specs: list[DatasetSpec]) -> list[DatasetSpec]:
    suffix = _suffix(cfg.dataset.resolution_type)
    return [
        spec._replace(id=f"{spec.id}-{edge:g}{suffix}", shaping=_shaping(cfg, edge))
        for spec in specs
        for edge in cfg.dataset.resolutions
    ]


def _suffix(unit: enums.ResolutionType) -> str:
    return "mp" if unit is enums.ResolutionType.area else "px"


def _masks(cfg: DictConfig) -> Masks | None:
    data = cfg.dataset
    if data.mask_from is enums.MaskFrom.none:
        return None
    files = data.mask_from is enums.MaskFrom.files
    return Masks(data.mask_from, "masks", Where(enums.DatasetType.folder, str(data.mask_path)) if files else None)


def _shaping(cfg: DictConfig, resolution: float) -> Shaping:
    data = cfg.dataset
    return Shaping(
        resolution, data.resolution_type, data.minimum_image_size, data.maximum_image_size, data.target_downsample_size,
        data.crop_aspect, tuple(data.crop_aspects), data.crop, data.crop_variants, data.flip, data.max_aspect,
        max_upscale=data.max_upscale,
    )  # fmt: skip

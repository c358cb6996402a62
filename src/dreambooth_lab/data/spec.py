"""What each dataset is: one typed record, whatever the configuration group it came from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from ..config import Crop


class DatasetSpec(NamedTuple):
    """Pictures of one folder at one resolution."""

    id: str
    path: Path
    prompt: str
    is_class: bool
    resolution: int  # px; the area trained on is its square
    max_aspect: float
    minimum_image_size: int
    crops: int  # cached random crops per picture; 0 is the one in the centre
    mirror: bool


def specs(cfg: DictConfig, classes: Path | None) -> list[DatasetSpec]:
    """The subject's photos at each resolution, then the class pictures, in a folder of theirs, at each resolution."""
    data, prior = cfg.dataset, cfg.prior
    kinds = [("instance", data.path, data.instance_prompt, False)]
    if classes is not None:
        kinds.append(("class", classes, prior.prompt, True))
    crops = data.crop_variants if data.crop is Crop.random else 0
    return [
        DatasetSpec(
            f"{kind}-{edge}px",
            Path(path),
            prompt,
            is_class,
            edge,
            data.max_aspect,
            data.minimum_image_size,
            crops,
            data.flip,
        )
        for kind, path, prompt, is_class in kinds
        for edge in data.resolutions
    ]

"""Problems of a run on a dataset file: what only folders have is refused beside it rather than ignored."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from . import enums
from .compose import conf_dir
from .reader import Reader
from .schema import DatasetConfig, PriorConfig

READ = {"type", "path", "subject", "instance_prompt", "class_prompt", "max_aspect", "crop_variants", "flip", "caption_dropout",
        "aesthetic_score", "long_captions",
        "batch_size"}  # fmt: skip


def problems(read: Reader) -> Iterator[str | None]:
    yield from _duplicate_values(read)
    if read("prior.path") is not None:
        said = f"prior.path is {read('prior.path')!r}"
        yield f"{said}, but class pictures come from the dataset file (is_regularisation_data); unset it"
    if read("prior.kind") is enums.PriorKind.bank:
        yield "prior.kind is bank, which takes one class prompt and no dataset file; use prior=teacher"
    if read("prior.source") not in (None, enums.PriorSource.folder):
        said = f"prior.source is {read('prior.source').name}"
        yield f"{said}, but class pictures come from the dataset file (is_regularisation_data); leave it out"
    if read("prior.prompt") != read("dataset.class_prompt"):
        yield f"prior.prompt is {read('prior.prompt')!r}, but class captions come from the dataset file; leave it out"
    if (read("validation.every_n_steps") or read("validation.every_n_epochs")) and not any(read("validation.prompts") or []):
        yield "validation.prompts is empty, and the dataset file has no instance_prompt; set dataset.instance_prompt=…"


def _duplicate_values(read: Reader) -> Iterator[str]:
    """Keys that have another value than their group's files give them, though nothing reads them."""
    own = _files(DatasetConfig, "dataset/folder", "dataset/simpletuner")
    for key in map(str, own):
        value = read(f"dataset.{key}")
        if key not in READ and value != own[key]:
            yield f"dataset.{key} is {getattr(value, 'name', value)}, but the entries of the dataset file say it; set it there"
    share = read("prior.class_fraction")
    if share != _files(PriorConfig, "prior/none").class_fraction:
        yield f"prior.class_fraction is {share}, but the dataset file says how often class pictures come; leave it out"


def _files(schema: type, *names: str) -> DictConfig:
    """What the files of conf/ say, the later over the earlier."""
    said = (OmegaConf.load(conf_dir() / f"{name}.yaml") for name in names)
    own = ({key: one._get_node(key) for key in one if key != "defaults"} for one in said if isinstance(one, DictConfig))
    merged = OmegaConf.merge(OmegaConf.structured(schema), *own)
    assert isinstance(merged, DictConfig)
    return merged

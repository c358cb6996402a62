"""Checks of a run with a dataset file: keys that only apply to folders are refused instead of ignored."""

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
        prefix = f"prior.path is {read('prior.path')!r}"
        yield f"{prefix}, but class images come from the dataset file (is_regularisation_data); unset it"
    if read("prior.kind") is enums.PriorKind.bank:
        yield "prior.kind is bank, which needs one class prompt and does not work with a dataset file; use prior=teacher"
    if read("prior.source") not in (None, enums.PriorSource.folder):
        prefix = f"prior.source is {read('prior.source').name}"
        yield f"{prefix}, but class images come from the dataset file (is_regularisation_data); remove it"
    if read("prior.prompt") != read("dataset.class_prompt"):
        yield f"prior.prompt is {read('prior.prompt')!r}, but class captions come from the dataset file; remove it"
    if (read("validation.every_n_steps") or read("validation.every_n_epochs")) and not any(read("validation.prompts") or []):
        yield "validation.prompts is empty, and the dataset file has no instance_prompt; set dataset.instance_prompt=…"


def _duplicate_values(read: Reader) -> Iterator[str]:
    """Keys without effect whose value differs from the defaults of their group."""
    own = _files(DatasetConfig, "dataset/folder", "dataset/simpletuner")
    for key in map(str, own):
        value = read(f"dataset.{key}")
        if key not in READ and value != own[key]:
            yield f"dataset.{key} is {getattr(value, 'name', value)}, but the entries of the dataset file set it; set it there"
    share = read("prior.class_fraction")
    if share != _files(PriorConfig, "prior/none").class_fraction:
        yield f"prior.class_fraction is {share}, but the dataset file sets the share of class images; remove it"


def _files(schema: type, *names: str) -> DictConfig:
    """The values of files of conf/, where later files override earlier ones."""
    configs = (OmegaConf.load(conf_dir() / f"{name}.yaml") for name in names)
    own = ({key: one._get_node(key) for key in one if key != "defaults"} for one in configs if isinstance(one, DictConfig))
    merged = OmegaConf.merge(OmegaConf.structured(schema), *own)
    assert isinstance(merged, DictConfig)
    return merged

"""Hydra's search path and plugins of this project."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import dreambench
from .enums import SIMPLETUNER_QUANT
from .migrations import migrate_file
from .prompts import prompts_of
from .schema import Config

PLACES = (  # keys that may contain a local path
    "dataset.path", "dataset.mask_path", "prior.path", "cache", "adapter.init_from", "adapter.preset", "model.pretrained",
    "model.config", "model.tae", "eval.clip_model", "eval.dino_model", "eval.path", "eval.gallery", "validation.library",
)  # fmt: skip
LOCAL = "local:"  # prefix that replaces a local path in an export
PACKAGE = Path(__file__).resolve().parents[1]


def conf_dir() -> Path:
    """The folder of YAML files: inside the wheel, or at the root of a source checkout."""
    return next(p for p in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if p.is_dir())


class FileConfigSource(file_config_source.FileConfigSource):
    """Reads YAML files, including those with names of earlier versions. Hydra identifies sources by the name of their class."""

    def load_config(self, config_path: str) -> ConfigResult:
        found = super().load_config(config_path)
        if isinstance(found.config, DictConfig):
            tree: Any = OmegaConf.to_container(found.config, resolve=False)
            package = found.header.get("package") or "/".join(config_path.split("/")[:-1])
            found.config = OmegaConf.create(migrate_file(tree, "" if package == "_global_" else package.replace("/", ".")))
        return found


class ExperimentFolder(SearchPathPlugin):
    """Lets `experiment=NAME` find the pinned experiments, which are outside of conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("experiments", f"file://{conf_dir().parent / 'experiments'}")


ConfigStore.instance().store(name="schema", node=Config)
for theirs, ours in SIMPLETUNER_QUANT.items():
    ConfigStore.instance().store(group="quant", name=theirs, node={"defaults": [ours]})
Plugins.instance().register(ExperimentFolder)
SourcesRegistry.instance().types["file"] = FileConfigSource
OmegaConf.register_new_resolver("prompt_library", prompts_of, replace=True)
OmegaConf.register_new_resolver("dreambench_class", dreambench.class_of, replace=True)
OmegaConf.register_new_resolver("dreambench_prompts", dreambench.prompts_of, replace=True)
OmegaConf.register_new_resolver("package", lambda path: str(PACKAGE / path), replace=True)


def resolve_paths(cfg: DictConfig) -> DictConfig:
    """The same configuration with its local paths made absolute, so that it is independent of the working directory."""
    anchored = cfg.copy()
    for key in PLACES:
        value = None
        with suppress(OmegaConfBaseException, RecursionError):  # `check` reports unreadable values
            value = None if OmegaConf.is_missing(cfg, key) else OmegaConf.select(cfg, key)
        if value and (key == "cache" or Path(value).expanduser().exists()):
            OmegaConf.update(anchored, key, str(Path(value).expanduser().resolve()))
    return anchored

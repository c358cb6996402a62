"""Where Hydra finds the configurations, and what it learns from us."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from .choices import SIMPLETUNER_QUANT
from .prompts import prompts_of
from .schema import Config

PACKAGE = Path(__file__).resolve().parents[1]


def conf_dir() -> Path:
    """The folder of YAML files: inside the wheel, or at the root of a source checkout."""
    return next(p for p in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if p.is_dir())


class ExperimentFolder(SearchPathPlugin):
    """Lets `experiment=NAME` find the pinned experiments, which lie outside conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("experiments", f"file://{conf_dir().parent / 'experiments'}")


ConfigStore.instance().store(name="schema", node=Config)
for theirs, ours in SIMPLETUNER_QUANT.items():
    ConfigStore.instance().store(group="quant", name=theirs, node={"defaults": [ours]})
Plugins.instance().register(ExperimentFolder)
OmegaConf.register_new_resolver("prompt_library", prompts_of, replace=True)
OmegaConf.register_new_resolver("package", lambda path: str(PACKAGE / path), replace=True)


def anchor(cfg: DictConfig) -> DictConfig:
    """The same configuration with its local paths made absolute, so that it means the same from any folder."""
    anchored = cfg.copy()
    for key in (
        "dataset.path",
        "dataset.mask_path",
        "prior.path",
        "cache",
        "adapter.init_from",
        "adapter.preset",
        "model.pretrained",
        "model.tae",
        "eval.clip_model",
        "eval.dino_model",
        "eval.path",
        "validation.library",
    ):
        value = None if OmegaConf.is_missing(cfg, key) else OmegaConf.select(cfg, key)
        if value and (key == "cache" or Path(value).expanduser().exists()):
            OmegaConf.update(anchored, key, str(Path(value).expanduser().resolve()))
    return anchored

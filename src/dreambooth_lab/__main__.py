"""The command line: `python -m dreambooth_lab key=value …`. Imports no torch, so help and refusals are instant."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dreambooth_lab.config import ConfigError, anchor, check, conf_dir
from dreambooth_lab.data.simpletuner import first_prompt
from dreambooth_lab.data.spec import plan
from dreambooth_lab.runfolder import RunFolder, new_folder, take_up

OmegaConf.register_new_resolver("run_folder", new_folder, replace=True)
OmegaConf.register_new_resolver("dataset_file_prompt", first_prompt, replace=True)


def job(cfg: DictConfig) -> dict[str, float]:
    """Compose → check → run one job of Hydra's."""
    hydra_cfg = HydraConfig.get()
    cfg = anchor(cfg)
    if cfg.resume is not None:
        cfg = take_up(cfg, list(hydra_cfg.overrides.task))
    check(cfg)
    if cfg.trainer.devices > 1 and hydra_cfg.mode is RunMode.MULTIRUN:
        several = f"trainer.devices is {cfg.trainer.devices} in a sweep, whose jobs share this process"
        raise ConfigError(f"{several}; start them one by one (hydra.mode=RUN), or with trainer.devices=1")
    plan(cfg)  # a wrong dataset file is refused before torch and the rest load
    from dreambooth_lab.run import run  # torch and the rest load here

    try:
        return run(cfg, Path(hydra_cfg.runtime.output_dir))
    finally:
        gc.collect()  # the next job of a sweep shares this process


def _job_or_exit(cfg: DictConfig) -> dict[str, float] | None:
    """A refused single run ends with its message and code 2; in a sweep, Hydra goes on and reports it at the end."""
    try:
        return job(cfg)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        _drop_if_empty(Path(HydraConfig.get().runtime.output_dir))
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        folder = RunFolder(HydraConfig.get().runtime.output_dir)
        way_on = f"go on with: python -m dreambooth_lab resume={folder.root}" if folder.newest() else "no checkpoint yet"
        print(f"interrupted; {way_on}", file=sys.stderr)
        sys.exit(130)


def _drop_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def main() -> None:
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_job_or_exit)()


if __name__ == "__main__":
    main()

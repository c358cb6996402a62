"""`python -m dreambooth_lab.tools.pretrain_toybox stage=all`, or one of `ORDER`."""

from importlib import import_module
from pathlib import Path

import hydra
from omegaconf import DictConfig

CONF = Path(__file__).resolve().parents[4] / "conf" / "pretrain"
ORDER = ("vae", "polish", "latents", "evaluator", "unet", "scorer", "export", "judge", "pictures")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    import torch

    torch.set_flush_denormal(True)
    torch.set_num_threads(cfg.threads)
    for stage in ORDER if cfg.stage == "all" else (cfg.stage,):
        import_module(f"dreambooth_lab.tools.pretrain_toybox.{stage}").run(cfg)


if __name__ == "__main__":
    main()

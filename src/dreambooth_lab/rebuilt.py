"""A run's LightningModule and diffusers pipeline, rebuilt from its files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from .adapter import ExportWeights
from .callbacks.ema import Ema
from .callbacks.export import export_form
from .config import ConfigError
from .dreambooth import TOKEN, DreamBooth
from .factory import build_family, build_method
from .optimizer import check_installed
from .power_average import LONGEST, Share, coefficients, gamma_of
from .runfolder import RunFolder
from .trained import TrainedPipeline

AMPLIFICATION = 16.0  # largest sum of the factors' magnitudes with which half-precision snapshots are combined
SCHEDULE_FREE = "train_mode"  # in the state of optimisers with separate evaluation weights
Which = Literal["last", "best"] | int | Path | str  # a checkpoint: by name, optimiser step, or file


def here(cfg: DictConfig) -> DictConfig:
    """A run's configuration, changed to one process on this machine."""
    own = cfg.copy()
    own.trainer.devices = own.trainer.num_nodes = 1
    own.trainer.accelerator = own.trainer.accelerator if torch.cuda.is_available() else "cpu"
    own.adapter.init_from = None  # the checkpoint contains all trained weights
    return own


def checkpoint_of(folder: RunFolder, which: Which) -> Path:
    """The file of a checkpoint.

    Raises:
        ConfigError: there is none; names the existing ones.
    """
    if which == "last":
        return folder.newest_readable()[0]
    best = folder.best()
    steps = {int(path.stem.removeprefix("step_")): path for path in folder.all_checkpoints()}
    path = (best[0] if best else None) if which == "best" else steps.get(which) if isinstance(which, int) else Path(which)
    if path is None or not path.is_file():
        known = [*map(str, steps), *(["'best'"] if best else [])]
        raise ConfigError(f"checkpoint is {which!r}, but {str(folder.root)!r} has {', '.join(known) or 'none'}")
    return path


def module(cfg: DictConfig, checkpoint: Path, ema: bool = False) -> DreamBooth:
    """The method with the weights of a checkpoint, in evaluation mode.

    With a schedule-free optimiser these are the evaluation weights, which are exported, not those at which it computes gradients.

    Raises:
        ConfigError: the file is damaged or of another configuration, or holds no average.
    """
    kept = _read(checkpoint)
    own = here(cfg)
    made, _ = build_method(own, build_family(own))
    learning, weights = made.optimized_parameters(), kept["state_dict"]
    if ema:
        learning, weights = made.trainable_parameters(), kept["callbacks"].get(Ema.__qualname__, {}).get("shadow")
    if weights is None:
        raise ConfigError(f"{str(checkpoint)!r} holds no average of the weights; the run had ema.enabled=false")
    if strange := sorted(learning.keys() ^ weights.keys()):
        raise ConfigError(f"{str(checkpoint)!r} does not match this configuration: one of them lacks {strange[0]}")
    _put(learning, weights)
    if not ema:
        _evaluated(made, kept["optimizer_states"][0])
    return made.eval()


def averages(folder: RunFolder, lengths: Sequence[float], step: int | None = None) -> tuple[int, list[dict[str, Tensor]]]:
    """Averages of the trained weights over lengths σ_rel, from the snapshots of a run with `ema.lengths`, and their step.

    Args:
        step: at which they end, any one of the snapshots'; None: the last.

    Raises:
        ConfigError: there are no snapshots of that step, or a length is out of range or too short for them.
    """
    kept = folder.snapshots()
    steps = sorted({at for at, _ in kept})
    if not steps or step not in (None, *steps):
        known = f"it has some of the steps {', '.join(map(str, steps))}" if steps else "train with ema.lengths=[0.05,0.1]"
        raise ConfigError(f"{str(folder.root)!r} has no snapshots of averages{f' of step {step}' if step else ''}; {known}")
    if strange := [length for length in lengths if not 0 < length <= LONGEST]:
        raise ConfigError(f"length is {strange[0]:g}; it must be above 0 and at most {LONGEST}")
    end = step or steps[-1]
    shares = [Share(at, gamma_of(length)) for at, length in kept]
    factors = [coefficients(shares, Share(end, gamma_of(length))) for length in lengths]
    for length, x in zip(lengths, factors, strict=True):
        if sum(map(abs, x)) > AMPLIFICATION:
            raise ConfigError(
                f"length is {length:g}, which these snapshots are too long and too far apart for: their rounding errors would be "
                "amplified; choose a longer one, or train with shorter ema.lengths or a smaller ema.snapshot_every_n_steps"
            )
    found: list[dict[str, Tensor]] = [{} for _ in lengths]
    for number, path in enumerate(kept.values()):
        for name, weight in load_file(path).items():
            for average, x in zip(found, factors, strict=True):
                average[name] = x[number] * weight.float() + average.get(name, 0)
    return end, found


def put(made: DreamBooth, weights: Mapping[str, Tensor]) -> None:
    """Give a module other trainable weights.

    Raises:
        ConfigError: they are not its own.
    """
    learning = made.trainable_parameters()
    if strange := sorted(learning.keys() ^ weights.keys()):
        raise ConfigError(f"the snapshots do not match this configuration: one of them lacks {strange[0]}")
    _put(learning, weights)


def pipeline(cfg: DictConfig, checkpoint: Path, ema: bool = False) -> Any:
    """The base model's diffusers pipeline with the weights of a checkpoint, which are exported and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        _export(module(cfg, checkpoint, ema), Path(folder))
        return TrainedPipeline(here(cfg), Path(folder)).pipeline


def _read(checkpoint: Path) -> dict[str, Any]:
    """Load tensors and plain values; no code in the file is run."""
    try:
        kept = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return {name: kept[name] for name in ("state_dict", "callbacks", "optimizer_states")}
    except (RuntimeError, KeyError, TypeError, EOFError, ValueError, UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"{str(checkpoint)!r} is damaged, or is not a checkpoint of a run ({reason})") from error


@torch.no_grad()
def _put(learning: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in learning.items():
        parameter.copy_(weights[name])


def _evaluated(made: DreamBooth, state: dict[str, Any]) -> None:
    """Switch to the average of a schedule-free optimiser, the only kind that is built here."""
    if SCHEDULE_FREE not in state["param_groups"][0]:
        return
    check_installed(made.cfg.optimizer)  # the name of its class comes with the run
    optimizer: Any = made.configure_optimizers()["optimizer"]
    optimizer.load_state_dict(state)
    optimizer.eval()


def _export(made: DreamBooth, folder: Path) -> None:
    """The files that `TrainedPipeline` reads."""
    family, owned = made.family, made.by_owner(made.trainable_parameters())
    token, own = owned.pop(TOKEN, None), owned.pop(family.denoiser_part)
    form = export_form(made.cfg, family)
    made.adapter.export(folder, ExportWeights(family.denoiser_part, own, owned, {}, family.kohya, form))
    if token and made.text and made.text.token:
        family.save_token(folder, made.text.token.word, list(token.values()), {})

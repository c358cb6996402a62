"""A checkpoint in one .safetensors file, converted once into a folder in diffusers' layout."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open

from ..config import ConfigError, enums
from ..storage.digests import digest
from ..storage.durable import apply_umask
from . import hub, weights

log = logging.getLogger(__name__)

REFUSED = (".ckpt", ".pt", ".pth", ".bin")
V, EPSILON = enums.Prediction.v_prediction, enums.Prediction.epsilon
HEADERS = {"v": V, "v_prediction": V, "epsilon": EPSILON, "eps": EPSILON}  # modelspec.prediction_type
VERSION = "1"  # of the conversion; part of every folder's name
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_single_file(pretrained: str) -> bool:
    """Is it a file, or the name of one?

    Raises:
        ConfigError: of a kind that is never read.
    """
    path = Path(pretrained).expanduser()
    if path.suffix in REFUSED and not path.is_dir():
        raise ConfigError(
            f"model.pretrained is {pretrained!r}; pickles can run code and are never read; take the checkpoint's .safetensors"
        )
    return path.suffix == ".safetensors" and not path.is_dir()


def convert(pretrained: str, config: str | None, prediction: enums.Prediction | None, cache: Path | None) -> Path:
    """The folder of a file's pipeline, made where the cache has none.

    Args:
        config: folder or hub id whose settings and tokenizers the file goes with.
        prediction: what the network predicts; None: as the file says, or as the settings do.
        cache: its folder `single_files` keeps what was made.

    Raises:
        ConfigError: something is lacking or can't be read.
    """
    file, said = Path(pretrained).expanduser(), f"model.pretrained is {pretrained!r}"
    if not file.is_file():
        raise ConfigError(f"{said}, which is not there; set it to a .safetensors file, a folder or a hub id")
    if config is None:
        raise ConfigError(
            f"{said}, a single file, and model.config is null; set model.config to the folder or hub id, in diffusers' "
            "layout, of the model it was made from, such as stabilityai/stable-diffusion-xl-base-1.0 (its weights are not read)"
        )
    if cache is None:
        raise ConfigError(f"{said}, a single file, which is converted into a cache, and there is none; set cache to a folder")
    settings = _settings(config)
    told = _scheduler(file, prediction, said)
    folder = cache / "single_files" / _key(file, settings, told, cache)
    return folder if (folder / hub.INDEX).is_file() else _make(file, settings, told, folder, said)


def _settings(config: str) -> Path:
    """The folder that settings and tokenizers are read from."""
    folder = Path(config).expanduser()
    if not folder.is_dir():
        folder = hub.settings(config)
    if not (folder / hub.INDEX).is_file():
        raise ConfigError(
            f"model.config is {config!r}, which has no {hub.INDEX}; set it to a folder or hub id in diffusers' layout"
        )
    return folder


def _scheduler(file: Path, prediction: enums.Prediction | None, said: str) -> dict[str, Any]:
    """What the file, or the configuration, says of how the model was trained: settings of its scheduler."""
    try:
        with safe_open(file, "pt") as opened:
            names, header = set(opened.keys()), opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{said}, which can't be read ({error}); fetch the file again") from error
    written = header.get("modelspec.prediction_type")
    own = V if "v_pred" in names else HEADERS.get(str(written))
    if prediction and own and prediction is not own:
        log.warning("%s, which says that it predicts %s; model.prediction_type=%s is used", said, own.value, prediction.value)
    if written and not own and not prediction:
        raise ConfigError(f"{said}, whose header has prediction_type {written!r}; set model.prediction_type to what it means")
    used = prediction or own
    told: dict[str, Any] = {"prediction_type": used.value} if used else {}
    if "ztsnr" in names:
        told |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return told


def _key(file: Path, settings: Path, told: dict[str, Any], cache: Path) -> str:
    """A hash of all that the folder depends on."""
    words = [VERSION, digest(file, cache), json.dumps(told, sort_keys=True)]
    words += [f"{path.relative_to(settings)} {digest(path, None)}" for path in _small(settings)]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]


def _dtype(file: Path) -> torch.dtype:
    """The one that most of a file's tensors have."""
    with safe_open(file, "pt") as opened:
        kinds = [opened.get_slice(name).get_dtype() for name in opened.keys()]  # noqa: SIM118
    return DTYPES.get(max(set(kinds), key=kinds.count), torch.float32)


def _make(file: Path, settings: Path, told: dict[str, Any], folder: Path, said: str) -> Path:
    """Convert beside the place, and move there what is whole."""
    aside = folder.with_name(f"{folder.name}.{uuid4().hex[:12]}.part")  # not by tempfile, whose folders are their maker's alone
    aside.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory() as bare:
            _read(file, _without_weights(settings, Path(bare) / "settings"), said).save_pretrained(aside)
        path = aside / "scheduler" / "scheduler_config.json"
        if told:
            path.write_text(json.dumps(weights.read_json(path, said) | told, indent=2))
        apply_umask(aside)
        if not (folder / hub.INDEX).is_file():  # another process may have been first
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _without_weights(settings: Path, to: Path) -> Path:
    """A copy of the small files: what the single file lacks must not come from another model, or from a pickle."""
    for path in _small(settings):
        (to / path.relative_to(settings)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / path.relative_to(settings))
    return to


def _small(settings: Path) -> list[Path]:
    return sorted(path for path in settings.rglob("*") if path.is_file() and path.suffix in weights.SMALL)


def _read(file: Path, settings: Path, said: str) -> Any:
    """The pipeline that the file holds, in the file's own dtype."""
    import diffusers

    index = weights.read_json(settings / hub.INDEX, "model.config")
    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if not hasattr(kind, "from_single_file"):
        raise ConfigError(
            f"{said}, and model.config is a {index.get('_class_name')}, which is read from no single file; use a folder"
        )
    absent = {part: None for part in weights.LEFT_OUT if part in index}
    try:
        return kind.from_single_file(str(file), config=str(settings), torch_dtype=_dtype(file), local_files_only=True, **absent)
    except Exception as error:  # diffusers raises what a missing tensor leads to
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:160]
        raise ConfigError(
            f"{said}, which does not hold a whole {kind.__name__} of model.config's sizes ({type(error).__name__}: {reason}); "
            "set model.config to the model that the file was made from"
        ) from error

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
    """Whether it is the path of a single file.

    Raises:
        ConfigError: the format is never read.
    """
    path = Path(pretrained).expanduser()
    if path.suffix in REFUSED and not path.is_dir():
        raise ConfigError(
            f"model.pretrained is {pretrained!r}; pickles can run code and are never read; use the checkpoint's .safetensors"
        )
    return path.suffix == ".safetensors" and not path.is_dir()


def convert(pretrained: str, config: str | None, prediction: enums.Prediction | None, cache: Path | None) -> Path:
    """The folder of a file's pipeline, converted if the cache has none.

    Args:
        config: folder or hub id with the file's configs and tokenizers.
        prediction: the prediction type; None: from the file, or from the configs.
        cache: its folder `single_files` stores the converted pipelines.

    Raises:
        ConfigError: a file is missing or can't be read.
    """
    file, prefix = Path(pretrained).expanduser(), f"model.pretrained is {pretrained!r}"
    if not file.is_file():
        raise ConfigError(f"{prefix}, which does not exist; set it to a .safetensors file, a folder or a hub id")
    if config is None:
        raise ConfigError(
            f"{prefix}, a single file, and model.config is null; set model.config to the folder or hub id, in diffusers' "
            "layout, of its base model, such as stabilityai/stable-diffusion-xl-base-1.0 (its weights are not read)"
        )
    if cache is None:
        raise ConfigError(
            f"{prefix}, a single file, which must be converted into a cache, but cache is not set; set cache to a folder"
        )
    settings = _settings(config)
    scheduler_settings = _scheduler(file, prediction, prefix)
    folder = cache / "single_files" / _key(file, settings, scheduler_settings, cache)
    return folder if (folder / hub.INDEX).is_file() else _make(file, settings, scheduler_settings, folder, prefix)


def _settings(config: str) -> Path:
    """The folder of the configs and tokenizers."""
    folder = Path(config).expanduser()
    if not folder.is_dir():
        folder = hub.settings(config)
    if not (folder / hub.INDEX).is_file():
        raise ConfigError(
            f"model.config is {config!r}, which has no {hub.INDEX}; set it to a folder or hub id in diffusers' layout"
        )
    return folder


def _scheduler(file: Path, prediction: enums.Prediction | None, prefix: str) -> dict[str, Any]:
    """Settings of the scheduler for the model's training, from the file or the configuration."""
    try:
        with safe_open(file, "pt") as opened:
            names, header = set(opened.keys()), opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{prefix}, which can't be read ({error}); download the file again") from error
    written = header.get("modelspec.prediction_type")
    own = V if "v_pred" in names else HEADERS.get(str(written))
    if prediction and own and prediction is not own:
        log.warning(
            "%s, whose header states the prediction type %s; model.prediction_type=%s is used instead",
            prefix,
            own.value,
            prediction.value,
        )
    if written and not own and not prediction:
        raise ConfigError(f"{prefix}, whose header has prediction_type {written!r}; set model.prediction_type to its meaning")
    used = prediction or own
    values: dict[str, Any] = {"prediction_type": used.value} if used else {}
    if "ztsnr" in names:
        values |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return values


def _key(file: Path, settings: Path, values: dict[str, Any], cache: Path) -> str:
    """A hash of everything that the folder depends on."""
    words = [VERSION, digest(file, cache), json.dumps(values, sort_keys=True)]
    words += [f"{path.relative_to(settings)} {digest(path, None)}" for path in _small(settings)]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]


def _dtype(file: Path) -> torch.dtype:
    """The most common dtype of a file's tensors."""
    with safe_open(file, "pt") as opened:
        kinds = [opened.get_slice(name).get_dtype() for name in opened.keys()]  # noqa: SIM118
    return DTYPES.get(max(set(kinds), key=kinds.count), torch.float32)


def _make(file: Path, settings: Path, values: dict[str, Any], folder: Path, message: str) -> Path:
    """Convert into a temporary folder, and move it when complete."""
    aside = folder.with_name(f"{folder.name}.{uuid4().hex[:12]}.part")  # not by tempfile, whose folders are private to their user
    aside.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory() as bare:
            _read(file, _without_weights(settings, Path(bare) / "settings"), message).save_pretrained(aside)
        path = aside / "scheduler" / "scheduler_config.json"
        if values:
            path.write_text(json.dumps(weights.read_json(path, message) | values, indent=2))
        apply_umask(aside)
        if not (folder / hub.INDEX).is_file():  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _without_weights(settings: Path, to: Path) -> Path:
    """Copy only the small files: missing weights must not come from another model, or from a pickle."""
    for path in _small(settings):
        (to / path.relative_to(settings)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / path.relative_to(settings))
    return to


def _small(settings: Path) -> list[Path]:
    return sorted(path for path in settings.rglob("*") if path.is_file() and path.suffix in weights.SMALL)


def _read(file: Path, settings: Path, prefix: str) -> Any:
    """The file's pipeline, in the file's own dtype."""
    import diffusers

    index = weights.read_json(settings / hub.INDEX, "model.config")
    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if not hasattr(kind, "from_single_file"):
        raise ConfigError(
            f"{prefix}, and model.config is a {index.get('_class_name')}, which can't be read from a single file; use a folder"
        )
    absent = {part: None for part in weights.LEFT_OUT if part in index}
    try:
        return kind.from_single_file(str(file), config=str(settings), torch_dtype=_dtype(file), local_files_only=True, **absent)
    except Exception as error:  # diffusers raises various exceptions for missing tensors
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:160]
        raise ConfigError(
            f"{prefix}, which does not contain a complete {kind.__name__} of model.config's sizes ({type(error).__name__}: "
            f"{reason}); "
            "set model.config to the file's base model"
        ) from error

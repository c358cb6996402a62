"""Metadata in the headers of exported files: full, public or none (`export.metadata`)."""

from __future__ import annotations

import base64
import getpass
import io
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from .. import __version__
from ..config import LOCAL, PLACES, enums, saved
from ..models.family import Spec

AWAY = ("webhook", "logger")  # groups without influence on the result, with private addresses and accounts
THUMBNAIL = 256  # px, the longer side


class Described(NamedTuple):
    """Data of a header besides the configuration."""

    name: str  # the name shown by other programs
    spec: Spec  # their names of the base model
    kind: str  # the kind of the files: lora, textual-inversion; "": a model
    prediction: enums.Prediction | None
    tags: Mapping[str, Mapping[str, int]]  # dataset → tag → number of images
    thumbnail: Path | None
    step: int
    digest: str


def header(cfg: DictConfig, export: Described) -> dict[str, str]:
    """The header of an export's safetensors files. With `export.metadata=none` only the fields by which programs list it."""
    if cfg.export.metadata is enums.Metadata.none:
        return _sorting(export)
    shown = public(cfg)
    return {
        **_sorting(export),
        **_shown(cfg, export, shown.model.pretrained.removeprefix(LOCAL)),
        "base_model": shown.model.pretrained,
        "instance_prompt": cfg.dataset.instance_prompt,
        "steps": str(export.step),
        "made_by": f"dreambooth-lab {__version__}",
        "weights_sha256": export.digest,
        "config": saved.dump(shown),
    }


def _sorting(export: Described) -> dict[str, str]:
    """Fields by which A1111 (`ss_`: sd-scripts') and Forge (`modelspec.`: Stability's ModelSpec 1.0.1) list a file under its base
    model, and its displayed name; A1111 hides files without them."""
    spec = export.spec
    made = {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": spec.implementation, "ss_output_name": export.name}
    if spec.architecture:
        made["modelspec.architecture"] = f"{spec.architecture}/{export.kind}" if export.kind else spec.architecture
    if spec.version:
        made |= {"ss_base_model_version": spec.version, "ss_v2": str(spec.version.startswith("sd_v2"))}
    return made


def _shown(cfg: DictConfig, export: Described, base: str) -> dict[str, str]:
    """Fields that these programs display."""
    edge, prompt = cfg.model.resolution, cfg.dataset.instance_prompt
    made = {
        "modelspec.title": export.name,
        "modelspec.description": f"DreamBooth: {prompt!r}, {export.step:,} steps on {base}",
        "modelspec.trigger_phrase": prompt,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{edge}x{edge}",
        "ss_sd_model_name": base,
        "ss_resolution": f"({edge}, {edge})",
        "ss_steps": str(export.step),
        "ss_tag_frequency": json.dumps(export.tags, ensure_ascii=False),
    }
    if export.prediction:
        made["modelspec.prediction_type"] = "v" if export.prediction is enums.Prediction.v_prediction else "epsilon"
    if export.thumbnail:
        made["modelspec.thumbnail"] = thumbnail(export.thumbnail)
    return made


def thumbnail(picture: Path) -> str:
    """An image as a small JPEG in a data URI."""
    stream = io.BytesIO()
    with Image.open(picture) as opened:
        small = opened.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def public(cfg: DictConfig) -> DictConfig:
    """The published part of a configuration: without webhooks; unless full, also without loggers, accounts and local paths."""
    published: Any = OmegaConf.to_container(cfg, resolve=True)
    del published["webhook"]
    if cfg.export.metadata is not enums.Metadata.full:
        published = {group: _nameless(group, value) for group, value in published.items() if group not in AWAY}
        published["export"] |= {"push_to_hub": False, "repo": None}
    made = OmegaConf.create(saved.literal(published))
    assert isinstance(made, DictConfig)
    return made


def _nameless(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _nameless(f"{key}.{name}", child) for name, child in value.items()}
    if isinstance(value, list):
        return [_nameless(key, child) for child in value]
    return place(value, key) if isinstance(value, str) else value


def place(text: str, key: str) -> str:
    """A local path is shortened to its last component, and marked as local if a model or preset is read from it;
    a URL loses its user and query; other values are unchanged."""
    if "://" in text and not text.startswith("file://"):
        parts = urlsplit(text)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")) if " " not in text else text
    is_path = text.startswith(("/", "~", "./", "../", "file://", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", text)
    if not is_path and not (key in PLACES and text and Path(text).expanduser().exists()):
        return text
    last = re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    last = "home" if last in ("", "~", Path.home().name, _user()) else last
    return f"{LOCAL}{last}" if key.startswith(("model.", "adapter.preset")) else last


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without user accounts
        return ""


def strip(folder: Path) -> None:
    """Remove local paths from the settings that libraries wrote into an export (`_name_or_path` and similar keys)."""
    for file in folder.rglob("*.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            continue
        kept = {
            name: place(value, "model.pretrained") if isinstance(value, str) and name.endswith("name_or_path") else value
            for name, value in settings.items()
        }
        if kept != settings:
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

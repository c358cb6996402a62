"""The two files beside a configuration: the datasets' and LyCORIS'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...config import NOT_LYCORIS, ON_LYCORIS, read_lycoris_file
from ...data.simpletuner.entry import is_class
from .values import NoEffect, Options, Refused, Settings

ADAPTERS = {"lora": "locon", "locon": "locon", "loha": "loha", "lokr": "lokr", "diag-oft": "oft"}  # of conf/adapter
LYCORIS_DEFAULT = "config/lycoris_config.json"  # SimpleTuner's


def is_lycoris(options: Options) -> bool:
    return options.get("model_type") != "full" and options.get("lora_type") == "lycoris"


def datasets(value: Any, _: Options) -> Settings:
    """A dataset file is used unchanged; the targets of regularisation sets are the base model's predictions, as in
    SimpleTuner."""
    if value is None:
        return {"/dataset": "simpletuner"}  # its path is then missing, which is reported
    prior = {"/prior": "teacher"} if _has_classes(Path(str(value))) else {}
    return {"/dataset": "simpletuner", "dataset.path": str(value), **prior}


def _has_classes(path: Path) -> bool:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False  # reading the dataset file reports the error
    if not isinstance(entries, list):
        return False
    return any(is_class(entry) for entry in entries if isinstance(entry, dict) and not entry.get("disabled"))


def lycoris(value: Any, options: Options) -> Settings:
    """The file is used unchanged; its algorithm determines the adapter."""
    if not is_lycoris(options):
        raise NoEffect("is read with lora_type=lycoris")
    settings: Settings = {"/adapter": "lokr", "adapter.preset": str(value)}
    try:
        algorithm = str(read_lycoris_file(str(value)).get("algo", "lokr"))
    except ValueError:
        return settings  # the check of the written experiment reports the error
    if algorithm in NOT_LYCORIS:
        raise Refused(f"{value} has algo {algorithm!r}, which LyCORIS {NOT_LYCORIS[algorithm]}")
    if algorithm not in ON_LYCORIS:
        raise Refused(f"{value} has algo {algorithm!r}; LyCORIS has {', '.join(ON_LYCORIS)}")
    if algorithm in ADAPTERS:
        return settings | {"/adapter": ADAPTERS[algorithm]}
    return settings | {"adapter.algorithm": algorithm}

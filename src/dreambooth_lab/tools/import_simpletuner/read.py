"""The options of a SimpleTuner configuration: config.json, config.toml or config.env. Nothing in a file is executed."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

from ...config import ConfigError
from .values import Options

EXTRA = "TRAINER_EXTRA_ARGS"  # of a config.env: options as on a command line
ENV_NAMES = {  # of a config.env, where the name is not the option's in capitals
    "DATALOADER_CONFIG": "data_backend_config", "TRAINING_SEED": "seed", "MINIMUM_RESOLUTION": "minimum_image_size",
    "MAX_NUM_STEPS": "max_train_steps", "NUM_EPOCHS": "num_train_epochs", "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "HUB_MODEL_NAME": "hub_model_id", "MODEL_NAME": "pretrained_model_name_or_path", "LR_SCHEDULE": "lr_scheduler",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub", "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "USE_XFORMERS": "enable_xformers_memory_efficient_attention", "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_NUM_MACHINES": "num_machines", "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
    "TRAINER_DYNAMO_BACKEND": "dynamo_backend", "RESUME_CHECKPOINT": "resume_from_checkpoint",
}  # fmt: skip
ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)(\+?=)(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}|\$([A-Za-z_]\w*)")


def read(path: Path) -> Options:
    """The options of a file, without their leading dashes.

    Raises:
        ConfigError: it can't be read, or is not of its format.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} can't be read ({error}); give SimpleTuner's config.json, .toml or .env") from error
    parse = {".toml": _toml, ".env": _env}.get(path.suffix if path.suffix else path.name, _json)
    return {str(key).strip().lstrip("-"): value for key, value in parse(text, path).items() if value is not None}


def _json(text: str, path: Path) -> Options:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{str(path)!r} is invalid JSON at {where}: {error.msg}; correct that line") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} is not an object of options; a list of datasets is read by dataset=simpletuner")
    return data


def _toml(text: str, path: Path) -> Options:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{str(path)!r} is invalid TOML: {error}; correct that line") from error


def _env(text: str, path: Path) -> Options:
    """NAME=value lines, with `export`, quotes, comments and ${NAME} of earlier lines. Other shell text is an error."""
    values: dict[str, str] = {}
    for number, line in enumerate(text.replace("\\\n", " ").splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        found = ASSIGNMENT.fullmatch(stripped)
        if found is None or "$(" in stripped or "`" in stripped:
            raise ConfigError(
                f"{str(path)!r} has {stripped!r} at line {number}; only NAME=value lines are read, none is executed"
            )
        name, sign, written = found.groups()
        value = VARIABLE.sub(lambda match: values.get(match[1] or match[2], match[0]), _unquoted(written, path, number))
        values[name] = f"{values.get(name, '')} {value}".strip() if sign == "+=" else value
    extra = _arguments(values.pop(EXTRA, ""))
    return {ENV_NAMES.get(name, name.lower()): value for name, value in values.items() if value} | extra


def _unquoted(written: str, path: Path, number: int) -> str:
    try:
        return " ".join(shlex.split(written, comments=True))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} has an open quotation mark at line {number}: {written!r}; close it") from error


def _arguments(text: str) -> dict[str, Any]:
    """--name=value, --name value and --name."""
    values: dict[str, Any] = {}
    name = ""
    for word in VARIABLE.sub("", text).split():
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            values[name] = value if sign else True
        elif name:
            values[name] = word if values[name] is True else f"{values[name]} {word}"
    return values

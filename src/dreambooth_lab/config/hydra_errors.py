"""Hydra's and OmegaConf's errors in one line: the key, the value, a fix."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from .check import ConfigError
from .keys import nearest
from .schema import Config

WANTED = {
    r"could not be converted to Float": "a number",
    r"could not be converted to Integer": "a whole number",
    r"is not a valid bool": "true or false",
    r"expected one of \[(?P<names>.*)\]": "one of {names}",
    r"Cannot assign \w+ to Dict": "a mapping",
    r"is not a ListConfig": "a list",
}  # OmegaConf's messages → the expected type
PLUGINS = {
    "hydra/launcher/joblib": "joblib", "hydra/launcher/submitit_local": "submitit", "hydra/launcher/submitit_slurm": "submitit",
    "hydra/launcher/ray": "ray", "hydra/launcher/ray_aws": "ray", "hydra/sweeper/optuna": "optuna",
}  # fmt: skip  # Hydra's plugins → the extra of this project that installs one
VALUE = re.compile(r"[Vv]alue '(.*?)'(?: of type| is not a valid|, expected)", re.DOTALL)


def explain(error: Exception) -> str | None:
    """A readable message for an error of composition; None for an error of another kind."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _syntax_error(error.override)
    if isinstance(error, MissingConfigException):
        return _missing_option(error.missing_cfg_file or "", error.options or ())
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):
        return f"{' '.join(str(error).split())}; use the name of a file of that group"
    if not isinstance(error, ConfigCompositionException):
        return None
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        is_unknown = isinstance(cause, ConfigKeyError | ConfigAttributeError)
        return (
            _unknown_key(str(cause.full_key)) if is_unknown else _wrong_type(str(cause.full_key), str(cause.msg).splitlines()[0])
        )
    return " ".join(str(error).split())


def _syntax_error(word: str) -> str:
    """A command-line argument outside of Hydra's grammar, and how to write it."""
    key, is_pair, value = word.partition("=")
    if not is_pair:
        return f"{word!r} is not KEY=VALUE; write the key, an equals sign and the value without spaces between them"
    quoted = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    shown = shlex.quote(f'{key}="{quoted}"')
    hint = f"quote its value within the shell's quotes: {shown}"
    if re.search(r"\s[\w./@-]+=", value):
        hint += ", or write each key as a separate argument"
    return f"{key} is {value!r}, which Hydra's grammar can't parse; {hint}"


def _missing_option(place: str, options: Iterable[str]) -> str:
    """No such option of a group of `conf/`."""
    if extra := PLUGINS.get(place):
        group, _, name = place.rpartition("/")
        return f"{group} is {name!r}, whose plugin is not installed; pip install 'dreambooth-lab[{extra}]'"
    group, _, name = place.rpartition("/")
    group = group or "--config-name"
    known = sorted(options)
    near = "".join(f" (did you mean {one}?)" for one in get_close_matches(name, known, n=1))
    way = f"choose one of {', '.join(known)}" if known else "see --help for the existing ones"
    return f"{group} is {name!r}, which does not exist{near}; {way}"


def _unknown_key(key: str) -> str:
    """No such key."""
    *parents, name = key.split(".")
    node: Any = Config
    for parent in parents:
        node = get_type_hints(node).get(parent) if is_dataclass(node) else None
    if not is_dataclass(node):  # an entry of a mapping
        return f"{key} does not exist; add it with all its keys: +{key}.…"
    known = [field.name for field in fields(node)]
    near = [".".join((*parents, one)) for one in get_close_matches(name, known, n=3)] or nearest(key)
    within = f"keys of {'.'.join(parents)}" if parents else "keys"
    return f"{key} is not a key; " + (f"did you mean {' or '.join(near)}?" if near else f"the {within} are {', '.join(known)}")


def _wrong_type(key: str, prefix: str) -> str:
    """A value of another type."""
    if "is not Optional" in prefix or "not convert None" in prefix or "NoneType" in prefix:
        return f"{key} is null, which is not allowed; set a value or remove it"
    value = VALUE.search(prefix)
    for pattern, wanted in WANTED.items():
        if found := re.search(pattern, prefix):
            return f"{key} is {value[1] if value else 'of another type'}; it must be {wanted.format(**found.groupdict())}"
    return f"{key}: {prefix}"

"""A cache of long measurements' results, in a folder. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .storage.durable import write_text

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "lycoris-lora", "dreambooth-lab")


def cached_measurement(folder: Path, depends_on: object, measure: Callable[[], Any]) -> Any:
    """The result of `measure`, cached by everything it depends on, including the libraries' versions.

    Args:
        folder: one JSON file per result. An unreadable file is measured again; in an unwritable folder nothing is stored.
        depends_on: its `repr` identifies the result.
        measure: returns JSON values: numbers, strings, lists and dictionaries of them.
    """
    versions = [f"{library} {version(library)}" for library in LIBRARIES]
    path = folder / f"{hashlib.sha256(repr((depends_on, versions)).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    result = measure()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result))
    return result

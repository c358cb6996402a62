"""Results of long measurements, kept in a folder between runs. Imports no torch."""

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


def remembered(folder: Path, depends_on: object, measure: Callable[[], Any]) -> Any:
    """What `measure` returned when everything it depends on, the libraries' versions too, was the same.

    Args:
        folder: one JSON file a result. What can't be read is measured again; where nothing can be written nothing is kept.
        depends_on: its `repr` identifies the result.
        measure: returns what JSON holds: numbers, strings, lists and dictionaries of them.
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

"""A lycoris_config.json, as LyCORIS' wrapper and SimpleTuner write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUFFIX = ".json"


def read_lycoris_file(place: str) -> dict[str, Any]:
    """The contents of the file.

    Raises:
        ValueError: there is no such file, or it is not a JSON object.
    """
    path = Path(place).expanduser()
    if not path.is_file():
        raise ValueError("which does not exist; give a lycoris_config.json, or the name of a preset such as attn-mlp")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"which is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("apply_preset", {}), dict):
        raise ValueError('which is not of the form {"algo": "lokr", "linear_dim": 16, "apply_preset": {…}}')
    return content

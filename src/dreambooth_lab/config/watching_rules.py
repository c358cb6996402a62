"""Problems of what is watched and what is given away: eval, preview, webhook, export."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from .reader import Bounds, Reader, is_absent_folder

BOUNDS: Bounds = (
    ("ema.decay", 0, 1), ("ema.update_interval", 1), ("validation.every_n_steps", 0), ("validation.num_images", 1),
    ("validation.num_inference_steps", 1), ("preview.every_n_steps", 1), ("eval.batch_size", 1),
    ("checkpoint.every_n_steps", 1),
)  # fmt: skip


def problems(read: Reader) -> Iterator[str | None]:
    yield from read.all_bounded(BOUNDS)
    yield from _eval_problems(read)
    yield from _preview_problems(read)
    yield from _hub_problems(read)


def _eval_problems(read: Reader) -> Iterator[str | None]:
    for key in ("eval.clip_model", "eval.dino_model"):
        if read(key) and not read("validation.every_n_steps"):
            yield f"{key} is set, but validation.every_n_steps is 0, so there are no pictures to score; set it, or eval=none"
        if is_absent_folder(read(key)):
            yield f"{key} is {read(key)!r}, a folder that does not exist; give a folder, a hub id, or null"


def _hub_problems(read: Reader) -> Iterator[str | None]:
    if not read("export.push_to_hub"):
        return
    repo, variable = read("export.repo"), read("export.token_env")
    if repo is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        yield f"export.push_to_hub is true, but export.repo is {repo!r}; set it to owner/name, or export.push_to_hub=false"
    if not os.environ.get(str(variable)):
        unset = f"export.token_env is {variable!r}, an environment variable that is not set"
        yield f"{unset}; export a write token in it, or set export.push_to_hub=false"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield "export.push_to_hub is true, but HF_HUB_OFFLINE is set; unset it, or set export.push_to_hub=false"


def _preview_problems(read: Reader) -> Iterator[str | None]:
    receivers = read("webhook.receivers") or {}
    if read("preview.enabled") and not read("validation.every_n_steps"):
        yield "preview.enabled is true, but validation.every_n_steps is 0, so nothing is drawn; set it, or preview.enabled=false"
    if read("preview.enabled") and not receivers:
        yield "preview.enabled is true, but nobody receives previews; choose webhook=raw or discord, or preview.enabled=false"
    for name, receiver in receivers.items():
        key = f"webhook.receivers.{name}"
        for field in ("url_env", "token_env"):
            if receiver[field] and not os.environ.get(receiver[field]):
                unset = f"{key}.{field} is {receiver[field]!r}, an environment variable that is not set"
                yield f"{unset}; export it, or choose webhook=none"
        address = receiver.url or os.environ.get(receiver.url_env or "", "http://")
        if not address.startswith(("http://", "https://")) or not (receiver.url or receiver.url_env):
            yield f"{key} has no http(s) address; set {key}.url, or {key}.url_env to a variable that holds one"

"""Upload of the export to the Hugging Face hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from omegaconf import DictConfig

log = logging.getLogger(__name__)


def push(cfg: DictConfig, folder: Path, message: str) -> None:
    """Upload a folder; errors are logged and don't stop the run.

    Args:
        cfg: the `export` group.
    """
    from huggingface_hub import HfApi

    token = os.environ[cfg.token_env]
    try:
        api = HfApi(token=token)
        api.create_repo(cfg.repo, private=cfg.private, exist_ok=True)
        done = api.upload_folder(repo_id=cfg.repo, folder_path=folder, commit_message=message)
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = str(error).replace(token, "…").strip() or type(error).__name__
        log.error(
            "could not push to %s: %s; the export is in %s, try: hf upload %s %s", cfg.repo, reason, folder, cfg.repo, folder
        )
        return
    log.info("pushed to %s", done.commit_url)

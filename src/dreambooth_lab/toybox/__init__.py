"""The embedded base model, a tiny SDXL, and the drawn world that it knows."""

from pathlib import Path


def base_folder() -> Path:
    """The `StableDiffusionXLPipeline` folder shipped with the package."""
    return Path(__file__).resolve().parent / "base"

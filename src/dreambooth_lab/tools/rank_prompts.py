"""`python -m dreambooth_lab.tools.rank_prompts key=value … --prompts "a photo of sks dog" --prompts "…"`: rank prompts by
the base model's similarity to the subject before training.

The arguments are those of a training run; they set the model, the photos and the metric models (default `eval=paper`). The base
model generates every prompt from the same noises. A metric model compares the images with the photos (image-image), and CLIP the
photos with the prompt (image-text). Writes ranks.csv, scores.csv, sheet.png and the images.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..config import ConfigError
from .common import cli

application = cli.app()


class By(StrEnum):
    clip_i = "clip_i"
    clip_t = "clip_t"
    dino = "dino"
    dino_masked = "dino_masked"


@application.command(help=__doc__)
def main(
    overrides: Annotated[list[str], typer.Argument(help="as for python -m dreambooth_lab", metavar="KEY=VALUE …")],
    prompts: Annotated[list[str] | None, typer.Option(help="a candidate; may be repeated")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file, one candidate per line")] = None,
    by: Annotated[By, typer.Option(help="image-image: clip_i, dino, dino_masked; image-text: clip_t")] = By.clip_i,
    output_dir: Annotated[Path, typer.Option(help="output folder for the tables and images")] = Path("ranked_prompts"),
    force: Annotated[bool, typer.Option(help="overwrite an earlier ranking")] = False,
) -> None:
    candidates = gathered(prompts or [], prompts_file)
    if output_dir.exists() and not force and any(output_dir.iterdir()):
        raise ConfigError(f"--output_dir is {str(output_dir)!r}, which is not empty; give another folder, or --force")
    from . import ranking
    from .common import training_config

    judged = any(word.startswith(("eval=", "eval.clip_model=")) for word in overrides)
    cfg = training_config.compose_checked([*([] if judged else ["eval=paper"]), *overrides])
    ranking.write(ranking.rank(cfg, candidates, by), output_dir)
    print(f"see {output_dir / 'sheet.png'}")


def gathered(found: list[str], file: Path | None) -> list[str]:
    """The candidates, each once, in order.

    Raises:
        ConfigError: the file can't be read, or there are fewer than two.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts_file is {str(file)!r}, which can't be read ({error}); give a text file") from error
    candidates = list(dict.fromkeys(line.strip() for line in [*found, *lines] if line.strip()))
    if len(candidates) < 2:
        raise ConfigError(f"--prompts and --prompts_file give {len(candidates)} prompt(s); give two or more to rank")
    return candidates


if __name__ == "__main__":
    cli.run(application)

"""`python -m dreambooth_lab.tools.caption --input_dir PHOTOS --model MODEL --instance_prompt "a photo of sks dog"`: a caption for
each photo, for `dataset.caption=textfile`.

A transformers model, local or from the hub (BLIP, Florence-2, Qwen2-VL and the like), writes a.txt beside a.jpg.
The instance prompt is inserted as follows. With --class_prompt "a photo of a dog", the first "dog" of a caption becomes the
subject, "sks dog" (an article right before it is dropped): "a dog on a beach" → "sks dog on a beach", "a brown dog" → "a brown
sks dog". Captions without "dog", and all captions without --class_prompt, get the instance prompt before them: "a photo of sks
dog, a pet".

An existing text file is not changed (--force overwrites it), so an interrupted call can be continued. Photos without a caption
are listed, and the exit code is then 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..config import ConfigError
from ..config.prompts import ARTICLES, rare_word
from .common import cli

application = cli.app()


@application.command(help=__doc__)
def main(
    input_dir: Annotated[Path, typer.Option(help="the photos, with subfolders")],
    model: Annotated[str, typer.Option(help="hub id or folder, such as Salesforce/blip-image-captioning-base")],
    instance_prompt: Annotated[str | None, typer.Option(help="inserted into each caption; default: nothing")] = None,
    class_prompt: Annotated[str | None, typer.Option(help="the same without the rare word: its noun is then replaced")] = None,
    question: Annotated[str | None, typer.Option(help="the question for chat models, or Florence-2's task")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="maximum tokens of a caption")] = 60,
    force: Annotated[bool, typer.Option(help="overwrite existing captions")] = False,
    review: Annotated[Path | None, typer.Option(help="the page of photos and captions; default: beside the folder")] = None,
) -> None:
    input_dir = input_dir.expanduser().resolve()
    if not input_dir.is_dir():
        raise ConfigError(f"--input_dir is {str(input_dir)!r}, which is not a folder; give the folder of the photos")
    put_in = placing(instance_prompt, class_prompt)
    from . import captioning

    made = captioning.write(input_dir, captioning.network(model, question, max_tokens), put_in, force)
    where = review or input_dir.parent / f"captions_{input_dir.name}.html"
    captioning.save_page(input_dir, made, where)
    print(
        f"{made.fresh} captions written, {len(made.captions) - made.fresh} existed already (--force overwrites them); see {where}"
    )
    for name, why in made.failed.items():
        print(f"no caption: {name}: {why}")
    if made.failed:
        raise typer.Exit(1)


def placing(instance_prompt: str | None, class_prompt: str | None) -> Callable[[str], str]:
    """A function that inserts the instance prompt into a caption.

    Raises:
        ConfigError: the class prompt is not the instance prompt without one word.
    """
    if instance_prompt is None:
        if class_prompt is not None:
            raise ConfigError(f"--class_prompt is {class_prompt!r}, but no --instance_prompt is given; give both")
        return lambda caption: caption
    if class_prompt is None:
        return lambda caption: f"{instance_prompt}, {caption}"
    word = rare_word(instance_prompt, class_prompt)
    found = re.search(rf"\b{re.escape(word)}\b\s*(.*)", instance_prompt, re.IGNORECASE) if word else None
    if found is None or not found[1].strip():
        prefix = f"--class_prompt is {class_prompt!r}, which is not --instance_prompt {instance_prompt!r} without its rare word"
        raise ConfigError(f"{prefix}; for 'a photo of sks dog' give 'a photo of a dog'")
    subject, noun = found[0].strip(), found[1].strip()
    pattern = re.compile(rf"\b(?:(?:{'|'.join(ARTICLES)})\s+)?{re.escape(noun)}\b", re.IGNORECASE)

    def put(caption: str) -> str:
        replaced, times = pattern.subn(lambda _: subject, caption, count=1)
        return replaced if times else f"{instance_prompt}, {caption}"

    return put


if __name__ == "__main__":
    cli.run(application)

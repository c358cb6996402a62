"""`python -m dreambooth_lab.tools.look key=value …`: a page that shows the training data of a configuration.

The arguments are those of a training run. Writes look.html, a self-contained page, and look.png; loads no weights. Exits
with 1 if the data have problems that must be fixed before training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from omegaconf import DictConfig

from .. import sheet
from ..config import enums
from ..data import planning
from ..data.preparation.entry import Collected, Collector
from ..data.spec import DatasetSpec
from ..factory import instantiate
from ..models.family import Family
from ..storage.durable import write_text
from .common import cli, training_config
from .inspection import page
from .inspection.photos import InspectedPhoto, duplicates, inspect

application = cli.app()


class DatasetInspection(NamedTuple):
    """The contents of one dataset."""

    id: str
    place: str
    seen: list[InspectedPhoto]
    left_out: dict[str, str]  # image → why it isn't trained on
    remarks: list[str]  # about the whole dataset


class Inspection(NamedTuple):
    datasets: list[DatasetInspection]
    problems: list[str]  # what must be fixed
    notices: list[str]
    tokens: dict[str, dict[str, int]]  # caption → text encoder → number of tokens


@application.command(help=__doc__)
def main(
    overrides: Annotated[list[str], typer.Argument(help="as for python -m dreambooth_lab", metavar="KEY=VALUE …")],
    output_dir: Annotated[Path, typer.Option(help="for look.html and look.png")] = Path("look"),
    most: Annotated[int, typer.Option(min=1, help="maximum number of photos shown per dataset")] = 100,
) -> None:
    cfg = training_config.compose_checked(overrides)
    inspected = inspect_datasets(cfg, most)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "look.html", page.page(inspected, overrides))
    sheet.save(sheet.draw([row for one in inspected.datasets for row in _rows(one)]), output_dir / "look.png")
    print(f"{sum(len(one.seen) for one in inspected.datasets)} photos: see {output_dir / 'look.html'}")
    for problem in inspected.problems:
        print(f"problem: {problem}")
    if inspected.problems:
        raise typer.Exit(1)


def inspect_datasets(cfg: DictConfig, most: int) -> Inspection:
    """The training data of `cfg`, at most `most` photos per dataset."""
    family: Family = instantiate(cfg, "model", Family, "recommended", cache=Path(cfg.cache).expanduser())
    plan = planning.plan(cfg, str(cfg.prior.path) if _from_folder(cfg) else None)
    collected = Collector(family.stride, Path(cfg.cache).expanduser()).collect(plan.specs)
    problems, notices = list(collected.problems), [*plan.notices, *collected.notices]
    made: list[DatasetInspection] = []
    if cfg.prior.kind.has_class_rows and cfg.prior.source is enums.PriorSource.generated:
        notices.append("class images are generated when training starts, and not shown")
    for place in dict.fromkeys((one.where, one.is_class, one.is_eval) for one in plan.specs):
        own = [one for one in plan.specs if (one.where, one.is_class, one.is_eval) == place]
        made.append(_inspect(own, collected, family.factor, most))
        problems += [problem for seen in made[-1].seen for problem in seen.problems]
    captions = {caption for one in made for seen in one.seen for caption in seen.captions}
    tokens = {caption: family.count_tokens(caption) for caption in sorted(captions)}
    return Inspection(made, list(dict.fromkeys(problems)), [*notices, *family.truncated_part(captions)], tokens)


def _inspect(specs: list[DatasetSpec], collected: Collected, factor: int, most: int) -> DatasetInspection:
    """The photos of one dataset, at all resolutions."""
    names = [one.id for one in specs]
    entries = [entry for entry in collected.entries if entry.spec.id in names]
    every = list(dict.fromkeys(entry.picture.name for entry in entries))
    left_out = {rejected.name: rejected.reason for name in names for rejected in collected.rejected[name]}
    kept = set(every[:most])
    seen: list[InspectedPhoto] = []
    for one in inspect([entry for entry in entries if entry.picture.name in kept], factor):
        if isinstance(one, InspectedPhoto):
            seen.append(one)
        else:
            left_out[one[0].name] = one[1]
    hidden = [f"{len(every) - most} more are not shown; --most={len(every)} shows them"] if len(every) > most else []
    return DatasetInspection(", ".join(names), specs[0].where.path, seen, left_out, [*duplicates(seen), *hidden])


def _from_folder(cfg: DictConfig) -> bool:
    ours = cfg.dataset.type is not enums.DatasetType.simpletuner and cfg.prior.kind.has_class_rows
    return ours and cfg.prior.source is enums.PriorSource.folder


def _rows(one: DatasetInspection) -> list[sheet.Row]:
    """One row per crop: the photo, the crop, and the crop with its mask."""
    return [
        sheet.Row(
            f"{seen.picture.name} for {crop.image.width}x{crop.image.height}",
            [seen.image, crop.image, *([sheet.overlay(crop.image, crop.mask)] if crop.mask else [])],
        )
        for seen in one.seen
        for crop in seen.crops
    ]


if __name__ == "__main__":
    cli.run(application)

"""The stable eval loss: how well pictures that are never trained on are denoised. Its minimum is where overfitting starts.

    eval/loss           mean over all rows
    eval/loss_DATASET   … over those of one dataset
    eval/loss_tT        … over those at one time T, named before the model's time shift

The plain squared error of the network's answer, without training weights, masks, dropout or rollout, at fixed times under
fixed noise: two evaluations of the same weights give the same bits. Numbers of the averaged weights begin with ema/. Every row
is kept in eval.csv, so that changes can be compared row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer

from ..data.held_out import Exam
from ..diffusion.time import shift
from ..dreambooth import DreamBooth
from ..runfolder import RunFolder
from .ema import PREFIX, Looks
from .ledger import Ledger
from .metrics import record
from .periodic import Periodic, Timetable


class Answer(NamedTuple):
    """One row's error."""

    step: int
    weights: str  # live or ema
    dataset: str
    picture: str
    t: float
    loss: float
    stratum: float  # t before the model's time shift, which depends on a picture's size


class EvalLoss(Periodic):
    """Asks the exams at step 0, which is the base model's reference, and whenever the timetable says."""

    def __init__(self, timetable: Timetable, exams: Sequence[Exam], folder: RunFolder, looks: Looks):
        super().__init__(timetable)
        self.exams, self.looks = exams, looks
        self.ledger = Ledger(folder.eval, Answer)

    def look(self, step: int, trainer: Trainer, module: DreamBooth) -> None:
        answers: list[Answer] = []
        for kind, holds_for in self.looks.at(step):
            with self.looks(module, kind):
                seen = self._ask_all(step, trainer, module)
            answers += [answer._replace(weights=name) for name in holds_for for answer in seen]
            for name in holds_for:
                record(trainer, {PREFIX[name] + metric: value for metric, value in summary(seen).items()}, step)
        if trainer.is_global_zero:
            self.ledger.add(step, answers)

    def _ask_all(self, step: int, trainer: Trainer, module: DreamBooth) -> list[Answer]:
        """Every exam once, the ranks in turn; all ranks know all answers, in the order of the exams."""
        own = {i: ask(self.exams[i], step, module) for i in range(trainer.global_rank, len(self.exams), trainer.world_size)}
        parts: list[dict[int, list[Answer]]] = [own] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(parts, own)
        whole = {i: answers for part in parts for i, answers in part.items()}
        return [answer for i in sorted(whole) for answer in whole[i]]


@torch.no_grad()
def ask(exam: Exam, step: int, module: DreamBooth) -> list[Answer]:
    """The error of each row with the module's present weights."""
    batch = move_data_to_device(exam.batch, module.family.device)
    low, high = module.family.times
    x0, stratum = batch.latents(), low + (high - low) * batch.u
    t = shift(stratum, module.family.shift(*x0.shape[2:]))
    output = module.predict(module.path.noise(x0, batch.eps, t), t, module.told(batch))
    error = (output.float() - module.path.target(x0, batch.eps, t)).square().mean((1, 2, 3))
    rows = zip(exam.rows, t.tolist(), error.tolist(), stratum.tolist(), strict=True)
    return [Answer(step, "", dataset, picture, time, loss, even) for (dataset, picture), time, loss, even in rows]


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Means under the names that are logged."""
    values: dict[str, list[float]] = {}
    for answer in answers:
        for name in ("eval/loss", f"eval/loss_{answer.dataset}", f"eval/loss_t{answer.stratum:.3f}"):
            values.setdefault(name, []).append(answer.loss)
    return {name: fmean(found) for name, found in values.items()}

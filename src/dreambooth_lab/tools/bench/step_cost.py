"""What the parts of the objective cost, in units of a plain training step, measured in one run:

    python -m dreambooth_lab.tools.bench.step_cost model.pretrained=… dataset.path=… prior.path=… dataset.batch_size=4 …

The words are those of a training run. A step is forward and backward of one batch; all kinds take the same batches in turn, so
that a busy machine slows them alike, and the figures are medians over rounds: CPU seconds on a CPU, wall time on a GPU. FLOPs are
those of one more step, counted by torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from ...batch import Batch
from ...data.module import Samples
from ..common.training import build_training
from ..common.training_config import command, compose_checked

ROUNDS, WARM = 5, 1
STRIDES = (1, 4, 8)
DEEP = 0.4  # t of every row: there is room for all sampler steps above it


class Kind:
    """A module with its own objective and the batches it takes."""

    def __init__(self, name: str, words: list[str], row_by_row: bool = False):
        self.name, self.row_by_row = name, row_by_row
        self.module, data = build_training(compose_checked(words))
        self.stream = iter(Samples(data, data.schedule, 0, 0, 1))
        self.seconds: list[float] = []

    def step(self) -> None:
        batch = self._next()
        self.seconds.append(_seconds(lambda: self._train(batch), self.module.family.device))

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self._train(self._next())
        return counter.get_total_flops()

    def _next(self) -> Batch:
        batch = next(self.stream)
        return self._deep(batch) if self.module.cfg.rollout.enabled else batch

    def _train(self, batch: Batch) -> None:
        if self.row_by_row:
            self._roll_out_rows(batch)
            batch = batch._replace(rollout_draws=torch.ones_like(batch.rollout_draws))  # already rolled out
        self.module.training_step(batch, 0)["loss"].backward()
        self.module.zero_grad()

    def _deep(self, batch: Batch) -> Batch:
        """Every row walks the whole way."""
        draws = torch.tensor([[0.0, 1 - 1e-9]], dtype=batch.rollout_draws.dtype).expand_as(batch.rollout_draws)
        return batch._replace(rollout_draws=draws, u=torch.full_like(batch.u, DEEP))

    def _roll_out_rows(self, batch: Batch) -> None:
        """The same rollout, one row after the other."""
        x0 = batch.latents()
        t = self.module.times(batch.u, x0.shape[2:])
        for i in range(len(t)):
            row = torch.tensor([i])
            one = batch._replace(eps=batch.eps[row], rollout_draws=batch.rollout_draws[row])
            self.module.rollout(x0[row], one, batch.cond.select(row), t[row], 0)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def kinds(words: list[str]) -> list[Kind]:
    rolled = ["prior=noise", "rollout.enabled=true", "rollout.ramp_steps=0", "rollout.probability=0.999"]
    made = [Kind("plain: the noise is every row's target", [*words, "prior=noise"])]
    made += [Kind("teacher on the class rows", [*words, "prior=teacher"]), Kind("target bank", [*words, "prior=bank"])]
    for k in STRIDES:
        made.append(Kind(f"{k} sampler steps of all rows, batched", [*words, *rolled, f"rollout.max_step_offset={k}"]))
        made.append(Kind(f"{k} sampler steps, row by row", [*words, *rolled, f"rollout.max_step_offset={k}"], row_by_row=True))
    return made


def main(words: list[str]) -> None:
    chosen = kinds(words)
    for i in range(WARM + ROUNDS):
        for kind in chosen:
            kind.step()
            if i < WARM:
                kind.seconds.clear()
    cfg = chosen[0].module.cfg
    message = f"batch {cfg.dataset.batch_size}, class share {cfg.prior.class_fraction:g}, {chosen[0].module.family.device}, "
    table = Table(
        "step",
        "ratio to plain",
        "seconds",
        "FLOPs, ratio",
        title=message + Path(cfg.model.pretrained).name + f", {ROUNDS} rounds",
    )
    plain = chosen[0].flops()
    for kind in chosen:
        ratios = [a / b for a, b in zip(kind.seconds, chosen[0].seconds, strict=True)]
        counted = plain if kind is chosen[0] else kind.flops()
        table.add_row(kind.name, f"{median(ratios):.2f}", f"{median(kind.seconds):.3f}", f"{counted / plain:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    command(main, __doc__)

"""One way to run every stage: batches that are pure functions of the step, EMA, checkpoints, a progress log.

Nothing random lives in the module or the loader: a batch draws everything from (seed, step), so a resumed run
continues bit for bit.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

Draw = Callable[[int], Any]  # step → batch


class Steps(IterableDataset):
    """Batches number `start`, `start` + 1, …; each a pure function of its number."""

    def __init__(self, draw: Draw, start: int, stop: int) -> None:
        self.draw, self.start, self.stop = draw, start, stop

    def __iter__(self) -> Iterator[Any]:
        return (self.draw(step) for step in range(self.start, self.stop))


class Stage(L.LightningModule, ABC):
    """A module with an averaged copy of its weights; subclasses implement `loss(batch)`."""

    nets: Any  # nn.ModuleDict; its members have methods of their own, which `Module` can't say
    ema: Any

    def __init__(self, nets: nn.ModuleDict, ema: nn.ModuleDict, cfg: Any) -> None:
        super().__init__()
        self.nets, self.ema, self.cfg = nets, ema.requires_grad_(False), cfg
        self.ema.load_state_dict(nets.state_dict())
        self.logged: dict[str, float] = {}

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and the parts that the progress log tells."""

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.nets.parameters()), "lr": self.cfg.lr}]

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss, parts = self.loss(batch)
        for name, value in parts.items():
            old = self.logged.get(name)
            self.logged[name] = value.item() if old is None else 0.98 * old + 0.02 * value.item()
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        decay = min(self.cfg.ema, (1 + self.global_step) / (10 + self.global_step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.nets.parameters()), 1 - decay)

    def on_before_optimizer_step(self, _: Any) -> None:  # Lightning's own clipping refuses fused optimizers
        torch.nn.utils.clip_grad_norm_(self.nets.parameters(), self.cfg.clip)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.groups(), weight_decay=self.cfg.weight_decay, betas=(0.9, 0.99), fused=True)
        warm, stop = self.cfg.warmup, self.cfg.steps

        def rate(step: int) -> float:  # linear warm-up, constant, linear decay over the last part
            down = (stop - step) / max(1.0, self.cfg.decay * stop)
            return max(0.0, min(1.0, (step + 1) / warm, down))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Log(L.Callback):
    """A line every `every` steps, to the file and the terminal: step, seconds a step, the running means."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every, self.since = path, every, time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Stage, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if step % self.every:
            return
        seconds = (time.perf_counter() - self.since) / self.every
        self.since = time.perf_counter()
        line = {"step": step, "s": round(seconds, 3), **{k: round(v, 5) for k, v in module.logged.items()}}
        with self.path.open("a") as f:
            f.write(json.dumps(line) + "\n")
        left = (module.cfg.steps - step) * seconds / 60
        print(f"{self.path.parent.name}: {json.dumps(line)} of {module.cfg.steps}, about {left:.0f} min left", flush=True)


class Keep(L.Callback):
    """Checkpoint and look (`show`) every so many steps."""

    def __init__(self, path: Path, every: int, show: Callable[[Stage, int], None] | None) -> None:
        self.path, self.every, self.show = path, every, show

    def on_train_batch_end(self, trainer: L.Trainer, module: Stage, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if step % self.every and step != module.cfg.steps:
            return
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        part.replace(self.path)
        if self.show:
            module.eval()
            with torch.no_grad():
                self.show(module, step)
            module.train()


def done_steps(path: Path) -> int:
    if not path.exists():
        return 0
    return int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])


def fit(stage: Stage, draw: Draw, folder: Path, show: Callable[[Stage, int], None] | None = None, workers: int = 0) -> None:
    """Train to `cfg.steps`, from the folder's checkpoint when it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    start, cfg = done_steps(last), stage.cfg
    loader = DataLoader(
        Steps(draw, start, cfg.steps), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    trainer = L.Trainer(
        max_steps=cfg.steps, accelerator="cpu", precision=cfg.precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Log(folder / "log.jsonl", cfg.log_every), Keep(last, cfg.keep_every, show)],
    )  # fmt: skip
    if start < cfg.steps:
        trainer.fit(stage, loader, ckpt_path=last if start else None, weights_only=True)
    else:
        stage.load_state_dict(torch.load(last, map_location="cpu", weights_only=True)["state_dict"])


def grid(rows: list[Tensor], path: Path) -> None:
    """Rows of pictures in [-1, 1], each [n 3 h w], below one another."""
    from PIL import Image

    lines = [torch.cat(list(row.float().cpu()), dim=2) for row in rows]
    picture = ((torch.cat(lines, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.numpy()).save(path)

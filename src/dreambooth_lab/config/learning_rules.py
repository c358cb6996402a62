"""Problems of how it learns: model, objective, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from .choices import Attention, RolloutKind, Schedule
from .reader import Bounds, Reader, is_absent_folder

BOUNDS: Bounds = (
    ("objective.logit_std", 1e-3), ("objective.low", 0, 1), ("objective.high", 0, 1),
    ("objective.gamma", 1e-6), ("objective.huber_c", 1e-6), ("objective.noise_offset", 0),
    ("objective.noise_offset_probability", 0, 1), ("rollout.max_step_offset", 1),
    ("rollout.probability", 0, 1), ("rollout.ramp_steps", 0), ("rollout.min_time", 0, 1), ("rollout.perturbation", 0),
    ("rollout.reflexflow.direction", 0), ("rollout.reflexflow.frequency", 0), ("optimizer.lr", 0),
    ("optimizer.warmup_steps", 0), ("optimizer.weight_decay", 0), ("optimizer.cycles", 1), ("optimizer.lora_plus_ratio", 1e-3),
    ("trainer.max_steps", 1), ("trainer.accumulate_grad_batches", 1), ("trainer.gradient_clip_norm", 0),
    ("trainer.log_every_n_steps", 1), ("trainer.devices", 1),
)  # fmt: skip


def problems(read: Reader) -> Iterator[str | None]:
    yield from read.all_bounded(BOUNDS)
    yield from _objective_problems(read)
    yield from _model_problems(read)
    yield from _optimizer_problems(read)


def _optimizer_problems(read: Reader) -> Iterator[str | None]:
    target, schedule = str(read("optimizer._target_")), read("optimizer.schedule")
    library = target.partition(".")[0]
    if read("optimizer._target_") is not None and not find_spec(library):
        yield f"optimizer._target_ is {target!r}, but {library} is not installed; pip install 'dreambooth-lab[optimizers]'"
    steps, warmup = read("trainer.max_steps"), read("optimizer.warmup_steps")
    if steps is not None and warmup is not None and warmup >= steps > 0:
        yield f"optimizer.warmup_steps is {warmup}, but trainer.max_steps is {steps}, so the rate never gets there; set it lower"
    if library == "prodigyopt":
        yield from _one_rate_problems(read)
    free = "schedulefree" in target
    if free and schedule not in (None, Schedule.constant):
        yield f"optimizer.schedule is {schedule.name} with a schedule-free optimiser; use optimizer.schedule=constant"
    if free and read("ema.enabled"):
        yield "ema.enabled is true with a schedule-free optimiser, which averages by itself; set ema.enabled=false"
    if read("optimizer.cycles") not in (None, 1) and schedule is not Schedule.restarts:
        yield f"optimizer.cycles is {read('optimizer.cycles')}, which only schedule=restarts has; set optimizer.schedule=restarts"
    if read("optimizer.lora_plus_ratio") not in (None, 1.0) and read("adapter.algorithm") not in (None, "lora", "dora", "locon"):
        said = (
            f"optimizer.lora_plus_ratio is {read('optimizer.lora_plus_ratio')} with adapter.algorithm={read('adapter.algorithm')}"
        )
        yield f"{said}, which has no A and B; use lora, dora or locon, or set it to 1"


def _one_rate_problems(read: Reader) -> Iterator[str | None]:
    """Prodigy finds one step size for all; its library refuses groups of different rates, but only once it trains."""
    ratios = {
        "optimizer.lora_plus_ratio": True,
        "adapter.token_lr_ratio": read("adapter.train_token"),
        "adapter.text_lr_ratio": bool(read("adapter.text_encoders")),
    }
    for key, applies in ratios.items():
        if applies and read(key) not in (None, 1.0):
            yield f"{key} is {read(key):g} with Prodigy, which finds one rate for all; set it to 1, or use optimizer=adamw"
    if any(block["lr_ratio"] != 1 for block in read("adapter.blocks") or []):
        yield "adapter.blocks has an lr_ratio with Prodigy, which finds one rate for all; set it to 1, or use optimizer=adamw"


def _objective_problems(read: Reader) -> Iterator[str | None]:
    low, high = read("objective.low"), read("objective.high")
    if low is not None and high is not None and low >= high:
        yield f"objective.low is {low:g} and objective.high {high:g}; times are drawn between them, so low must be the lesser"
    if (grid := read("rollout.grid")) is not None and grid != "native" and (not isinstance(grid, int) or grid < 1):
        yield f"rollout.grid is {grid!r}; it must be a number of inference steps, at least 1, or native"
    for key in ("objective.shift", "rollout.shift"):
        if (shift := read(key)) is not None and shift != "model" and not (isinstance(shift, int | float) and shift > 0):
            yield f"{key} is {shift!r}; it must be a number above 0, or model (as the model was trained)"
    terms = [read(f"rollout.reflexflow.{name}") for name in ("direction", "frequency")]
    if any(terms) and read("rollout.kind") is RolloutKind.input_perturbation:
        yield "rollout.reflexflow has terms, but rollout.kind=input_perturbation makes no walk they speak of; set them to 0"


def _model_problems(read: Reader) -> Iterator[str | None]:
    if is_absent_folder(read("model.pretrained")):
        absent = f"model.pretrained is {read('model.pretrained')!r}, a folder that does not exist"
        yield f"{absent}; give a diffusers folder or a hub id such as owner/name"
    cuda_only = read("model.attention") in (Attention.efficient, Attention.cudnn)
    if cuda_only and read("trainer.accelerator") == "cpu":
        yield f"model.attention is {read('model.attention').name}, which only CUDA devices have; use auto, flash or math"
    if read("ema.device") is not None and str(read("ema.device")).split(":")[0] not in ("cpu", "cuda"):
        yield f"ema.device is {read('ema.device')!r}; it must be cpu or cuda"
    for key in ("validation.resolution", "model.resolution", "prior.generated.resolution"):
        if read(key) is not None and (read(key) < 16 or read(key) % 8):
            yield f"{key} is {read(key)}; it must be a multiple of 8, at least 16"

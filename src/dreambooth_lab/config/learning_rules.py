"""Checks of training: model, objective, optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from . import enums
from .reader import Reader, installed, is_absent_folder

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")  # gpu and cuda are the same


def problems(read: Reader) -> Iterator[str | None]:
    yield from _objective_problems(read)
    yield from _anchor_problems(read)
    yield from _weight_problems(read)
    yield from _model_problems(read)
    yield from _optimizer_problems(read)


def _optimizer_problems(read: Reader) -> Iterator[str | None]:
    target, schedule = str(read("optimizer._target_")), read("optimizer.schedule")
    library = target.partition(".")[0]
    if read("optimizer._target_") is not None and not installed(library):
        yield f"optimizer._target_ is {target!r}, but {library} is not installed; pip install 'dreambooth-lab[optimizers]'"
    warmup = read("optimizer.warmup_steps")
    for key in ("trainer.max_steps", "optimizer.schedule_steps"):
        if (steps := read(key)) is not None and warmup is not None and warmup >= steps > 0:
            yield f"optimizer.warmup_steps is {warmup}, but {key} is {steps}, so the warm-up never ends; set it lower"
    if read("optimizer.schedule_steps") is not None and schedule is enums.Schedule.constant:
        prefix = f"optimizer.schedule_steps is {read('optimizer.schedule_steps')} with optimizer.schedule=constant"
        yield f"{prefix}, which has no length; set it to null, or choose another schedule"
    if library == "prodigyopt":
        yield from _one_rate_problems(read)
    free = "schedulefree" in target
    if free and schedule not in (None, enums.Schedule.constant):
        yield f"optimizer.schedule is {schedule.name} with a schedule-free optimiser; use optimizer.schedule=constant"
    if free and read("ema.enabled"):
        yield "ema.enabled is true with a schedule-free optimiser, which has its own averaging; set ema.enabled=false"
    if lengths := read("ema.lengths"):
        if free:
            yield f"ema.lengths is {list(lengths)} with a schedule-free optimiser, which averages by itself; set ema.lengths=[]"
        if len(set(lengths)) != len(lengths) or len(lengths) < 2:
            yield (
                f"ema.lengths is {list(lengths)}; other lengths are computed from at least two different ones; set "
                "ema.lengths=[0.05,0.1], or [] for none"
            )
    if read("optimizer.cycles") not in (None, 1) and schedule is not enums.Schedule.restarts:
        yield f"optimizer.cycles is {read('optimizer.cycles')}, which only schedule=restarts has; set optimizer.schedule=restarts"
    if read("optimizer.lora_plus_ratio") not in (None, 1.0) and read("adapter.algorithm") not in (None, "lora", "dora", "locon"):
        prefix = (
            f"optimizer.lora_plus_ratio is {read('optimizer.lora_plus_ratio')} with adapter.algorithm={read('adapter.algorithm')}"
        )
        yield f"{prefix}, which has no A and B; use lora, dora or locon, or set it to 1"


def _one_rate_problems(read: Reader) -> Iterator[str | None]:
    """Prodigy finds one step size for all parameters; its library refuses groups of different rates, but only during training."""
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
    low, high = read("objective.min_time"), read("objective.max_time")
    if low is not None and high is not None and low >= high:
        yield f"objective.min_time is {low:g} and objective.max_time {high:g}; set min_time below max_time"
    terms = [read(f"rollout.reflexflow.{name}") for name in ("direction", "frequency")]
    if any(terms) and read("rollout.kind") is enums.RolloutKind.input_perturbation:
        yield "rollout.reflexflow has terms, but rollout.kind=input_perturbation has no rollout for them; set them to 0"


def _anchor_problems(read: Reader) -> Iterator[str | None]:
    """DCO compares squared errors of the same prediction, which the base model's can be computed of too."""
    if read("objective.anchor") in (None, enums.Anchor.none):
        return
    if read("objective.loss") is enums.LossKind.huber:
        yield "objective.anchor is dco with objective.loss=huber; it compares squared errors: use loss=l2, or anchor=none"
    if read("rollout.enabled") and any(read(f"rollout.reflexflow.{name}") for name in ("direction", "frequency")):
        yield "objective.anchor is dco with terms of rollout.reflexflow, which the base model has none of; set them to 0"


def _weight_problems(read: Reader) -> Iterator[str | None]:
    """A learned weight is the logarithm of a loss, has a rate of its own, and changes what training losses mean."""
    if read("objective.weight") is not enums.Weight.learned:
        return
    said = "objective.weight is learned"
    if read("objective.anchor") is enums.Anchor.dco:
        yield f"{said} with objective.anchor=dco, whose rows have no error to learn the weight from; use anchor=none or min_snr"
    if str(read("optimizer._target_")).startswith("prodigyopt."):
        yield f"{said} with Prodigy, which finds one rate for all, but the weight needs its own; use optimizer=adamw"
    if read("checkpoint.monitor") == "train/loss":
        yield f"{said}, so train/loss is L / e^u + u, which u lowers too; set checkpoint.monitor=train/loss_instance or eval/loss"


def _model_problems(read: Reader) -> Iterator[str | None]:
    if is_absent_folder(read("model.pretrained")):
        absent = f"model.pretrained is {read('model.pretrained')!r}, a folder that does not exist"
        yield f"{absent}; give a diffusers folder or a hub id such as owner/name"
    if read("model.dtype") is enums.Dtype.float16:
        yield "model.dtype is float16, in which small gradients become 0; use model.dtype=bfloat16, or float32"
    cuda_only = read("model.attention") in (enums.Attention.efficient, enums.Attention.cudnn)
    if cuda_only and read("trainer.accelerator") == "cpu":
        yield f"model.attention is {read('model.attention').name}, which only CUDA devices have; use auto, flash or math"
    yield from _block_problems(read)
    if (accelerator := read("trainer.accelerator")) not in (None, *ACCELERATORS):
        why = ", which is not supported" if accelerator in ("tpu", "xpu", "hpu") else ""
        yield f"trainer.accelerator is {accelerator!r}{why}; it must be {', '.join(ACCELERATORS[:-1])} or {ACCELERATORS[-1]}"
    if read("ema.device") is not None and str(read("ema.device")).split(":")[0] not in ("cpu", "cuda"):
        yield f"ema.device is {read('ema.device')!r}; it must be cpu or cuda"
    for key in ("validation.resolution", "model.resolution", "prior.generated.resolution"):
        if read(key) is not None and read(key) % 8:
            yield f"{key} is {read(key)}; it must be a multiple of 8"


def _block_problems(read: Reader) -> Iterator[str | None]:
    """Problems of blocks whose weights are elsewhere until they run."""
    offloads, divides = read("model.offload") is enums.Offload.blocks, read("trainer.strategy") == "fsdp"
    if not (offloads or divides):
        return
    setting, off = (
        ("trainer.strategy is fsdp", "trainer.strategy=ddp") if divides else ("model.offload is blocks", "model.offload=none")
    )
    if read("model.gradient_checkpointing") is False:
        yield (
            f"{setting} without gradient checkpointing, so backward would need every block on the device; set "
            f"model.gradient_checkpointing=true, or {off}"
        )
    if offloads and divides:
        yield "model.offload is blocks with trainer.strategy=fsdp, which stores the blocks itself; set model.offload=none"
    if offloads and read("trainer.accelerator") == "cpu":
        yield "model.offload is blocks, but trainer.accelerator is cpu, so there is nothing to offload; set model.offload=none"
    if read("model.compile"):
        yield f"{setting} with model.compile=true, whose compiled blocks hold their weights; turn one of them off"
    if read("adapter.algorithm") == "full":
        yield f"{setting} with adapter=full, which trains the blocks themselves; set {off}"
    if read("quant.kind") is enums.QuantKind.nf4:
        yield f"{setting} with quant.kind=nf4, whose weights can't be moved block by block; use int8 or int4"

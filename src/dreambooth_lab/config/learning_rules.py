"""Problems of what learns and how: model, adapter, quant, objective, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from .choices import Dtype, QuantKind, RolloutKind, Schedule
from .reader import Bounds, Reader, is_absent_folder

BOUNDS: Bounds = (
    ("adapter.rank", 1), ("adapter.alpha", 1e-6), ("adapter.dropout", 0, 0.99), ("adapter.token_lr_ratio", 0),
    ("adapter.text_lr_ratio", 0),
    ("objective.logit_std", 1e-3), ("objective.shift", 1e-3), ("objective.low", 0, 1), ("objective.high", 0, 1),
    ("objective.gamma", 1e-6), ("objective.huber_c", 1e-6), ("objective.noise_offset", 0),
    ("objective.noise_offset_probability", 0, 1), ("rollout.max_step_offset", 1), ("rollout.shift", 1e-3),
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
    yield from _adapter_problems(read)
    yield from _optimizer_problems(read)


def _optimizer_problems(read: Reader) -> Iterator[str | None]:
    target, schedule = str(read("optimizer._target_")), read("optimizer.schedule")
    library = target.partition(".")[0]
    if read("optimizer._target_") is not None and not find_spec(library):
        yield f"optimizer._target_ is {target!r}, but {library} is not installed; pip install 'dreambooth-lab[optimizers]'"
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


QUANTO = (QuantKind.int8, QuantKind.int4, QuantKind.int2, QuantKind.fp8)
PEFT, ON_QUANTISED = ("lora", "dora"), ("lora", "dora", "locon", "loha", "lokr")
NOT_LYCORIS = {
    "full": "takes the base's weights away for: use adapter=full",
    "dylora": "can't load again",
    "ia3": "can't load again",
    "tlora": "can't put on padded convolutions",
}


def _adapter_problems(read: Reader) -> Iterator[str | None]:
    """Pairs that can't work, each with its reason: what the libraries would do instead is fail late, or something else."""
    algorithm, target = read("adapter.algorithm"), str(read("adapter._target_"))
    options = read("adapter.options") or {}
    decomposed = algorithm == "dora" or options.get("use_dora") or options.get("dora_wd") or options.get("weight_decompose")
    low, kind = read("model.dtype") not in (None, Dtype.float32), read("quant.kind") or QuantKind.none
    dtype = f"model.dtype is {read('model.dtype').name}" if low else ""
    if target.endswith(".LoRA") and algorithm not in PEFT:
        yield f"adapter.algorithm is {algorithm!r}; peft's are lora and dora; see adapter=lokr for LyCORIS"
    if target.endswith(".Lycoris") and algorithm in NOT_LYCORIS:
        yield f"adapter.algorithm is {algorithm!r}, which LyCORIS {NOT_LYCORIS[algorithm]}"
    if target.endswith(".Lycoris") and options.get("use_scalar"):
        yield "adapter.options.use_scalar is true: LyCORIS folds the scalar into its files, so a run can't go on; leave it out"
    if target.endswith(".Lycoris") and decomposed and low:
        yield f"adapter.options has weight decomposition and {dtype}, which LyCORIS can't mix; use float32 or adapter=dora"
    if read("adapter.preset") is not None and not target.endswith(".Lycoris"):
        yield f"adapter.preset is {read('adapter.preset')!r}, which only LyCORIS has; use adapter=lokr, or adapter.preset=null"
    if str(options.get("init_lora_weights", "")).lower().startswith("pissa"):
        yield "adapter.options.init_lora_weights is pissa, which rewrites the base; the prior's teacher needs it"
    if algorithm == "full" and low:
        yield f"{dtype} with adapter=full, where small updates are lost; set model.dtype=float32"
    yield from _text_encoder_problems(read)
    place = read("adapter.init_from")
    if place is not None and not Path(place).expanduser().exists():
        yield f"adapter.init_from is {place!r}, which does not exist; give an export folder of a run, or a file of one"
    if kind is QuantKind.none:
        return
    if algorithm not in (None, *ON_QUANTISED):
        yield f"quant.kind is {kind.name}, but adapter={algorithm} needs the weights themselves; use quant=none"
    if algorithm in ON_QUANTISED and target.endswith(".Lycoris") and decomposed:
        yield f"quant.kind is {kind.name}, where LyCORIS silently drops dora_wd; use adapter=dora or quant=none"
    if target.endswith(".LoRA") and decomposed and kind in QUANTO and low:
        yield f"quant.kind is {kind.name} with DoRA and {dtype}, which peft can't mix; use float32 or quant=int8_torchao"


def _text_encoder_problems(read: Reader) -> Iterator[str | None]:
    numbers, algorithm = read("adapter.text_encoders") or [], read("adapter.algorithm")
    if not numbers:
        return
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        yield f"adapter.text_encoders is {numbers}; number each once, from 1: [1,2]"
    if algorithm not in (None, *PEFT):
        yield f"adapter.text_encoders is {numbers}, but {algorithm} can't sit on text encoders; use adapter=lora or dora, or []"
    if not read("adapter.text_parts"):
        yield f"adapter.text_encoders is {numbers}, but adapter.text_parts is empty; name some groups, or use text_encoders=[]"
    if read("model.encoder_dtype") is Dtype.float16:
        yield "model.encoder_dtype is float16 with adapter.text_encoders, whose gradients it loses; use float32 or bfloat16"
    for number in numbers:
        kind = read(f"quant.text_encoder_{number}") or QuantKind.none
        if kind in QUANTO and algorithm == "dora" and read("model.encoder_dtype") is not Dtype.float32:
            low = f"model.encoder_dtype is {read('model.encoder_dtype').name}"
            yield f"quant.text_encoder_{number} is {kind.name} with DoRA and {low}, which peft can't mix; use float32"


def _objective_problems(read: Reader) -> Iterator[str | None]:
    low, high = read("objective.low"), read("objective.high")
    if low is not None and high is not None and low >= high:
        yield f"objective.low is {low:g} and objective.high {high:g}; times are drawn between them, so low must be the lesser"
    if (grid := read("rollout.grid")) is not None and grid != "native" and (not isinstance(grid, int) or grid < 1):
        yield f"rollout.grid is {grid!r}; it must be a number of inference steps, at least 1, or native"
    terms = [read(f"rollout.reflexflow.{name}") for name in ("direction", "frequency")]
    if any(terms) and read("rollout.kind") is RolloutKind.input_perturbation:
        yield "rollout.reflexflow has terms, but rollout.kind=input_perturbation makes no walk they speak of; set them to 0"


def _model_problems(read: Reader) -> Iterator[str | None]:
    if is_absent_folder(read("model.pretrained")):
        absent = f"model.pretrained is {read('model.pretrained')!r}, a folder that does not exist"
        yield f"{absent}; give a diffusers folder or a hub id such as owner/name"
    if (
        not read("adapter.parts")
        and not read("adapter.targets")
        and not read("adapter.preset")
        and read("adapter.algorithm") != "full"
    ):
        yield "adapter.parts and adapter.targets are both empty; nothing would be trained"
    if read("ema.device") is not None and str(read("ema.device")).split(":")[0] not in ("cpu", "cuda"):
        yield f"ema.device is {read('ema.device')!r}; it must be cpu or cuda"
    for key in ("validation.resolution", "model.resolution", "prior.generated.resolution"):
        if read(key) is not None and (read(key) < 16 or read(key) % 8):
            yield f"{key} is {read(key)}; it must be a multiple of 8, at least 16"

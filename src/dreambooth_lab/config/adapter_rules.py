"""Checks of the trained weights and the base: adapter and quant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from . import enums
from .enums import ORTHO_TAIL, REGEX
from .lycoris_file import SUFFIX, read_lycoris_file
from .reader import Reader, installed

QUANTO = (enums.QuantKind.int8, enums.QuantKind.int4, enums.QuantKind.int2, enums.QuantKind.fp8)
PEFT, ON_QUANTISED = ("lora", "dora"), ("lora", "dora", "locon", "loha", "lokr")
ON_LYCORIS = ("lora", "locon", "loha", "lokr", "glora", "diag-oft", "boft")
ON_ALL_AT_ONCE = ("prodigyopt", "schedulefree")  # libraries whose optimisers have more than a state per weight
NOT_LYCORIS = {
    "full": "implements by removing the base's weights; use adapter=full",
    "dylora": "can't load again",
    "ia3": "can't load again",
    "tlora": "can't apply to padded convolutions",
}


def problems(read: Reader) -> Iterator[str | None]:
    yield from _adapter_problems(read)
    yield from _layer_problems(read)
    yield from _rank_problems(read)
    yield from _weights_problems(read)
    yield from _text_encoder_problems(read)
    for key in ("quant.kind", "quant.text_encoder_1", "quant.text_encoder_2", "quant.text_encoder_3"):
        if read(key) is enums.QuantKind.nf4 and not installed("bitsandbytes"):
            yield f"{key} is nf4, but bitsandbytes is not installed; pip install 'dreambooth-lab[bnb]', or use int4"


def _adapter_problems(read: Reader) -> Iterator[str | None]:
    """Combinations that can't work, each with its reason; the libraries would fail late, or compute something else."""
    algorithm, target = read("adapter.algorithm"), str(read("adapter._target_"))
    options = dict(read("adapter.options") or {})
    if target.endswith(".Lycoris") and str(read("adapter.preset")).endswith(SUFFIX):
        try:
            lycoris_config = read_lycoris_file(read("adapter.preset"))
        except ValueError as error:
            yield f"adapter.preset is {read('adapter.preset')!r}, {error}"
            return
        options, algorithm = lycoris_config, lycoris_config.get("algo", algorithm)
    decomposed = algorithm == "dora" or options.get("use_dora") or options.get("dora_wd") or options.get("weight_decompose")
    low, kind = read("model.dtype") not in (None, enums.Dtype.float32), read("quant.kind") or enums.QuantKind.none
    dtype = f"model.dtype is {read('model.dtype').name}" if low else ""
    if target.endswith(".LoRA") and algorithm not in PEFT:
        yield f"adapter.algorithm is {algorithm!r}; peft's are lora and dora; see adapter=lokr for LyCORIS"
    if target.endswith(".Lycoris") and algorithm in NOT_LYCORIS:
        yield f"adapter.algorithm is {algorithm!r}, which LyCORIS {NOT_LYCORIS[algorithm]}"
    if target.endswith(".Lycoris") and algorithm not in (None, *ON_LYCORIS, *NOT_LYCORIS):
        yield f"adapter.algorithm is {algorithm!r}; LyCORIS has {', '.join(ON_LYCORIS)}"
    if target.endswith(".Lycoris") and options.get("use_scalar"):
        yield "adapter.options.use_scalar is true: LyCORIS folds the scalar into its files, so a run can't be resumed; remove it"
    if target.endswith(".Lycoris") and decomposed and low:
        yield f"adapter.options has weight decomposition and {dtype}, which LyCORIS can't mix; use float32 or adapter=dora"
    if read("adapter.preset") is not None and not target.endswith(".Lycoris"):
        yield f"adapter.preset is {read('adapter.preset')!r}, which only LyCORIS has; use adapter=lokr, or adapter.preset=null"
    if algorithm == "full" and low and (library := str(read("optimizer._target_")).partition(".")[0]) in ON_ALL_AT_ONCE:
        what = f"{dtype} with adapter=full and {library}'s optimiser, whose steps can't be rounded stochastically"
        yield f"{what}; use optimizer=adamw, adamw8bit, adafactor or lion, or model.dtype=float32"
    if not any(read(f"adapter.{key}") for key in ("parts", "targets", "preset")) and algorithm != "full":
        yield "adapter.parts and adapter.targets are both empty; nothing would be trained"
    place = read("adapter.init_from")
    if place is not None and not Path(place).expanduser().exists():
        yield f"adapter.init_from is {place!r}, which does not exist; give an export folder of a run, or a file of one"
    if kind is enums.QuantKind.none:
        return
    if algorithm not in (None, *ON_QUANTISED):
        yield f"quant.kind is {kind.name}, but adapter={algorithm} needs the weights themselves; use quant=none"
    if algorithm in ON_QUANTISED and target.endswith(".Lycoris") and decomposed:
        yield f"quant.kind is {kind.name}, with which LyCORIS silently ignores dora_wd; use adapter=dora or quant=none"
    if target.endswith(".LoRA") and decomposed and kind in QUANTO and low:
        yield f"quant.kind is {kind.name} with DoRA and {dtype}, which peft can't mix; use float32 or quant=int8_torchao"


def _layer_problems(read: Reader) -> Iterator[str | None]:
    """Invalid rules and targets, and keys that an algorithm does not have."""
    algorithm, blocks, targets = read("adapter.algorithm"), read("adapter.blocks") or [], read("adapter.targets") or []
    patterns = [("adapter.blocks", block["match"]) for block in blocks]
    patterns += [("adapter.targets", target.removeprefix(REGEX)) for target in targets if target.startswith(REGEX)]
    for key, pattern in patterns:
        if (wrong := _regex_problem(pattern)) is not None:
            yield f"{key} has {pattern!r}, which is not a valid regular expression: {wrong}"
    ranked = any(block["rank"] is not None for block in blocks)
    if read("adapter.preset") is not None and (targets or ranked):
        what = "adapter.targets" if targets else "ranks in adapter.blocks"
        prefix = f"adapter.preset is {read('adapter.preset')!r}"
        yield f"{prefix}, which sets layers and ranks itself; remove {what}, or the preset"
    if algorithm == "full" and (read("adapter.rank") != 1 or read("adapter.dropout") or read("adapter.options") or ranked):
        yield "adapter=full trains the weights themselves: it has no rank, dropout, options or ranks in blocks; remove them"
    init = (read("adapter.options") or {}).get("init_lora_weights", True)
    if init not in (True, "gaussian", "orthogonal"):
        yield f"adapter.options.init_lora_weights is {init!r}, which changes the base's predictions; use true or gaussian"


def _weights_problems(read: Reader) -> Iterator[str | None]:
    """‖ΔW‖² is at hand where the update is B A, or the weights themselves learn."""
    if read("prior.kind") is not enums.PriorKind.weights:
        return
    algorithm, target = read("adapter.algorithm"), str(read("adapter._target_"))
    if not (algorithm == "full" or (algorithm == "lora" and target.endswith(".LoRA"))):
        yield f"prior.kind is weights with adapter.algorithm={algorithm}, whose ‖ΔW‖² is not at hand; use adapter=lora or full"


def _rank_problems(read: Reader) -> Iterator[str | None]:
    """What a rank by time and an orthogonal start need."""
    schedule, least, rank = read("adapter.rank_schedule"), read("adapter.min_rank"), read("adapter.rank")
    algorithm, options = read("adapter.algorithm"), dict(read("adapter.options") or {})
    off = schedule in (None, enums.RankSchedule.none)
    is_lora = algorithm == "lora" and str(read("adapter._target_")).endswith(".LoRA")
    lowest = least or max((rank or 1) // 2, 1)
    if off and least is not None:
        yield f"adapter.min_rank is {least}, which only a schedule reads; set adapter.rank_schedule=tlora, or leave it out"
    if not off and not is_lora:
        what = f"adapter.rank_schedule is {schedule.name} with adapter.algorithm={algorithm}"
        yield f"{what}, which can't follow it; use adapter=lora"
    if not off and read("adapter.text_encoders"):
        said = f"adapter.rank_schedule is {schedule.name} with adapter.text_encoders={list(read('adapter.text_encoders'))}"
        yield f"{said}, which know no time; use text_encoders=[], or rank_schedule=none"
    if not off and is_lora and rank is not None and rank <= lowest:
        said = f"adapter.rank_schedule is {schedule.name} with adapter.rank={rank} and adapter.min_rank={lowest}"
        yield f"{said}, which leaves no rank out; set min_rank below rank, or rank_schedule=none"
    if (init := options.get("init")) is None:
        return
    if init != ORTHO_TAIL or not is_lora:
        yield f"adapter.options.init is {init!r} with adapter.algorithm={algorithm}; it must be {ORTHO_TAIL}, of adapter=lora"
    if "init_lora_weights" in options:
        yield f"adapter.options has init={init} and init_lora_weights, which both say how a LoRA starts; leave one out"
    if read("adapter.init_from") is not None:
        yield f"adapter.options.init is {init!r} with adapter.init_from, where the start is a file's; leave one of them out"


def _regex_problem(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def _text_encoder_problems(read: Reader) -> Iterator[str | None]:
    numbers, algorithm = read("adapter.text_encoders") or [], read("adapter.algorithm")
    if not numbers:
        return
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        yield f"adapter.text_encoders is {numbers}; list each encoder once, numbered from 1: [1,2]"
    if algorithm not in (None, *PEFT):
        yield f"adapter.text_encoders is {numbers}, but {algorithm} does not support text encoders; use adapter=lora or dora"
    if not read("adapter.text_parts"):
        yield f"adapter.text_encoders is {numbers}, but adapter.text_parts is empty; name some groups, or use text_encoders=[]"
    if read("model.encoder_dtype") is enums.Dtype.float16:
        yield "model.encoder_dtype is float16 with adapter.text_encoders, whose gradients underflow; use float32 or bfloat16"
    for number in numbers:
        kind = read(f"quant.text_encoder_{number}") or enums.QuantKind.none
        if kind in QUANTO and algorithm == "dora" and read("model.encoder_dtype") is not enums.Dtype.float32:
            low = f"model.encoder_dtype is {read('model.encoder_dtype').name}"
            yield f"quant.text_encoder_{number} is {kind.name} with DoRA and {low}, which peft can't mix; use float32"

"""The legal range of every number of the schema in one table. NaN, infinite and extreme values are refused."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from omegaconf import DictConfig, ListConfig

from .reader import Reader

Range = tuple[float, float]  # minimum, maximum; both are legal

SHARE: Range = (0, 1)
STEPS: Range = (1, 10**9)
NO_STEPS: Range = (0, 10**9)  # 0: never, or none
EPOCHS: Range = (0, 10**6)
PICTURES: Range = (1, 10**6)
ROWS: Range = (1, 2**16)
PIXELS: Range = (16, 2**14)
SAMPLER_STEPS: Range = (1, 10**4)
GUIDANCE: Range = (0, 1000)
RATIO: Range = (0, 10**4)  # ratio of learning rates, or a weight
STRENGTH: Range = (0, 100)
RATE: Range = (1e-12, 100)
RANK: Range = (1, 10**5)
SEED: Range = (0, 2**31 - 1)
SIZE: Range = (0, 10**6)  # px or megapixels

RANGES: dict[str, Range] = {
    "seed": SEED,
    "model.resolution": PIXELS, "model.recommended.lr": RATE, "model.recommended.lr_full": RATE, "model.recommended.rank": RANK,
    "model.recommended.guidance_scale": GUIDANCE, "model.recommended.num_inference_steps": SAMPLER_STEPS,
    "adapter.rank": RANK, "adapter.min_rank": RANK, "adapter.alpha": (1e-6, 10**6), "adapter.dropout": (0, 0.99),
    "adapter.blocks.rank": RANK, "adapter.blocks.lr_ratio": RATIO, "adapter.text_encoders": (1, 9),
    "adapter.text_lr_ratio": RATIO, "adapter.token_lr_ratio": RATIO,
    "race": (0, 100),
    "memory.card_gib": (0.1, 2**20),
    "dataset.resolutions": (0.01, 2**14), "dataset.max_aspect": (1, 8), "dataset.minimum_image_size": SIZE,
    "dataset.maximum_image_size": (1e-3, 10**6), "dataset.target_downsample_size": (1e-3, 10**6),
    "dataset.max_upscale": (1e-3, 10**4), "dataset.repeats": (0, 10**6), "dataset.crop_aspects": (0.01, 100),
    "dataset.crop_variants": (1, 10**4), "dataset.caption_dropout": SHARE, "dataset.aesthetic_score": (0, 10),
    "dataset.batch_size": ROWS,
    "prior.weight": RATIO, "prior.class_fraction": SHARE, "prior.generated.count": PICTURES,
    "prior.generated.num_inference_steps": SAMPLER_STEPS, "prior.generated.guidance_scale": GUIDANCE,
    "prior.generated.resolution": PIXELS, "prior.generated.batch_size": ROWS, "prior.generated.seed": SEED,
    "prior.bank.draws": (1, 10**5), "prior.bank.batch_size": ROWS,
    "mask.min_weight": SHARE, "mask.drop_probability": SHARE,
    "objective.logit_mean": (-100, 100), "objective.logit_std": (1e-3, 100), "objective.shift": (1e-3, 1000),
    "objective.min_time": SHARE, "objective.max_time": SHARE, "objective.gamma": (1e-6, 10**6),
    "objective.uncertainty_lr": (1e-6, 1), "objective.huber_c": (1e-6, 1000),
    "objective.anchor_beta": (1e-3, 10**7), "objective.noise_offset": STRENGTH, "objective.noise_offset_probability": SHARE,
    "rollout.max_step_offset": (1, 1000), "rollout.num_steps": SAMPLER_STEPS, "rollout.shift": (1e-3, 1000),
    "rollout.probability": SHARE, "rollout.ramp_steps": NO_STEPS, "rollout.min_time": SHARE, "rollout.perturbation": STRENGTH,
    "rollout.reflexflow.direction": RATIO, "rollout.reflexflow.frequency": RATIO,
    "ema.decay": SHARE, "ema.update_interval": STEPS, "ema.lengths": (0.005, 0.28), "ema.snapshot_every_n_steps": STEPS,
    "validation.every_n_steps": NO_STEPS, "validation.every_n_epochs": EPOCHS, "validation.num_images": (1, 10**4),
    "validation.batch_size": ROWS,
    "validation.num_inference_steps": SAMPLER_STEPS, "validation.guidance_scale": GUIDANCE, "validation.seed": SEED,
    "validation.resolution": PIXELS, "validation.superclass_share": SHARE, "validation.personal_guidance": SHARE,
    "eval.batch_size": ROWS, "eval.every_n_steps": NO_STEPS, "eval.every_n_epochs": EPOCHS, "eval.num_images": PICTURES,
    "eval.timesteps": (1, 10**4),
    "preview.every_n_steps": SAMPLER_STEPS,
    "optimizer.lr": RATE, "optimizer.weight_decay": STRENGTH, "optimizer.warmup_steps": NO_STEPS,
    "optimizer.cycles": (1, 10**6), "optimizer.schedule_steps": STEPS, "optimizer.lora_plus_ratio": (1e-3, 10**4),
    "trainer.max_steps": STEPS, "trainer.max_epochs": (1e-3, 10**6),
    "trainer.accumulate_grad_batches": ROWS, "trainer.gradient_clip_norm": (0, 10**6),
    "trainer.devices": (1, 1024), "trainer.num_nodes": (1, 1024),
    "trainer.skip_nonfinite_steps": NO_STEPS, "trainer.log_every_n_steps": STEPS,
    "checkpoint.every_n_steps": STEPS, "checkpoint.patience": NO_STEPS, "checkpoint.keep": STEPS,
}  # fmt: skip


OR_WORD = {  # keys that may be a keyword instead
    "objective.shift": "model (as the model was trained)",
    "rollout.shift": "model (as the model was trained)",
    "rollout.num_steps": "native (sampler steps of one native timestep)",
}


def problems(read: Reader) -> Iterator[str]:
    """Numbers outside their ranges, then those in free-form options that are not finite."""
    for key, (low, high) in RANGES.items():
        for value in numbers(read, key):
            if not low <= value <= high:
                yield f"{key} is {value}; it must be {_legal(key)}"
    for key in OR_WORD:
        yield from _neither(key, read(key), key in read.broken or key.endswith("shift"))
    for key in ("model.options", "adapter.options", "optimizer.options", "logger.loggers"):
        yield from _not_finite(key, read(key))


def _legal(key: str) -> str:
    low, high = RANGES[key]
    legal = f"between {low:g} and {high:g}" if high <= 10 else f"at least {low:g}, at most {high:g}"
    return legal + (f", or {OR_WORD[key]}" if key in OR_WORD else "")


def _neither(key: str, value: Any, may_be_null: bool) -> Iterator[str]:
    if value is None and may_be_null:
        return
    whole = key == "rollout.num_steps"
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number and value != OR_WORD[key].split()[0]:
        yield f"{key} is {value!r}; it must be a {'whole ' if whole else ''}number, {_legal(key)}"


def numbers(read: Reader, key: str) -> list[int | float]:
    """The numbers of a key of the table: its own value, a list's, or those of one field of a list's records."""
    parent, _, field = key.rpartition(".")
    if parent == "adapter.blocks":
        held = [record[field] for record in read(parent) or []]
    else:
        value = read(key)
        held = list(value) if isinstance(value, ListConfig) else [value]
    return [value for value in held if isinstance(value, int | float) and not isinstance(value, bool)]


def _not_finite(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, float) and not isfinite(value):
        yield f"{key} is {value}; it must be a finite number"
    elif isinstance(value, DictConfig):
        for name, child in value.items():
            yield from _not_finite(f"{key}.{name!s}", child)
    elif isinstance(value, ListConfig):
        for i, child in enumerate(value):
            yield from _not_finite(f"{key}[{i}]", child)

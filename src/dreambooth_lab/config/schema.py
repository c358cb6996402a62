"""The typed schema of `conf/`: Python says what is legal, YAML says what is chosen, so nothing here has a default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .choices import (
    Attention,
    CaptionKind,
    Crop,
    CropAspect,
    DatasetType,
    Dtype,
    EmaValidation,
    HuberSchedule,
    LossKind,
    MaskFrom,
    Mode,
    Outside,
    PriorKind,
    PriorSource,
    QuantKind,
    Ramp,
    ReceiverKind,
    ResolutionType,
    RolloutKind,
    RolloutTarget,
    Sampler,
    Schedule,
    Timesteps,
    Weight,
)


@dataclass
class UsualConfig:
    lr: float
    rank: int
    timesteps: Timesteps
    guidance_scale: float
    num_inference_steps: int


@dataclass
class ModelConfig:
    _target_: str
    pretrained: str
    revision: str | None
    variant: str | None
    dtype: Dtype
    encoder_dtype: Dtype
    tae: str | None
    resolution: int
    gradient_checkpointing: bool
    attention: Attention
    compile: bool
    options: dict[str, Any]
    usual: UsualConfig


@dataclass
class BlockConfig:
    match: str
    rank: int | None
    lr_ratio: float


@dataclass
class AdapterConfig:
    _target_: str
    algorithm: str
    rank: int
    alpha: float
    dropout: float
    parts: list[str]
    targets: list[str]
    blocks: list[BlockConfig]
    init_from: str | None
    options: dict[str, Any]
    preset: str | None
    text_encoders: list[int]
    text_parts: list[str]
    text_lr_ratio: float
    train_token: bool
    token: str | None
    token_lr_ratio: float


@dataclass
class QuantConfig:
    kind: QuantKind
    text_encoder_1: QuantKind
    text_encoder_2: QuantKind
    text_encoder_3: QuantKind
    cache: bool


@dataclass
class DatasetConfig:
    subject: str | None
    type: DatasetType
    path: str
    image_column: str
    caption_column: str | None
    split: str
    streaming: bool
    instance_prompt: str
    class_prompt: str | None
    prompts: list[str]
    caption: CaptionKind
    prepend_instance_prompt: bool
    only_instance_prompt: bool
    resolutions: list[float]
    resolution_type: ResolutionType
    max_aspect: float
    minimum_image_size: float
    maximum_image_size: float | None
    target_downsample_size: float | None
    max_upscale: float | None
    repeats: int
    crop: Crop
    crop_aspect: CropAspect
    crop_aspects: list[float]
    crop_variants: int
    flip: bool
    mask_from: MaskFrom
    mask_path: str | None
    caption_dropout: float
    aesthetic_score: float
    batch_size: int


@dataclass
class GeneratedConfig:
    count: int
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    resolution: int
    batch_size: int
    seed: int


@dataclass
class BankConfig:
    draws: int
    batch_size: int


@dataclass
class PriorConfig:
    kind: PriorKind
    source: PriorSource
    path: str | None
    prompt: str | None
    weight: float
    share: float
    generated: GeneratedConfig
    bank: BankConfig


@dataclass
class MaskConfig:
    normalize: bool
    floor: float
    drop_probability: float
    outside: Outside


@dataclass
class ObjectiveConfig:
    timesteps: Timesteps
    logit_mean: float
    logit_std: float
    shift: Any  # a number, or model
    low: float
    high: float
    weight: Weight
    gamma: float
    loss: LossKind
    huber_c: float
    huber_schedule: HuberSchedule
    noise_offset: float
    noise_offset_probability: float


@dataclass
class ReflexFlowConfig:
    direction: float
    frequency: float


@dataclass
class RolloutConfig:
    enabled: bool
    kind: RolloutKind
    max_step_offset: int
    grid: Any  # a number of strides, or native
    shift: Any  # a number, or model
    probability: float
    ramp_steps: int
    ramp_shape: Ramp
    sampler: Sampler
    target: RolloutTarget
    min_time: float
    perturbation: float
    reflexflow: ReflexFlowConfig


@dataclass
class EmaConfig:
    enabled: bool
    decay: float
    update_interval: int
    device: str
    validation: EmaValidation


@dataclass
class ValidationConfig:
    every_n_steps: int
    every_n_epochs: float
    library: str | None
    prompts: list[str]
    negative_prompt: str
    num_images: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    resolution: int


@dataclass
class EvalConfig:
    clip_model: str | None
    dino_model: str | None
    batch_size: int
    path: str | None
    every_n_steps: int
    every_n_epochs: float
    num_images: int
    timesteps: int


@dataclass
class ReceiverConfig:
    kind: ReceiverKind
    url: str | None
    url_env: str | None
    token_env: str | None


@dataclass
class WebhookConfig:
    receivers: dict[str, ReceiverConfig]


@dataclass
class PreviewConfig:
    enabled: bool
    every_n_steps: int


@dataclass
class OptimizerConfig:
    _target_: str
    lr: float
    weight_decay: float
    options: dict[str, Any]
    schedule: Schedule
    warmup_steps: int
    cycles: int
    lora_plus_ratio: float


@dataclass
class TrainerConfig:
    max_steps: int
    accumulate_grad_batches: int
    gradient_clip_norm: float
    accelerator: str
    devices: int
    log_every_n_steps: int
    deterministic: bool
    progress: bool


@dataclass
class CheckpointConfig:
    every_n_steps: int
    keep_all: bool
    monitor: str | None
    mode: Mode
    patience: int


@dataclass
class OneLoggerConfig:
    _target_: str
    package: str
    options: dict[str, Any]


@dataclass
class ExportConfig:
    push_to_hub: bool
    repo: str | None
    private: bool
    token_env: str


@dataclass
class LoggerConfig:
    loggers: dict[str, OneLoggerConfig]


@dataclass
class Config:
    model: ModelConfig
    adapter: AdapterConfig
    quant: QuantConfig
    dataset: DatasetConfig
    prior: PriorConfig
    mask: MaskConfig
    objective: ObjectiveConfig
    rollout: RolloutConfig
    ema: EmaConfig
    validation: ValidationConfig
    eval: EvalConfig
    preview: PreviewConfig
    webhook: WebhookConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    export: ExportConfig
    logger: LoggerConfig
    name: str
    seed: int
    runs: str
    cache: str
    resume: str | None
    preflight: str

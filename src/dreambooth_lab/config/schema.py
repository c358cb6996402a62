"""The typed schema of `conf/`: Python defines the legal values, YAML the chosen ones, so nothing here has a default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import enums


@dataclass
class RecommendedConfig:
    lr: float
    lr_full: float
    rank: int
    timesteps: enums.Timesteps
    guidance_scale: float
    num_inference_steps: int
    parts: list[str]
    every_part: list[str]


@dataclass
class ModelConfig:
    _target_: str
    pretrained: str
    revision: str | None
    variant: str | None
    dtype: enums.Dtype
    encoder_dtype: enums.Dtype
    tae: str | None
    resolution: int
    gradient_checkpointing: bool
    attention: enums.Attention
    compile: bool
    vae_tiling: bool
    offload: enums.Offload
    options: dict[str, Any]
    empty_caption: enums.EmptyCaption
    config: str | None
    prediction_type: enums.Prediction | None
    recommended: RecommendedConfig


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
    rank_schedule: enums.RankSchedule
    min_rank: int | None
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
    kind: enums.QuantKind
    text_encoder_1: enums.QuantKind
    text_encoder_2: enums.QuantKind
    text_encoder_3: enums.QuantKind
    cache: bool


@dataclass
class MemoryConfig:
    card_gib: float | None
    plans: list[list[str]]


@dataclass
class DatasetConfig:
    subject: str | None
    type: enums.DatasetType
    path: str
    image_column: str
    caption_column: str | None
    split: str
    streaming: bool
    instance_prompt: str
    class_prompt: str | None
    prompts: list[str]
    caption: enums.CaptionKind
    prepend_instance_prompt: bool
    only_instance_prompt: bool
    long_captions: enums.LongCaptions
    resolutions: list[float]
    resolution_type: enums.ResolutionType
    max_aspect: float
    minimum_image_size: float
    maximum_image_size: float | None
    target_downsample_size: float | None
    max_upscale: float | None
    repeats: int
    crop: enums.Crop
    crop_aspect: enums.CropAspect
    crop_aspects: list[float]
    crop_variants: int
    flip: bool
    mask_from: enums.MaskFrom
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
    kind: enums.PriorKind
    source: enums.PriorSource
    path: str | None
    prompt: str | None
    weight: float
    class_fraction: float
    generated: GeneratedConfig
    bank: BankConfig


@dataclass
class MaskConfig:
    normalize: bool
    min_weight: float
    drop_probability: float
    outside: enums.Outside


@dataclass
class ObjectiveConfig:
    timesteps: enums.Timesteps
    logit_mean: float
    logit_std: float
    shift: Any  # a number, or model
    min_time: float
    max_time: float
    weight: enums.Weight
    gamma: float
    uncertainty_lr: float
    anchor: enums.Anchor
    anchor_beta: float
    loss: enums.LossKind
    huber_c: float
    huber_schedule: enums.HuberSchedule
    noise_offset: float
    noise_offset_probability: float


@dataclass
class ReflexFlowConfig:
    direction: float
    frequency: float


@dataclass
class RolloutConfig:
    enabled: bool
    kind: enums.RolloutKind
    max_step_offset: int
    num_steps: Any  # a number of sampler steps, or native
    shift: Any  # a number, or model
    probability: float
    ramp_steps: int
    ramp_shape: enums.Ramp
    sampler: enums.Sampler
    target: enums.RolloutTarget
    min_time: float
    perturbation: float
    reflexflow: ReflexFlowConfig


@dataclass
class EmaConfig:
    enabled: bool
    decay: float
    update_interval: int
    device: str
    validation: enums.EmaValidation
    lengths: list[float]
    snapshot_every_n_steps: int


@dataclass
class ValidationConfig:
    every_n_steps: int
    every_n_epochs: float
    library: str | None
    prompts: list[str]
    negative_prompt: str
    num_images: int
    batch_size: int
    num_inference_steps: int
    guidance_scale: float
    superclass: enums.Superclass
    superclass_share: float
    personal_guidance: float | None
    seed: int
    resolution: int


@dataclass
class EvalConfig:
    clip_model: str | None
    dino_model: str | None
    gallery: str | None
    batch_size: int
    path: str | None
    every_n_steps: int
    every_n_epochs: float
    num_images: int
    timesteps: int
    leakage: bool


@dataclass
class ReceiverConfig:
    kind: enums.ReceiverKind
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
    schedule: enums.Schedule
    warmup_steps: int
    cycles: int
    schedule_steps: int | None
    on_extend: enums.OnExtend
    lora_plus_ratio: float


@dataclass
class TrainerConfig:
    max_steps: int
    max_epochs: float | None
    accumulate_grad_batches: int
    gradient_clip_norm: float
    skip_nonfinite_steps: int
    accelerator: str
    devices: int
    num_nodes: int
    strategy: str
    log_every_n_steps: int
    deterministic: bool
    progress: bool


@dataclass
class CheckpointConfig:
    every_n_steps: int
    keep: int | None
    monitor: str | None
    mode: enums.Mode
    patience: int


@dataclass
class OneLoggerConfig:
    _target_: str
    package: str
    options: dict[str, Any]


@dataclass
class ExportConfig:
    name: str
    dtype: enums.Dtype
    formats: list[enums.Format]
    push_to_hub: bool
    repo: str | None
    private: bool
    token_env: str
    metadata: enums.Metadata


@dataclass
class LoggerConfig:
    loggers: dict[str, OneLoggerConfig]


@dataclass
class Config:
    model: ModelConfig
    adapter: AdapterConfig
    quant: QuantConfig
    memory: MemoryConfig
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
    search_metric: str | None
    race: int

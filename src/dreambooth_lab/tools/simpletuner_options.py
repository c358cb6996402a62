"""SimpleTuner's config.json in this project's words: what each option becomes here, or why it is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..config import SIMPLETUNER_QUANT

Said = dict[str, Any]  # group or key of this project → value; groups begin with /
Options = dict[str, Any]  # the whole config.json


class Left(Exception):
    """An option can't be taken over; the text says why, and what to do instead."""


class Option(NamedTuple):
    say: Callable[[Any, Options], Said]
    note: str = ""


def number(value: Any) -> float | int:
    try:
        made = float(value)
    except (TypeError, ValueError) as error:
        raise Left(f"{value!r} is no number") from error
    return int(made) if made.is_integer() and "e" not in str(value).lower() and "." not in str(value) else made


def flag(value: Any) -> bool:
    if str(value).lower() not in ("true", "false", "1", "0"):
        raise Left(f"{value!r} is neither true nor false")
    return str(value).lower() in ("true", "1")


def edge(value: Any) -> float | int:
    """1024 or "1024x1024"."""
    sides = str(value).lower().split("x")
    if len(set(sides)) > 1:
        raise Left(f"{value!r}: validation pictures are square; set validation.resolution")
    return number(sides[0])


def to(key: str, convert: Callable[[Any], Any] = lambda value: value, note: str = "") -> Option:
    return Option(lambda value, _: {key: convert(value)}, note)


def choice(key: str, names: dict[str, Any], note: str = "") -> Option:
    def say(value: Any, _: Options) -> Said:
        if str(value) not in names:
            raise Left(f"{value!r} is not built; there are {', '.join(names)}")
        return {key: names[str(value)]}

    return Option(say, note)


def idle(why: str) -> Option:
    def say(*_: Any) -> Said:
        raise Left(why)

    return Option(say)


def _adapter(value: Any, options: Options) -> Said:
    if value == "full":
        return {"/adapter": "full", "model.dtype": "float32"}
    if value != "lora":
        raise Left(f"{value!r} is not built; there are lora and full")
    if options.get("lora_type", "standard") == "lycoris":
        return {"/adapter": "lokr"}
    return {"/adapter": "dora" if str(options.get("use_dora", "false")).lower() == "true" else "lora"}


def _rollout(value: Any, _: Options) -> Said:
    steps = number(value)
    return {"rollout.enabled": True, "rollout.max_step_offset": steps, "rollout.grid": "native"} if steps else {}


def _offset(value: Any, options: Options) -> Said:
    strength, share = options.get("noise_offset", 0.1), options.get("noise_offset_probability", 0.25)
    said = {"objective.noise_offset": number(strength), "objective.noise_offset_probability": number(share)}
    return said if flag(value) else {}


def _ema_device(value: Any, _: Options) -> Said:
    return {"ema.device": {"cpu": "cpu", "accelerator": "cuda"}.get(str(value), str(value))}


def _no_eval_loss(value: Any, _: Options) -> Said:
    return {"eval.every_n_steps": 0, "eval.every_n_epochs": 0.0} if flag(value) else {}


FAMILIES = {
    "sd1x": "sd15", "sd2x": "sd21", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "flux2": "flux2_klein",
    "deepfloyd": "deepfloyd_1", "z-image": "z_image", "qwen_image": "qwen_image", "chroma": "chroma",
}  # fmt: skip
LOGGERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"], "none": ["none"]}
DTYPES = {"bf16": "bfloat16", "no": "float32", "fp32": "float32", "fp16": "float16"}
OPTIMIZERS = {
    "adamw_bf16": "adamw", "torch-adamw": "adamw", "optimi-adamw": "adamw", "adamw": "adamw", "bnb-adamw8bit": "adamw8bit",
    "adamw8bit": "adamw8bit", "torch-adafactor": "adafactor", "adafactor": "adafactor", "prodigy": "prodigy",
    "adamw_schedulefree": "schedulefree", "optimi-lion": "lion", "lion": "lion",
}  # fmt: skip
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
             "cosine_with_restarts": "restarts"}  # fmt: skip
WITH = "goes with {}"
CACHED = "caches are addressed by content, in cache=…"
SECRET = "addresses and tokens are named by environment variable: webhook=raw webhook.receivers.raw.url_env=NAME"

OPTIONS: dict[str, Option] = {
    "model_family": choice("/model", FAMILIES),
    "model_type": Option(_adapter),
    "pretrained_model_name_or_path": to("model.pretrained", str),
    "data_backend_config": Option(lambda value, _: {"/dataset": "simpletuner", "dataset.path": str(value)}),
    "base_model_precision": choice("/quant", SIMPLETUNER_QUANT),
    "text_encoder_1_precision": choice("quant.text_encoder_1", SIMPLETUNER_QUANT),
    "text_encoder_2_precision": choice("quant.text_encoder_2", SIMPLETUNER_QUANT),
    "text_encoder_3_precision": choice("quant.text_encoder_3", SIMPLETUNER_QUANT),
    "data_aesthetic_score": to("dataset.aesthetic_score", number, "read by model=sdxl_refiner"),
    "flow_schedule_shift": to("objective.shift", number, "of flow models; ours is the model's own without it"),
    "lora_rank": to("adapter.rank", number),
    "lora_alpha": to("adapter.alpha", number),
    "lora_dropout": to("adapter.dropout", number),
    "init_lora": to("adapter.init_from", str),
    "lycoris_config": to("adapter.preset", str, "read as it is"),
    "learning_rate": to("optimizer.lr", number),
    "optimizer": choice("/optimizer", OPTIMIZERS, "weights that learn are float32 here"),
    "lr_scheduler": choice("optimizer.schedule", SCHEDULES),
    "lr_warmup_steps": to("optimizer.warmup_steps", number),
    "lr_num_cycles": to("optimizer.cycles", number),
    "train_batch_size": to("dataset.batch_size", number),
    "gradient_accumulation_steps": to("trainer.accumulate_grad_batches", number),
    "gradient_checkpointing": to("model.gradient_checkpointing", flag),
    "max_train_steps": to("trainer.max_steps", number),
    "max_grad_norm": to("trainer.gradient_clip_norm", number, "of the norm; SimpleTuner clips single values"),
    "mixed_precision": choice("model.dtype", DTYPES, "of the frozen base"),
    "seed": to("seed", number),
    "resolution": to("model.resolution", number, "where an entry of the dataset file has none"),
    "caption_dropout_probability": to("dataset.caption_dropout", number, "class rows keep their captions here"),
    "snr_gamma": Option(lambda value, _: {"objective.weight": "min_snr", "objective.gamma": number(value)}),
    "loss_type": choice("objective.loss", {"l2": "l2", "huber": "huber", "smooth_l1": "huber"}),
    "huber_c": to("objective.huber_c", number),
    "huber_schedule": choice("objective.huber_schedule", {"snr": "snr", "constant": "constant"}),
    "offset_noise": Option(_offset),
    "scheduled_sampling_max_step_offset": Option(_rollout, "strides of 1/1000, as there; rollout.grid=28 walks further"),
    "scheduled_sampling_probability": to("rollout.probability", number, "the ramp rises from 0 to it"),
    "scheduled_sampling_ramp_steps": to("rollout.ramp_steps", number),
    "scheduled_sampling_ramp_shape": choice("rollout.ramp_shape", {"linear": "linear", "cosine": "cosine"}),
    "scheduled_sampling_sampler": choice("rollout.sampler", {"unipc": "unipc", "euler": "euler", "dpm": "dpm"}),
    "use_ema": to("ema.enabled", flag),
    "ema_decay": to("ema.decay", number),
    "ema_update_interval": to("ema.update_interval", number, "the decay is compensated here"),
    "ema_device": Option(_ema_device),
    "ema_validation": choice("ema.validation", {name: name for name in ("none", "ema_only", "comparison")}),
    "validation_prompt": Option(lambda value, _: {"validation.prompts": [str(value)]}),
    "validation_negative_prompt": to("validation.negative_prompt", str),
    "validation_step_interval": to("validation.every_n_steps", number),
    "validation_steps": to("validation.every_n_steps", number),
    "validation_disable": Option(lambda value, _: {"validation.every_n_steps": 0} if flag(value) else {}),
    "validation_num_inference_steps": to("validation.num_inference_steps", number),
    "validation_guidance": to("validation.guidance_scale", number),
    "validation_seed": to("validation.seed", number),
    "validation_resolution": to("validation.resolution", edge),
    "num_validation_images": to("validation.num_images", number),
    "validation_preview": to("preview.enabled", flag, "needs a webhook: webhook=raw"),
    "validation_preview_steps": to("preview.every_n_steps", number),
    "validation_epoch_interval": to("validation.every_n_epochs", number),
    "user_prompt_library": to("validation.library", str),
    "eval_steps_interval": to("eval.every_n_steps", number),
    "eval_epoch_interval": to("eval.every_n_epochs", number),
    "num_eval_images": to("eval.num_images", number, "pictures here, batches there"),
    "eval_timesteps": to("eval.timesteps", number),
    "eval_loss_disable": Option(_no_eval_loss),
    "evaluation_type": choice("/eval", {"clip": "paper", "none": "none"}),
    "pretrained_evaluation_model_name_or_path": to("eval.clip_model", str),
    "checkpoint_step_interval": to("checkpoint.every_n_steps", number),
    "checkpointing_steps": to("checkpoint.every_n_steps", number),
    "push_to_hub": to("export.push_to_hub", flag, "the token is read from HF_TOKEN"),
    "hub_model_id": to("export.repo", str),
    "checkpoints_total_limit": Option(lambda value, _: {"checkpoint.keep_all": number(value) > 1}, "only the newest, or all"),
    "report_to": choice("/logger", LOGGERS, "metrics.csv is always written"),
    "lora_type": idle(WITH.format("model_type")), "use_dora": idle(WITH.format("model_type")),
    "noise_offset": idle(WITH.format("offset_noise")), "noise_offset_probability": idle(WITH.format("offset_noise")),
    "model_flavour": idle("give the model itself: model.pretrained=…"),
    "num_train_epochs": idle("runs are measured in steps: trainer.max_steps; the preflight tells how many an epoch has"),
    "resolution_type": idle("each entry of the dataset file has its own"),
    "minimum_image_size": idle("each entry of the dataset file has its own"),
    "aspect_bucket_rounding": idle("aspects are not rounded"), "aspect_bucket_alignment": idle("a fact of the model family"),
    "output_dir": idle("run folders are named by date; runs=… says where"),
    "cache_dir": idle(CACHED), "cache_dir_vae": idle(CACHED), "cache_dir_text": idle(CACHED),
    "override_dataset_config": idle(CACHED), "compress_disk_cache": idle("cached tensors are stored as they are"),
    "delete_problematic_images": idle("no file of yours is ever deleted"),
    "delete_unwanted_images": idle("no file of yours is ever deleted"),
    "resume_from_checkpoint": idle("resume=RUN goes on with a run"),
    "webhook_config": idle(SECRET), "webhook_reporting_interval": idle(SECRET),
    "disable_benchmark": idle("the base model is always drawn at step 0"),
    "attention_mechanism": idle("model.attention has PyTorch's own kernels"),
    "allow_tf32": idle("PyTorch's default is kept"), "use_xformers": idle("PyTorch's own attention is used"),
    "vae_batch_size": idle("pictures are encoded one by one"), "write_batch_size": idle("entries are written one by one"),
    "read_batch_size": idle("entries are read when a batch needs them"), "quantize_via": idle("on the run's device"),
    "tracker_project_name": idle("name=… names the run"), "tracker_run_name": idle("name=… names the run"),
    "metadata_update_interval": idle("every picture is checked at every start, changed ones are read"),
}  # fmt: skip

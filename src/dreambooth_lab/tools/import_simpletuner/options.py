"""SimpleTuner's options: the corresponding keys of this project, or why there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...config import SIMPLETUNER_QUANT
from .datasets import datasets, is_lycoris, lycoris
from .families import FAMILY_OPTIONS, is_flow
from .values import (
    NoEffect,
    Option,
    Options,
    Refused,
    Settings,
    Unsupported,
    choice,
    edge,
    flag,
    is_off,
    no_effect,
    number,
    refused,
    to,
)

FLOAT = "trained weights are float32 here"
LOGGERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"], "none": ["none"]}
DTYPES = {"bf16": "bfloat16", "no": "float32", "fp32": "float32", "fp16": "bfloat16"}
QUANT = SIMPLETUNER_QUANT | {  # of as many bits, where the library is another
    "int8dq-torchao": "int8_torchao", "fp8wo-torchao": "fp8_torchao", "fp8-native": "fp8_torchao", "fp8uz-quanto": "fp8",
    "int8-sdnq": "int8", "uint8-sdnq": "int8", "fp8-sdnq": "fp8", "uint4-sdnq": "int4", "uint2-sdnq": "int2",
    "int8": "int8", "int4": "int4", "int2": "int2", "fp8": "fp8", "nf4": "nf4", "none": "none",
}  # fmt: skip
BITS = "weights only; with the same number of bits if the library differs"
OPTIMIZERS = {
    **dict.fromkeys(("adamw_bf16", "adamw", "torch-adamw", "optimi-adamw", "sdnq-adamw"), "adamw"),
    **dict.fromkeys(("bnb-adamw", "bnb-adamw-paged"), "adamw"),
    **dict.fromkeys(("bnb-adamw8bit", "bnb-adamw8bit-paged", "ao-adamw8bit", "adamw8bit"), "adamw8bit"),
    **dict.fromkeys(("torch-adafactor", "sdnq-adafactor", "adafactor"), "adafactor"),
    **dict.fromkeys(("optimi-lion", "bnb-lion", "bnb-lion-paged", "sdnq-lion", "lion"), "lion"),
    "prodigy": "prodigy", "adamw_schedulefree": "schedulefree",
}  # fmt: skip
SCHEDULES = {
    **dict.fromkeys(("constant", "constant_with_warmup"), "constant"),
    **dict.fromkeys(("cosine", "cosine_with_warmup"), "cosine"),
    "linear": "linear", "polynomial": "linear", "cosine_with_restarts": "restarts",
}  # fmt: skip
PART = "another denoiser in a pipeline is not supported; set pretrained_model_name_or_path to a folder that has it"
FLUX_TARGETS = {"all": ["attention"], "all+ffs": ["attention", "feed_forward"]}


def _adapter(value: Any, options: Options) -> Settings:
    if value not in ("lora", "full"):
        raise Refused(f"model_type is {value!r}; there are lora and full")
    if value == "full":
        return {"/adapter": "full", "model.dtype": "float32"}
    if options.get("lora_type", "standard") not in ("standard", "lycoris"):
        raise Refused(f"lora_type is {options['lora_type']!r}; there are standard and lycoris")
    if is_lycoris(options):
        return {"/adapter": "lokr"}  # lycoris_config sets the algorithm
    return {"/adapter": "dora" if flag(options.get("use_dora", False)) else "lora"}


def _lora(key: str, convert: Callable[[Any], Any]) -> Option:
    def say(value: Any, options: Options) -> Settings:
        if options.get("model_type") == "full":
            raise NoEffect("for LoRA only, and model_type is full")
        if is_lycoris(options) and key != "adapter.init_from":
            raise NoEffect("for standard LoRA only; lycoris_config sets it")
        return {key: convert(value)}

    return Option(say)


def _not_full(option: Option, why: str) -> Option:
    def say(value: Any, options: Options) -> Settings:
        if options.get("model_type") == "full":
            raise NoEffect(why)
        return option.say(value, options)

    return Option(say, option.note)


def _steps(value: Any, options: Options) -> Settings:
    if is_off(value) and is_off(options.get("num_train_epochs")):
        raise Unsupported("the length of the training is not set; set trainer.max_steps or trainer.max_epochs")
    if is_off(value):
        raise NoEffect("num_train_epochs sets it")
    return {"trainer.max_steps": number(value)}


def _epochs(value: Any, options: Options) -> Settings:
    if is_off(value) or not is_off(options.get("max_train_steps")):
        raise NoEffect("max_train_steps sets it")
    return {"trainer.max_epochs": number(value)}


def _shift(value: Any, options: Options) -> Settings:
    if not is_flow(options):
        raise NoEffect("for flow models only")
    return {"objective.shift": number(value) or 1.0}


def _auto_shift(value: Any, options: Options) -> Settings:
    if not is_flow(options):
        raise NoEffect("for flow models only")
    return {"objective.shift": "model"} if flag(value) else {}


def _rollout(value: Any, _: Options) -> Settings:
    steps = number(value)
    return {"rollout.enabled": True, "rollout.max_step_offset": steps, "rollout.num_steps": "native"} if steps else {}


def _offset(value: Any, options: Options) -> Settings:
    strength, share = options.get("noise_offset", 0.1), options.get("noise_offset_probability", 0.25)
    values = {"objective.noise_offset": number(strength), "objective.noise_offset_probability": number(share)}
    return values if flag(value) else {}


def _weight(value: Any, options: Options) -> Settings:
    if is_off(value):
        return {}
    kind = "soft_min_snr" if flag(options.get("use_soft_min_snr", False)) else "min_snr"
    return {"objective.weight": kind, "objective.gamma": number(value)}


def _ema_device(value: Any, _: Options) -> Settings:
    return {"ema.device": {"cpu": "cpu", "accelerator": "cuda"}.get(str(value), str(value))}


def _no_eval_loss(value: Any, _: Options) -> Settings:
    return {"eval.every_n_steps": 0, "eval.every_n_epochs": 0.0} if flag(value) else {}


def _library(value: Any, options: Options) -> Settings:
    if is_off(value) or not is_off(options.get("user_prompt_library")):
        raise NoEffect("validation.prompts and validation.library are used")
    if Path(str(value)).suffix == ".json":
        return {"validation.library": str(value)}
    raise Unsupported("SimpleTuner's own prompts are not included; set validation.library=dreambooth_objects, or your own file")


def _prompt(value: Any, options: Options) -> Settings:
    if not is_off(options.get("user_prompt_library")):
        raise Unsupported("validation.library is used instead; add the prompt to that file")
    return {"validation.prompts": [str(value)]}


def _negative(value: Any, _: Options) -> Settings:
    return {"validation.negative_prompt": "" if str(value) == "none" else str(value)}


def _hub(value: Any, _: Options) -> Settings:
    return {"export.push_to_hub": flag(value)}


def _hub_name(value: Any, options: Options) -> Settings:
    if not flag(options.get("push_to_hub", False)):
        raise NoEffect("push_to_hub is off")
    return {"export.repo": str(value)}


def _guidance(value: Any, options: Options) -> Settings:
    if (options.get("flux_guidance_mode", "constant"), number(options.get("flux_guidance_value", 1))) == ("constant", 1):
        raise NoEffect("FLUX.1 is trained with this guidance here")
    raise Unsupported("FLUX.1 is trained at guidance 1")


def _vae(value: Any, options: Options) -> Settings:
    if str(value) == str(options.get("pretrained_model_name_or_path", value)) or "sdxl-vae-fp16-fix" in str(value):
        raise NoEffect("the checkpoint's own VAE is used, in model.encoder_dtype")
    raise Unsupported("the checkpoint's own VAE is used; to use another one, put it into a copy of the checkpoint's folder")


OPTIONS: dict[str, Option] = FAMILY_OPTIONS | {
    "model_type": Option(_adapter),
    "data_backend_config": Option(datasets, "read unchanged"),
    "base_model_precision": _not_full(choice("/quant", QUANT, BITS), "model_type is full: trained weights are not quantised"),
    "text_encoder_1_precision": choice("quant.text_encoder_1", QUANT),
    "text_encoder_2_precision": choice("quant.text_encoder_2", QUANT),
    "text_encoder_3_precision": choice("quant.text_encoder_3", QUANT),
    "data_aesthetic_score": to("dataset.aesthetic_score", number, "read by model=sdxl_refiner"),
    "flow_schedule_shift": Option(_shift),
    "flow_schedule_auto_shift": Option(_auto_shift, "by the image size, as in the model's sampler"),
    "lora_rank": _lora("adapter.rank", number),
    "lora_alpha": _lora("adapter.alpha", number),
    "lora_dropout": _lora("adapter.dropout", number),
    "init_lora": _lora("adapter.init_from", str),
    "flux_lora_target": choice("adapter.parts", FLUX_TARGETS),
    "lycoris_config": Option(lycoris, "read unchanged"),
    "learning_rate": to("optimizer.lr", number),
    "optimizer": choice("/optimizer", OPTIMIZERS, FLOAT),
    "lr_scheduler": choice("optimizer.schedule", SCHEDULES, "polynomial becomes linear"),
    "lr_warmup_steps": to("optimizer.warmup_steps", number),
    "lr_num_cycles": to("optimizer.cycles", number),
    "adam_weight_decay": to("optimizer.weight_decay", number),
    "train_batch_size": to("dataset.batch_size", number),
    "gradient_accumulation_steps": to("trainer.accumulate_grad_batches", number),
    **dict.fromkeys(("gradient_checkpointing", "use_gradient_checkpointing"), to("model.gradient_checkpointing", flag)),
    "vae_enable_tiling": to("model.vae_tiling", flag),
    "max_train_steps": Option(_steps),
    "num_train_epochs": Option(_epochs),
    "max_grad_norm": to("trainer.gradient_clip_norm", number, "clips the norm; SimpleTuner clips single values by default"),
    "mixed_precision": _not_full(
        choice("model.dtype", DTYPES, "for the frozen base; fp16 becomes bfloat16, which needs no loss scaling"), FLOAT
    ),
    "seed": to("seed", number),
    "num_processes": to("trainer.devices", number),
    "resolution": to("model.resolution", number, "for entries of the dataset file without one"),
    "caption_dropout_probability": to("dataset.caption_dropout", number, "class rows keep their captions here"),
    "snr_gamma": Option(_weight),
    "loss_type": choice("objective.loss", {"l2": "l2", "huber": "huber", "smooth_l1": "huber"}),
    "huber_c": to("objective.huber_c", number),
    "huber_schedule": choice("objective.huber_schedule", {"snr": "snr", "constant": "constant"}),
    "offset_noise": Option(_offset),
    "scheduled_sampling_max_step_offset": Option(_rollout, "steps of 1/1000, as there; rollout.num_steps=28 has longer ones"),
    "scheduled_sampling_probability": to("rollout.probability", number, "the value at the end of the ramp, which starts at 0"),
    "scheduled_sampling_ramp_steps": to("rollout.ramp_steps", number),
    "scheduled_sampling_ramp_shape": choice("rollout.ramp_shape", {"linear": "linear", "cosine": "cosine"}),
    "scheduled_sampling_sampler": choice("rollout.sampler", {"unipc": "unipc", "euler": "euler", "dpm": "dpm"}),
    "use_ema": to("ema.enabled", flag),
    "ema_decay": to("ema.decay", number),
    "ema_update_interval": to("ema.update_interval", number, "the decay is adjusted for it here"),
    "ema_device": Option(_ema_device),
    "ema_validation": choice("ema.validation", {name: name for name in ("none", "ema_only", "comparison")}),
    "validation_prompt": Option(_prompt),
    "validation_prompt_library": Option(_library),
    "validation_negative_prompt": Option(_negative),
    **dict.fromkeys(("validation_step_interval", "validation_steps"), to("validation.every_n_steps", number)),
    "validation_disable": Option(lambda value, _: {"validation.every_n_steps": 0} if flag(value) else {}),
    "validation_num_inference_steps": to("validation.num_inference_steps", number),
    "validation_guidance": to("validation.guidance_scale", number),
    "validation_seed": to("validation.seed", number),
    "validation_resolution": to("validation.resolution", edge, "the first of several"),
    "num_validation_images": to("validation.num_images", number),
    "validation_preview": to("preview.enabled", flag, "needs a webhook: webhook=raw"),
    "validation_preview_steps": to("preview.every_n_steps", number),
    "validation_epoch_interval": to("validation.every_n_epochs", number),
    "user_prompt_library": to("validation.library", str),
    "eval_steps_interval": to("eval.every_n_steps", number),
    "eval_epoch_interval": to("eval.every_n_epochs", number),
    "num_eval_images": to("eval.num_images", number, "images here, batches in SimpleTuner"),
    "eval_timesteps": to("eval.timesteps", number),
    "eval_loss_disable": Option(_no_eval_loss),
    "evaluation_type": choice("/eval", {"clip": "paper", "none": "none"}),
    "pretrained_evaluation_model_name_or_path": to("eval.clip_model", str),
    **dict.fromkeys(("checkpoint_step_interval", "checkpointing_steps"), to("checkpoint.every_n_steps", number)),
    "checkpoints_total_limit": to("checkpoint.keep", number),
    "push_to_hub": Option(_hub, "when training ends; the token is read from HF_TOKEN"),
    "hub_model_id": Option(_hub_name, "write it as OWNER/NAME"),
    "report_to": choice("/logger", LOGGERS, "metrics.csv is always written"),
    "variant": to("model.variant", str),
    "revision": to("model.revision", str),
    "pretrained_vae_model_name_or_path": Option(_vae),
    "flux_guidance_mode": Option(_guidance),
    "flux_guidance_value": Option(_guidance),
    "pretrained_transformer_model_name_or_path": refused(PART),
    "pretrained_unet_model_name_or_path": refused(PART),
    "lora_type": no_effect("goes with model_type"), "use_dora": no_effect("goes with model_type"),
    "noise_offset": no_effect("goes with offset_noise"), "noise_offset_probability": no_effect("goes with offset_noise"),
    "use_soft_min_snr": no_effect("goes with snr_gamma"),
    "controlnet": refused("controlnet trains another network, which is not supported"),
    "control": refused("control trains with input images, which is not supported"),
    "distillation_method": refused("distillation is another kind of training, which is not supported"),
    "twinflow_enabled": refused("TwinFlow is another kind of training, which is not supported"),
    "slider_lora_target": refused("slider LoRAs are another kind of training, which is not supported"),
}  # fmt: skip

"""Options that are not mapped, by reason; a * stands for the rest of a name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from .values import Option, no_effect, unbuilt

NO_MEANING = {
    "images are bucketed by their exact shape": "aspect_bucket_* disable_bucket_pruning allow_dataset_oversubscription",
    "each entry of the dataset file sets it": (
        "disable_multiline_split resolution_type minimum_image_size maximum_image_size target_downsample_size "
        "caption_strategy instance_prompt prepend_instance_prompt only_instance_prompt parquet_* max_upscale_threshold "
        "aspect_ratio_bucket* repeats"
    ),
    "run folders are named by date; runs=FOLDER and name=NAME set their location and name": "output_dir logging_dir tracker_*",
    "caches are addressed by content, in cache=FOLDER": (
        "cache_dir* override_dataset_config compress_disk_cache preserve_data_backend_cache vae_cache_* text_cache_* "
        "text_embed_* skip_file_discovery metadata_update_interval"
    ),
    "your files are never deleted": "delete_*",
    "resume=RUN resumes a run": "resume_from_checkpoint",
    "the base model is always validated at step 0": "disable_benchmark",
    "addresses and tokens come from environment variables, such as webhook=raw webhook.receivers.raw.url_env=NAME": (
        "webhook_* hub_token aws_* s3_* *_token *_api_key *_password"
    ),
    "model.attention has PyTorch's own kernels": "attention_mechanism *xformers* sageattention_usage",
    "PyTorch's default is used": "*_tf32 torch_num_threads unet_attention_slice",
    "images and captions are encoded one by one, and read when a batch needs them": (
        "vae_batch_size write_batch_size read_batch_size text_encoder_batch_size image_processing_batch_size max_workers "
        "dataloader_prefetch* enable_multiprocessing"
    ),
    "weights are quantised as they are loaded, then cached": "quantize_via",
    "gradients are clipped by their norm: trainer.gradient_clip_norm": "grad_clip_method",
    "fused projections give the same prediction": "fuse_qkv_projections fused_qkv_projections",
    "a run's folder contains it": "checkpointing_use_tempdir save_text_encoder print_* debug_* modelspec_comment model_card_*",
    "every epoch is complete": "strict_epoch_limit",
    "trained weights and the loss are float32": "gradient_precision base_model_default_dtype vae_dtype",
    "one process per device": (
        "num_machines machine_rank main_process_* local_rank accelerate_* set_grads_to_none find_unused_parameters"
    ),
    "model.compile compiles the blocks": "dynamo_* validation_torch_compile",
    "VAE and text encoders leave the device when their outputs are cached": (
        "accelerator_cache_clear_interval keep_vae_loaded fully_unload_text_encoder delete_model_after_load "
        "offload_during_* vae_enable_*"
    ),
    "validation uses the adapter's full strength": "enable_watermark validation_lycoris_strength validation_adapter_strength",
    "the empty prompt is not validated": "validation_disable_unconditional",
    "only for the configuration program": (
        "i_know_what_i_am_doing same_network configs_dir merge_environment_config config_type simpletuner_* __* ez_model_type"
    ),
    "only for its backend": "sdnq_*",
    "only for a second set of input images": "conditioning_multidataset_sampling",
    "a checkpoint's own code is never run": "trust_remote_code",
    "for other families": (
        "max_grounding_entities pixart_* custom_text_encoder_* wan_* ltx_* ltx2_* hidream_* ideogram_* sana_* cosmos3_* "
        "minimax_* krea2_* audio_* lyrics_* acestep_* framerate"
    ),
}
NOT_SUPPORTED = {
    "token routing (TREAD) is not supported": "tread_config",
    "skip-layer guidance is not supported": "validation_guidance_skip_*",
    "guidance is not rescaled here": "validation_guidance_rescale",
    "guidance is the pipeline's own": "validation_guidance_real validation_no_cfg_until_timestep validation_noise_scheduler",
    "activations are not quantised": "quantize_activations quantization_config",
    "every block is checkpointed": "gradient_checkpointing_*",
    "use model.offload=blocks, or quantise the weights with quant=": (
        "ramtorch* musubi_* *group_offload* *_chunk* deepspeed_* fsdp_* context_parallel_*"
    ),
    "only the final export is pushed": "push_checkpoints_to_hub publishing_config push_to_hub_background",
    "use optimizer.options={…}": "optimizer_* adam_beta* adam_epsilon prodigy_steps fuse_optimizer",
    "schedules decay to 0": "lr_end lr_power",
    "learning rates are not scaled by the batch size; set optimizer.lr": "lr_scale*",
    "use adapter.targets=[…]": "peft_lora_target_modules",
    "LoRA's matrices are initialised by peft; see adapter.options": (
        "sla_config peft_lora_mode lora_init_type singlora_* init_lokr_norm init_lora_*"
    ),
    "timesteps are drawn by objective.timesteps": "flow_* timestep_bias_* refiner_training* disable_segmented_timestep_sampling",
    "FLUX.1 is trained at guidance 1": "flux_*",
    "use adapter.text_encoders=[1,2]": "train_text_encoder text_encoder_lr text_encoder_limit",
    "a part of a pipeline can't be replaced; use a folder with all parts": "pretrained_* *_text_encoder_model_name_or_path",
    "this rollout option is not supported; rollout has a ramp, a sampler and a maximum number of steps": "scheduled_sampling_*",
    "this loss term is not supported": (
        "crepa_* urepa_* irepa_* layersync_* nextlat_* mixflow_* xm_* diff2flow_* internal_guidance_* "
        "masked_loss_probability input_perturbation* snr_weight twinflow_* distillation_config diffusion_blocks_config"
    ),
    "the eval loss and CLIP are supported": "eval_dataset_*",
    "validation uses prompts only": "validation_* validate_*",
    "no external program is started": "custom_tracker *_script disk_low_*",
    "EMA's warm-up is min(decay, (1+s)/(10+s))": "ema_*",
    "the checkpoint's own settings are used": (
        "prediction_type rescale_betas_zero_snr training_scheduler_* inference_scheduler_* t5_padding sd3_* tokenizer_*"
    ),
    "checkpoints are counted in steps": "checkpoint_epoch_interval checkpointing_rolling_steps checkpoints_rolling_*",
    "there is no assistant LoRA": "assistant_lora_*",
    "datasets are sampled by their rows: repeats and probability": "data_backend_sampling",
    "validation uses only the trained model": "deepfloyd_validation_* sdxl_validation_*",
    "every layer of adapter.parts or adapter.targets is trained": "layer_freeze_strategy freeze_encoder_*",
    "an unreadable file is listed and skipped": "ignore_missing_files",
    "export.formats writes ComfyUI's file beside diffusers'": "lora_format",
    "weights are not offloaded to a path": "offload_param_path",
    "the refiner is trained on the last fifth of the noise schedule": "sdxl_refiner_uses_full_range",
    "randomness is keyed by the sample, not the device": "seed_for_each_device",
    "it belongs to an option that is not supported": "soft_min_snr_sigma_data controlnet_*",
    "there is no content filter": "*nsfw*",
}


def other(name: str) -> Option | None:
    """The result for an option without its own entry; None: it is unknown."""
    for reasons, kind in ((NO_MEANING, no_effect), (NOT_SUPPORTED, unbuilt)):
        for why, names in reasons.items():
            if any(fnmatchcase(name, pattern) for pattern in names.split()):
                return kind(why)
    return None

"""Options that are not taken over, by reason; a * stands for the rest of a name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from .values import Option, no_effect, unbuilt

NO_MEANING = {
    "pictures are put into buckets by their exact shape": "aspect_bucket_* disable_bucket_pruning allow_dataset_oversubscription",
    "each entry of the dataset file says it": (
        "disable_multiline_split resolution_type minimum_image_size maximum_image_size target_downsample_size "
        "caption_strategy instance_prompt prepend_instance_prompt only_instance_prompt parquet_* max_upscale_threshold "
        "aspect_ratio_bucket* repeats"
    ),
    "run folders are named by date; runs=FOLDER says where, name=NAME how": "output_dir logging_dir tracker_*",
    "caches are addressed by content, in cache=FOLDER": (
        "cache_dir* override_dataset_config compress_disk_cache preserve_data_backend_cache vae_cache_* text_cache_* "
        "text_embed_* skip_file_discovery metadata_update_interval"
    ),
    "no file of yours is ever deleted": "delete_*",
    "resume=RUN goes on with a run": "resume_from_checkpoint",
    "the base model is always drawn at step 0": "disable_benchmark",
    "addresses and tokens are named by environment variable, as webhook=raw webhook.receivers.raw.url_env=NAME": (
        "webhook_* hub_token aws_* s3_* *_token *_api_key *_password"
    ),
    "model.attention has PyTorch's own kernels": "attention_mechanism *xformers* sageattention_usage",
    "PyTorch's default is kept": "*_tf32 torch_num_threads unet_attention_slice",
    "pictures and captions are encoded one by one, and read when a batch needs them": (
        "vae_batch_size write_batch_size read_batch_size text_encoder_batch_size image_processing_batch_size max_workers "
        "dataloader_prefetch* enable_multiprocessing"
    ),
    "weights are quantised as they are loaded, then cached": "quantize_via",
    "gradients are clipped by their norm: trainer.gradient_clip_norm": "grad_clip_method",
    "fused projections give the same answer": "fuse_qkv_projections fused_qkv_projections",
    "a run's folder says it all": "checkpointing_use_tempdir save_text_encoder print_* debug_* modelspec_comment model_card_*",
    "every epoch is whole": "strict_epoch_limit",
    "what learns, and the loss, are float32": "gradient_precision base_model_default_dtype vae_dtype",
    "one process a device": (
        "num_machines machine_rank main_process_* local_rank accelerate_* set_grads_to_none find_unused_parameters"
    ),
    "model.compile compiles the blocks": "dynamo_* validation_torch_compile",
    "VAE and text encoders leave the device when their answers are cached": (
        "accelerator_cache_clear_interval keep_vae_loaded fully_unload_text_encoder delete_model_after_load "
        "offload_during_* vae_enable_*"
    ),
    "the adapter's full strength is drawn": "enable_watermark validation_lycoris_strength validation_adapter_strength",
    "the empty prompt is not drawn": "validation_disable_unconditional",
    "of the configuration program alone": (
        "i_know_what_i_am_doing same_network configs_dir merge_environment_config config_type simpletuner_* __* ez_model_type"
    ),
    "of its backend alone": "sdnq_*",
    "of a second set of given pictures": "conditioning_multidataset_sampling",
    "no code of a checkpoint's is run": "trust_remote_code",
    "of other families": (
        "max_grounding_entities pixart_* custom_text_encoder_* wan_* ltx_* ltx2_* hidream_* ideogram_* sana_* cosmos3_* "
        "minimax_* krea2_* audio_* lyrics_* acestep_* framerate"
    ),
}
NOT_SUPPORTED = {
    "token routing (TREAD) is not built": "tread_config",
    "layers are not dropped from guidance here": "validation_guidance_skip_*",
    "guidance is not rescaled here": "validation_guidance_rescale",
    "guidance is the pipeline's own": "validation_guidance_real validation_no_cfg_until_timestep validation_noise_scheduler",
    "activations are not quantised": "quantize_activations quantization_config",
    "every block is checkpointed": "gradient_checkpointing_*",
    "say it as model.offload=blocks, or make the weights smaller with quant=": (
        "ramtorch* musubi_* *group_offload* *_chunk* deepspeed_* fsdp_* context_parallel_*"
    ),
    "the final export alone is pushed": "push_checkpoints_to_hub publishing_config push_to_hub_background",
    "say it as optimizer.options={…}": "optimizer_* adam_beta* adam_epsilon prodigy_steps fuse_optimizer",
    "schedules fall to 0": "lr_end lr_power",
    "rates are not scaled by the batch: set optimizer.lr": "lr_scale*",
    "say it as adapter.targets=[…]": "peft_lora_target_modules",
    "LoRA's matrices are as peft makes them; see adapter.options": (
        "sla_config peft_lora_mode lora_init_type singlora_* init_lokr_norm init_lora_*"
    ),
    "times are drawn by objective.timesteps": "flow_* timestep_bias_* refiner_training* disable_segmented_timestep_sampling",
    "FLUX.1 is trained at guidance 1": "flux_*",
    "say it as adapter.text_encoders=[1,2]": "train_text_encoder text_encoder_lr text_encoder_limit",
    "a part of a pipeline can't be replaced: give a folder that has them all": "pretrained_* *_text_encoder_model_name_or_path",
    "this rollout option is not built; rollout has a ramp, a sampler and a longest walk": "scheduled_sampling_*",
    "this term of the loss is not built": (
        "crepa_* urepa_* irepa_* layersync_* nextlat_* mixflow_* xm_* diff2flow_* internal_guidance_* "
        "masked_loss_probability input_perturbation* snr_weight twinflow_* distillation_config diffusion_blocks_config"
    ),
    "of this kind of evaluation there is the eval loss and CLIP's": "eval_dataset_*",
    "validation draws prompts": "validation_* validate_*",
    "no program is started": "custom_tracker *_script disk_low_*",
    "EMA's warm-up is min(decay, (1+s)/(10+s))": "ema_*",
    "the checkpoint's own settings are kept": (
        "prediction_type rescale_betas_zero_snr training_scheduler_* inference_scheduler_* t5_padding sd3_* tokenizer_*"
    ),
    "steps are what is counted": "checkpoint_epoch_interval checkpointing_rolling_steps checkpoints_rolling_*",
    "there is no assistant LoRA": "assistant_lora_*",
    "datasets are drawn by their rows: repeats and probability": "data_backend_sampling",
    "validation draws with the trained model alone": "deepfloyd_validation_* sdxl_validation_*",
    "every layer that adapter.parts or adapter.targets names learns": "layer_freeze_strategy freeze_encoder_*",
    "an unreadable file is listed and left out": "ignore_missing_files",
    "export.formats writes ComfyUI's file beside diffusers'": "lora_format",
    "weights stay where they are": "offload_param_path",
    "the refiner learns the last fifth of the noise": "sdxl_refiner_uses_full_range",
    "randomness is keyed by the sample, not the device": "seed_for_each_device",
    "it goes with an option that is not built": "soft_min_snr_sigma_data controlnet_*",
    "no filter of contents is built": "*nsfw*",
}


def other(name: str) -> Option | None:
    """What an option without an entry of its own becomes; None: nothing is known of it."""
    for reasons, kind in ((NO_MEANING, no_effect), (NOT_SUPPORTED, unbuilt)):
        for why, names in reasons.items():
            if any(fnmatchcase(name, pattern) for pattern in names.split()):
                return kind(why)
    return None

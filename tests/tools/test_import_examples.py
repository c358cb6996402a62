"""SimpleTuner's published examples, restated per family: each option and value that they use is mapped as expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import samples
from dreambooth_lab.config import ConfigError
from dreambooth_lab.tools.import_simpletuner.__main__ import problems
from dreambooth_lab.tools.import_simpletuner.translate import Kind, experiment, translate

SHARED: dict[str, Any] = {  # used by most of them
    "model_type": "lora", "lora_type": "standard", "optimizer": "adamw_bf16", "lr_scheduler": "constant", "learning_rate": 1e-4,
    "base_model_precision": "int8-quanto", "quantize_via": "cpu", "mixed_precision": "bf16", "gradient_checkpointing": True,
    "train_batch_size": 1, "max_train_steps": 100, "num_train_epochs": 0, "checkpoint_step_interval": 50, "seed": 42,
    "disable_bucket_pruning": True, "hub_model_id": "an-example", "push_to_hub": False, "push_checkpoints_to_hub": False,
    "output_dir": "output/x", "report_to": "none", "tracker_project_name": "p", "tracker_run_name": "r", "use_ema": False,
    "vae_batch_size": 1, "validation_guidance": 4.0, "validation_guidance_rescale": 0.0, "validation_num_inference_steps": 16,
    "validation_prompt": "a sign", "validation_resolution": "1024x1024", "validation_seed": 42, "validation_steps": 50,
    "data_backend_config": "config/examples/data.json",
}  # fmt: skip
FLOW: dict[str, Any] = SHARED | {
    "flow_schedule_shift": 3, "grad_clip_method": "value", "lora_rank": 16, "lora_alpha": 16, "num_eval_images": 25,
    "validation_disable_unconditional": True, "validation_negative_prompt": "ugly", "validation_prompt_library": False,
}  # fmt: skip
NEWER: dict[str, Any] = {
    "aspect_bucket_rounding": 2, "caption_dropout_probability": 0.1, "checkpoints_total_limit": 5, "minimum_image_size": 0,
    "compress_disk_cache": False, "disable_benchmark": False, "fuse_qkv_projections": False, "gradient_accumulation_steps": 1,
    "lr_warmup_steps": 0, "max_grad_norm": 0.01, "resolution": 512, "resolution_type": "pixel_area", "optimizer": "optimi-lion",
    "resume_from_checkpoint": "latest", "skip_file_discovery": False, "strict_epoch_limit": False, "vae_cache_ondemand": False,
    "lr_scheduler": "constant_with_warmup", "validation_lycoris_strength": 1.0, "quantize_activations": False,
}  # fmt: skip
SDNQ = {"base_model_precision": "int8-sdnq", "sdnq_group_size": -1, "sdnq_use_hadamard": True, "sdnq_hadamard_group_size": 256,
        "sdnq_use_quantized_matmul": True, "sdnq_compile_mode": "compile"}  # fmt: skip
TREAD = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}
LOKR = {"bypass_mode": True, "algo": "lokr", "multiplier": 1.0, "full_matrix": True, "linear_dim": 10000, "linear_alpha": 1,
        "factor": 4, "apply_preset": {"target_module": ["Attention"],
                                      "module_algo_map": {"Attention": {"factor": 12}}}}  # fmt: skip
LYCORIS = {"lora_type": "lycoris", "lycoris_config": "config/examples/x.lycoris-lokr/lycoris_config.json"}

EXAMPLES: dict[str, tuple[dict[str, Any], str, set[str]]] = {  # options, the model here, what is not supported
    "chroma": (FLOW | {"model_family": "chroma", "lora_rank": 128, "lora_alpha": 128}, "chroma", set()),
    "deepfloyd": (
        SHARED | {"model_family": "deepfloyd", "model_flavour": "i-medium-400m", "base_model_precision": "no_change",
                  "pretrained_model_name_or_path": "DeepFloyd/IF-I-M-v1.0", "resolution_type": "pixel", "lora_rank": 8,
                  "validation_resolution": "256x256", "caption_dropout_probability": 0.0},
        "deepfloyd_1", set(),
    ),
    "flux": (FLOW | {"model_family": "flux", "controlnet": False}, "flux", set()),
    "flux-tread": (FLOW | {"model_family": "flux", "tread_config": TREAD}, "flux", {"tread_config"}),
    "flux2": (FLOW | SDNQ | {"model_family": "flux2"}, "flux2_klein", set()),
    "flux2-lokr": (FLOW | LYCORIS | {"model_family": "flux2", "model_flavour": "klein-9b"}, "flux2_klein", set()),
    "lumina2": (FLOW | {"model_family": "lumina2"}, "lumina2", set()),
    "qwen_image": (
        SHARED | NEWER | {"model_family": "qwen_image", "model_flavour": "v1.0", "base_model_precision": "int2-quanto",
                          "flow_schedule_shift": 1.73},
        "qwen_image", set(),
    ),
    "sd1x": (
        SHARED | NEWER | {"model_family": "sd1x", "model_flavour": "dreamshaper", "loss_type": "huber",
                          "pretrained_model_name_or_path": "Lykon/dreamshaper-8"},
        "sd15", set(),
    ),
    "sd3": (
        FLOW | {"model_family": "sd3", "validation_guidance_skip_layers": [7, 8, 9]}, "sd3", {"validation_guidance_skip_layers"}
    ),
    "sdxl": (SHARED | LYCORIS | {"model_family": "sdxl"}, "sdxl", set()),
    "z_image": (
        SHARED | NEWER | {"model_family": "z_image", "model_flavour": "base", "base_model_precision": "int8-torchao",
                          "flow_schedule_shift": 0.0, "flow_schedule_auto_shift": True},
        "z_image", set(),
    ),
    "z_image-turbo": (
        SHARED | NEWER | SDNQ | {"model_family": "z_image", "model_flavour": "turbo"}, "z_image", {"disable_assistant_lora"}
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, photos: Path) -> Path:
    """The folder of one example in SimpleTuner's layout."""
    own = tmp_path / "examples/x.lycoris-lokr"
    own.mkdir(parents=True)
    (own / "lycoris_config.json").write_text(json.dumps(LOKR))
    samples.save(tmp_path / "examples/data.json", samples.entry(photos))
    return own


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_imports(folder, name):
    options, model, unsupported = EXAMPLES[name]
    translation, became = translate(options, folder)
    assert translation["/model"] == model and translation["dataset.path"] == str(folder.parent / "data.json")
    assert {one.option for one in became if one.kind is Kind.left} == unsupported
    target = folder / "imported/experiment/example.yaml"
    target.parent.mkdir(parents=True)
    target.write_text(experiment(translation, "example", "config.json"))
    assert problems(target) == ""


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl"])
def test_controlnet_example_is_refused_with_the_reason(folder, family):
    with pytest.raises(ConfigError, match="controlnet trains another network"):
        translate(SHARED | {"model_family": family, "controlnet": True}, folder)


def test_tutorial_example_imports(folder):
    """config.json.example: dashes before each name, booleans and numbers as strings."""
    options = {"model_family": "flux", "model_type": "lora", "push_to_hub": "true", "gradient_checkpointing": "true",
               "lr_scheduler": "polynomial", "lr_warmup_steps": 100, "validation_num_inference_steps": "20", "report_to": "wandb",
               "validation_guidance_rescale": "0.0", "validation_torch_compile": "false", "learning_rate": "1e-4"}  # fmt: skip
    translation, became = translate(options | LYCORIS, folder)
    assert not [one for one in became if one.kind is Kind.left]
    assert (
        translation["optimizer.schedule"] == "linear"
        and translation["/logger"] == ["wandb"]
        and translation["/adapter"] == "lokr"
    )
    assert translation["export.push_to_hub"] is True and translation["validation.num_inference_steps"] == 20

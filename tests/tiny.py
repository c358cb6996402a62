"""Tiny random-weight models of the real classes, and images, created by the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)


def tokenizer() -> CLIPTokenizer:
    """CLIP's layout without merges: every byte is a token."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=77)


def text_encoder(kind, width: int, seed: int):
    torch.manual_seed(seed)
    return kind(
        CLIPTextConfig(
            vocab_size=514, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )
    )  # fmt: skip


def unet(states: int, pooled: int, channels: int, prediction_seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(prediction_seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, transformer_layers_per_block=(1, 1), cross_attention_dim=states, norm_num_groups=4,
        projection_class_embeddings_input_dim=pooled + 6 * 4,
    )  # fmt: skip


def vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, layers_per_block=1, latent_channels=channels, norm_num_groups=4, scaling_factor=0.13025,
    )  # fmt: skip


def tae(channels: int) -> AutoencoderTiny:
    torch.manual_seed(4)
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    return AutoencoderTiny(latent_channels=channels, **widths, **blocks)


def save_clip(folder: Path) -> Path:
    torch.manual_seed(5)
    text = {"vocab_size": 514, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": 77, "projection_dim": 8, "eos_token_id": 513, "bos_token_id": 512}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
              "patch_size": 8, "projection_dim": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer()).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    torch.manual_seed(6)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**small, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_sdxl(folder: Path, prediction: str = "epsilon", channels: int = 4) -> Path:
    """A complete SDXL pipeline in diffusers' layout; the smallest bucket step is 16 px."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, timestep_spacing="leading",
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae(channels), unet=unet(24, 16, channels), scheduler=scheduler, tokenizer=tokenizer(), tokenizer_2=tokenizer(),
        text_encoder=text_encoder(CLIPTextModel, 8, 2), text_encoder_2=text_encoder(CLIPTextModelWithProjection, 16, 3),
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_photos(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> Path:
    """Write smooth random images of the given (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        coarse = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def save_masks(photos: Path, folder: Path) -> Path:
    """Write a mask for each photo: white except for its upper and left quarter."""
    folder.mkdir()
    for photo in photos.glob("*.png"):
        width, height = Image.open(photo).size
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 :, width // 4 :] = 255
        Image.fromarray(mask).save(folder / photo.name)
    return folder

"""A tiny pipeline with random weights for each family, of the real classes, saved in the layout of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as D
import torch
import transformers as T

import tiny
from dreambooth_lab.config import conf_dir

WORDS = ["a", "photo", "of", "dog", "cat", "sks", "on", "the", "beach", "in", "space", "red", "robot"]
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|end|>"
LETTERS = [chr(i) for i in range(32, 127)]
FLOW: dict[str, Any] = {"num_train_timesteps": 1000}
DYNAMIC = FLOW | {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def t5_tokenizer() -> T.T5Tokenizer:
    pieces = ["▁" + word for word in WORDS] + ["▁"] + LETTERS[1:]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(i + 1)) for i, piece in enumerate(pieces))]
    return T.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def t5(width: int = 16) -> T.T5EncoderModel:
    torch.manual_seed(7)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 130}
    return T.T5EncoderModel(T.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False))


def _bytes(kind: Any, special: dict[str, str], **options: Any) -> Any:
    letters = sorted(tiny.ByteLevel.alphabet())
    tokens = [*special.values(), *letters]
    tokenizer = kind(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges=[], **special, **options)
    return tokenizer


def qwen_tokenizer() -> T.Qwen2Tokenizer:
    special = {"unk_token": "<|endoftext|>", "eos_token": "<|end|>", "pad_token": "<|endoftext|>"}
    tokenizer = _bytes(T.Qwen2Tokenizer, special, model_max_length=2048)
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> T.GemmaTokenizer:
    letters = ["▁", *LETTERS[1:]]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    return T.GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=512)


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


def qwen3(layers: int = 2) -> T.Qwen3ForCausalLM:
    torch.manual_seed(8)
    return T.Qwen3ForCausalLM(T.Qwen3Config(**SMALL | {"num_hidden_layers": layers}, vocab_size=300))


def gemma() -> T.Gemma2Model:
    torch.manual_seed(9)
    return T.Gemma2Model(T.Gemma2Config(**SMALL, vocab_size=130, query_pre_attn_scalar=8))


def clip(kind: Any, width: int, seed: int) -> Any:
    return tiny.text_encoder(kind, width, seed)


def vae(channels: int, **options: Any) -> D.AutoencoderKL:
    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return D.AutoencoderKL(
        **blocks, block_out_channels=[8] * 4, layers_per_block=1, latent_channels=channels, norm_num_groups=4, **options
    )


def _unet(**options: Any) -> D.UNet2DConditionModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    sizes = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_head_dim": (1, 2),
        "norm_num_groups": 4,
    }
    return D.UNet2DConditionModel(**blocks | sizes | options)


def stable_diffusion(prediction: str = "epsilon") -> Any:
    return D.StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip(T.CLIPTextModel, 8, 2),
        tokenizer=tiny.tokenizer(),
        unet=_unet(cross_attention_dim=8),
        scheduler=D.PNDMScheduler(**BETAS, prediction_type=prediction, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def refiner() -> Any:
    sizes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 5 * 4,
    }
    return D.StableDiffusionXLImg2ImgPipeline(
        vae=vae(4, scaling_factor=0.13025),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=clip(T.CLIPTextModelWithProjection, 16, 3),
        tokenizer_2=tiny.tokenizer(),
        unet=_unet(cross_attention_dim=16, use_linear_projection=True, **sizes),
        scheduler=D.EulerDiscreteScheduler(**BETAS),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def sd3(large: bool = False) -> Any:
    torch.manual_seed(0)
    transformer = D.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        out_channels=16,
        pos_embed_max_size=24,
        qk_norm="rms_norm" if large else None,
    )
    _stir(transformer)
    return D.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=D.FlowMatchEulerDiscreteScheduler(**FLOW, shift=3.0),
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(T.CLIPTextModelWithProjection, 8, 2),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=clip(T.CLIPTextModelWithProjection, 16, 3),
        tokenizer_2=tiny.tokenizer(),
        text_encoder_3=None if large else t5(width=32),
        tokenizer_3=None if large else t5_tokenizer(),
    )


def flux(guidance: bool = True) -> Any:
    torch.manual_seed(0)
    transformer = D.FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    _stir(transformer)
    shift = DYNAMIC if guidance else FLOW | {"shift": 1.0}
    return D.FluxPipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(T.CLIPTextModel, 8, 2),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def deepfloyd(stage: int = 1) -> Any:
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "encoder_hid_dim": 16,
        "encoder_hid_dim_type": "text_proj",
        "cross_attention_dim": 8,
        "only_cross_attention": False,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "act_fn": "gelu",
        "attention_head_dim": 4,
        "norm_eps": 1e-5,
    }
    cosine = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}
    scheduler = D.DDPMScheduler(
        **cosine, variance_type="learned_range", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5
    )
    parts = {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5(),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }
    rest = {"watermarker": None, "requires_safety_checker": False}
    if stage == 1:
        return D.IFPipeline(unet=_unet(in_channels=3, out_channels=6, sample_size=16, **blocks), **parts, **rest)
    unet = _unet(in_channels=6, out_channels=6, sample_size=64, class_embed_type="timestep", **blocks)
    return D.IFSuperResolutionPipeline(unet=unet, image_noising_scheduler=D.DDPMScheduler(**cosine), **parts, **rest)


def flux2_klein() -> Any:
    torch.manual_seed(0)
    transformer = D.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    _stir(transformer)
    torch.manual_seed(1)
    coder = D.AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32
    )
    coder.bn.running_mean.normal_()
    coder.bn.running_var.uniform_(0.5, 2.0)
    return D.Flux2KleinPipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=coder,
        text_encoder=qwen3(28),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
        is_distilled=False,
    )


def z_image() -> Any:
    torch.manual_seed(0)
    transformer = D.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    _stir(transformer)
    return D.ZImagePipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(**FLOW, shift=3.0),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def qwen_image() -> Any:
    torch.manual_seed(0)
    transformer = D.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    _stir(transformer)
    coder = D.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 2.0, 1.0],
    )
    text = SMALL | {"vocab_size": 300, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}
    text.pop("head_dim")
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    torch.manual_seed(8)
    encoder = T.Qwen2_5_VLForConditionalGeneration(T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=300))
    return D.QwenImagePipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02),
        vae=coder,
        text_encoder=encoder,
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def chroma() -> Any:
    torch.manual_seed(0)
    transformer = D.ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    _stir(transformer)
    return D.ChromaPipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(**FLOW),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
    )


def sana() -> Any:
    torch.manual_seed(0)
    transformer = D.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    _stir(transformer)
    torch.manual_seed(1)
    sizes = {"block_out_channels": (8,) * 6, "layers_per_block": (1,) * 6, "qkv_multiscales": ((),) * 6}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()}
    coder = D.AutoencoderDC(latent_channels=4, attention_head_dim=4, **both, scaling_factor=0.41407)
    scheduler = D.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    return D.SanaPipeline(
        tokenizer=gemma_tokenizer(), text_encoder=gemma(), vae=coder, transformer=transformer, scheduler=scheduler
    )


def lumina2() -> Any:
    torch.manual_seed(0)
    transformer = D.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=16,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    _stir(transformer)
    return D.Lumina2Pipeline(
        transformer=transformer,
        scheduler=D.FlowMatchEulerDiscreteScheduler(**FLOW, shift=6.0),
        text_encoder=gemma(),
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        tokenizer=gemma_tokenizer(),
    )


def pixart() -> Any:
    torch.manual_seed(0)
    transformer = D.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        norm_type="ada_norm_single",
        caption_channels=16,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    _stir(transformer)
    scheduler = D.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return D.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(4, scaling_factor=0.13025),
        transformer=transformer,
        scheduler=scheduler,
    )


def aura_flow() -> Any:
    torch.manual_seed(0)
    transformer = D.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, out_channels=4, pos_embed_max_size=256,
    )  # fmt: skip
    _stir(transformer)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 130}
    return D.AuraFlowPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=T.UMT5EncoderModel(T.UMT5Config(**sizes)),
        vae=vae(4, scaling_factor=0.13025),
        transformer=transformer,
        scheduler=D.FlowMatchEulerDiscreteScheduler(**FLOW, shift=1.73),
    )


@torch.no_grad()
def _stir(model: torch.nn.Module) -> None:
    """Layers initialised to zero would hide their inputs."""
    g = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(0.0, 0.1, generator=g)


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd15": stable_diffusion,
    "sd21": lambda: stable_diffusion("v_prediction"),
    "sdxl_refiner": refiner,
    "sd3": sd3,
    "sd35": lambda: sd3(large=True),
    "flux": flux,
    "flux_schnell": lambda: flux(False),
    "deepfloyd_1": deepfloyd,
    "deepfloyd_2": lambda: deepfloyd(2),
    "flux2_klein": flux2_klein,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "chroma": chroma,
    "sana": sana,
    "lumina2": lumina2,
    "pixart": pixart,
}


def model_of(name: str) -> str:
    """The option of `model=` for it."""
    name = {"sd35": "sd35_large"}.get(name, name)
    return name if (conf_dir() / "model" / f"{name}.yaml").is_file() else "diffusers"


REFUSED = {"aura_flow": aura_flow}  # pipelines that can't be trained here


def save(name: str, folder: Path) -> Path:
    (PIPELINES | REFUSED)[name]().save_pretrained(folder)
    return folder

"""The UNet and both text encoders, trained jointly on cached latents: ε-prediction on SDXL's own schedule."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from dreambooth_lab.config import enums
from dreambooth_lab.diffusion.path import VariancePreserving
from dreambooth_lab.tools.pretrain_toybox.latents import Cache
from dreambooth_lab.tools.pretrain_toybox.runner import Stage, fit, grid
from dreambooth_lab.tools.pretrain_toybox.text import encode_text, new_text_encoders
from dreambooth_lab.toybox.captions import caption
from dreambooth_lab.toybox.tokenizer import build_tokenizer
from dreambooth_lab.toybox.world import BUCKETS, prompts

BETA_START, BETA_END, STEPS = 0.00085, 0.012, 1000


class UnetBatch(NamedTuple):
    latents: Tensor  # [B 16 h w]
    eps: Tensor  # [B 16 h w]
    t: Tensor  # [B], 0 … 1
    ids: Tensor  # [B L]
    kept: Tensor  # [B], 0 where the caption is dropped
    time_ids: Tensor  # [B 6]


def new_unet(cfg: Any) -> Any:
    width = sum(cfg.text_widths)
    unet: Any = UNet2DConditionModel(
        sample_size=16, in_channels=cfg.latent_channels, out_channels=cfg.latent_channels,
        block_out_channels=tuple(cfg.channels), layers_per_block=cfg.layers, transformer_layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=cfg.heads, cross_attention_dim=width, use_linear_projection=True, norm_num_groups=cfg.groups,
        addition_embed_type="text_time", addition_time_embed_dim=cfg.size_width,
        projection_class_embeddings_input_dim=6 * cfg.size_width + cfg.text_widths[1],
    )  # fmt: skip
    unet.set_attn_processor(AttnProcessor())  # at these sizes faster on CPUs than the fused kernel, by a quarter
    return unet


def new_nets(cfg: Any) -> nn.ModuleDict:
    nets = new_text_encoders(build_tokenizer(), cfg)
    nets["unet"] = new_unet(cfg)
    return nets


def new_path() -> VariancePreserving:
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, STEPS, dtype=torch.float64) ** 2
    return VariancePreserving(torch.cumprod(1 - betas, 0), enums.Prediction.epsilon)


class Draw:
    """Step → batch: one size a batch, times stratified over it, noise with a small offset a channel (as SDXL's)."""

    def __init__(self, cache: Cache, cfg: Any, seed: int) -> None:
        self.cache, self.cfg, self.seed, self.tokenizer = cache, cfg, seed, build_tokenizer()

    def __call__(self, step: int) -> UnetBatch:
        rng, n = np.random.default_rng([self.seed, step, 0x75]), self.cfg.batch
        size = BUCKETS[int(rng.choice(len(BUCKETS), p=self.cache.share))]
        rows = rng.integers(len(self.cache.views[size]), size=n)
        latents = self.cache.latents[size][torch.from_numpy(rows)].float()
        views = [self.cache.views[size][i] for i in rows]
        ids = self.tokenizer([caption(v.scene, rng) for v in views], padding="max_length", return_tensors="pt").input_ids
        eps = rng.standard_normal(latents.shape, dtype=np.float32)
        eps += self.cfg.offset * rng.standard_normal((*latents.shape[:2], 1, 1), dtype=np.float32)
        t = (rng.permutation(n) + rng.random(n)) / n
        kept = rng.random(n) >= self.cfg.caption_dropout
        time_ids = torch.tensor([v.time_ids for v in views])
        return UnetBatch(latents, torch.from_numpy(eps), torch.from_numpy(t), ids, torch.from_numpy(kept).float(), time_ids)


class UnetStage(Stage):
    def __init__(self, cfg: Any) -> None:
        super().__init__(new_nets(cfg), new_nets(cfg), cfg)
        self.path = new_path()

    def groups(self) -> list[dict[str, Any]]:
        texts = [p for n, p in self.nets.named_parameters() if n.startswith("text")]
        return [
            {"params": list(self.nets["unet"].parameters()), "lr": self.cfg.lr},
            {"params": texts, "lr": self.cfg.lr * self.cfg.text_lr},
        ]

    def predict(self, nets: Any, x_t: Tensor, batch: UnetBatch) -> Tensor:
        states, pooled = encode_text(nets, batch.ids)
        states, pooled = states * batch.kept.view(-1, 1, 1), pooled * batch.kept.view(-1, 1)
        size = {"text_embeds": pooled, "time_ids": batch.time_ids}
        clock = self.path.native(batch.t)
        return nets["unet"](x_t, clock, states, added_cond_kwargs=size).sample.float()

    def loss(self, batch: UnetBatch) -> tuple[Tensor, dict[str, Tensor]]:
        x_t = self.path.noise(batch.latents, batch.eps, batch.t)
        output = self.predict(self.nets, x_t, batch)
        error = (output - self.path.target(batch.latents, batch.eps, batch.t)).square().mean((1, 2, 3))  # [B]
        alpha, sigma = (s.flatten() for s in self.path.scales(batch.t))
        weight = (self.cfg.min_snr * (sigma / alpha).square()).clamp(max=1.0)  # min(SNR, γ) / SNR
        return (error * weight).mean(), {"loss": error.mean().detach(), "weighted": (error * weight).mean().detach()}


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear", num_train_timesteps=STEPS,
        steps_offset=1, timestep_spacing="leading", prediction_type="epsilon",
    )  # fmt: skip


def pipeline(nets: Any, vae: Any) -> Any:
    tokenizer = build_tokenizer()
    pipe: Any = StableDiffusionXLPipeline(
        vae=vae, text_encoder=nets["text_encoder"], text_encoder_2=nets["text_encoder_2"], tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=nets["unet"], scheduler=scheduler(), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, texts: list[str], seed: int, steps: int = 20, guidance: float = 4.0, **size: int) -> Tensor:
    """Pictures [n 3 h w], -1 … 1; each prompt has its own noise. `size`: height and width, the pipeline's without."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": noise, "output_type": "pt"}
    return pipe(texts, **options, **size).images.float() * 2 - 1


def look_prompts() -> list[str]:
    """Every class in every place, then what the quality bar doesn't ask."""
    every = prompts()
    return [f"a photo of a {c} {k} {b}" for c, k, b in (every[(37 * i) % len(every)] for i in range(36))] + [
        "a photo of a robot", "a photo of sks robot", "a cat", "a photo of sks cat", "a car in space", "a house at night",
        "a cup with steam", "a red robot with yellow spots", "a blue fish with stripes", "a photo of vqk robot",
        "a cat with a bow",
        "",
    ]  # fmt: skip


def shipped_nets(folder: Path, nets: nn.ModuleDict) -> None:
    """Fill `nets` with the base model's weights: its UNet and both text encoders."""
    from safetensors.torch import load_file

    files = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
    for name, file in files.items():
        nets[name].load_state_dict(load_file(folder / name / f"{file}.safetensors"))


def run(cfg: Any) -> None:
    from diffusers import AutoencoderKL

    out, folder = Path(cfg.out) / "unet", Path(cfg.out) / "latents"
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    torch.manual_seed(cfg.seed)
    stage = UnetStage(cfg.unet)
    if cfg.unet.from_shipped:
        shipped_nets(Path(cfg.base), stage.nets)
        stage.ema.load_state_dict(stage.nets.state_dict())

    def show(stage: Stage, step: int) -> None:
        pictures = sample(pipeline(stage.ema.eval(), vae), look_prompts(), seed=0)
        grid(list(pictures.split(12)), out / f"{step:06d}.png")

    fit(stage, Draw(Cache(folder), cfg.unet, cfg.seed), out, show)

"""Stable Diffusion XL (Podell et al. 2023): UNet with text_time conditioning, two CLIP text encoders, KL-VAE."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path as Folder
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..batch import Cond, Text
from ..config import Attention, ConfigError, Dtype, QuantKind
from ..diffusion.path import Prediction, VariancePreserving
from ..embedding import Slot
from ..quant import Source
from . import files, kernels
from .family import Family, OnStep, TextEncoders

log = logging.getLogger(__name__)

TOKEN_FILE, TOKEN_KEYS = "learned_embeds.safetensors", ("clip_l", "clip_g")  # as other tools name them
TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")


class SDXL(Family):
    """Any checkpoint of SDXL's architecture, of any size, with any number of latent channels.

    Args:
        pretrained: folder written by save_pretrained, or hub id.
        dtype: of the frozen UNet; its answers are float32.
        encoder_dtype: of the VAE and the text encoders.
        tae: folder or hub id of an AutoencoderTiny for previews; None takes the VAE itself.
        gradient_checkpointing: keep blocks' inputs only, and run the blocks again for their gradients.
        attention: PyTorch's kernel for it; auto takes the fastest that fits.
        compile: the transformer blocks, by torch.compile.
    """

    learns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "feed_forward": ("ff.net.0.proj", "ff.net.2"),
        "convolution": ("re:.*resnets\\..*\\.(conv1|conv2|conv_shortcut)", "re:.*samplers\\..*\\.conv"),
    }
    text_learns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
        "feed_forward": ("mlp.fc1", "mlp.fc2"),
    }

    denoiser_part = "unet"
    text_encoder_parts = ("text_encoder", "text_encoder_2")
    token_usage: ClassVar[str] = """\
from safetensors.torch import load_file
learned = load_file(export + "/learned_embeds.safetensors")
for name, end in (("clip_l", ""), ("clip_g", "_2")):
    tokenizer, encoder = getattr(pipeline, "tokenizer" + end), getattr(pipeline, "text_encoder" + end)
    (row,) = tokenizer("{word}", add_special_tokens=False).input_ids
    encoder.get_input_embeddings().weight.data[row] = learned[name][0].to(encoder.dtype)"""
    kohya: ClassVar[Mapping[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    # Small, and everything passes through them: time, size and pooled text; the text encoder's last projection.
    keeps: ClassVar[tuple[str, ...]] = ("time_embedding", "add_embedding", "time_emb_proj", "text_projection")

    def __init__(
        self, pretrained: str, revision: str | None, variant: str | None, dtype: Dtype, encoder_dtype: Dtype,
        tae: str | None, resolution: int, gradient_checkpointing: bool, attention: Attention, compile: bool,
    ):  # fmt: skip
        files.quiet()
        self.folder = files.resolve(pretrained, revision, variant)
        self.variant, self.tae = variant, tae
        self.dtype, self.encoder_dtype = getattr(torch, dtype.value), getattr(torch, encoder_dtype.value)
        self.gradient_checkpointing, self.attention, self.compiles = gradient_checkpointing, attention, compile
        index = files.read_json(self.folder / "model_index.json")
        if not index["_class_name"].startswith("StableDiffusionXL") or "text_encoder_2" not in index:
            raise ConfigError(
                f"model.pretrained is {pretrained!r}, a {index['_class_name']}; model=sdxl needs a StableDiffusionXLPipeline"
            )
        self.zero_unconditional = index.get("force_zeros_for_empty_prompt", True)
        self._read_facts()

    def _read_facts(self) -> None:
        schedule = DDPMScheduler.from_pretrained(self.folder, subfolder="scheduler")
        self.path = VariancePreserving(schedule.alphas_cumprod, Prediction(schedule.config.prediction_type))
        vae, unet = (files.read_json(self.folder / part / "config.json") for part in ("vae", "unet"))
        self.factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self.stride = self.factor * 2 ** (len(unet["block_out_channels"]) - 1)
        self.channels = unet["in_channels"]
        self.scaling = vae["scaling_factor"]

    def _load(self, kind: Any, part: str, dtype: torch.dtype) -> Any:
        name = {} if kind.__module__.startswith("diffusers") else {"dtype": dtype}
        variant = files.weight_variant(self.folder / part, self.variant)
        options = name or {"torch_dtype": dtype}

        def read() -> nn.Module:
            model = kind.from_pretrained(self.folder, subfolder=part, variant=variant, use_safetensors=True, **options)
            return files.settle(model, self.device)

        weights = files.weights(self.folder / part, variant)
        source = Source(read, lambda: files.hollow(kind, self.folder / part), weights, dtype, self.device)
        return self.quantiser.load(part, source, self.keeps)

    def check_device(self) -> None:
        kernels.require(self.attention, self.compiles, self.device, self.dtype)

    @cached_property
    def denoiser(self) -> nn.Module:
        unet = self._load(UNet2DConditionModel, "unet", self.dtype)
        if self.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return kernels.choose(unet, self.attention, self.compiles)

    @cached_property
    def vae(self) -> Any:
        return self._load(AutoencoderKL, "vae", self.encoder_dtype)

    @cached_property
    def text_encoders(self) -> TextEncoders:
        return self.load_text_encoders()

    def load_text_encoders(self) -> TextEncoders:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        kinds = (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection))
        pairs = []
        for suffix, kind in kinds:
            tokenizer = CLIPTokenizer.from_pretrained(self.folder, subfolder=f"tokenizer{suffix}")
            pairs.append((tokenizer, self._load(kind, f"text_encoder{suffix}", self.encoder_dtype)))
        return pairs

    def release_encoders(self) -> None:
        self.__dict__.pop("vae", None)
        self.__dict__.pop("text_encoders", None)

    def text_identity(self) -> str:
        precision = (str(self.encoder_dtype), *self._fewer_bits(self.text_encoder_parts))
        return files.identity(self.folder, TEXT_PARTS, "sdxl", *precision, str(self.zero_unconditional))

    def _fewer_bits(self, parts: Sequence[str]) -> list[str]:
        """Which of some parts are quantised, and how."""
        kinds = {part: self.quantiser.kind(part) for part in parts}
        return [f"{part} {kind.value}" for part, kind in kinds.items() if kind is not QuantKind.none]

    def denoiser_identity(self) -> str:
        return files.identity(self.folder, ("unet", "scheduler"), str(self.dtype), *self._fewer_bits(("unet",)))

    def image_identity(self) -> str:
        return files.identity(self.folder, ("vae",), str(self.encoder_dtype))

    def read_text(self, captions: Sequence[str], encoders: TextEncoders) -> Text:
        """The last hidden layer but one of both encoders, side by side; pooled is the second's projected output."""
        states = []
        for tokenizer, encoder in encoders:
            _warn_of_long(captions, tokenizer)
            ids = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
            output = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2].float())
        text = Text(torch.cat(states, -1), output.text_embeds.float())
        if self.zero_unconditional:
            said = torch.tensor([bool(caption) for caption in captions], device=self.device)
            text = Text(text.states * said.view(-1, 1, 1), text.pooled * said.view(-1, 1))
        return text

    def token_slots(self, word: str, encoders: TextEncoders) -> list[Slot]:
        return [_slot(tokenizer, encoder, word) for tokenizer, encoder in encoders]

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device, self.encoder_dtype)).latent_dist
        return (posterior.mean.float() * self.scaling).cpu(), (posterior.std.float() * self.scaling).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.device, self.encoder_dtype) / self.scaling).sample.float()

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.denoiser(
            x_t.to(self.dtype), self.path.native(t), cond.states.to(self.dtype),
            added_cond_kwargs={"text_embeds": cond.pooled.to(self.dtype), "time_ids": cond.size}, return_dict=False,
        )[0].float()  # fmt: skip

    @cached_property
    def _sampler(self) -> Any:
        from diffusers import StableDiffusionXLPipeline

        absent = dict.fromkeys(TEXT_PARTS)
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            self.folder, unet=self.denoiser, vae=None, add_watermarker=False, **absent
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def generate(
        self, text: Text, negative: Text, *, height: int, width: int, on_step: OnStep | None = None, **options: Any
    ) -> list[Any]:
        self._sampler.vae = self.vae
        if on_step:
            options["callback_on_step_end"] = lambda _, i, t, now: on_step(i + 1, now["latents"]) or {}
        texts = {"prompt_embeds": text.states, "pooled_prompt_embeds": text.pooled}
        texts |= {"negative_prompt_embeds": negative.states, "negative_pooled_prompt_embeds": negative.pooled}
        texts = {name: value.to(self.device, self.dtype) for name, value in texts.items()}
        try:
            latents = self._sampler(height=height, width=width, output_type="latent", **texts, **options).images
            return self._sampler.image_processor.postprocess(self.decode(latents), output_type="pil")
        finally:
            self._sampler.vae = None
            self.__dict__.pop("vae")
            self.__dict__.pop("_preview_decoder", None)

    @cached_property
    def _preview_decoder(self) -> Any:
        try:
            tiny = AutoencoderTiny.from_pretrained(self.tae, torch_dtype=self.encoder_dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            way_out = "set model.tae to a folder or hub id of an AutoencoderTiny, or to null for the VAE itself"
            raise ConfigError(f"model.tae is {self.tae!r}, which could not be loaded; {way_out}") from error
        return files.settle(tiny, self.device)

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Tensor:
        if self.tae is None:
            return self.decode(latents)
        return self._preview_decoder.decode(latents.to(self.device, self.encoder_dtype)).sample.float()

    def pipeline(self) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline.from_pretrained(
            self.folder, torch_dtype=self.dtype, add_watermarker=False, use_safetensors=True,
            variant=files.weight_variant(self.folder / "unet", self.variant),
        )  # fmt: skip

    def save_token(self, folder: Folder, rows: Sequence[Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        named = {name: row.detach().cpu().float()[None] for name, row in zip(TOKEN_KEYS, rows, strict=True)}
        save_file(named, folder / TOKEN_FILE)

    def load_token(self, pipeline: Any, folder: Folder, word: str) -> Callable[[float], None]:
        if not (folder / TOKEN_FILE).is_file():
            raise ConfigError(f"{str(folder)!r} has no {TOKEN_FILE}, which this export needs beside it: {word!r} was learned too")
        saved = load_file(folder / TOKEN_FILE)
        pairs = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
        slots = self.token_slots(word, pairs)
        before = [layer.weight[row].detach().clone() for layer, row in slots]

        def mean(strength: float) -> None:
            for name, (layer, row), base in zip(TOKEN_KEYS, slots, before, strict=True):
                learned = saved[name][0].to(base)
                layer.weight.data[row] = torch.lerp(base, learned, strength).to(layer.weight.device)

        mean(1.0)
        return mean


def _slot(tokenizer: Any, encoder: Any, word: str) -> Slot:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ConfigError(
            f"adapter.train_token is true, but {word!r} is {len(ids)} tokens to the text encoder ({pieces}); "
            "choose a word that is one token, or set adapter.train_token=false"
        )
    return encoder.get_input_embeddings(), ids[0]


def _warn_of_long(captions: Sequence[str], tokenizer: Any) -> None:
    limit = tokenizer.model_max_length
    for caption in captions:
        length = len(tokenizer(caption).input_ids)
        if length > limit:
            log.warning("caption has %d tokens, of which the text encoder reads the first %d: %r", length, limit, caption)

"""A family's files: the properties of a checkpoint in diffusers' layout, its networks, loaded when needed, and
their identities. Subclasses implement the calls of the networks."""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path as Folder
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from ..config import ConfigError, enums
from ..embedding import Slot
from . import files, kernels, latents, pipeline_without_networks, schedule, single_file, tokens
from .checkpoint import Checkpoint, without_weights
from .family import Family, Spec, TextEncoders
from .offload import Blocks
from .sharding import Lockstep
from .weights import LEFT_OUT

SAID = (
    "pretrained", "revision", "variant", "dtype", "encoder_dtype", "tae", "resolution", "gradient_checkpointing", "attention",
    "compile", "vae_tiling", "offload", "empty_caption", "cache",
)  # fmt: skip
CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class CheckpointFamily(Family):
    """A family read from a folder written by save_pretrained, a hub id or a single file.

    Args:
        pretrained: folder written by save_pretrained, or hub id.
        dtype: of the frozen denoiser; its predictions are float32.
        encoder_dtype: of the VAE and the text encoders.
        tae: folder or hub id of an AutoencoderTiny for previews; None: the VAE itself.
        gradient_checkpointing: save only the blocks' inputs, and recompute the blocks for their gradients.
        attention: PyTorch's attention kernel; auto takes the fastest supported one.
        compile: compile the transformer blocks by torch.compile.
        vae_tiling: encode and decode images in overlapping tiles, which needs less memory and changes pixels slightly.
        offload: which part of the denoiser is stored in host memory and copied to the device when it runs.
        options: specific to a family; see `known_options`.
        empty_caption: the conditioning of rows without caption.
        config: for a single file: folder or hub id with its configs and tokenizers.
        prediction_type: for a single file: its prediction type, if the file does not state it.
        cache: folder for cached results; None: they are computed at every start.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()  # pipeline classes of this family's checkpoints; empty: all
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (
            r"re:.*\.\d+\.(.*\.)?(attn|attention|self_attn|cross_attn)\w*\.(\w*\.)?(to_|add_|qkv|out|proj|q_|k_|v_)\w*(\.0)?",
        ),
        "feed_forward": (r"re:(?!.*conv_depth).*\.\d+\.((.*\.)?(ff\w*|\w*mlp|feed_forward|ffn)\..*|proj_mlp|proj_out)",),
    }
    text_target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
        "feed_forward": ("mlp.fc1", "mlp.fc2"),
    }
    kohya: ClassVar[Mapping[str, str]] = {}
    programs: ClassVar[tuple[str, ...]] = ()
    spec: Spec = Spec()
    token_keys: ClassVar[Mapping[str, str]] = CLIP  # text encoder → key of its trained embedding in files
    skip_quantization: ClassVar[tuple[str, ...]] = (
        "time_embedding", "time_text_embed", "time_guidance_embed", "t_embedder", "add_embedding", "time_emb_proj",
        "text_projection", "norm_out", "re:proj_out", "adaln_single", "adaLN_modulation", "x_embedder", "context_embedder",
        "img_in", "txt_in",
    )  # fmt: skip

    def __init__(
        self, pretrained: str, revision: str | None, variant: str | None, dtype: enums.Dtype, encoder_dtype: enums.Dtype,
        tae: str | None, resolution: int, gradient_checkpointing: bool, attention: enums.Attention, compile: bool,
        options: Mapping[str, Any], empty_caption: enums.EmptyCaption, config: str | None = None,
        prediction_type: enums.Prediction | None = None, cache: Folder | None = None, vae_tiling: bool = False,
        offload: enums.Offload = enums.Offload.none,
    ):  # fmt: skip
        files.silence_loading()
        self.options, self.said_by_user = dict(options), {name: value for name, value in locals().items() if name in SAID}
        if strange := sorted(self.options.keys() - set(self.known_options())):
            raise ConfigError(f"model.options has {strange}; this model knows {sorted(self.known_options())}")
        self.checkpoint = Checkpoint(pretrained, revision, variant, cache, config, prediction_type)
        self.tae, self.empty_caption = tae, empty_caption
        self.dtype, self.encoder_dtype = getattr(torch, dtype.value), getattr(torch, encoder_dtype.value)
        self.gradient_checkpointing, self.attention, self.compiles = gradient_checkpointing, attention, compile
        self.vae_tiling, self.offload = vae_tiling, offload
        self.blocks: Blocks | None = None  # of the denoiser, once it is loaded, if they are offloaded or divided
        self.named = f"model.pretrained is {pretrained!r}, which"
        self._read_parts()
        self._read_facts()

    def known_options(self) -> tuple[str, ...]:
        """Keys of `options` that this family supports."""
        return ()

    def _read_parts(self) -> None:
        """Read the list of components; refuse a checkpoint of another family."""
        name, parts = self.checkpoint.pipeline_name, self.checkpoint.parts
        self.pipeline_class: Any = getattr(diffusers, name, None)
        if self.pipelines and name not in self.pipelines:
            raise ConfigError(f"{self.named} is a {name}; this model needs a {' or '.join(self.pipelines)}; see conf/model/")
        self.loads_lora = hasattr(self.pipeline_class, "load_lora_weights")
        self.denoiser_part = next((part for part in ("transformer", "unet") if part in parts), "")
        if self.pipeline_class is None or not self.denoiser_part or "transformer_2" in parts:
            raise ConfigError(f"{self.named} is a {name}, which has no single denoiser to train; choose another model")
        if "strength" in inspect.signature(self.pipeline_class.__call__).parameters and not self.pipelines:
            raise ConfigError(f"{self.named} is a {name}, which is image-to-image; choose a text-to-image model")
        self.text_encoder_parts = tuple(sorted(part for part in parts if part.startswith("text_encoder")))
        self.trainable_text_encoder_parts = tuple(
            p for p in self.text_encoder_parts if parts[p].__name__.startswith("CLIPTextModel")
        )

    def _read_facts(self) -> None:
        self.schedule = schedule.read(self.checkpoint.config("scheduler"), self.named)
        self.path = self.schedule.path
        self.shifts: dict[tuple[int, int], float] = {}  # by size, cached
        self.network = pipeline_without_networks.settings(self.checkpoint, self.denoiser_part)
        self.latents = self._latents()
        self.factor, self.channels = self.latents.factor, self.latents.channels
        blocks = self.network.get("down_block_types")
        self.stride = self.factor * (2 ** (len(blocks) - 1) if blocks else 2)
        if blocks and (has := self.network["in_channels"]) != self._inputs():
            raise ConfigError(
                f"{self.named} has a denoiser of {has} input channels instead of {self._inputs()}; inpainting and editing "
                "models can't be trained; choose the text-to-image model that they are based on"
            )

    def _latents(self) -> Any:
        """The latent format of the VAE."""
        if "vae" not in self.checkpoint.parts:
            return latents.Pixels()
        return latents.rule(pipeline_without_networks.settings(self.checkpoint, "vae"), self.named)

    def _inputs(self) -> int:
        """Expected input channels of a UNet."""
        return self.channels

    def check_device(self) -> None:
        kernels.require(self.attention, self.compiles, self.device, self.dtype)
        if self.offload is enums.Offload.blocks and self.device.type == "cpu" and not without_weights():
            raise ConfigError(
                "model.offload is blocks, but the run's device is the CPU, so there is nothing to offload; use none"
            )

    def native(self, t: Tensor) -> Tensor:
        """t as the network's native timestep, in a dtype that it accepts."""
        native = self.path.native(t)
        return native.float() if native.is_floating_point() else native

    # The networks.

    def _load(self, part: str, dtype: torch.dtype, device: torch.device | None = None) -> Any:
        return self.checkpoint.load(part, dtype, device or self.device, self.quantiser, self.skip_quantization)

    @cached_property
    def denoiser(self) -> nn.Module:
        offloaded = self.offload is enums.Offload.blocks or self.shards > 0
        model = self._load(self.denoiser_part, self.dtype, torch.device("cpu") if offloaded else None)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if offloaded:
            self.blocks = Blocks(model, self.device)
        return kernels.choose(model, self.attention, self.compiles)

    def offloaded(self) -> list[int]:
        return self.blocks.sizes if self.blocks else []

    def shard(self) -> Lockstep:
        model, blocks = self.denoiser, self.blocks
        assert blocks is not None  # the denoiser was loaded with `shards`
        return blocks.divide(model)

    @cached_property
    def vae(self) -> Any:
        if "vae" not in self.checkpoint.parts:
            return None
        vae = self._load("vae", self.encoder_dtype)
        return latents.in_tiles(vae) if self.vae_tiling else vae

    @cached_property
    def text_encoders(self) -> TextEncoders:
        return self.load_text_encoders()

    def load_text_encoders(self) -> TextEncoders:
        return [(self._tokenizer(part), self._load(part, self.encoder_dtype)) for part in self.text_encoder_parts]

    @abstractmethod
    def _tokenizer(self, part: str) -> Any:
        """The tokenizer of a text encoder."""

    def release_encoders(self) -> None:
        self.__dict__.pop("vae", None)
        self.__dict__.pop("text_encoders", None)
        files.trim()

    def loading(self, base: str, config: str | None) -> str:
        options = {"torch_dtype": str(self.dtype)}
        options |= {"variant": json.dumps(self.checkpoint.read_variant)} if self.checkpoint.read_variant else {}
        kind, call = "DiffusionPipeline", "from_pretrained"
        if single_file.is_single_file(base):
            kind, call = self.checkpoint.pipeline_name, "from_single_file"
            options |= {"config": json.dumps(config, ensure_ascii=False)}
        prefix = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"""\
import torch
from diffusers import {kind}
pipeline = {kind}.{call}({json.dumps(base, ensure_ascii=False)}, {prefix})"""

    def pipeline(self) -> Any:
        wanted, parts = (
            pipeline_without_networks.constructor_arguments(self.pipeline_class),
            self.checkpoint.parts.keys() - LEFT_OUT,
        )
        left_out = {name: None for name in wanted if name.startswith(pipeline_without_networks.COMPONENTS) and name not in parts}
        quiet = {name: value for name, value in pipeline_without_networks.OPTIONS.items() if name in wanted}
        return self.pipeline_class.from_pretrained(
            self.checkpoint.folder, torch_dtype=self.dtype, use_safetensors=True, **left_out, **quiet,
            variant=self.checkpoint.read_variant,
        )  # fmt: skip

    # Images and latents.

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.latents.encode(self.vae, pixels.to(self.device, self.encoder_dtype))
        return mean.cpu(), std.cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.latents.decode(self.vae, latents.to(self.device))

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Tensor:
        if self.tae is None:
            return self.decode(latents)
        rows = latents.to(self.device, self.encoder_dtype).split(1)
        return torch.cat([self._preview_decoder.decode(row).sample.float() for row in rows])

    @cached_property
    def _preview_decoder(self) -> Any:
        try:
            tiny = files.cache_first(
                AutoencoderTiny.from_pretrained, self.tae, torch_dtype=self.encoder_dtype, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            way_out = "set model.tae to a folder or hub id of an AutoencoderTiny, or to null for the VAE itself"
            raise ConfigError(f"model.tae is {self.tae!r}, which could not be loaded; {way_out}") from error
        return files.freeze_to(tiny, self.device)

    # Trained tokens, and the identities of the parts.

    def token_slots(self, word: str, encoders: TextEncoders) -> list[Slot]:
        pairs = zip(self.text_encoder_parts, encoders, strict=True)
        return [tokens.slot(*pair, word) for part, pair in pairs if part in self.trainable_text_encoder_parts]

    def save_token(self, folder: Folder, word: str, rows: Sequence[Tensor], header: Mapping[str, str]) -> Folder:
        return tokens.save(folder, word, [self.token_keys[part] for part in self.trainable_text_encoder_parts], rows, header)

    def load_token(self, pipeline: Any, folder: Folder, word: str) -> Callable[[float], None]:
        keys = [self.token_keys[part] for part in self.trainable_text_encoder_parts]
        named = [(part.replace("text_encoder", "tokenizer"), part) for part in self.trainable_text_encoder_parts]
        return tokens.load(folder, keys, [(getattr(pipeline, a), getattr(pipeline, b)) for a, b in named], word)

    def token_usage(self, word: str) -> str:
        return tokens.usage({part: self.token_keys[part] for part in self.trainable_text_encoder_parts}, word)

    def text_identity(self) -> str:
        tokenizers = (part.replace("text_encoder", "tokenizer") for part in self.text_encoder_parts)
        lines = [self.checkpoint.pipeline_name, str(self.encoder_dtype), *map(str, self._index_options())]
        if self.empty_caption is not enums.EmptyCaption.auto:  # keeps the key of texts that earlier versions cached
            lines.append(f"empty caption: {self.empty_caption.value}")
        return self._identity((*tokenizers, *self.text_encoder_parts), *lines)

    def _index_options(self) -> list[Any]:
        """Settings of the pipeline in the checkpoint's index, besides its components."""
        return sorted((k, v) for k, v in self.checkpoint.index.items() if not isinstance(v, list) and not k.startswith("_"))

    def denoiser_identity(self) -> str:
        return self._identity((self.denoiser_part, "scheduler"), str(self.dtype))

    def image_identity(self) -> str:
        return self._identity(("vae",), str(self.encoder_dtype), *(["in tiles"] if self.vae_tiling else []))

    def _identity(self, parts: Sequence[str], *also: str) -> str:
        return self.checkpoint.identity(parts, self.quantiser, *also)

"""Any text-to-image pipeline that diffusers loads, through the pipeline's own call; and what the named families share.

A named family says which pipelines it reads, and what is better known than asked: which layers learn, how the network is called
at the least cost, what other programs call its parts.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path as Folder
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor, nn

from ..batch import Cond, Text
from ..config import Attention, ConfigError, Dtype
from ..embedding import Slot
from . import files, kernels, latents, schedule, shell, tokens
from .ask import Asked, Reached
from .checkpoint import Checkpoint
from .family import Family, OnStep, TextEncoders
from .weights import LEFT_OUT

log = logging.getLogger(__name__)

LENGTH = ".length"  # ends the name of a tensor that says how many of another's tokens a caption has
# Pictures of the very size, and captions of the very words, that are asked for.
AS_ASKED = {"output_type": "latent", "use_resolution_binning": False, "clean_caption": False}
SAID = (
    "pretrained",
    "revision",
    "variant",
    "dtype",
    "encoder_dtype",
    "tae",
    "resolution",
    "gradient_checkpointing",
    "attention",
    "compile",
    "cache",
)
CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class PipelineFamily(Family):
    """Any checkpoint in diffusers' layout whose pipeline makes pictures of prompts, of any size.

    Args:
        pretrained: folder written by save_pretrained, or hub id.
        dtype: of the frozen denoiser; its answers are float32.
        encoder_dtype: of the VAE and the text encoders.
        tae: folder or hub id of an AutoencoderTiny for previews; None takes the VAE itself.
        gradient_checkpointing: keep blocks' inputs only, and run the blocks again for their gradients.
        attention: PyTorch's kernel for it; auto takes the fastest that fits.
        compile: the transformer blocks, by torch.compile.
        options: a family's own; see `known_options`.
        config: of a single file: folder or hub id with its settings and tokenizers.
        prediction_type: of a single file: what its network predicts, where the file does not say so.
        cache: folder of what need not be found out twice; None: it is, at every start.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()  # classes whose checkpoints are this family's; empty: all
    learns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (
            r"re:.*\.\d+\.(.*\.)?(attn|attention|self_attn|cross_attn)\w*\.(\w*\.)?(to_|add_|qkv|out|proj|q_|k_|v_)\w*(\.0)?",
        ),
        "feed_forward": (r"re:(?!.*conv_depth).*\.\d+\.((.*\.)?(ff\w*|\w*mlp|feed_forward|ffn)\..*|proj_mlp|proj_out)",),
    }
    text_learns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
        "feed_forward": ("mlp.fc1", "mlp.fc2"),
    }
    kohya: ClassVar[Mapping[str, str]] = {}
    token_keys: ClassVar[Mapping[str, str]] = CLIP  # text encoder → what learned embeddings of it are called in files
    keeps: ClassVar[tuple[str, ...]] = (
        "time_embedding", "time_text_embed", "time_guidance_embed", "t_embedder", "add_embedding", "time_emb_proj",
        "text_projection", "norm_out", "re:proj_out", "adaln_single", "adaLN_modulation", "x_embedder", "context_embedder",
        "img_in", "txt_in",
    )  # fmt: skip

    def __init__(
        self, pretrained: str, revision: str | None, variant: str | None, dtype: Dtype, encoder_dtype: Dtype,
        tae: str | None, resolution: int, gradient_checkpointing: bool, attention: Attention, compile: bool,
        options: Mapping[str, Any], config: str | None = None, prediction_type: str | None = None, cache: Folder | None = None,
    ):  # fmt: skip
        files.quiet()
        self.options, self.said_by_user = dict(options), {name: value for name, value in locals().items() if name in SAID}
        if strange := sorted(self.options.keys() - set(self.known_options())):
            raise ConfigError(f"model.options has {strange}; this model knows {sorted(self.known_options())}")
        self.checkpoint = Checkpoint(pretrained, revision, variant, cache, config, prediction_type)
        self.tae = tae
        self.dtype, self.encoder_dtype = getattr(torch, dtype.value), getattr(torch, encoder_dtype.value)
        self.gradient_checkpointing, self.attention, self.compiles = gradient_checkpointing, attention, compile
        self.said = f"model.pretrained is {pretrained!r}, which"
        self._read_parts()
        self._read_facts()

    def known_options(self) -> tuple[str, ...]:
        """Keys of `options` that mean something to this family."""
        return ()

    def _read_parts(self) -> None:
        """Which components there are; refuse a checkpoint that this family would read wrongly."""
        name, parts = self.checkpoint.pipeline_name, self.checkpoint.parts
        self.pipeline_class: Any = getattr(diffusers, name, None)
        if self.pipelines and name not in self.pipelines:
            raise ConfigError(f"{self.said} is a {name}; this model needs a {' or '.join(self.pipelines)}; see conf/model/")
        self.denoiser_part = next((part for part in ("transformer", "unet") if part in parts), "")
        if self.pipeline_class is None or not self.denoiser_part or "transformer_2" in parts:
            raise ConfigError(f"{self.said} is a {name}, which has no single denoiser to train; choose another model")
        if "strength" in inspect.signature(self.pipeline_class.__call__).parameters and not self.pipelines:
            raise ConfigError(f"{self.said} is a {name}, which changes given pictures; choose a text-to-image model")
        self.text_encoder_parts = tuple(sorted(part for part in parts if part.startswith("text_encoder")))
        self.teachable_parts = tuple(p for p in self.text_encoder_parts if parts[p].__name__.startswith("CLIPTextModel"))

    def _read_facts(self) -> None:
        self.schedule = schedule.read(self.checkpoint.config("scheduler"), self.said)
        self.path = self.schedule.path
        self.shifts: dict[tuple[int, int], float] = {}  # of sizes asked for before
        self.network = shell.settings(self.checkpoint, self.denoiser_part)
        self.latents = self._latents()
        self.factor, self.channels = self.latents.factor, self.latents.channels
        blocks = self.network.get("down_block_types")
        self.stride = self.factor * (2 ** (len(blocks) - 1) if blocks else 2)
        if blocks and (has := self.network["in_channels"]) != self._inputs():
            raise ConfigError(
                f"{self.said} has a denoiser of {has} input channels where {self._inputs()} are fed; inpainting and editing "
                "models can't be trained here; choose the text-to-image model they were made from"
            )

    def _latents(self) -> Any:
        """How latents are made and read back."""
        if "vae" not in self.checkpoint.parts:
            return latents.Pixels()
        return latents.rule(shell.settings(self.checkpoint, "vae"), self.said)

    def _inputs(self) -> int:
        """Channels that a UNet should take."""
        return self.channels

    @cached_property
    def asked(self) -> Asked:
        """The pipeline's own call; it has no weights but those put in."""
        with torch.random.fork_rng(devices=[]):  # networks are initialised here, which must not move the step's own draws
            return Asked(shell.build(self.checkpoint, self.pipeline_class, self.dtype))

    def check_device(self) -> None:
        kernels.require(self.attention, self.compiles, self.device, self.dtype)

    def shift(self, height: int, width: int) -> float:
        if self.schedule.dynamic is None:
            return self.schedule.shift
        if (height, width) not in self.shifts:
            mu = self.asked.shift(**self._size(height, width), **self.unguided)
            self.shifts[height, width] = self.schedule.shift_of(mu)
        return self.shifts[height, width]

    # The networks.

    def _load(self, part: str, dtype: torch.dtype) -> Any:
        return self.checkpoint.load(part, dtype, self.device, self.quantiser, self.keeps)

    @cached_property
    def denoiser(self) -> nn.Module:
        model = self._load(self.denoiser_part, self.dtype)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return kernels.choose(model, self.attention, self.compiles)

    @cached_property
    def vae(self) -> Any:
        return self._load("vae", self.encoder_dtype) if "vae" in self.checkpoint.parts else None

    @cached_property
    def text_encoders(self) -> TextEncoders:
        return self.load_text_encoders()

    def load_text_encoders(self) -> TextEncoders:
        return [(self._tokenizer(part), self._load(part, self.encoder_dtype)) for part in self.text_encoder_parts]

    def _tokenizer(self, part: str) -> Any:
        return getattr(self.asked.pipeline, part.replace("text_encoder", "tokenizer"))

    def release_encoders(self) -> None:
        self.__dict__.pop("vae", None)
        self.__dict__.pop("text_encoders", None)
        files.trim()

    # The text.

    def read_text(self, captions: Sequence[str], encoders: TextEncoders) -> Text:
        parts = dict(zip(self.text_encoder_parts, (encoder for _, encoder in encoders), strict=True))
        for part, (tokenizer, _) in zip(self.text_encoder_parts, encoders, strict=True):
            if part in self.teachable_parts:
                _warn_of_long(captions, tokenizer)
        said, empty = ([i for i, caption in enumerate(captions) if bool(caption) is wanted] for wanted in (True, False))
        with shell.holding(self.asked.pipeline, **parts):
            texts = [self._read([captions[i] for i in said])] if said else []
            texts += [self._unconditional().repeat(len(empty))] if empty else []
        return Text.stack(texts).take(torch.tensor([*said, *empty], device=self.device).argsort())

    def _read(self, captions: list[str]) -> Text:
        """Captions that say something."""
        call = self._size(8, 8) | self.begin(torch.zeros(len(captions), 3, 8, 8))
        return self._record(self.asked.text(prompt=captions, **call, **self.unguided), len(captions))

    def _unconditional(self) -> Text:
        """What the pipeline puts beside a prompt for classifier-free guidance; where it has none, an empty prompt."""
        beside = any(name.startswith("negative_") for name in self.asked.says)
        call = self._size(8, 8) | self.begin(torch.zeros(1, 3, 8, 8))
        said = self.asked.text(prompt=[""], **call, **(self.guidance(2.0) if beside else self.unguided))
        return self._record({name: _first(said.get(f"negative_{name}"), value) for name, value in said.items()}, 1)

    def _record(self, said: Mapping[str, Any], rows: int) -> Text:
        """The tensors that the pipeline's call takes back; lists of rows are padded, and a mask of ones is written out."""
        text = Text()
        for name in (n for n in said if n in self.asked.parameters and not n.startswith("negative_")):
            value = said[name]
            if isinstance(value, list):
                text[name + LENGTH] = torch.tensor([len(row) for row in value], device=self.device)
                value = nn.utils.rnn.pad_sequence(value, batch_first=True)
            if value is None and name.endswith("mask"):
                value = torch.ones(said["prompt_embeds"].shape[:2], dtype=torch.long, device=self.device)
            if value is not None:
                self._check_rows(name, value, rows)
                text[name] = value.float() if value.is_floating_point() else value
        return text

    def _check_rows(self, name: str, value: Tensor, rows: int) -> None:
        if len(value) != rows:
            shape = tuple(value.shape)
            raise ConfigError(f"{self.said} is a {self.checkpoint.pipeline_name}, whose {name} {shape} has no row a caption")

    def _arguments(self, text: Mapping[str, Tensor]) -> dict[str, Any]:
        """A text as the pipeline's call takes it."""
        made: dict[str, Any] = {}
        for name, value in text.items():
            if name.endswith(LENGTH):
                continue
            value = value.to(self.device, self.dtype if value.is_floating_point() else None)
            lengths = text.get(name + LENGTH)
            made[name] = value if lengths is None else [row[:n] for row, n in zip(value, lengths.tolist(), strict=True)]
        return made

    def token_slots(self, word: str, encoders: TextEncoders) -> list[Slot]:
        pairs = zip(self.text_encoder_parts, encoders, strict=True)
        return [tokens.slot(*pair, word) for part, pair in pairs if part in self.teachable_parts]

    # Pictures and latents.

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
        return self._preview_decoder.decode(latents.to(self.device, self.encoder_dtype)).sample.float()

    @cached_property
    def _preview_decoder(self) -> Any:
        try:
            tiny = files.cache_first(
                AutoencoderTiny.from_pretrained, self.tae, torch_dtype=self.encoder_dtype, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            way_out = "set model.tae to a folder or hub id of an AutoencoderTiny, or to null for the VAE itself"
            raise ConfigError(f"model.tae is {self.tae!r}, which could not be loaded; {way_out}") from error
        return files.settle(tiny, self.device)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        call = self._size(*x_t.shape[2:]) | self._arguments(cond) | self.unguided
        with shell.holding(self.asked.pipeline, **{self.denoiser_part: self.denoiser}):
            return self.asked.answer(x_t, self.native(t), **call).float()

    def native(self, t: Tensor) -> Tensor:
        """t on the network's own clock, in a type that it takes."""
        native = self.path.native(t)
        return native.float() if native.is_floating_point() else native

    def _size(self, height: int, width: int) -> dict[str, Any]:
        """Arguments for one step to latents of a size in cells, at least the stride's."""
        least = self.stride // self.factor
        height, width = (max(side // least, 1) * least * self.factor for side in (height, width))
        return {"height": height, "width": width, "num_inference_steps": 1, **AS_ASKED}

    def guidance(self, scale: float) -> dict[str, float]:
        by_prompts = "true_cfg_scale" in self.asked.parameters and not self.network.get("guidance_embeds", False)
        return {"true_cfg_scale" if by_prompts else "guidance_scale": scale}

    @cached_property
    def unguided(self) -> dict[str, float]:
        """Arguments for the answer to the prompt alone; a network that is fed a guidance scale is fed 1."""
        return {
            name: 0.0 if name == "guidance_scale" and not self.network.get("guidance_embeds") else 1.0
            for name in self.guidance(1.0)
        }

    @torch.no_grad()
    def generate(
        self, text: Text, negative: Text, *, height: int, width: int, guidance_scale: float, on_step: OnStep | None = None,
        photos: Sequence[Image.Image] = (), **options: Any,
    ) -> list[Image.Image]:  # fmt: skip
        against = {f"negative_{name}": value for name, value in self._arguments(negative).items()}
        call = self._arguments(text) | {name: value for name, value in against.items() if name in self.asked.parameters}
        call |= self.guidance(guidance_scale) | {"height": height, "width": width, "negative_prompt": None} | options
        try:
            with shell.holding(self.asked.pipeline, **{self.denoiser_part: self.denoiser}):
                latents = self._sample(call, torch.Size((self.channels, height // self.factor, width // self.factor)), on_step)
            return [picture for row in latents.split(1) for picture in self._pictures(row)]  # one at a time: decoding is large
        finally:
            self.__dict__.pop("vae", None)
            self.__dict__.pop("_preview_decoder", None)

    def _sample(self, call: dict[str, Any], shape: torch.Size, on_step: OnStep | None) -> Tensor:
        """Latents [B C h w] after the last step of the pipeline's call."""
        unpack = self._unpacking(shape)

        def watch(done: int, packed: Tensor, whole: int) -> dict[str, Tensor]:
            if on_step:
                on_step(done, unpack(packed))
            if done == whole:
                raise Reached(unpack(packed))
            return {}

        def old(i: int, t: Any, packed: Tensor) -> None:
            watch(i + 1, packed, len(self.asked.pipeline.scheduler.timesteps))

        def new(pipeline: Any, i: int, t: Any, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return watch(i + 1, now["latents"], pipeline.num_timesteps)

        return self.asked.run(call | AS_ASKED | {"callback_on_step_end": new, "callback": old})

    def _unpacking(self, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        """What brings the sampler's latents to [B C h w]."""
        return self.asked.unpacking(shape, **self._size(*shape[1:]), **self.unguided)

    def begin(self, image: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call that make it begin from a picture, if the family `refines`."""
        return {}

    def _pictures(self, latents: Tensor) -> list[Image.Image]:
        return files.pictures(self.decode(latents))

    def pipeline(self) -> Any:
        wanted, parts = shell.wanted(self.pipeline_class), self.checkpoint.parts.keys() - LEFT_OUT
        left_out = {name: None for name in wanted if name.startswith(shell.COMPONENTS) and name not in parts}
        quiet = {name: value for name, value in shell.OPTIONS.items() if name in wanted}
        return self.pipeline_class.from_pretrained(
            self.checkpoint.folder, torch_dtype=self.dtype, use_safetensors=True, **left_out, **quiet,
            variant=self.checkpoint.read_variant,
        )  # fmt: skip

    # Learned tokens, and what identifies the parts.

    def save_token(self, folder: Folder, rows: Sequence[Tensor]) -> None:
        tokens.save(folder, [self.token_keys[part] for part in self.teachable_parts], rows)

    def load_token(self, pipeline: Any, folder: Folder, word: str) -> Callable[[float], None]:
        keys = [self.token_keys[part] for part in self.teachable_parts]
        named = [(part.replace("text_encoder", "tokenizer"), part) for part in self.teachable_parts]
        return tokens.load(folder, keys, [(getattr(pipeline, a), getattr(pipeline, b)) for a, b in named], word)

    def token_usage(self, word: str) -> str:
        return tokens.usage({part: self.token_keys[part] for part in self.teachable_parts}, word)

    def text_identity(self) -> str:
        tokenizers = (part.replace("text_encoder", "tokenizer") for part in self.text_encoder_parts)
        said = (self.checkpoint.pipeline_name, str(self.encoder_dtype), *map(str, self._index_options()))
        return self._identity((*tokenizers, *self.text_encoder_parts), *said)

    def _index_options(self) -> list[Any]:
        """What the checkpoint's index says of its pipeline besides its components."""
        return sorted((k, v) for k, v in self.checkpoint.index.items() if not isinstance(v, list) and not k.startswith("_"))

    def denoiser_identity(self) -> str:
        return self._identity((self.denoiser_part, "scheduler"), str(self.dtype))

    def image_identity(self) -> str:
        return self._identity(("vae",), str(self.encoder_dtype))

    def _identity(self, parts: Sequence[str], *also: str) -> str:
        return self.checkpoint.identity(parts, self.quantiser, *also)


def _first(value: Any, other: Any) -> Any:
    """`value`, or the other where it is absent (None, or an empty list)."""
    return other if value is None or (isinstance(value, list) and not value) else value


def _warn_of_long(captions: Sequence[str], tokenizer: Any) -> None:
    limit = tokenizer.model_max_length
    for caption in captions:
        length = len(tokenizer(caption).input_ids)
        if length > limit:
            log.warning("caption has %d tokens, of which the text encoder reads the first %d: %r", length, limit, caption)

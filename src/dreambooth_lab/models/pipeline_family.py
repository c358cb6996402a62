"""Any text-to-image pipeline that diffusers loads, through the pipeline's own call; and the base class of the named families.

A named family defines the pipelines that it reads, its trained layers, a direct and faster call of its network, and the names
of its parts in other programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ..batch import Caption, Cond, Text, to_device
from ..config import ConfigError, enums
from . import files, pipeline_without_networks
from .checkpoint_family import CheckpointFamily
from .chunks import SPECIAL, Piece, cut, join, pieces, tokens
from .family import OnStep, TextEncoders
from .pipeline_calls import CallResult, PipelineCalls

LENGTH = ".length"  # suffix of a tensor with the number of a caption's tokens in another tensor
# Generate the requested size, and use the prompt unchanged.
AS_ASKED = {"use_resolution_binning": False, "clean_caption": False}


class PipelineFamily(CheckpointFamily):
    """Any checkpoint in diffusers' layout whose pipeline generates images from prompts, of any size."""

    chunkable: ClassVar[bool] = False  # whether the denoiser accepts any number of text states

    @cached_property
    def calls(self) -> PipelineCalls:
        """The pipeline's own call, without networks except the given ones."""
        with torch.random.fork_rng(devices=[]):  # initialises networks, which must not change the state of the step's generator
            return PipelineCalls(pipeline_without_networks.build(self.checkpoint, self.pipeline_class, self.dtype))

    def _tokenizer(self, part: str) -> Any:
        return getattr(self.calls.pipeline, part.replace("text_encoder", "tokenizer"))

    def shift(self, height: int, width: int) -> float:
        if self.schedule.dynamic is None:
            return self.schedule.shift
        if (height, width) not in self.shifts:
            mu = self.calls.shift(**self._size(height, width), **self.unguided)
            self.shifts[height, width] = self.schedule.shift_of(mu)
        return self.shifts[height, width]

    def guidance(self, scale: float) -> dict[str, float]:
        by_prompts = "true_cfg_scale" in self.calls.parameters and not self.network.get("guidance_embeds", False)
        return {"true_cfg_scale" if by_prompts else "guidance_scale": scale}

    @cached_property
    def unguided(self) -> dict[str, float]:
        """Arguments for the prediction without guidance; a network with a guidance input gets 1."""
        return {
            name: 0.0 if name == "guidance_scale" and not self.network.get("guidance_embeds") else 1.0
            for name in self.guidance(1.0)
        }

    def _size(self, height: int, width: int) -> dict[str, Any]:
        """Arguments for one step with latents of a size in cells, at least the stride."""
        least = self.stride // self.factor
        height, width = (max(side // least, 1) * least * self.factor for side in (height, width))
        return {"height": height, "width": width, "num_inference_steps": 1, "output_type": "latent", **AS_ASKED}

    def size_arguments(self, height: int, width: int) -> dict[str, Any]:
        exact = {name: value for name, value in AS_ASKED.items() if name in self.calls.parameters}
        return {"height": height, "width": width, **exact}

    # The text.

    def read_text(self, captions: Sequence[Caption], encoders: TextEncoders) -> Text:
        parts = dict(zip(self.text_encoder_parts, (encoder for _, encoder in encoders), strict=True))
        with pipeline_without_networks.with_parts(self.calls.pipeline, **parts):
            if self.chunks == 1:
                return self._read_once(captions)
            texts = []
            for number in range(self.chunks):
                seeing = {part.replace("text_encoder", "tokenizer"): Piece(self._tokenizer(part), number) for part in parts}
                with pipeline_without_networks.with_parts(self.calls.pipeline, **seeing):
                    texts.append(self._read_once(captions))
            return join(texts)

    def _read_once(self, captions: Sequence[Caption]) -> Text:
        values = {i: caption for i, caption in enumerate(captions) if caption}
        texts, order = [self._read(list(values.values()))] if values else [], list(values)
        for nothing, read in (("", self._empty), (None, self._unconditional)):
            rows = [i for i, caption in enumerate(captions) if caption == nothing]
            texts += [read().repeat(len(rows))] if rows else []
            order += rows
        return Text.stack(texts).select(to_device(torch.tensor(order).argsort(), self.device))

    def _empty(self) -> Text:
        """The conditioning of a row without caption."""
        if self.empty_caption is enums.EmptyCaption.auto:
            return self._unconditional()
        read = self._read([""])
        if self.empty_caption is enums.EmptyCaption.encoded:
            return read
        kept = {name: value for name, value in read.items() if name.endswith("mask") or not value.is_floating_point()}
        return Text({name: kept.get(name, torch.zeros_like(value)) for name, value in read.items()})

    def fit_chunks(self, captions: Iterable[str]) -> None:
        if not self.chunkable or self.trainable_text_encoder_parts != self.text_encoder_parts:
            raise ConfigError(
                f"dataset.long_captions is chunk, but a {self.checkpoint.pipeline_name} takes texts of one length, or has other "
                "text encoders than CLIP's; use dataset.long_captions=truncate"
            )
        self.chunks = max(self.chunks, pieces(map(self._tokenizer, self.text_encoder_parts), captions))

    def truncated_part(self, captions: Iterable[str]) -> list[str]:
        found, lines = sorted(set(captions)), []
        calls = self.calls.parameters.get("max_sequence_length")
        for part in self.text_encoder_parts if self.chunks == 1 else ():
            if part in self.trainable_text_encoder_parts:
                lines.append(cut(part, self._tokenizer(part), self._tokenizer(part).model_max_length, SPECIAL, found))
            elif calls and isinstance(calls.default, int):
                lines.append(cut(part, self._tokenizer(part), calls.default, 1, found))
        return [line for line in lines if line]

    def count_tokens(self, caption: str) -> dict[str, int]:
        return {part: len(tokens(self._tokenizer(part), caption)) for part in self.text_encoder_parts}

    def text_identity(self) -> str:
        whole = super().text_identity()
        return whole if self.chunks == 1 else f"{whole} in {self.chunks} chunks"

    def _read(self, captions: list[str]) -> Text:
        """The text encoders' output for captions."""
        call = self._size(8, 8) | self.image_arguments(torch.zeros(len(captions), 3, 8, 8))
        return self._record(self.calls.text(prompt=captions, **call, **self.unguided), len(captions))

    def _unconditional(self) -> Text:
        """The pipeline's unconditional input for classifier-free guidance; if it has none, an empty prompt."""
        beside = any(name.startswith("negative_") for name in self.calls.text_names)
        call = self._size(8, 8) | self.image_arguments(torch.zeros(1, 3, 8, 8))
        text = self.calls.text(prompt=[""], **call, **(self.guidance(2.0) if beside else self.unguided))
        return self._record({name: _first(text.get(f"negative_{name}"), value) for name, value in text.items()}, 1)

    def _record(self, values: Mapping[str, Any], rows: int) -> Text:
        """The tensors that the pipeline's call accepts; lists of rows are padded, and a missing mask is written as ones."""
        text = Text()
        for name in (n for n in values if n in self.calls.parameters and not n.startswith("negative_")):
            value = values[name]
            if isinstance(value, list):
                text[name + LENGTH] = torch.tensor([len(row) for row in value], device=self.device)
                value = nn.utils.rnn.pad_sequence(value, batch_first=True)
            if value is None and name.endswith("mask"):
                value = torch.ones(values["prompt_embeds"].shape[:2], dtype=torch.long, device=self.device)
            if value is not None:
                self._check_rows(name, value, rows)
                text[name] = value.float() if value.is_floating_point() else value
        return text

    def _check_rows(self, name: str, value: Tensor, rows: int) -> None:
        if len(value) != rows:
            shape = tuple(value.shape)
            raise ConfigError(
                f"{self.named} is a {self.checkpoint.pipeline_name}, whose {name} {shape} does not have one row per caption"
            )

    def _arguments(self, text: Mapping[str, Tensor]) -> dict[str, Any]:
        """A text as arguments of the pipeline's call."""
        made: dict[str, Any] = {}
        for name, value in text.items():
            if name.endswith(LENGTH):
                continue
            value = value.to(self.device, self.dtype if value.is_floating_point() else None)
            lengths = text.get(name + LENGTH)
            made[name] = value if lengths is None else [row[:n] for row, n in zip(value, lengths.tolist(), strict=True)]
        return made

    def text_arguments(self, text: Text, negative: Text) -> dict[str, Any]:
        against = {f"negative_{name}": value for name, value in self._arguments(negative).items()}
        known = {name: value for name, value in against.items() if name in self.calls.parameters}
        return self._arguments(text) | known | {"negative_prompt": None}

    # The prediction, and images.

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        call = self._size(*x_t.shape[2:]) | self._arguments(cond) | self.unguided
        with pipeline_without_networks.with_parts(self.calls.pipeline, **{self.denoiser_part: self.denoiser}):
            return self.calls.denoise(x_t, self.native(t), **call).float()

    @torch.no_grad()
    def generate(
        self, text: Text, negative: Text, *, height: int, width: int, guidance_scale: float, on_step: OnStep | None = None,
        photos: Sequence[Image.Image] = (), **options: Any,
    ) -> list[Image.Image]:  # fmt: skip
        call = self.text_arguments(text, negative) | self.guidance(guidance_scale) | {"height": height, "width": width} | options
        try:
            with pipeline_without_networks.with_parts(self.calls.pipeline, **{self.denoiser_part: self.denoiser}):
                latents = self._sample(call, torch.Size((self.channels, height // self.factor, width // self.factor)), on_step)
            return [
                picture for row in latents.split(1) for picture in self._images(row)
            ]  # one at a time: decoding needs much memory
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
                raise CallResult(unpack(packed))
            return {}

        def old(i: int, t: Any, packed: Tensor) -> None:
            watch(i + 1, packed, len(self.calls.pipeline.scheduler.timesteps))

        def new(pipeline: Any, i: int, t: Any, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return watch(i + 1, now["latents"], pipeline.num_timesteps)

        return self.calls.run(call | AS_ASKED | {"output_type": "latent", "callback_on_step_end": new, "callback": old})

    def _unpacking(self, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        """The function from the sampler's latents to [B C h w]."""
        return self.calls.unpacking(shape, **self._size(*shape[1:]), **self.unguided)

    def image_arguments(self, image: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call that give it an initial image, if the family `needs_image`."""
        return {}

    def _images(self, latents: Tensor) -> list[Image.Image]:
        return files.to_images(self.decode(latents))


def _first(value: Any, other: Any) -> Any:
    """`value`, or the default if it is None or an empty list."""
    return other if value is None or (isinstance(value, list) and not value) else value

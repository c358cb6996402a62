"""Captioning models of transformers: BLIP, Florence-2, Qwen2-VL and similar ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import ConfigError
from . import files

QUESTION = "Describe this picture in one sentence."
TASK = "<DETAILED_CAPTION>"  # Florence-2's; the output of its caption tasks is plain text
PICTURE = {"type": "image"}


class Captioner:
    """The network, its preprocessing and a device. The form of the input follows from its processor: a chat, if it has a chat
    template; a task, if it has tasks; else the image only.

    Args:
        place: hub id, or folder written by save_pretrained.
        option: the option that named it, for messages.
        question: for models with a chat template or tasks; None: `QUESTION`, or `TASK`.

    Raises:
        ConfigError: the model can't be loaded, or takes no question.
    """

    def __init__(self, place: str, option: str, device: torch.device, question: str | None, max_tokens: int):
        from transformers import AutoModelForImageTextToText

        files.silence_loading()
        folder = Path(place).expanduser()
        where = str(folder) if folder.is_dir() else place
        kind: Any = AutoModelForImageTextToText
        try:
            self.processor = _processor(where)
            model, info = kind.from_pretrained(where, use_safetensors=True, dtype=_dtype(device), output_loading_info=True)
        except (OSError, ValueError, ImportError) as error:
            way_out = "give a folder of a BLIP, Florence-2 or Qwen-VL, or a reachable hub id"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{option} is {place!r}, which could not be loaded ({reason}); {way_out}") from error
        if info["missing_keys"]:
            raise ConfigError(f"{option} is {place!r}, which lacks weights of {type(model).__name__}; give a whole model")
        self.model: Any = files.freeze_to(model, device)
        self.device, self.max_tokens = device, max_tokens
        self.chats, self.has_tasks = bool(self.processor.chat_template), hasattr(self.processor, "post_process_generation")
        if question and not (self.chats or self.has_tasks):
            raise ConfigError(f"--question is {question!r}, but {type(model).__name__} takes only an image; remove --question")
        self.question = question or (QUESTION if self.chats else TASK)

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> str:
        """A caption on one line; empty if nothing was generated."""
        inputs = self._inputs(picture.convert("RGB")).to(self.device, self.model.dtype)
        made = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        (text,) = self.processor.batch_decode(self._fresh(made, inputs), skip_special_tokens=True)
        return " ".join(text.split())

    def _inputs(self, picture: Image.Image) -> Any:
        if self.chats:
            asked = [{"role": "user", "content": [PICTURE, {"type": "text", "text": self.question}]}]
            text = self.processor.apply_chat_template(asked, add_generation_prompt=True)
            return self.processor(images=[picture], text=[text], return_tensors="pt")
        values = {"text": self.question} if self.has_tasks else {}
        return self.processor(images=picture, **values, return_tensors="pt")

    def _fresh(self, made: Tensor, inputs: Any) -> Tensor:
        """The generated tokens: decoder-only models repeat the question first."""
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(made[:, : asked.shape[1]], asked):
            return made[:, asked.shape[1] :]
        return made


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _processor(place: str) -> Any:
    """A model's processor, without its video part if its library is missing: only images are used here."""
    from transformers import AutoConfig, AutoProcessor

    try:
        return AutoProcessor.from_pretrained(place)
    except ImportError:
        from transformers.models.auto.processing_auto import processor_class_from_name

        return _without_videos(_class_of(AutoConfig.from_pretrained(place), processor_class_from_name)).from_pretrained(place)


def _class_of(config: Any, by_name: Any) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return by_name(PROCESSOR_MAPPING_NAMES[config.model_type])


def _without_videos(kind: Any) -> Any:
    class Stills(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return Stills

"""Tiny random caption models of the real classes, saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as T

import tiny

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def blip(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
    tokenizer = T.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    text = SMALL | {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = T.BlipConfig(text_config=text, vision_config=SMALL | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    processor = T.BlipProcessor(T.BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    model = T.BlipForConditionalGeneration(config)
    _save(folder, model, processor)
    model.text_decoder.cls.predictions.bias.data[:5] = -100  # it generates letters
    model.save_pretrained(folder)
    return folder


def florence2(folder: Path) -> Path:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>", *sorted(tiny.ByteLevel.alphabet())]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = T.BartTokenizer(vocab=ids, merges=[], extra_special_tokens={"image_token": "<image>"})
    image_processor = T.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False, image_seq_length=2)
    text = {
        "model_type": "bart", "vocab_size": len(tokens), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "max_position_embeddings": 128, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    }  # fmt: skip
    vision = {
        "depths": (1,) * 4, "embed_dim": (8, 8, 16, 16), "num_heads": (1,) * 4, "num_groups": (1,) * 4, "projection_dim": 16,
        "window_size": 4, "max_temporal_embeddings": 10, "max_position_embeddings": 10,
    }  # fmt: skip
    config = T.Florence2Config(text_config=text, vision_config=vision, image_token_id=ids["<image>"])
    processor = T.Florence2Processor(
        image_processor, tokenizer, num_additional_image_tokens=1, post_processor_config={"polygons": {}}
    )
    return _save(folder, T.Florence2ForConditionalGeneration(config), processor)


def qwen2_vl(folder: Path) -> Path:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 14}
    return _qwen(folder, T.Qwen2VLConfig, T.Qwen2VLForConditionalGeneration, vision)


def qwen2_5_vl(folder: Path) -> Path:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "num_heads": 2, "patch_size": 14}
    return _qwen(folder, T.Qwen2_5_VLConfig, T.Qwen2_5_VLForConditionalGeneration, vision | {"fullatt_block_indexes": [0]})


def _qwen(folder: Path, config: Any, kind: Any, vision: dict[str, Any]) -> Path:
    """Without the processor of videos, which needs torchvision."""
    parts = {
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
    }
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *parts.values()]
    tokens = [*sorted(tiny.ByteLevel.alphabet()), *special]
    ids = {token: i for i, token in enumerate(tokens)}
    ends = {"unk_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = T.Qwen2Tokenizer(vocab=ids, merges=[], additional_special_tokens=special, **ends)
    tokenizer.chat_template = CHAT
    text = SMALL | {
        "vocab_size": len(tokens), "num_key_value_heads": 2, "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    numbers = {f"{part}_token_id": ids[token] for part, token in parts.items()}
    image_processor = T.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56, patch_size=14, merge_size=2)
    return _save(folder, kind(config(text_config=text, vision_config=vision, **numbers)), image_processor, tokenizer)


def _save(folder: Path, model: Any, *parts: Any) -> Path:
    """With fresh weights, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder

"""The two text encoders and what SDXL feeds its UNet: penultimate states of both, the pooled state of the second."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth_lab.toybox.captions import FREE_TOKENS


def encoder_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(  # type: ignore[call-arg]
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, projection_dim=width, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        hidden_act=act, attn_implementation="eager",
    )  # fmt: skip


def new_text_encoders(tokenizer: CLIPTokenizer, cfg: Any) -> nn.ModuleDict:
    one, two = (encoder_config(tokenizer, w, cfg.text_layers, cfg.text_heads, "quick_gelu") for w in cfg.text_widths)
    return nn.ModuleDict({"text_encoder": CLIPTextModel(one), "text_encoder_2": CLIPTextModelWithProjection(two)})


def encode_text(nets: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [B L] → states [B L C1+C2], pooled [B C2]."""
    one = nets["text_encoder"](ids, output_hidden_states=True)
    two = nets["text_encoder_2"](ids, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds


@torch.no_grad()
def give_free_tokens_an_embedding(nets: Any, tokenizer: CLIPTokenizer, seed: int) -> None:
    """Tokens that never occurred get a random embedding as strong as a trained word's, so that they are told apart."""
    known = torch.tensor(tokenizer.convert_tokens_to_ids([w + "</w>" for w in ("red", "blue", "robot", "cat", "photo", "snow")]))
    free = torch.tensor(tokenizer.convert_tokens_to_ids([w + "</w>" for w in FREE_TOKENS]))
    random = torch.Generator().manual_seed(seed)
    for encoder in nets.values():
        table = encoder.get_input_embeddings().weight
        rows = torch.randn(len(free), table.shape[1], generator=random)
        table[free] = rows / rows.norm(dim=1, keepdim=True) * table[known].norm(dim=1).mean()

"""Quantisation while reading the files is bit-identical to quantising the whole model, which is never loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_quant import need
from torch import nn
from transformers import T5Config, T5EncoderModel

import tiny
from dreambooth_lab.config import enums
from dreambooth_lab.models import files, meta_init
from dreambooth_lab.models.checkpoint import Checkpoint
from dreambooth_lab.quant import Quantiser, Source
from dreambooth_lab.quant.base import layers_to_quantize

CPU = torch.device("cpu")
KINDS = [
    enums.QuantKind.int8,
    enums.QuantKind.int4,
    enums.QuantKind.fp8_torchao,
    enums.QuantKind.int8_torchao,
    enums.QuantKind.nf4,
]


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(7)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=32,
        pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


def t5() -> T5EncoderModel:
    torch.manual_seed(8)
    return T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2))


MODELS = {
    "unet": (UNet2DConditionModel, lambda: tiny.unet(24, 16, 4)),
    "flux": (FluxTransformer2DModel, flux),
    "t5": (T5EncoderModel, t5),
}


def source(name: str, folder: Path, dtype: torch.dtype, streams: bool) -> Source:
    kind, _ = MODELS[name]
    dtypes = {"dtype" if name == "t5" else "torch_dtype": dtype}

    def read(device: torch.device) -> nn.Module:
        assert not streams, "the whole model is read"
        return files.freeze_to(kind.from_pretrained(folder, use_safetensors=True, **dtypes), device)

    shards = tuple(sorted(folder.glob("*.safetensors")))
    build_on_meta = (lambda: meta_init.build(kind, folder, dtype)) if streams else None
    return Source(read, lambda: files.on_meta(kind, folder), shards, dtype, CPU, None, build_on_meta)


def save(name: str, folder: Path) -> Path:
    MODELS[name][1]().save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def same(one: nn.Module, other: nn.Module, library: enums.QuantKind) -> None:
    from dreambooth_lab.quant import backend

    quantised = set(layers_to_quantize(one, ["time_embedding"])[0])
    assert [name for name, _ in one.named_modules()] == [name for name, _ in other.named_modules()]
    for name, module in one.named_modules():
        twin = other.get_submodule(name)
        assert type(module) is type(twin)
        if name in quantised:
            mine, theirs = backend(library).pack(module), backend(library).pack(twin)
            assert mine[1] == theirs[1] and mine[0].keys() == theirs[0].keys()
            assert all(torch.equal(part, theirs[0][key]) for key, part in mine[0].items())
        for key in ("_parameters", "_buffers"):
            for own, tensor in getattr(module, key).items():
                if tensor is not None and not (name in quantised and own == "weight"):
                    like = getattr(twin, key)[own]
                    assert tensor.dtype is like.dtype and torch.equal(tensor, like), f"{name}.{own}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.value)
@pytest.mark.parametrize("name", MODELS)
def test_streaming_is_bit_identical_to_a_whole_load(name, kind, dtype, tmp_path):
    need(kind)
    folder = save(name, tmp_path)
    streamed, whole = (
        Quantiser({"m": kind}, None).load("m", source(name, folder, dtype, streams), ["time_embedding"])
        for streams in (True, False)
    )
    same(streamed, whole, kind)
    if name == "t5":
        assert streamed.shared.weight is streamed.encoder.embed_tokens.weight, "tied weights stay one tensor"


def test_layer_split_over_shards_is_quantised_once_complete(tmp_path):
    folder = save("flux", tmp_path / "a")
    tensors = {name: part for file in folder.glob("*.safetensors") for name, part in load_file(file).items()}
    shutil.copytree(folder, tmp_path / "b", ignore=shutil.ignore_patterns("*.safetensors*"))
    halves = {i: {k: v for k, v in tensors.items() if k.endswith("bias") is bool(i)} for i in (0, 1)}
    for i, half in halves.items():
        save_file(half, tmp_path / "b" / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors", metadata={"format": "pt"})
    table = {k: f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors" for i, half in halves.items() for k in half}
    index = tmp_path / "b" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    split, whole = (
        Quantiser({"m": enums.QuantKind.int8}, None).load("m", source("flux", at, torch.bfloat16, streams), ["time_embedding"])
        for at, streams in ((tmp_path / "b", True), (folder, False))
    )
    same(split, whole, enums.QuantKind.int8)


@pytest.mark.parametrize("spoil", ["renamed", "lacking", "more"])
def test_files_with_other_names_are_loaded_whole(spoil, tmp_path):
    """transformers and diffusers rename some tensors on load; such files are loaded by the library."""
    folder = save("unet", tmp_path)
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    if spoil != "lacking":
        tensors["other"] = tensors[name].clone()
    if spoil != "more":
        tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="the whole model is read"):
        Quantiser({"m": enums.QuantKind.int8}, None).load("m", source("unet", folder, torch.float32, True), [])


def test_checkpoint_is_streamed(tiny_sdxl, monkeypatch):
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)
    unet = Checkpoint(str(tiny_sdxl), None, None).load(
        "unet", torch.float32, CPU, Quantiser({"unet": enums.QuantKind.int8}, None), []
    )
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in unet.parameters()) and not unet.training

"""Checkpoints in one file: the same model as the folder it was made from, converted once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPTextModel

import tiny
from dreambooth_lab import lab
from dreambooth_lab.batch import ImageInfo, Size
from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.factory import build_family
from dreambooth_lab.models import single_file
from dreambooth_lab.models.checkpoint import Checkpoint
from dreambooth_lab.quant import Quantiser

CPU, PLAIN = torch.device("cpu"), Quantiser({}, None)
LAYERS = 1  # resnets of a block of the UNet
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
TOP = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
       "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
       "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
VAE = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
       "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm", "to_out.0": "proj_out",
       "to_q": "q", "to_k": "k", "to_v": "v", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
       ".resnets.": ".block."}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Stable Diffusion 1.5's layout."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=LAYERS, norm_num_groups=4, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    to = tmp_path_factory.mktemp("sd15")
    StableDiffusionPipeline(
        vae=tiny.vae(4), text_encoder=tiny.text_encoder(CLIPTextModel, 24, 2), tokenizer=tiny.tokenizer(), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(to)  # fmt: skip
    return to


def of_unet(name: str) -> str:
    for ours, theirs in TOP.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, i, inner = rest[0], int(rest[1]), ".".join(rest[2:])
        place = f"middle_block.{2 * i if kind == 'resnets' else 1}"
    else:
        block, kind, i, inner = int(rest[0]), rest[1], int(rest[2]), ".".join(rest[3:])
        down = side == "down_blocks"
        if kind.endswith("samplers"):
            at = (block + 1) * (LAYERS + 1) - (not down)
            return f"input_blocks.{at}.0.op.{rest[-1]}" if down else f"output_blocks.{at}.2.conv.{rest[-1]}"
        at = block * (LAYERS + 1) + i + down
        place = f"{'input' if down else 'output'}_blocks.{at}.{'0' if kind == 'resnets' else '1'}"
    first, _, last = inner.partition(".")
    return f"{place}.{RESNET[first] if kind == 'resnets' else first}.{last}"


def of_vae(name: str) -> str:
    half, _, inner = name.partition(".")
    if inner.startswith("up_blocks."):
        inner = f"up.{3 - int(inner[10])}{inner[11:]}"
    elif inner.startswith("down_blocks."):
        inner = f"down.{inner[12:]}"
    for ours, theirs in VAE.items():
        inner = inner.replace(ours, theirs)
    return f"{half}.{inner}"


def write(folder: Path, to: Path, *flags: str, metadata: dict[str, str] | None = None) -> Path:
    """The folder's weights under the original keys."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    tensors = {f"model.diffusion_model.{of_unet(name)}": tensor for name, tensor in unet.items()}
    tensors |= {f"first_stage_model.{of_vae(name)}": tensor for name, tensor in vae.items()}
    tensors |= {f"cond_stage_model.transformer.text_model.{n.removeprefix('text_model.')}": t for n, t in text.items()}
    save_file(tensors | {flag: torch.tensor([]) for flag in flags}, to, metadata=metadata)
    return to


def of_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder's tensors under OpenCLIP's names: query, key and value in one tensor, the projection transposed."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
        elif name.startswith("embeddings."):
            made[{"token": "token_embedding.weight"}.get(name[11:16], "positional_embedding")] = tensor
        elif name.startswith("final_layer_norm."):
            made[name.replace("final_layer_norm", "ln_final")] = tensor
        else:
            _, _, i, rest = name.split(".", 3)
            inner, _, end = rest.rpartition(".")
            if inner in OPEN_CLIP:
                made[f"transformer.resblocks.{i}.{OPEN_CLIP[inner]}.{end}"] = tensor
            elif inner == "self_attn.q_proj":
                parts = [weights[f"text_model.encoder.layers.{i}.self_attn.{side}_proj.{end}"] for side in "qkv"]
                made[f"transformer.resblocks.{i}.attn.in_proj_{end}"] = torch.cat(parts)
    return made


def write_xl(folder: Path, to: Path, *flags: str) -> Path:
    """An SDXL pipeline in the layout of SDXL checkpoint files."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    clip = load_file(folder / "text_encoder" / "model.safetensors")
    big = of_open_clip(load_file(folder / "text_encoder_2" / "model.safetensors"))
    tensors = {f"model.diffusion_model.{of_unet(name)}": tensor for name, tensor in unet.items()}
    tensors |= {f"first_stage_model.{of_vae(name)}": tensor for name, tensor in vae.items()}
    tensors |= {f"conditioner.embedders.0.transformer.text_model.{n.removeprefix('text_model.')}": t for n, t in clip.items()}
    tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in big.items()}
    save_file(tensors | {flag: torch.tensor([]) for flag in flags}, to)
    return to


@torch.no_grad()
def test_single_sdxl_file_matches_its_folder(tiny_sdxl, tmp_path):
    words = ["dataset=folder", "dataset.path=.", "model.dtype=float32", "trainer.accelerator=cpu", f"cache={tmp_path}/cache"]
    file = write_xl(tiny_sdxl, tmp_path / "x.safetensors")
    families = [
        build_family(lab.compose("model=sdxl", f"model.pretrained={folder}", *words, *more))
        for folder, more in ((tiny_sdxl, []), (file, [f"model.config={tiny_sdxl}"]))
    ]
    pixels, outputs = torch.rand(1, 3, 64, 64) * 2 - 1, []
    for family in families:
        mean, _ = family.encode_image(pixels)
        text = family.encode_text(["a photo of a dog"])
        cond = family.cond(text, [ImageInfo(Size((64, 64), (0, 0), (64, 64)), mean[0], 0, 0, 7.0)])
        outputs.append((mean, *text.values(), family.denoise(mean, torch.tensor([0.5]), cond), family.decode(mean)))
    for one, other in zip(*outputs, strict=True):
        assert_close(one, other, atol=1e-6, rtol=1e-6)  # memory-mapped weights have another alignment, so last bits may differ
    (tmp_path / "plain").touch()
    converted = [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".safetensors"]
    assert converted and {path.stat().st_mode for path in converted} == {(tmp_path / "plain").stat().st_mode}


def test_v_prediction_zero_snr_sdxl_file_keeps_its_schedule(tiny_sdxl, tmp_path):
    file = write_xl(tiny_sdxl, tmp_path / "x.safetensors", "v_pred", "ztsnr")
    family = build_family(
        lab.compose("model=sdxl", f"model.pretrained={file}", f"model.config={tiny_sdxl}", "dataset=folder", "dataset.path=.",
                    "trainer.accelerator=cpu", f"cache={tmp_path}/cache")
    )  # fmt: skip
    alpha, sigma = family.path.scales(torch.tensor([family.path.top]))
    assert family.path.prediction is enums.Prediction.v_prediction
    assert float(alpha.flatten()) < 1e-3 and float(sigma.flatten()) == pytest.approx(1, abs=1e-4)


def converted(file: Path, folder: Path, cache: Path, prediction: enums.Prediction | None = None) -> Checkpoint:
    return Checkpoint(str(file), None, "auto", cache, str(folder), prediction)


@torch.no_grad()
def test_single_file_matches_its_folder(folder, tmp_path):
    one, other = converted(write(folder, tmp_path / "x.safetensors"), folder, tmp_path / "c"), Checkpoint(str(folder), None, None)
    x, states, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24), torch.arange(77)[None]
    calls = {
        "unet": lambda m: m(x, 10, states).sample,
        "vae": lambda m: torch.cat([m.encode(torch.ones(1, 3, 64, 64)).latent_dist.mean.flatten(), m.decode(x).sample.flatten()]),
        "text_encoder": lambda m: m(tokens).last_hidden_state,
    }
    for part, ask in calls.items():
        outputs = [ask(checkpoint.load(part, torch.float32, CPU, PLAIN, [])) for checkpoint in (one, other)]
        assert torch.equal(*outputs), part
    assert one.config("scheduler") == other.config("scheduler")


def test_single_file_is_converted_once(folder, tmp_path, monkeypatch):
    file = write(folder, tmp_path / "x.safetensors")
    first = converted(file, folder, tmp_path / "c").folder
    monkeypatch.setattr(single_file, "_make", None)
    assert converted(file, folder, tmp_path / "c").folder == first
    assert [path.name for path in first.parent.iterdir()] == [first.name], "no partial file is left"


@pytest.mark.parametrize(
    ("flags", "metadata", "key", "wanted"),
    [
        ((), None, None, ("epsilon", None)),
        ((), None, enums.Prediction.v_prediction, ("v_prediction", None)),
        ((), {"modelspec.prediction_type": "v"}, None, ("v_prediction", None)),
        (("v_pred",), None, None, ("v_prediction", None)),
        (("v_pred", "ztsnr"), None, None, ("v_prediction", True)),
    ],
)
def test_prediction_type_is_detected(flags, metadata, key, wanted, folder, tmp_path):
    config = converted(write(folder, tmp_path / "x.safetensors", *flags, metadata=metadata), folder, tmp_path, key).config(
        "scheduler"
    )
    assert config["prediction_type"] == wanted[0] and (config["rescale_betas_zero_snr"] or None) == wanted[1]
    assert config["timestep_spacing"] == ("trailing" if wanted[1] else "leading")


def test_settings_are_read_from_a_hub_id_without_weights(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = write(folder, tmp_path / "x.safetensors")
    by_id, by_folder = (Checkpoint(str(file), None, None, tmp_path / "c", source) for source in ("owner/name", str(folder)))
    assert by_id.folder == by_folder.folder, "the same settings make the same model"
    with pytest.raises(ConfigError, match=r"model\.config is 'owner/other', which is not a folder and could not be downloaded"):
        Checkpoint(str(file), None, None, tmp_path / "c", "owner/other")


def test_invalid_single_files_are_refused(folder, tmp_path):
    file, cache = write(folder, tmp_path / "x.safetensors"), tmp_path / "c"
    for name in ("x.ckpt", "x.pt", "x.bin"):
        with pytest.raises(ConfigError, match=r"pickles can run code and are never read; use the checkpoint's \.safetensors"):
            Checkpoint(name, None, None)
    with pytest.raises(ConfigError, match=r"model\.config is null; set model\.config to the folder or hub id"):
        Checkpoint(str(file), None, None, cache)
    with pytest.raises(ConfigError, match="which does not exist"):
        converted(tmp_path / "y.safetensors", folder, cache)
    with pytest.raises(ConfigError, match=r"whose header has prediction_type 'vv'; set model\.prediction_type"):
        converted(write(folder, tmp_path / "vv.safetensors", metadata={"modelspec.prediction_type": "vv"}), folder, cache)
    with pytest.raises(ConfigError, match=r"model\.config is .*set model\.config=null"):
        Checkpoint(str(folder), None, None, cache, str(folder))
    (tmp_path / "z.safetensors").write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"can't be read"):
        converted(tmp_path / "z.safetensors", folder, cache)


def test_file_of_another_size_is_refused_and_leaves_no_files(folder, tmp_path, tiny_sdxl):
    with pytest.raises(ConfigError, match=r"does not contain a complete StableDiffusionXLPipeline of model\.config's sizes"):
        converted(write(folder, tmp_path / "x.safetensors"), tiny_sdxl, tmp_path / "c")
    assert list((tmp_path / "c" / "single_files").iterdir()) == []


def test_missing_weights_are_not_taken_from_another_model(folder, tmp_path):
    file = write(folder, tmp_path / "x.safetensors")
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("cond_stage_model")}, file)
    with pytest.raises(ConfigError, match="does not contain a complete StableDiffusionPipeline"):
        converted(file, folder, tmp_path / "c")

"""Writes the base folder: a plain `StableDiffusionXLPipeline` in half precision, with evaluator, scorer and card.

A UNet that continues the shipped one (`unet.from_shipped`) is written beside the shipped evaluator, scorer and DINO.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreambooth_lab.tools.pretrain_toybox.card import card
from dreambooth_lab.tools.pretrain_toybox.latents import folded, shipped_vae, trained_vae
from dreambooth_lab.tools.pretrain_toybox.text import give_free_tokens_an_embedding
from dreambooth_lab.tools.pretrain_toybox.unet import UnetStage, pipeline
from dreambooth_lab.toybox.tokenizer import build_tokenizer

LIMIT = 14_000_000  # bytes, everything together


def trained(cfg: Any) -> Any:
    """The averaged weights of the last checkpoint."""
    stage = UnetStage(cfg.unet)
    state = torch.load(Path(cfg.out) / "unet/last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    stage.load_state_dict(state)
    return stage.ema.eval()


def say_float32(folder: Path) -> None:
    """transformers opens weights in the type its config names; the file's halves should open as floats."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part.pop("torch_dtype", None)
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def forget_paths(base: Path) -> None:
    """diffusers writes the folder that a part was loaded from."""
    for path in base.glob("*/config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def add(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.ckpt", "*.jsonl", "*.png"))


def export_judge(source: Path, target: Path) -> None:
    """A network that transformers can open, in half precision, with its preprocessing."""
    from transformers import AutoModel

    add(source, target)
    AutoModel.from_pretrained(source).half().save_pretrained(target)
    say_float32(target)


def run(cfg: Any) -> None:
    base, out = Path(cfg.base), Path(cfg.out)
    nets = trained(cfg)
    give_free_tokens_an_embedding(nn.ModuleDict({k: v for k, v in nets.items() if k != "unet"}), build_tokenizer(), cfg.seed)
    vae = shipped_vae(cfg) if cfg.latents.shipped_vae else folded(trained_vae(cfg))
    text = card(cfg)
    if not cfg.unet.from_shipped:
        shutil.rmtree(base, ignore_errors=True)
    pipeline(nets, vae).to(dtype=torch.float16).save_pretrained(base)
    for name in ("text_encoder", "text_encoder_2"):
        say_float32(base / name)
    forget_paths(base)
    if (out / "evaluator/model.safetensors").exists():
        add(out / "evaluator", base / "evaluator")
    for source, name in (("scorer/clip", "scorer"), ("dino/vit", "dino")):
        if (out / source).exists():
            export_judge(out / source, base / name)
    (base / "README.md").write_text(text, encoding="utf-8")
    files = [p for p in base.rglob("*") if p.is_file()]
    for path in files:
        path.chmod(0o644)
    size = sum(p.stat().st_size for p in files)
    print(f"{base}: {size:,} bytes")
    if size > LIMIT:
        raise RuntimeError(f"the base folder holds {size:,} bytes; at most {LIMIT:,} may ship")

"""The model card, with the numbers that the stages measured."""

import json
from pathlib import Path
from typing import Any

import torch

TEXT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# toybox: a tiny SDXL that knows a drawn world

A `StableDiffusionXLPipeline` small enough to train on a laptop: UNet with SDXL's text, size and crop conditioning,
AutoencoderKL (f = 8, 16 latent channels), two CLIP text encoders, ε-prediction on SDXL's schedule. Trained from nothing
on procedurally drawn scenes: 6 classes (robot, car, house, cat, cup, fish), 8 colours, 6 places, by day and at night,
at 128×128, 96×160 and 160×96. It knows nothing else.

```python
from diffusers import StableDiffusionXLPipeline
from dreambooth_lab.toybox import base_folder

pipe = StableDiffusionXLPipeline.from_pretrained(base_folder())
pipe("a photo of a red robot on the beach", num_inference_steps=20, guidance_scale=4.0).images[0]
```

Beside it: `evaluator/` (`dreambooth_lab.toybox.evaluator.Evaluator`: class, colour, place, identity, individual), `scorer/` (a
`CLIPModel` for CLIP-I and CLIP-T) and `dino/` (a `Dinov2Model` that tells individuals apart, taught by pairs of pictures
rather than by itself). `sks`, `zwx` and ten other tokens never occurred in training; their
embeddings are random and as long as a trained word's. Held-out subjects: `dreambooth_lab.toybox.subjects`.

## Numbers
{numbers}

## Training
`python -m dreambooth_lab.tools.pretrain_toybox stage=all`, two and a half hours on two CPU cores. Only drawn pictures and
generated textures were seen: no photographs, no people.

## Limits
Small details (whiskers, spots, chimneys) are often wrong; positions and counts can't be asked for; words outside the
world mean nothing to it. Real photographs pass the autoencoder blurred.
"""


JUDGED = "judged by the evaluator (`stage=judge`)"


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def minutes(path: Path) -> str:
    """Of each stage, repeats and resumed parts added up, in the order of the file; those under half a minute are left out."""
    spent: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        spent[record["stage"]] = spent.get(record["stage"], 0) + record["wall_s"] / 60
    return ", ".join(f"{stage} {m:.0f}" for stage, m in spent.items() if m >= 0.5)


def card(cfg: Any) -> str:
    return _continued(cfg) if cfg.unet.from_shipped else _whole(cfg)


def _continued(cfg: Any) -> str:
    """The shipped card with the steps of a UNet that was trained further, and what the judge found since."""
    lines = (Path(cfg.base) / "README.md").read_text(encoding="utf-8").splitlines()
    more = f", then {_steps(cfg):,} more of {cfg.unet.batch} at a rate of {cfg.unet.lr:g} (seed {cfg.seed})"
    judged = _judged(cfg)
    for number, line in enumerate(lines):
        if line.startswith("- UNet and text encoders") and more not in line:
            lines[number] += more
        if judged and JUDGED in line:
            lines[number] = judged
    return "\n".join(lines) + "\n"


def _steps(cfg: Any) -> int:
    return int(torch.load(Path(cfg.out) / "unet/last.ckpt", map_location="cpu", weights_only=True)["global_step"])


def _judged(cfg: Any) -> str | None:
    judged = read(Path(cfg.out) / "judge/judge.json")
    if not judged:
        return None
    text = ", ".join(f"{k} {v}" for k, v in judged.items() if k in ("class", "colour", "background"))
    return f"- {judged['prompts']} prompts, {JUDGED}: {text}"


def _whole(cfg: Any) -> str:
    out, lines = Path(cfg.out), []
    psnr = next((p for p in (out / "polish/psnr.txt", out / "vae/psnr.txt") if p.exists()), out / "vae/psnr.txt")
    if psnr.exists():
        lines.append(f"- VAE, held-out scenes: step {psnr.read_text().splitlines()[-1]} (dB)")
    lines.append(f"- UNet and text encoders: {_steps(cfg):,} steps of {cfg.unet.batch} pictures, {cfg.latents.scenes:,} scenes")
    title_of = {
        "evaluator": "Evaluator, accuracy on held-out scenes",
        "scorer": "Scorer, zero-shot over all 288 prompts, accuracy on held-out scenes",
        "dino": "DINO's stand-in, the nearest of 127 pictures shows the same individual",
    }
    for name, text in title_of.items():
        numbers = read(out / name / "accuracies.json")
        if numbers:
            lines.append(f"- {text}: " + ", ".join(f"{k} {v}" for k, v in numbers.items()))
    if judged := _judged(cfg):
        lines.append(judged)
    lines.append(f"- Minutes of the stages on {cfg.threads} threads: {minutes(out / 'times.jsonl')}")
    return TEXT.format(numbers="\n".join(lines))

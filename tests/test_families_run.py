"""Every family through whole runs of two steps: each prior and its sources, each kind of adapter, quantised parts, what text
encoders learn; then its export, loaded into the family's own pipeline. Without `slow`, each family takes some of them in turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
import tiny_families
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.run import run
from dreambooth_lab.runfolder import RunFolder
from dreambooth_lab.trained import TrainedPipeline

CLIPS = ("sd15", "sd21", "sdxl_refiner", "sd3", "sd35", "flux", "flux_schnell")  # whose text encoders can learn
NAMES = list(tiny_families.PIPELINES)
GENERATED = ["prior.source=generated", "prior.generated.count=2", "prior.generated.num_inference_steps=2"]
TEXT = ["adapter.text_encoders=[1]", "adapter.train_token=true"]
QUANT_TEXT = [f"quant.text_encoder_{i}=int8" for i in (1, 2, 3)]
VARIANTS = {
    "bank of generated pictures": ["prior=bank", "prior.bank.draws=2", "rollout.enabled=false", *GENERATED],
    "captions, DoRA": ["prior=teacher", "prior.source=captions", "adapter=dora", "objective.weight=learned"],
    "text encoders": ["prior=teacher", "prior.source=captions", *TEXT],
    "LoKr on int8": ["prior=noise", "prior.source=generated", *GENERATED[1:], "adapter=lokr", "quant=int8", *QUANT_TEXT],
    "LoCon on nf4": ["prior=none", "adapter=locon", "quant=nf4", "quant.text_encoder_1=nf4"],
    "LoHa": ["prior=bank", "prior.bank.draws=2", "rollout.enabled=false", "prior.source=captions", "adapter=loha"],
    "OFT": ["prior=none", "adapter=oft", "objective.weight=learned"],
    "T-LoRA": ["prior=teacher", "prior.source=blank", "adapter.rank_schedule=tlora", "+adapter.options.init=ortho_tail"],
    "full": ["prior=teacher", "prior.source=captions", "adapter=full", "optimizer.lr=1e-3"],
}
IN_TURN = [(name, list(VARIANTS)[i % len(VARIANTS)]) for i, name in enumerate(NAMES)]
CELLS = [
    pytest.param(name, variant, marks=() if (name, variant) in IN_TURN else pytest.mark.slow, id=f"{name}, {variant}")
    for name in NAMES
    for variant in VARIANTS
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    tiny.save_photos(root / "photos", [(80, 80), (60, 120)])
    tiny.save_photos(root / "held", [(80, 80)], seed=5)
    tiny.save_masks(root / "photos", root / "masks")
    return root


def words(name: str, folder: Path, pictures: Path, cache: Path) -> list[str]:
    return [
        f"model={tiny_families.model_of(name)}", f"model.pretrained={folder}", "model.dtype=float32",
        "model.encoder_dtype=float32", "model.tae=null", "model.resolution=64", "dataset=masked",
        f"dataset.path={pictures}/photos", f"dataset.mask_path={pictures}/masks", "dataset.batch_size=2",
        'dataset.instance_prompt="a photo of z dog"', 'dataset.class_prompt="a photo of dog"', "adapter.rank=4",
        "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.progress=false", "optimizer.lr=1e-2", "logger=none",
        "validation.num_images=1", "validation.num_inference_steps=2", "ema.enabled=true", f"cache={cache}",
        "rollout.enabled=true", "rollout.ramp_steps=0", f"eval.path={pictures}/held", "eval.timesteps=2", "eval.every_n_steps=2",
        *(["model.options.first_stage=null"] if name == "deepfloyd_2" else []),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_a_family_trains_and_its_pipeline_reads_the_export(name, variant, folders, pictures, tmp_path):
    cfg = lab.compose(*words(name, folders(name), pictures, tmp_path / "cache"), *VARIANTS[variant])
    cfg.adapter.rank = 1 if variant == "full" else 4
    refusal = refused(name, variant)
    if refusal:
        with pytest.raises(ConfigError, match=refusal):
            run(cfg, tmp_path / "run")
        return
    check(cfg)
    run(cfg, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    numbers = folder.read_metrics()
    assert all(np.isfinite(value) for _, _, value in numbers)
    assert {(0, "eval/loss"), (2, "eval/loss"), (2, "train/loss")} <= {(step, key) for step, key, _ in numbers}
    assert sorted(picture.name for picture in folder.image_folder.glob("step_*.png")) == ["step_0000000.png", "step_0000002.png"]
    assert changes(TrainedPipeline(cfg, folder.export)) > 0, "what was trained changes the answer of the pipeline"


def refused(name: str, variant: str) -> str | None:
    """The reason, where a family can't do a thing."""
    if variant == "text encoders" and name not in CLIPS:
        return r"adapter\.text_encoders has \[1\].* trainable text encoders of this model are \[\]"
    if variant == "T-LoRA" and tiny_families.model_of(name) == "diffusers":
        return r"adapter\.rank_schedule is tlora, but this model's network has a clock not known"
    if "prior.source=generated" in VARIANTS[variant] and name in ("sdxl_refiner", "deepfloyd_2"):
        return r"prior\.source is generated, but this model is image-to-image"
    return None


@torch.no_grad()
def changes(trained: TrainedPipeline) -> float:
    """How far the pipeline's own denoiser moves from strength 0 to 1."""
    denoiser = getattr(trained.pipeline, trained.family.denoiser_part)
    answers = []
    for strength in (0.0, 1.0):
        trained.set_scale(strength)
        answers.append(answer(trained, denoiser))
    return float((answers[1] - answers[0]).abs().max())


def answer(trained: TrainedPipeline, denoiser: torch.nn.Module) -> torch.Tensor:
    """The last hidden state of the denoiser when the pipeline draws one step."""
    seen = []
    keep = lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    hook = denoiser.register_forward_hook(keep)
    image = Image.new("RGB", (64, 64), "red") if trained.family.needs_image else None
    trained.draw("a photo of z dog", "", 64, 5, 1.0, 0, image)
    hook.remove()
    last = seen[-1]
    return last[0].float() if isinstance(last, list) else last.float()

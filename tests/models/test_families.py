"""What every family must do, tried on tiny models of its real diffusers and transformers classes. The oracle is the family's own
diffusers pipeline, loaded and called as a user does."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import tiny_families
from dreambooth_lab import lab
from dreambooth_lab.adapter import Learned, LoRA
from dreambooth_lab.adapter.base import match
from dreambooth_lab.batch import Shown, Size, Text
from dreambooth_lab.config import ConfigError
from dreambooth_lab.models.ask import Asked
from dreambooth_lab.models.pipeline_family import PipelineFamily
from dreambooth_lab.run import build_family

CONF = {"sd35": "sd35_large"}  # name of the tiny pipeline → of the configuration, where they differ
NAMED = [name for name in tiny_families.PIPELINES if name not in ("pixart", "sana", "lumina2")]
FROM_PROMPTS = [name for name in tiny_families.PIPELINES if name not in ("sdxl_refiner", "deepfloyd_2")]
CAPTION = "a photo of sks dog"
GUIDED = {"flux": {"guidance_scale": 1.0}, "qwen_image": {}, "z_image": {"guidance_scale": 0.0}}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Each family's checkpoint, made when first asked for."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(name):
        if name not in made:
            made[name] = tiny_families.save(name, root / name)
        return made[name]

    return folder


composed = cache(lab.compose)


def load(folders, name, *words, model=None):
    model = model or (CONF.get(name, name) if name in NAMED else "diffusers")
    first = ["model.options.first_stage=null"] if name == "deepfloyd_2" else []
    return build_family(
        composed(
            f"model={model}", f"model.pretrained={folders(name)}", "model.dtype=float32", "model.encoder_dtype=float32",
            "model.tae=null", "dataset=folder", "dataset.path=.", "trainer.accelerator=cpu", *first, *words,
        )
    )  # fmt: skip


def cells(family):
    """Height and width of a small latent that is not square."""
    unit = family.stride // family.factor
    return (4 if unit < 8 else 1) * unit, (6 if unit < 8 else 2) * unit


def told(family, captions, seed=0):
    """Rows to ask about: x [B C h w], t [B], and what the family is told of them."""
    height, width = cells(family)
    x = torch.randn(len(captions), family.channels, height, width, generator=torch.Generator().manual_seed(seed))
    size = Size((100, 80), (3, 5), (height * family.factor, width * family.factor))
    shown = [Shown(size, latents, 0, i, 7.0) for i, latents in enumerate(x)]
    t = torch.linspace(*family.times, len(captions) + 2)[1:-1]
    return x, t, family.cond(family.encode_text(captions), shown)


def first_step(pipeline, **call):
    """(answer, native time, sample) that a pipeline's call hands to its scheduler first, in its own layout."""
    seen = []
    step = type(pipeline.scheduler).step

    def watch(self, answer, t, sample, *args, **options):
        seen.append((answer.detach().clone(), t, sample.detach().clone()))
        return step(self, answer, t, sample, *args, **options)

    type(pipeline.scheduler).step = watch
    try:
        pipeline.set_progress_bar_config(disable=True)
        pipeline(prompt=CAPTION, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **call)
    finally:
        type(pipeline.scheduler).step = step
    return seen[0]


def unpacked(pipeline, latents, family, height, width):
    """By the pipeline's own function, or as FLUX.2 lays tokens out."""
    if latents.ndim == 4:
        return latents[:, : family.channels]
    if not hasattr(pipeline, "_unpack_latents"):
        return latents.permute(0, 2, 1).unflatten(2, (height, width))
    made = pipeline._unpack_latents(latents, height * family.factor, width * family.factor, family.factor)
    return made[:, :, 0] if made.ndim == 5 else made


@pytest.mark.parametrize("name", FROM_PROMPTS)
def test_the_answer_is_the_pipelines_own_at_its_first_step(name, folders):
    family = load(folders, name)
    pipeline, (height, width) = family.pipeline(), cells(family)
    size = {"height": height * family.factor, "width": width * family.factor}
    binning = {"use_resolution_binning": False} if name in ("sana", "pixart") else {}
    answer, native, sample = first_step(pipeline, **size, **binning, **GUIDED.get(name, {"guidance_scale": 1.0}))
    x = unpacked(pipeline, sample, family, height, width)
    cond = family.cond(family.encode_text([CAPTION]), [Shown(Size((64, 64), (0, 0), (64, 64)), x[0], 0, 0, 7.0)])
    t = family.path.time(native[None]) if hasattr(family.path, "time") else native[None] / 1000
    assert_close(family.denoise(x, t, cond), unpacked(pipeline, answer, family, height, width).float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [n for n in NAMED if n in FROM_PROMPTS])
def test_a_direct_denoise_equals_the_pipelines_call_to_the_bit(name, folders):
    family = load(folders, name)
    x, t, cond = told(family, [CAPTION, "a dog"])
    assert torch.equal(family.denoise(x, t, cond), PipelineFamily.denoise(family, x, t, cond))


def test_the_refiner_answers_as_its_pipeline(folders):
    family = load(folders, "sdxl_refiner")
    x, t, cond = told(family, [CAPTION, "a dog"])
    height, width = (side * family.factor for side in x.shape[2:])
    call = {"strength": 1.0, "original_size": (100, 80), "crops_coords_top_left": (3, 5)}
    call |= {"aesthetic_score": 7.0, "guidance_scale": 0.0, "num_inference_steps": 1, "output_type": "latent"}
    pipeline = family.pipeline()
    asked = Asked(pipeline)
    asked.layouts[tuple(x.shape[1:])] = None  # UNets' samples are not packed
    texts = {name: tensor for name, tensor in cond.items() if name.endswith("embeds")}
    for i in range(2):  # this pipeline takes one time a call
        row = {name: tensor[i : i + 1] for name, tensor in texts.items()} | {"image": torch.zeros_like(x[:1])}
        theirs = asked.answer(x[i : i + 1], family.native(t[i : i + 1]), height=height, width=width, **call, **row)
        assert_close(family.denoise(x, t, cond)[i : i + 1], theirs, atol=1e-5, rtol=1e-5)
    assert cond["size"].tolist() == [[100, 80, 3, 5, 7]] * 2 and family.times == (0.0, 0.2)


def test_stage_two_answers_as_its_pipeline(folders):
    family = load(folders, "deepfloyd_2")
    x, t, cond = told(family, [CAPTION])
    small, level = torch.rand(1, 3, *(side // 4 for side in x.shape[2:])) * 2 - 1, torch.tensor([250])
    cond["small"], cond["level"] = family.noised(small, x, level), level  # the pipeline draws both noises from one stand-in
    pipeline = family.pipeline()
    call = {
        "prompt_embeds": cond["prompt_embeds"],
        "image": small,
        "noise_level": 250,
        "guidance_scale": 0.0,
        "output_type": "latent",
    }
    asked = Asked(pipeline)
    asked.layouts[tuple(x.shape[1:])] = None
    theirs = asked.answer(x, family.native(t), height=x.shape[2], width=x.shape[3], num_inference_steps=1, **call)
    assert_close(family.denoise(x, t, cond), theirs, atol=1e-5, rtol=1e-5)


def test_stage_two_is_told_the_picture_small_noised_and_how_far(folders):
    family = load(folders, "deepfloyd_2")
    text = family.encode_text([CAPTION] * 40)
    shown = [Shown(Size((64, 64), (0, 0), (64, 64)), torch.full((3, 64, 64), 0.5), 0, i, 7.0) for i in range(40)]
    cond = family.cond(text, shown)
    alpha, sigma = family.noising.scales(family.noising.time(cond["level"]))
    noise = (cond["small"] - alpha * 0.5) / sigma
    assert cond["level"].unique().numel() > 30 and cond["level"].max() < 1000
    assert abs(noise.std() - 1) < 0.05 and torch.equal(cond["small"], family.cond(text, shown)["small"])


@pytest.mark.parametrize("name", FROM_PROMPTS)
def test_text_is_what_the_pipeline_encodes(name, folders):
    family = load(folders, name)
    pipeline = family.pipeline()
    text = family.encode_text([CAPTION])
    said = {
        "prompt": CAPTION,
        "prompt_2": None,
        "prompt_3": None,
        "device": "cpu",
        "num_images_per_prompt": 1,
        "clean_caption": False,
    }
    said |= {"do_classifier_free_guidance": False}
    called = inspect.signature(type(pipeline).__call__).parameters  # for what the call itself says to encode_prompt
    said |= {n: called[n].default for n in ("complex_human_instruction", "max_sequence_length") if n in called}
    known = inspect.signature(pipeline.encode_prompt).parameters
    theirs = pipeline.encode_prompt(**{n: value for n, value in said.items() if n in known})[0]
    assert_close(text["prompt_embeds"], (theirs[0][None] if isinstance(theirs, list) else theirs).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FROM_PROMPTS)
def test_captions_of_any_length_share_a_batch(name, folders):
    family = load(folders, name)
    captions = [CAPTION, "a dog", "", "a photo of a red robot on the beach in space"]
    text = Text.stack([family.encode_text([caption]) for caption in captions])
    x, t, _ = told(family, captions)
    shown = [Shown(Size((64, 64), (0, 0), (64, 64)), latents, 0, 0, 7.0) for latents in x]
    together = family.denoise(x, t, family.cond(text, shown))
    alone = [
        family.denoise(x[i : i + 1], t[i : i + 1], family.cond(family.encode_text([c]), [shown[i]]))
        for i, c in enumerate(captions)
    ]
    assert_close(together, torch.cat(alone), atol=2e-5, rtol=2e-5)
    swapped = family.denoise(x, t, family.cond(text.take(torch.tensor([1, 0, 2, 3])), shown))
    assert not torch.allclose(swapped[:2], together[:2], atol=1e-6), "who says what must matter"
    assert_close(swapped[2:], together[2:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", tiny_families.PIPELINES)
def test_latents_come_back_as_pictures_of_their_size(name, folders):
    family = load(folders, name)
    pixels = torch.rand(1, 3, 2 * family.stride, 3 * family.stride, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_image(pixels)
    assert mean.shape == std.shape == (1, family.channels, pixels.shape[2] // family.factor, pixels.shape[3] // family.factor)
    assert (std >= 0).all() and family.decode(mean).shape == pixels.shape


@pytest.mark.parametrize("name", tiny_families.PIPELINES)
def test_gradients_reach_what_learns_and_nothing_else(name, folders):
    family = load(folders, name)
    layers = match(family.denoiser, [ending for group in family.learns.values() for ending in group])
    adapter = LoRA(rank=2, alpha=2, dropout=0.0, parts=list(family.learns), targets=[])
    assert adapter.attach(family.denoiser, family.learns, 0) == layers
    for parameter in family.denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    x, t, cond = told(family, [CAPTION, "a dog"])
    family.denoise(x, t, cond).square().mean().backward()
    reached = {
        n.partition(".lora_")[0] for n, p in family.denoiser.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    last = {layer for layer in layers if layer not in reached}
    # The text stream of the last two-stream block feeds nothing.
    assert all("ff_context" in layer or "to_add_out" in layer or "add_q_proj" in layer or "txt_mlp" in layer for layer in last), (
        last
    )
    assert all(p.grad is None for p in family.denoiser.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", NAMED)
def test_bfloat16_answers_in_float32_close_by(name, folders):
    family, low = load(folders, name), load(folders, name, "model.dtype=bfloat16")
    x, t, cond = told(family, [CAPTION, "a dog"])
    exact, answer = family.denoise(x, t, cond), low.denoise(x, t, cond)
    assert answer.dtype is torch.float32 and next(low.denoiser.parameters()).dtype is torch.bfloat16
    assert (answer - exact).norm() < (0.3 if name == "chroma" else 0.06) * exact.norm()  # its modulation amplifies rounding


@pytest.mark.parametrize("name", NAMED)
def test_two_loads_agree_to_the_bit(name, folders):
    answers = []
    for _ in range(2):
        family = load(folders, name)
        x, t, cond = told(family, [CAPTION, ""])
        answers.append(family.denoise(x, t, cond))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", tiny_families.PIPELINES)
def test_pictures_have_the_size_that_was_asked_for(name, folders):
    family = load(folders, name)
    height, width = (side * family.factor for side in cells(family))
    text, seen = family.encode_text([CAPTION]), []
    photos = [Image.new("RGB", (50, 70), "red")] if family.refines else []
    (picture,) = family.generate(
        text, family.encode_text([""]), height=height, width=width, guidance_scale=3.0, num_inference_steps=10, photos=photos,
        generator=[torch.Generator().manual_seed(0)], on_step=lambda step, latents: seen.append((step, tuple(latents.shape))),
    )  # fmt: skip
    assert picture.size == (width, height)
    assert [step for step, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) >= 2
    assert {shape for _, shape in seen} == {(1, family.channels, *cells(family))}


def test_pictures_are_the_pipelines(folders):
    for name in ("sd15", "sd3", "flux", "qwen_image"):
        family = load(folders, name)
        pipeline, size = family.pipeline(), {"height": 64, "width": 96, "num_inference_steps": 3}
        pipeline.set_progress_bar_config(disable=True)
        ours = family.generate(
            family.encode_text([CAPTION]),
            family.encode_text([""]),
            **size,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(1)],
        )[0]
        against = {"negative_prompt": ""} if name == "qwen_image" else {}
        theirs = pipeline(
            prompt=CAPTION, **size, **family.guidance(3.0), **against, generator=torch.Generator().manual_seed(1)
        ).images[0]
        apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
        assert apart.max() <= 2, name  # weights mapped from a file may start at any byte, so last bits differ


FRESH = """
import json, sys, diffusers
from dreambooth_lab.models import files
files.quiet()
found = {}
for name, folder, export, part in json.loads(sys.argv[1]):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(export)
    layers = [m for m in getattr(pipeline, part).modules() if hasattr(m, "lora_A")]
    found[name] = len(layers), float(sum(m.get_delta_weight("default_0").double().norm() ** 2 for m in layers))
print("FOUND" + json.dumps(found))
"""


def test_exports_load_in_their_familys_pipelines_in_a_fresh_process(folders, tmp_path):
    wanted, asked = {}, []
    for name in (n for n in NAMED if n not in ("flux_schnell", "sd21", "sd35")):
        family = load(folders, name)
        adapter = LoRA(rank=2, alpha=4, dropout=0.0, parts=list(family.learns), targets=[])
        layers = adapter.attach(family.denoiser, family.learns, 0)
        learned = {n: torch.nn.init.normal_(p, std=0.1) for n, p in family.denoiser.named_parameters() if p.requires_grad}
        adapter.export(tmp_path / name, Learned(family.denoiser_part, learned, {}, {}, family.kohya))
        tuned = [m for m in family.denoiser.modules() if hasattr(m, "lora_A")]
        wanted[name] = [len(layers), float(sum(m.get_delta_weight("default").double().norm() ** 2 for m in tuned))]
        asked.append([name, str(folders(name)), str(tmp_path / name), family.denoiser_part])
    said = subprocess.run([sys.executable, "-c", FRESH, json.dumps(asked)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-2000:]
    found = json.loads(said.stdout.partition("FOUND")[2])
    assert {name: pytest.approx(value, rel=1e-5) for name, value in wanted.items()} == found


def test_another_familys_checkpoint_is_refused(folders):
    with pytest.raises(ConfigError, match="is a FluxPipeline; this model needs a StableDiffusion3Pipeline"):
        load(folders, "flux", model="sd3")
    with pytest.raises(ConfigError, match="changes given pictures"):
        load(folders, "sdxl_refiner", model="diffusers")


def test_time_shifts_are_the_models_own_for_a_size(folders):
    assert load(folders, "sd3").shift(8, 8) == load(folders, "sd3").shift(128, 128) == 3.0
    flux = load(folders, "flux")
    assert flux.shift(128, 128) == pytest.approx(torch.tensor(1.15).exp().item())
    assert 1 < flux.shift(16, 16) < flux.shift(64, 64) < flux.shift(128, 128)
    assert load(folders, "flux_schnell").shift(64, 64) == 1.0


@pytest.mark.parametrize("name", ["flux", "flux2_klein", "z_image", "qwen_image", "sana", "sd15"])
def test_asking_a_pipeline_draws_nothing(name, folders):
    """A step's adapter dropout is torch's own generator's: a resumed run asks for the first time in another step."""
    family = load(folders, name)
    x, t, cond = told(family, [CAPTION])
    family.__dict__.pop("asked"), family.shifts.clear()
    assert family.denoiser is not None
    before = torch.random.get_rng_state()
    family.shift(*x.shape[2:])
    family.denoise(x, t, cond)
    assert torch.equal(torch.random.get_rng_state(), before)

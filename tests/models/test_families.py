"""The contract of all families, tested on tiny models of their real diffusers and transformers classes. The reference is the
family's own diffusers pipeline, loaded and called as users do."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from omegaconf import OmegaConf
from PIL import Image
from torch.testing import assert_close

import tiny
import tiny_families
from dreambooth_lab import lab
from dreambooth_lab.adapter import ExportWeights, Form, Full, LoRA
from dreambooth_lab.adapter.base import matching_layers
from dreambooth_lab.adapter.timed_rank import RankClock
from dreambooth_lab.batch import ImageInfo, Size, Text
from dreambooth_lab.config import ConfigError, conf_dir, enums
from dreambooth_lab.factory import build_family
from dreambooth_lab.models.pipeline_calls import PipelineCalls
from dreambooth_lab.models.pipeline_family import PipelineFamily

NAMED = [name for name in tiny_families.PIPELINES if tiny_families.model_of(name) != "diffusers"]
FROM_PROMPTS = [name for name in tiny_families.PIPELINES if name not in ("sdxl_refiner", "deepfloyd_2")]
TWINS = ("sd21", "sd35", "flux_schnell", "pixart")  # of the same class as another, or of one that is called in the same way


def quick(names):
    """Marks the cases of TWINS as slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in TWINS else name for name in names]


CAPTION = "a photo of sks dog"
FORM = Form("lora", torch.float32, (enums.Format.diffusers, enums.Format.comfyui))
GUIDED = {"flux": {"guidance_scale": 1.0}, "qwen_image": {}, "z_image": {"guidance_scale": 0.0}}


composed = cache(lab.compose)


def load(folders, name, *words, model=None):
    model = model or tiny_families.model_of(name)
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


def inputs(family, captions, seed=0):
    """Inputs of a denoiser: x [B C h w], t [B], and the conditioning."""
    height, width = cells(family)
    x = torch.randn(len(captions), family.channels, height, width, generator=torch.Generator().manual_seed(seed))
    size = Size((100, 80), (3, 5), (height * family.factor, width * family.factor))
    shown = [ImageInfo(size, latents, 0, i, 7.0) for i, latents in enumerate(x)]
    t = torch.linspace(*family.times, len(captions) + 2)[1:-1]
    return x, t, family.cond(family.encode_text(captions), shown)


def first_step(pipeline, **call):
    """(prediction, native timestep, sample) of a pipeline's first scheduler step, in its own layout."""
    seen = []
    step = type(pipeline.scheduler).step

    def watch(self, prediction, t, sample, *args, **options):
        seen.append((prediction.detach().clone(), t, sample.detach().clone()))
        return step(self, prediction, t, sample, *args, **options)

    type(pipeline.scheduler).step = watch
    try:
        pipeline.set_progress_bar_config(disable=True)
        pipeline(prompt=CAPTION, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **call)
    finally:
        type(pipeline.scheduler).step = step
    return seen[0]


def unpacked(pipeline, latents, family, height, width):
    """Unpack tokens by the pipeline's own function, or in FLUX.2's order."""
    if latents.ndim == 4:
        return latents[:, : family.channels]
    if not hasattr(pipeline, "_unpack_latents"):
        return latents.permute(0, 2, 1).unflatten(2, (height, width))
    made = pipeline._unpack_latents(latents, height * family.factor, width * family.factor, family.factor)
    return made[:, :, 0] if made.ndim == 5 else made


@pytest.mark.parametrize("name", FROM_PROMPTS)
def test_prediction_matches_the_pipelines_first_step(name, folders):
    family = load(folders, name)
    pipeline, (height, width) = family.pipeline(), cells(family)
    size = {"height": height * family.factor, "width": width * family.factor}
    binning = {"use_resolution_binning": False} if name in ("sana", "pixart") else {}
    prediction, native, sample = first_step(pipeline, **size, **binning, **GUIDED.get(name, {"guidance_scale": 1.0}))
    x = unpacked(pipeline, sample, family, height, width)
    cond = family.cond(family.encode_text([CAPTION]), [ImageInfo(Size((64, 64), (0, 0), (64, 64)), x[0], 0, 0, 7.0)])
    t = family.path.time(native[None]) if hasattr(family.path, "time") else native[None] / 1000
    assert_close(family.denoise(x, t, cond), unpacked(pipeline, prediction, family, height, width).float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", NAMED)
def test_native_timestep_round_trips(name, folders):
    family = load(folders, name)
    seen = []
    RankClock(None, lambda timestep: seen.append(family.time_of(timestep)) or timestep).watch(family.denoiser)
    x, t, cond = inputs(family, [CAPTION, "a dog"])
    family.denoise(x, t, cond)
    assert_close(seen[0].double(), t.double(), atol=1.01 / family.path.num_steps, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMED if n in FROM_PROMPTS])
def test_direct_denoise_is_bit_identical_to_the_pipelines_call(name, folders):
    family = load(folders, name)
    x, t, cond = inputs(family, [CAPTION, "a dog"])
    assert torch.equal(family.denoise(x, t, cond), PipelineFamily.denoise(family, x, t, cond))


def test_refiner_prediction_matches_its_pipeline(folders):
    family = load(folders, "sdxl_refiner")
    x, t, cond = inputs(family, [CAPTION, "a dog"])
    height, width = (side * family.factor for side in x.shape[2:])
    call = {"strength": 1.0, "original_size": (100, 80), "crops_coords_top_left": (3, 5)}
    call |= {"aesthetic_score": 7.0, "guidance_scale": 0.0, "num_inference_steps": 1, "output_type": "latent"}
    pipeline = family.pipeline()
    calls = PipelineCalls(pipeline)
    calls.layouts[tuple(x.shape[1:])] = None  # UNets' samples are not packed
    texts = {name: tensor for name, tensor in cond.items() if name.endswith("embeds")}
    for i in range(2):  # this pipeline takes one timestep per call
        row = {name: tensor[i : i + 1] for name, tensor in texts.items()} | {"image": torch.zeros_like(x[:1])}
        theirs = calls.denoise(x[i : i + 1], family.native(t[i : i + 1]), height=height, width=width, **call, **row)
        assert_close(family.denoise(x, t, cond)[i : i + 1], theirs, atol=1e-5, rtol=1e-5)
    assert cond["size"].tolist() == [[100, 80, 3, 5, 7]] * 2 and family.times == (0.0, 0.2)


def test_stage_two_prediction_matches_its_pipeline(folders):
    family = load(folders, "deepfloyd_2")
    x, t, cond = inputs(family, [CAPTION])
    small, level = torch.rand(1, 3, *(side // 4 for side in x.shape[2:])) * 2 - 1, torch.tensor([250])
    cond["small"], cond["level"] = family.noised(small, x, level), level  # the pipeline draws both noises from the same fake
    pipeline = family.pipeline()
    call = {
        "prompt_embeds": cond["prompt_embeds"],
        "image": small,
        "noise_level": 250,
        "guidance_scale": 0.0,
        "output_type": "latent",
    }
    calls = PipelineCalls(pipeline)
    calls.layouts[tuple(x.shape[1:])] = None
    theirs = calls.denoise(x, family.native(t), height=x.shape[2], width=x.shape[3], num_inference_steps=1, **call)
    assert_close(family.denoise(x, t, cond), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_stage_two_upscales_the_stage_one_image(folders):
    """Validation from prompts by both stages equals stage II from stage I's image."""
    both = load(folders, "deepfloyd_2", f"model.options.first_stage={folders('deepfloyd_1')}")
    one, two = load(folders, "deepfloyd_1"), load(folders, "deepfloyd_2")
    assert not both.needs_image and two.needs_image
    calls = {"guidance_scale": 2.0, "num_inference_steps": 2}
    noise = lambda: {"generator": [torch.Generator().manual_seed(3)]}  # noqa: E731
    texts = both.encode_text([CAPTION]), both.encode_text([""])
    small = one.generate(*texts, height=32, width=64, **calls, **noise())
    shared = noise()  # stage II continues stage I's generator
    two_steps = both.generate(*texts, height=128, width=256, **calls, **shared)
    after = noise()
    one.generate(*texts, height=32, width=64, **calls, **after)
    alone = two.generate(*texts, height=128, width=256, photos=small, **calls, **after)
    assert two_steps[0].size == (256, 128)
    assert np.array_equal(*(np.asarray(image) for (image,) in (two_steps, alone)))


def test_stage_two_is_conditioned_on_the_noised_low_resolution_image_and_its_level(folders):
    family = load(folders, "deepfloyd_2")
    text = family.encode_text([CAPTION] * 40)
    shown = [ImageInfo(Size((64, 64), (0, 0), (64, 64)), torch.full((3, 64, 64), 0.5), 0, i, 7.0) for i in range(40)]
    cond = family.cond(text, shown)
    alpha, sigma = family.noising.scales(family.noising.time(cond["level"]))
    noise = (cond["small"] - alpha * 0.5) / sigma
    assert cond["level"].unique().numel() > 30 and cond["level"].max() < 1000
    assert abs(noise.std() - 1) < 0.05 and torch.equal(cond["small"], family.cond(text, shown)["small"])


@pytest.mark.parametrize("name", quick(FROM_PROMPTS))
def test_text_matches_the_pipelines_encoding(name, folders):
    family = load(folders, name)
    pipeline = family.pipeline()
    text = family.encode_text([CAPTION])
    options = {
        "prompt": CAPTION,
        "prompt_2": None,
        "prompt_3": None,
        "device": "cpu",
        "num_images_per_prompt": 1,
        "clean_caption": False,
    }
    options |= {"do_classifier_free_guidance": False}
    called = inspect.signature(type(pipeline).__call__).parameters  # for the arguments that the call passes to encode_prompt
    options |= {n: called[n].default for n in ("complex_human_instruction", "max_sequence_length") if n in called}
    known = inspect.signature(pipeline.encode_prompt).parameters
    theirs = pipeline.encode_prompt(**{n: value for n, value in options.items() if n in known})[0]
    assert_close(text["prompt_embeds"], (theirs[0][None] if isinstance(theirs, list) else theirs).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", quick(FROM_PROMPTS))
def test_captions_of_different_lengths_share_a_batch(name, folders):
    family = load(folders, name)
    captions = [CAPTION, "a dog", "", "a photo of a red robot on the beach in space"]
    text = Text.stack([family.encode_text([caption]) for caption in captions])
    x, t, _ = inputs(family, captions)
    shown = [ImageInfo(Size((64, 64), (0, 0), (64, 64)), latents, 0, 0, 7.0) for latents in x]
    together = family.denoise(x, t, family.cond(text, shown))
    alone = [
        family.denoise(x[i : i + 1], t[i : i + 1], family.cond(family.encode_text([c]), [shown[i]]))
        for i, c in enumerate(captions)
    ]
    assert_close(together, torch.cat(alone), atol=2e-5, rtol=2e-5)
    swapped = family.denoise(x, t, family.cond(text.select(torch.tensor([1, 0, 2, 3])), shown))
    assert not torch.allclose(swapped[:2], together[:2], atol=1e-6), "roles must change the encoding"
    assert_close(swapped[2:], together[2:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", quick(tiny_families.PIPELINES))
def test_decoded_latents_have_the_image_size(name, folders):
    family = load(folders, name)
    pixels = torch.rand(1, 3, 2 * family.stride, 3 * family.stride, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_image(pixels)
    assert mean.shape == std.shape == (1, family.channels, pixels.shape[2] // family.factor, pixels.shape[3] // family.factor)
    assert (std >= 0).all() and family.decode(mean).shape == pixels.shape


@pytest.mark.parametrize("name", quick(tiny_families.PIPELINES))
def test_gradients_reach_only_trained_parameters(name, folders):
    family = load(folders, name)
    layers = matching_layers(family.denoiser, [ending for group in family.target_modules.values() for ending in group])
    adapter = LoRA(rank=2, alpha=2, dropout=0.0, parts=list(family.target_modules), targets=[])
    assert adapter.attach(family.denoiser, family.target_modules, 0) == layers
    for parameter in family.denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    x, t, cond = inputs(family, [CAPTION, "a dog"])
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


@pytest.mark.parametrize("name", quick(NAMED))
def test_bfloat16_prediction_is_close_to_float32(name, folders):
    family, low = load(folders, name), load(folders, name, "model.dtype=bfloat16")
    x, t, cond = inputs(family, [CAPTION, "a dog"])
    exact, prediction = family.denoise(x, t, cond), low.denoise(x, t, cond)
    assert prediction.dtype is torch.float32 and next(low.denoiser.parameters()).dtype is torch.bfloat16
    assert (prediction - exact).norm() < (0.3 if name == "chroma" else 0.06) * exact.norm()  # its modulation amplifies rounding


@pytest.mark.parametrize("name", quick(NAMED))
def test_repeated_loads_are_bit_identical(name, folders):
    predictions = []
    for _ in range(2):
        family = load(folders, name)
        x, t, cond = inputs(family, [CAPTION, ""])
        predictions.append(family.denoise(x, t, cond))
    assert torch.equal(*predictions)


@pytest.mark.parametrize("name", quick(tiny_families.PIPELINES))
def test_generated_images_have_the_requested_size(name, folders):
    family = load(folders, name)
    height, width = (side * family.factor for side in cells(family))
    text, seen = family.encode_text([CAPTION]), []
    photos = [Image.new("RGB", (50, 70), "red")] if family.needs_image else []
    (image,) = family.generate(
        text, family.encode_text([""]), height=height, width=width, guidance_scale=3.0, num_inference_steps=10, photos=photos,
        generator=[torch.Generator().manual_seed(0)], on_step=lambda step, latents: seen.append((step, tuple(latents.shape))),
    )  # fmt: skip
    assert image.size == (width, height)
    assert [step for step, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) >= 2
    assert {shape for _, shape in seen} == {(1, family.channels, *cells(family))}


def test_generated_images_match_the_pipelines(folders):
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
import json, sys, diffusers, torch
from PIL import Image
from dreambooth_lab.models import files
files.silence_loading()
for name, folder, export, part, call in json.loads(sys.argv[1]):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(export)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    keep = lambda module, args, kwargs, output: calls.append((args, kwargs, output[0]))
    getattr(pipeline, part).register_forward_hook(keep, with_kwargs=True)
    image = {"image": Image.new("RGB", (64, 64), "red")} if call.pop("begin") else {}
    pipeline(prompt="a photo of sks dog", num_inference_steps=5, generator=torch.manual_seed(0), **call, **image)
    torch.save(calls[0], export + "/call.pt")
"""


def test_export_predicts_the_same_in_a_fresh_process(folders, tmp_path):
    trained, calls = {}, []
    for name in (n for n in NAMED if n not in ("flux_schnell", "sd21", "sd35")):
        family = trained[name] = load(folders, name)
        adapter = LoRA(rank=2, alpha=4, dropout=0.0, parts=list(family.target_modules), targets=[])
        adapter.attach(family.denoiser, family.target_modules, 0)
        learned = {n: torch.nn.init.normal_(p, std=0.1) for n, p in family.denoiser.named_parameters() if p.requires_grad}
        adapter.export(tmp_path / name, ExportWeights(family.denoiser_part, learned, {}, {}, family.kohya, FORM))
        begin = name in ("sdxl_refiner", "deepfloyd_2")
        call = {"begin": begin, **family.guidance(1.0), **({} if begin else family.size_arguments(64, 64))}
        calls.append([name, str(folders(name)), str(tmp_path / name), family.denoiser_part, call])
    process = subprocess.run([sys.executable, "-c", FRESH, json.dumps(calls)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    for name, family in trained.items():
        args, kwargs, theirs = torch.load(tmp_path / name / "call.pt", weights_only=True)
        with torch.no_grad():
            ours = family.denoiser(*args, **kwargs)[0]
            for module in family.denoiser.modules():
                if hasattr(module, "lora_A"):
                    module.enable_adapters(False)
            base = family.denoiser(*args, **kwargs)[0]
        ours, theirs, base = (torch.stack(list(x)) for x in (ours, theirs, base))  # Z-Image returns a list
        assert_close(ours, theirs, atol=2e-5, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert (ours - base).abs().max() > 1e-3, name


@torch.no_grad()
@pytest.mark.parametrize("name", quick(NAMED))
def test_full_weights_load_to_the_same_prediction(name, folders, tmp_path):
    family, again = load(folders, name), load(folders, name)
    adapter = Full(rank=1, alpha=1, dropout=0.0, parts=[], targets=[])
    adapter.attach(family.denoiser, family.target_modules, 0)
    learned = {n: torch.nn.Parameter(p + 0.02 * torch.randn_like(p)) for n, p in family.denoiser.named_parameters()}
    x, t, cond = inputs(family, [CAPTION, "a dog"])
    base = family.denoise(x, t, cond)
    adapter.export(tmp_path, ExportWeights(family.denoiser_part, learned, {}, {}, family.kohya, FORM))
    assert torch.equal(family.denoise(x, t, cond), base), "an export does not change the model"
    again.denoiser.load_state_dict(type(again.denoiser).from_pretrained(tmp_path / family.denoiser_part).state_dict())
    for own, tensor in learned.items():
        family.denoiser.get_parameter(own).data.copy_(tensor)
    trained = family.denoise(x, t, cond)
    assert torch.equal(again.denoise(x, t, cond), trained) and not torch.equal(trained, base)


TINY_DECODERS = [n for n in NAMED if OmegaConf.load(conf_dir() / "model" / f"{tiny_families.model_of(n)}.yaml").get("tae")]


@pytest.mark.parametrize("name", quick(TINY_DECODERS))
def test_previews_use_the_tiny_autoencoder(name, folders, tmp_path):
    family = load(folders, name)
    tiny.tae(family.channels).save_pretrained(tmp_path / "tae")
    family = load(folders, name, f"model.tae={tmp_path}/tae")
    latents = torch.randn(1, family.channels, *cells(family))
    images = family.preview(latents)
    assert images.shape == (1, 3, *(side * family.factor for side in cells(family))) and "vae" not in family.__dict__
    assert_close(images, AutoencoderTiny.from_pretrained(tmp_path / "tae").decode(latents).sample.float())


def test_pipeline_with_one_timestep_per_batch_is_refused_with_the_reason(folders):
    family = load(folders, "aura_flow", model="diffusers")
    with pytest.raises(ConfigError, match="AuraFlowPipeline can't be trained through its own call"):
        family.denoise(*inputs(family, [CAPTION, "a dog"]))


def test_checkpoint_of_another_family_is_refused(folders):
    with pytest.raises(ConfigError, match="is a FluxPipeline; this model needs a StableDiffusion3Pipeline"):
        load(folders, "flux", model="sd3")
    with pytest.raises(ConfigError, match="image-to-image"):
        load(folders, "sdxl_refiner", model="diffusers")


def test_time_shift_is_the_models_own_for_a_size(folders):
    assert load(folders, "sd3").shift(8, 8) == load(folders, "sd3").shift(128, 128) == 3.0
    flux = load(folders, "flux")
    assert flux.shift(128, 128) == pytest.approx(torch.tensor(1.15).exp().item())
    assert 1 < flux.shift(16, 16) < flux.shift(64, 64) < flux.shift(128, 128)
    assert load(folders, "flux_schnell").shift(64, 64) == 1.0


@pytest.mark.parametrize("name", ["flux", "flux2_klein", "z_image", "qwen_image", "sana", "sd15"])
def test_inspecting_a_pipeline_consumes_no_random_numbers(name, folders):
    """Adapter dropout uses torch's generator, and a resumed run inspects the pipeline at another step."""
    family = load(folders, name)
    x, t, cond = inputs(family, [CAPTION])
    family.__dict__.pop("calls"), family.shifts.clear()
    assert family.denoiser is not None
    before = torch.random.get_rng_state()
    family.shift(*x.shape[2:])
    family.denoise(x, t, cond)
    assert torch.equal(torch.random.get_rng_state(), before)

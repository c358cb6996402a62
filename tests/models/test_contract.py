"""The contract of a family, tested on a tiny model of its real classes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch.testing import assert_close

import tiny
from dreambooth_lab.batch import ImageInfo, Size
from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.models.sdxl import SDXL

SIZE = Size((100, 80), (3, 5), (64, 64))
CAPTIONS = ["a photo of sks dog", ""]


def load(
    folder,
    dtype=enums.Dtype.float32,
    checkpointing=False,
    attention=enums.Attention.auto,
    compile=False,
    encoder_dtype=enums.Dtype.float32,
    tae=None,
    empty=enums.EmptyCaption.auto,
):
    return SDXL(str(folder), None, None, dtype, encoder_dtype, tae, 64, checkpointing, attention, compile, {}, empty)


@pytest.fixture
def family(tiny_sdxl):
    return load(tiny_sdxl)


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl):
    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)


def noisy(rows=2, channels=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, channels, 8, 8, generator=g)


def cond(family):
    return family.cond(
        family.encode_text(CAPTIONS), [ImageInfo(SIZE, torch.zeros(family.channels, 8, 8), 0, i, 7.0) for i in range(2)]
    )


def test_attributes_are_consistent(family):
    assert (family.factor, family.stride, family.channels, family.path.num_steps) == (8, 16, 4, 1000)
    assert not family.__dict__.keys() & {"denoiser", "vae", "text_encoders"}, "built without weights"


def test_text_matches_the_pipelines_encoding(family, pipeline):
    text = family.encode_text(CAPTIONS)
    states, empty, pooled, empty_pooled = pipeline.encode_prompt(CAPTIONS[0], negative_prompt=None, device="cpu")
    assert_close(text["prompt_embeds"], torch.cat([states, empty]))
    assert_close(text["pooled_prompt_embeds"], torch.cat([pooled, empty_pooled]))


@pytest.mark.parametrize("forced", [True, False])
def test_empty_caption_follows_the_setting_and_sampling_follows_the_pipeline(tiny_sdxl, tmp_path, forced):
    """SDXL's files force zeros; without that setting the pipeline encodes ""."""
    folder = shutil.copytree(tiny_sdxl, tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": forced}
    (folder / "model_index.json").write_text(json.dumps(index))
    theirs = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    states, beside, pooled, pooled_beside = theirs.encode_prompt("", negative_prompt=None, device="cpu")
    assert bool((beside == 0).all()) is forced and states.abs().max() > 0.1
    told = {
        enums.EmptyCaption.auto: (beside, pooled_beside), enums.EmptyCaption.encoded: (states, pooled),
        enums.EmptyCaption.zeros: (torch.zeros_like(states), torch.zeros_like(pooled)),
    }  # fmt: skip
    identities = set()
    for kind, expected in told.items():
        family = load(folder, empty=kind)
        text = family.encode_text(["", None, "a dog", ""])
        for row in (0, 3):
            assert_close((text["prompt_embeds"][row : row + 1], text["pooled_prompt_embeds"][row : row + 1]), expected)
        assert_close((text["prompt_embeds"][1:2], text["pooled_prompt_embeds"][1:2]), (beside, pooled_beside))
        assert_close(text["prompt_embeds"][2:3], theirs.encode_prompt("a dog", device="cpu")[0])
        identities.add(family.text_identity())
    assert len(identities) == 3, "so that caches are not shared"


def test_latents_decode_in_the_pipeline(family, pipeline):
    pixels = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_image(pixels)
    assert mean.shape == std.shape == (1, 4, 8, 6) and (std > 0).all()
    posterior = pipeline.vae.encode(pixels).latent_dist
    assert_close(mean / pipeline.vae.config.scaling_factor, posterior.mean)
    assert_close(family.decode(mean), pipeline.vae.decode(posterior.mean).sample)


def test_prediction_matches_the_network_at_its_native_timestep(family, pipeline):
    c, x = cond(family), noisy()
    native = torch.tensor([0, 999])
    theirs = pipeline.unet(
        x, native, c["prompt_embeds"], added_cond_kwargs={"text_embeds": c["pooled_prompt_embeds"], "time_ids": c["size"]}
    ).sample  # fmt: skip
    assert_close(family.denoise(x, family.path.time(native), c), theirs)
    assert c["size"][0].tolist() == [100, 80, 3, 5, 64, 64]


def test_generated_images_match_the_pipelines(family, pipeline):
    text, negative = family.encode_text(CAPTIONS[:1]), family.encode_text([""])
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 5.0}
    (ours,) = family.generate(text, negative, generator=torch.Generator().manual_seed(1), **options)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(CAPTIONS[0], generator=torch.Generator().manual_seed(1), **options).images[0]
    assert ours.tobytes() == theirs.tobytes()


def test_repeated_loads_are_bit_identical(tiny_sdxl):
    predictions = [
        family.denoise(noisy(), torch.tensor([0.1, 0.9]), cond(family)) for family in (load(tiny_sdxl), load(tiny_sdxl))
    ]
    assert torch.equal(*predictions)


def test_encoders_can_be_freed_and_reloaded(family):
    before = family.encode_text(CAPTIONS)
    family.release_encoders()
    assert not family.__dict__.keys() & {"vae", "text_encoders"}
    assert torch.equal(family.encode_text(CAPTIONS)["prompt_embeds"], before["prompt_embeds"])


def test_gradient_checkpointing_does_not_change_gradients(tiny_sdxl):
    def gradients(checkpointing):
        family = load(tiny_sdxl, checkpointing=checkpointing)
        family.denoiser.requires_grad_(True).train()
        family.denoise(noisy(), torch.tensor([0.1, 0.9]), cond(family)).square().mean().backward()
        return [p.grad for p in family.denoiser.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert_close(plain, checkpointed)


@pytest.mark.parametrize("kernel", [enums.Attention.math, enums.Attention.flash])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_uses_the_requested_kernel(kernel, checkpointing, tiny_sdxl, family):
    chosen = load(tiny_sdxl, attention=kernel, checkpointing=checkpointing)
    chosen.denoiser.requires_grad_(True).train()
    x, t, c = noisy(), torch.tensor([0.1, 0.9]), cond(family)
    with torch.profiler.profile() as profile:
        prediction = chosen.denoise(x, t, c)
        prediction.square().mean().backward()
    assert_close(prediction, family.denoise(x, t, c))
    ran = {event.key for event in profile.key_averages()}
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert (flash in ran) == (kernel is enums.Attention.flash) != ("aten::_scaled_dot_product_attention_math" in ran)


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        ({"attention": enums.Attention.cudnn}, "cpu", "which only CUDA devices have"),
        ({"attention": enums.Attention.flash}, "cuda", "only 16-bit dtypes"),
        ({"compile": True}, "cpu", "there is no C\\+\\+ compiler 'no-such-compiler'"),
    ],
)
def test_unsupported_kernels_of_a_device_are_refused(settings, device, message, tiny_sdxl, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    family = load(tiny_sdxl, **settings)
    family.device = torch.device(device)
    with pytest.raises(ConfigError, match=message):
        family.check_device()


def test_bfloat16_prediction_is_close_to_float32(tiny_sdxl, family):
    low = load(tiny_sdxl, enums.Dtype.bfloat16)
    c, x, t = cond(family), noisy(), torch.tensor([0.1, 0.9])
    prediction = low.denoise(x, t, c)
    assert next(low.denoiser.parameters()).dtype is torch.bfloat16 and prediction.dtype is torch.float32
    assert_close(prediction, family.denoise(x, t, c), atol=0.05, rtol=0.05)


def test_identity_depends_on_weights_and_dtype(tiny_sdxl, tmp_path):
    base = load(tiny_sdxl)
    copy = load(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    assert (copy.text_identity(), copy.image_identity()) == (base.text_identity(), base.image_identity())
    weights = next((copy.checkpoint.folder / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert copy.image_identity() != base.image_identity() and copy.text_identity() == base.text_identity()
    lower = load(tiny_sdxl, encoder_dtype=enums.Dtype.bfloat16)
    assert lower.text_identity() != base.text_identity()


def test_v_prediction_and_other_channel_counts_are_read_from_the_files(tmp_path):
    family = load(tiny.save_sdxl(tmp_path, prediction="v_prediction", channels=16))
    assert family.path.prediction.value == "v_prediction"
    assert family.denoise(noisy(channels=16), torch.tensor([0.1, 0.9]), cond(family)).shape == (2, 16, 8, 8)


def test_truncated_caption_is_reported(family):
    assert family.truncated_part(["a dog", ""]) == []
    for line, part in zip(family.truncated_part(["a dog", "word " * 60]), family.text_encoder_parts, strict=True):
        assert line.startswith(f"1 of 2 captions are longer than the limit of {part}, 77 tokens: ")
        assert "tokens are ignored" in line


def test_previews_use_the_tiny_decoder(tiny_sdxl, tmp_path):
    small = tiny.tae(4)
    small.save_pretrained(tmp_path / "tae")
    family = load(tiny_sdxl, tae=str(tmp_path / "tae"))
    assert_close(family.preview(noisy()), small.eval().decode(noisy()).sample)
    assert family.preview(noisy()).shape == (2, 3, 64, 64)
    family.tae = str(tmp_path / "none")
    del family._preview_decoder
    with pytest.raises(ConfigError, match=r"model\.tae is .*none.*; set model\.tae"):
        family.preview(noisy())


@pytest.mark.parametrize("place", ["stranger/no-such-model", "empty"])
def test_missing_weights_raise_one_clear_error(place, tmp_path):
    where = place if "/" in place else tmp_path
    with pytest.raises(ConfigError, match=r"model\.pretrained is .*; set model\.pretrained to a folder"):
        load(where)


def test_pipeline_of_another_class_is_refused(tiny_sdxl, tmp_path):
    other = shutil.copytree(tiny_sdxl, tmp_path / "other")
    index = (other / "model_index.json").read_text().replace('"StableDiffusionXLPipeline"', '"StableDiffusionPipeline"')
    (other / "model_index.json").write_text(index)
    with pytest.raises(ConfigError, match="needs a StableDiffusionXLPipeline"):
        load(other)

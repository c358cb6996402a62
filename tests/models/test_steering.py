"""Sampling with the class prompt, and with weaker weights for the unconditional prediction."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import tiny_families
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check, class_prompt_of, enums
from dreambooth_lab.factory import build_family, build_method
from dreambooth_lab.models.steering import Steering, steered
from dreambooth_lab.run import run
from dreambooth_lab.tools.generate import generate, read
from dreambooth_lab.tools.generate import steer as steer_by_args

SUBJECT, CLASS = "a photo of sks dog", "a photo of a dog"
NONE, SWITCH, MIX = enums.Superclass.none, enums.Superclass.switch, enums.Superclass.mix
OFF = Steering(NONE, 0.0, None)


@pytest.fixture(params=["lora", "lokr"])
def module(small, request):
    cfg = lab.compose(*small, f"adapter={request.param}", "adapter.rank=4")
    made, _ = build_method(cfg, build_family(cfg))
    generator = torch.Generator().manual_seed(5)
    for p in made.trainable_parameters().values():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return made.eval()


def latents(module, prompt, steps, negative=None, guidance=3.0, steering=OFF, about=CLASS):
    """Latents after every step, of two images."""
    family, seen = module.family, []

    def draw(words, on_step):
        texts = (family.encode_text([prompt_text]).repeat(2) for prompt_text in (words, negative))
        return family.generate(*texts, height=64, width=64, num_inference_steps=steps, guidance_scale=guidance,
                               generator=[torch.Generator().manual_seed(i) for i in range(2)], on_step=on_step)  # fmt: skip

    call = partial(draw, about, None) if about else None
    with steered(family.denoiser, steering, steps, call, partial(module.adapter.weakened, family.denoiser)):
        draw(prompt, lambda _, x: seen.append(x.clone()))
    return seen


def test_switch_uses_the_class_prompt_for_the_first_steps(module):
    about_class, subject = latents(module, CLASS, 4), latents(module, SUBJECT, 4)
    switched = latents(module, SUBJECT, 4, steering=Steering(SWITCH, 0.5, None))
    assert all(torch.equal(a, b) for a, b in zip(switched[:2], about_class[:2], strict=True))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(switched[2:], about_class[2:], strict=True))
    assert (switched[-1] - subject[-1]).abs().max() > 1e-4


def test_mix_is_the_weighted_mean_of_both_predictions(module):
    """A step is affine in the prediction."""
    (one,), (other,) = latents(module, SUBJECT, 1), latents(module, CLASS, 1)
    (mixed,) = latents(module, SUBJECT, 1, steering=Steering(MIX, 0.3, None))
    assert (one - other).abs().max() > 1e-3
    assert_close(mixed, torch.lerp(one, other, 0.3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_personal_guidance_extrapolates_from_weaker_weights(module, strength):
    """ε = ε_ω(∅) + w (ε_1(prompt) - ε_ω(∅)), and a step is affine in it."""
    (prompt,) = latents(module, SUBJECT, 1, negative=SUBJECT)
    with module.adapter.weakened(module.family.denoiser, strength):
        (weak,) = latents(module, "", 1, negative="")
    (guided,) = latents(module, SUBJECT, 1, negative="", steering=Steering(NONE, 0.0, strength))
    assert_close(guided, weak + 3.0 * (prompt - weak), atol=1e-3, rtol=1e-3)
    assert (guided - latents(module, SUBJECT, 1, negative="")[0]).abs().max() > 1e-3


def test_steering_is_removed_afterwards_and_off_changes_nothing(module):
    before = latents(module, SUBJECT, 2)
    hooks = len(module.family.denoiser._forward_hooks), len(module.family.denoiser._forward_pre_hooks)
    for steering in (Steering(SWITCH, 0.5, 0.3), Steering(MIX, 0.5, 0.0)):
        latents(module, SUBJECT, 2, steering=steering)
    assert (len(module.family.denoiser._forward_hooks), len(module.family.denoiser._forward_pre_hooks)) == hooks
    assert torch.equal(latents(module, SUBJECT, 2)[-1], before[-1])
    unknown = latents(module, SUBJECT, 2, steering=Steering(MIX, 0.5, None), about=None)
    assert torch.equal(unknown[-1], before[-1]), "a prompt that is not about the subject"


def test_personal_guidance_at_full_strength_is_plain_guidance(module):
    plain = latents(module, SUBJECT, 2)
    assert torch.equal(latents(module, SUBJECT, 2, steering=Steering(NONE, 0.0, 1.0))[-1], plain[-1])


@pytest.mark.parametrize(
    "words", [["validation.superclass=switch", "validation.superclass_share=0.5"],
              ["validation.superclass=mix", "validation.personal_guidance=0.2", "adapter.rank_schedule=tlora"]]
)  # fmt: skip
def test_validation_images_match_generate(small, tmp_path, words):
    prompts = f'validation.prompts=["{SUBJECT}","{CLASS}"]'
    overrides = [*small, *words, prompts, "trainer.max_steps=3", "optimizer.lr=1e-2", "validation.num_inference_steps=4"]
    cfg = lab.compose(*overrides, "export.dtype=float32", "validation.guidance_scale=3")
    check(cfg)
    run(cfg, tmp_path / "run")
    generate(read([f"run={tmp_path / 'run'}", f"prompt=['{SUBJECT}', '{CLASS}']", "seeds=1", f"out={tmp_path / 'out'}"]))
    with pytest.raises(ConfigError, match="which is plain guidance"):
        generate(read([f"run={tmp_path / 'run'}", f"prompt={SUBJECT}", "personal_guidance=1.0"]))
    for i in range(2):
        ours = Image.open(tmp_path / "run" / "images" / "step_0000003" / f"{i:02d}_00.png").convert("RGB").tobytes()
        theirs = Image.open(tmp_path / "out" / f"{i:02d}_00.png").convert("RGB").tobytes()
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1


@pytest.mark.parametrize(
    ("prompt", "made"),
    [
        ("a photo of sks dog on the beach", "a photo of a dog on the beach"),
        ("a photo of a SKS dog", "a photo of a dog"),
        ("sks dog", "a dog"),
        ("a photo of a dog", None),
        ("sksy dog", None),
    ],
)
def test_class_prompt_is_the_prompt_without_the_rare_word(prompt, made):
    assert class_prompt_of(prompt, SUBJECT, CLASS, None) == made


def test_article_is_dropped_if_the_class_prompt_has_none():
    assert class_prompt_of("photo of sks dogs", "photo of sks dogs", "photo of dogs", None) == "photo of dogs"
    assert class_prompt_of("photo of q dogs", "x", None, "q") == "photo of dogs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["validation.superclass=switch", "dataset.class_prompt=null"],
            "but the rare word that the class prompt lacks is not clear",
        ),
        (["validation.superclass=mix", "validation.superclass_share=1"], "it must lie between 0 and 1"),
        (["validation.personal_guidance=1"], "which is plain guidance"),
        (["validation.personal_guidance=0.5", "validation.guidance_scale=1"], "where there is no guidance"),
        (["validation.personal_guidance=0.5", "adapter=full"], "whose strength can't be set while it trains"),
    ],
)
def test_contradictory_options_are_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        check(lab.compose(*words))
    assert message in str(caught.value)


def test_generate_refuses_unknown_options(small):
    with pytest.raises(ConfigError, match="it must be none, switch or mix"):
        steer_by_args(lab.compose(*small), read(["run=a", "prompt=x", "superclass=often"]))


@pytest.mark.parametrize("name", ["flux", "sdxl_refiner"])
def test_models_with_other_guidance_are_refused(name, folders):
    cfg = lab.compose(f"model={tiny_families.model_of(name)}", f"model.pretrained={folders(name)}", "dataset=folder",
                      "dataset.path=.", "trainer.accelerator=cpu", "model.tae=null",
                      "validation.personal_guidance=0.5")  # fmt: skip
    with pytest.raises(ConfigError, match="SD, SDXL, SD3 and toybox only"):
        build_family(cfg)

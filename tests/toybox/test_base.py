"""The shipped base model: it loads without options, generates the toybox world, and stays small."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPModel, CLIPProcessor

from dreambooth_lab.models.feature_extractors import Dino, MaskedDino
from dreambooth_lab.tools.pretrain_toybox.judge import chosen, draw_all, score
from dreambooth_lab.tools.pretrain_toybox.scorer import choices
from dreambooth_lab.tools.pretrain_toybox.unet import sample
from dreambooth_lab.toybox import base_folder
from dreambooth_lab.toybox.evaluator import Evaluator
from dreambooth_lab.toybox.subjects import subject_photos
from dreambooth_lab.toybox.tokenizer import build_tokenizer
from dreambooth_lab.toybox.world import SUBJECTS, draw_individual, render


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionXLPipeline.from_pretrained(base_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator.load(base_folder() / "evaluator")


def test_base_loads_in_one_dtype_with_the_toybox_tokenizer(pipe):
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {torch.float32}
    assert pipe.tokenizer("a photo of sks robot").input_ids == build_tokenizer()("a photo of sks robot").input_ids


def test_base_is_smaller_than_14_megabytes():
    files = [p for p in base_folder().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 14_000_000
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md"}


def test_base_generates_what_the_prompt_names(pipe, evaluator):
    class Few:
        batch, steps, guidance, first_seed = 12, 12, 4.0, 0

    wanted = chosen(12, seed=1)
    seen = score(evaluator, draw_all(pipe, wanted, Few), wanted)
    assert seen["class"] > 0.8 and seen["colour"] > 0.8 and seen["background"] > 0.8


def test_base_generates_other_aspect_ratios(pipe, evaluator):
    for height, width in ((96, 160), (160, 96)):
        images = sample(pipe, ["a photo of a green fish in the snow"], 0, steps=8, height=height, width=width)
        assert images.shape == (1, 3, height, width)


def test_latents_have_unit_variance_under_the_scaling_factor(pipe):
    from dreambooth_lab.tools.pretrain_toybox.vae import held_out

    with torch.no_grad():
        z = pipe.vae.encode(held_out(32)[0]).latent_dist.mean * pipe.vae.config.scaling_factor
    assert z.mean().abs() < 0.1 and 0.9 < z.std() < 1.1


def test_photos_of_one_subject_are_more_similar_than_of_two_subjects(evaluator):
    from dreambooth_lab.tools.pretrain_toybox.pictures import tensors

    photos = {name: tensors([p.image for p in subject_photos(name, 4)]) for name in SUBJECTS}
    for name, own in photos.items():
        assert evaluator.similarity(own, own).mean() > 0.8
        assert all(evaluator.similarity(own, other).mean() < 0.6 for rest, other in photos.items() if rest != name)


@pytest.mark.skipif(not (base_folder() / "scorer").exists(), reason="this base has no scorer")
def test_scorer_loads_as_clip_and_distinguishes_prompts():
    folder = base_folder() / "scorer"
    assert CLIPModel.from_pretrained(folder).dtype == torch.float32 and CLIPProcessor.from_pretrained(folder)
    assert min(choices(folder, n=32).values()) > 0.7


@pytest.mark.parametrize("kind", [Dino, MaskedDino])
def test_shipped_dino_distinguishes_individuals_of_one_class(kind):
    """Photos of a held-out subject in different places are more similar than photos of other subjects in the same places."""
    dino = Dino(str(base_folder() / "dino"), "eval.dino_model", torch.device("cpu"), 64)
    judge = dino if kind is Dino else MaskedDino(dino)
    for name in SUBJECTS:
        own = subject_photos(name, 4)
        rng = np.random.default_rng(0)
        others = [render(replace(photo.scene, who=replace(draw_individual(rng), kind=name))) for photo in own]
        of_own, of_others = (judge.embed([p.image for p in group]) for group in (own, others))
        alike = (of_own @ of_own.T)[~torch.eye(4, dtype=torch.bool)].mean()
        assert alike > (of_own @ of_others.T).mean() + 0.2, name

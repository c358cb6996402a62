import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPModel, CLIPProcessor

import tiny
from dreambooth_lab import lab
from dreambooth_lab.callbacks import scores
from dreambooth_lab.callbacks.scores import Score, Scores, changes, read_scores, summary
from dreambooth_lab.config import ConfigError, Subject, check
from dreambooth_lab.models.feature_extractors import Clip, Dino, MaskedDino, Photo, foreground
from dreambooth_lab.run import run
from dreambooth_lab.runfolder import RunFolder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    return tiny.save_clip(root / "clip"), tiny.save_dino(root / "dino")


@pytest.fixture(scope="module")
def scored(small, models, tmp_path_factory):
    root = tmp_path_factory.mktemp("scores") / "run"
    prompts = '["a photo of sks dog","a photo of a dog","a red car"]'
    words = [f"eval.clip_model={models[0]}", f"eval.dino_model={models[1]}", f"validation.prompts={prompts}"]
    run(lab.compose(*small, *words, "trainer.max_steps=3"), root)
    return lab.load(root)


def pictures(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [Image.fromarray(torch.randint(0, 255, (40, 50, 3), generator=g, dtype=torch.uint8).numpy()) for _ in range(n)]


def test_clip_is_transformers_own_cosine_whatever_the_batch(models):
    looks = pictures(5)
    clip, processor = CLIPModel.from_pretrained(models[0]), CLIPProcessor.from_pretrained(models[0])
    inputs = processor(text=["a dog", "a red car"], images=looks, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = clip(**inputs).logits_per_image / clip.logit_scale.exp()
    for batch_size in (2, 16):
        ours = Clip(str(models[0]), "eval.clip_model", CPU, batch_size)
        assert_close(ours.embed(looks) @ ours.embed_texts(["a dog", "a red car"]).T, logits, atol=1e-5, rtol=1e-4)


def test_dino_knows_a_picture_again(models):
    seen = Dino(str(models[1]), "eval.dino_model", CPU, 2).embed([*pictures(3), *pictures(1)])
    assert_close(seen.norm(dim=1), torch.ones(4))
    assert_close(seen[0], seen[3])


def on_ground(colour, ground):
    """A square of one colour in the middle of a ground, and its mask."""
    picture, mask = Image.new("RGB", (32, 32), ground), Image.new("L", (32, 32), 0)
    for image, paint in ((picture, colour), (mask, 255)):
        image.paste(paint, (8, 8, 24, 24))
    return Photo(picture, mask)


def test_the_masked_mean_is_of_the_patches_that_hold_the_attention(models):
    dino = Dino(str(models[1]), "eval.dino_model", CPU, 2)
    picture = on_ground("red", "blue").image
    with torch.no_grad():
        pixels = dino.processor(images=[picture], return_tensors="pt")["pixel_values"]
        seen = dino.model(pixel_values=pixels, output_attentions=True)
    front = foreground(seen.attentions[-1][:, :, 0, 1:].mean(1), 0.6)[0].bool()
    assert 0 < front.sum() < 16
    mean = seen.last_hidden_state[0, 1:][front].mean(0)
    assert_close(MaskedDino(dino).embed([picture])[0], mean / mean.norm())
    attention = torch.tensor([[0.05, 0.3, 0.25, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0, 0.0]])
    assert foreground(attention, 0.6).tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["clip_i", "dino", "dino_masked"])
def test_a_copy_of_a_photo_byte_for_byte_has_similarity_one_masks_or_not(models, tmp_path, name):
    clip, dino = Clip(str(models[0]), "eval.clip_model", CPU, 4), Dino(str(models[1]), "eval.dino_model", CPU, 4)
    judge = {"clip_i": clip, "dino": dino, "dino_masked": MaskedDino(dino)}[name]
    for number, picture in enumerate(pictures(3)):
        mask = Image.new("L", picture.size, 0)
        mask.paste(255, (5 * number, 4, 30, 25))
        photos = [Photo(picture, mask)]
        scored = Scores(RunFolder(tmp_path), None, {name: judge}, photos, Subject("a photo of sks dog", None, "sks"))
        (score,) = scored(["a photo of sks dog"], [[picture.copy()]])
        assert score.metric == name and score.value == pytest.approx(1.0, abs=1e-5)


def test_the_masks_tell_how_well_the_attention_finds_the_subject(models):
    dino = MaskedDino(Dino(str(models[1]), "eval.dino_model", CPU, 2))
    photo = on_ground("red", "blue")
    covered = [Photo(photo.image, Image.new("L", (32, 32), grey)) for grey in (255, 0)]
    assert dino.under_masks(covered[:1]) == pytest.approx(1.0) and dino.under_masks(covered[1:]) == 0.0
    assert dino.under_masks(covered) == pytest.approx(0.5) and dino.under_masks([Photo(photo.image, None)]) is None


def test_every_picture_is_scored_for_what_its_prompt_is_about(scored):
    found = {(s.step, s.metric, s.prompt) for s in read_scores(scored.folder)}
    subject = {m for step, m, p in found if p == "a photo of sks dog" and step == 3}
    kind = {m for step, m, p in found if p == "a photo of a dog" and step == 3}
    other = {m for step, m, p in found if p == "a red car" and step == 3}
    assert subject == {"clip_t", "clip_i", "dino", "dino_masked"} and other == {"clip_t"}
    judged = ("clip_i", "dino", "dino_masked")
    assert kind == {"clip_t", *(f"pres_{name}" for name in judged), *(f"diversity_{name}" for name in judged)}


def test_diversity_is_one_less_the_mean_cosine_of_different_pictures(models, tmp_path):
    dino, (a, b) = Dino(str(models[1]), "eval.dino_model", CPU, 4), pictures(2)
    scored = Scores(
        RunFolder(tmp_path), None, {"dino": dino}, [Photo(a, None)], Subject("a photo of sks dog", "a photo of a dog", None)
    )
    found = [s.value for s in scored(["a photo of a dog"], [[a, a, b]]) if s.metric == "diversity_dino"]
    apart = 1 - float(dino.embed([a]) @ dino.embed([b]).T)
    assert apart > 1e-4 and found == pytest.approx([apart / 2, apart / 2, apart], abs=1e-5)


def test_an_unclear_rare_word_is_said(models, tmp_path, caplog):
    dino = Dino(str(models[1]), "eval.dino_model", CPU, 4)
    for subject, said in ((Subject("a photo of sks dog", None, None), True), (Subject("a photo of sks dog", None, "sks"), False)):
        caplog.clear()
        Scores(RunFolder(tmp_path), None, {"dino": dino}, [Photo(pictures(1)[0], None)], subject)
        assert ("set adapter.token to it" in caplog.text) is said


def test_the_means_are_logged_at_their_steps(scored):
    for name in (
        "clip/mean",
        "clip/min",
        "clip/max",
        "clip/std",
        "subject/clip_i",
        "subject/dino",
        "class/pres_dino",
        "class/diversity_dino",
    ):
        assert [step for step, _ in scored.series[name]] == [0, 3], name
    values = [s.value for s in read_scores(scored.folder) if s.step == 3 and s.metric == "clip_t"]
    logged = dict(scored.series["clip/mean"])[3]
    assert logged == pytest.approx(sum(values) / len(values)) and len(values) == 6


def test_scoring_does_not_touch_training(scored, small, tmp_path):
    prompts = 'validation.prompts=["a photo of sks dog","a photo of a dog","a red car"]'
    run(lab.compose(*small, "trainer.max_steps=3", prompts), tmp_path / "plain")
    plain = lab.load(tmp_path / "plain").series
    assert all(scored.series[name] == values for name, values in plain.items())


def test_changes_are_paired():
    before = [Score(0, "live", "dino", "p", i, v) for i, v in enumerate((0.1, 0.5, 0.9))]
    after = [Score(9, "live", "dino", "p", i, v + 0.2) for i, v in enumerate((0.1, 0.5, 0.9))]
    (change,) = changes(before + after)
    assert (change.first, change.last) == (pytest.approx(0.5), pytest.approx(0.7))
    assert (change.low, change.high) == (pytest.approx(0.2), pytest.approx(0.2)), "a constant change has no spread"
    assert changes(before) == []


def test_the_interval_is_students():
    """Against the table's 97.5 % quantile of 3 degrees of freedom."""
    low, high = scores.interval([1.0, 2.0, 3.0, 4.0])
    assert (low, high) == pytest.approx((2.5 - 3.182 * 1.29099 / 2, 2.5 + 3.182 * 1.29099 / 2), abs=1e-3)
    assert scores.interval([1.0, 2.0])[0] != scores.interval([1.0, 2.0])[0], "two values tell no spread"


def test_summary_names():
    made = summary(
        [
            Score(0, "live", "clip_t", "p", 0, 0.2),
            Score(0, "live", "clip_t", "p", 1, 0.4),
            Score(0, "live", "pres_dino", "q", 0, 0.5),
        ]
    )
    assert made == pytest.approx({"clip/mean": 0.3, "clip/min": 0.2, "clip/max": 0.4, "clip/std": 0.1, "class/pres_dino": 0.5})


def test_the_report_tells_what_changed(scored):
    page = scored.folder.report.read_text()
    assert "<td>pres_dino</td>" in page and "95 % interval" in page


def test_what_cannot_work_is_refused(small, tmp_path):
    with pytest.raises(ConfigError, match=r"eval\.clip_model is .*a folder that does not exist"):
        check(lab.compose(*small, "eval.clip_model=./nowhere"))
    with pytest.raises(ConfigError, match=r"no images to score"):
        check(lab.compose(*small, f"eval.dino_model={tmp_path}", "validation.every_n_steps=0"))
    with pytest.raises(ConfigError, match=r"eval\.clip_model is 'nobody/none', which could not be loaded"):
        Clip("nobody/none", "eval.clip_model", CPU, 1)


def test_judges_are_on_their_device_only_while_they_look(models):
    dino = Dino(str(models[1]), "eval.dino_model", CPU, 2)
    moves = []
    dino.model.to = moves.append
    dino.device = torch.device("cpu", 0)  # told apart from where it rests
    with dino.on_device():
        dino.embed(pictures(3))
        MaskedDino(dino).embed(pictures(1))
        assert moves == [dino.device]
    assert moves == [dino.device, "cpu"] and not dino.users

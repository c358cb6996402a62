import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, rare_word
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.embedding import TokenEmbedding
from dreambooth_lab.factory import build_adapter, build_family, trained_token
from dreambooth_lab.run import run
from dreambooth_lab.trainable_text import TrainableText

TOKEN = ["adapter.train_token=true", 'dataset.instance_prompt="a photo of q dog"']  # one byte is one token here


@pytest.fixture
def made(small):
    cfg = lab.compose(*small, *TOKEN)
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter = build_adapter(cfg)
    adapter.attach(family.denoiser, family.target_modules, seed=0)
    module = DreamBooth(cfg, family, adapter, TrainableText(family, "q", adapted=False)).train()
    return module, next(iter(Samples(data, data.schedule, 0, 0, 1)))


@pytest.mark.parametrize(
    ("instance", "kind", "word"),
    [
        ("a photo of sks dog", "a photo of a dog", "sks"),
        ("an sks robot", "a robot", "sks"),
        ("sks", "a dog", "sks"),
        ("A photo of sks, a dog.", "a photo of a dog", "sks"),
        ("a photo of sks zwx dog", "a photo of a dog", None),
        ("a photo of a dog", "a photo of a dog", None),
        ("a photo of sks dog", None, None),
    ],
)
def test_rare_word_is_the_word_missing_from_the_class_prompt(instance, kind, word):
    assert rare_word(instance, kind) == word


@pytest.mark.parametrize(
    ("caption", "there"),
    [
        ("a photo of sks dog", True),
        ("Sks, sitting", True),
        ("the sks's bowl", True),
        ("asksb", False),
        ("a photo of a dog", False),
    ],
)
def test_token_matching_agrees_with_the_tokenizer(caption, there):
    layer = torch.nn.Embedding(3, 2)
    assert TokenEmbedding("sks", [(layer, 1)]).occurs_in(caption) is there


def test_untrained_token_keeps_its_embedding(made):
    module, batch = made
    assert_close(module.conditioning(batch)["prompt_embeds"], batch.cond["prompt_embeds"])
    assert_close(module.conditioning(batch)["pooled_prompt_embeds"], batch.cond["pooled_prompt_embeds"])


def test_trained_token_changes_only_captions_that_contain_it(made):
    module, batch = made
    for row in module.text.token.parameters():
        row.data += 1
    cond = module.conditioning(batch)
    assert (cond["prompt_embeds"][batch.instance_rows] - batch.cond["prompt_embeds"][batch.instance_rows]).abs().max() > 1e-2
    assert torch.equal(cond["prompt_embeds"][batch.class_rows], batch.cond["prompt_embeds"][batch.class_rows])
    plain = build_family(module.cfg).encode_text(["a photo of a dog"])
    assert torch.equal(module.text.encode(["a photo of a dog"])["prompt_embeds"], plain["prompt_embeds"])


def test_gradients_reach_only_the_token_in_both_encoders(made):
    module, batch = made
    for p in module.denoiser.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    module.training_step(batch, 0)["loss"].backward()
    assert len(module.text.token.rows) == 2 and all(row.grad.abs().sum() > 0 for row in module.text.token.rows)
    assert all(p.grad is None for _, encoder in module.text.pairs for p in encoder.parameters())


def test_word_of_several_tokens_is_refused(made):
    with pytest.raises(ConfigError, match=r"'sks' is 3 tokens for the text encoder"):
        made[0].family.token_slots("sks", made[0].text.pairs)


def test_ambiguous_rare_word_is_refused(small):
    with pytest.raises(ConfigError, match=r"set adapter\.token to it"):
        trained_token(lab.compose(*small, "adapter.train_token=true", "dataset.class_prompt=null"))
    assert trained_token(lab.compose(*small, "adapter.train_token=true", "adapter.token=dog")) == "dog"


def test_run_trains_exports_and_reloads_its_token(small, tmp_path):
    run(lab.compose(*small, *TOKEN), tmp_path / "run")
    done = lab.load(tmp_path / "run")
    rows, average = (
        load_file(done.folder.export / name) for name in ("embeddings/q.safetensors", "ema/embeddings/q.safetensors")
    )
    assert set(rows) == {"clip_l", "clip_g"} and not torch.equal(rows["clip_l"], average["clip_l"])
    pipeline = done.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 5.0}
    image = pipeline("a photo of q dog", generator=torch.Generator().manual_seed(0), **options).images[0]
    saved = Image.open(done.folder.image_folder / "step_0000006" / "00_00.png")
    difference = torch.tensor(list(image.tobytes())) - torch.tensor(list(saved.tobytes()))
    assert difference.abs().max() <= 1

"""Adapters on the text encoders: their gradients and learning rates, the unchanged base, and a whole run."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family, build_trainable_text
from dreambooth_lab.run import run

BOTH = "adapter.text_encoders=[1,2]"


@pytest.fixture(scope="module")
def make(small):
    def made(*words):
        cfg = lab.compose(*small, BOTH, *words)
        family = build_family(cfg)
        data = DreamBoothData(cfg, family)
        data.prepare()
        adapter, text = build_adapter(cfg), build_trainable_text(cfg, family)
        layers = attach(cfg, family, adapter, text)
        return DreamBooth(cfg, family, adapter, text).train(), data, layers

    return made


@pytest.fixture(scope="module")
def made(make):
    return make()


def batch_of(data):
    return next(iter(Samples(data, data.schedule, 0, 0, 1)))


def move(module):
    generator = torch.Generator().manual_seed(0)
    for p in module.trainable_parameters().values():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)


def test_base_text_encoders_are_unchanged_and_used_by_the_teacher(make):
    module, data, _ = make()
    batch = batch_of(data)
    base = batch.cond
    assert_close(module.conditioning(batch)["prompt_embeds"], base["prompt_embeds"]), "fresh adapters change nothing"
    assert module.training_step(batch, 0)["prior"] < 1e-12, "captions encoded in one batch round differently"
    teacher_output = module.teacher.predict_base(batch, batch.latents(), torch.full((len(batch.sample),), 0.5), batch.class_rows)
    move(module)
    cond = module.conditioning(batch)
    assert (cond["prompt_embeds"] - base["prompt_embeds"]).abs().amax((1, 2)).min() > 1e-2, "every caption changes its meaning"
    again = module.teacher.predict_base(batch, batch.latents(), torch.full((len(batch.sample),), 0.5), batch.class_rows)
    assert torch.equal(teacher_output, again), "the teacher uses the base model's text encoders"
    by_family = module.family.encode_text(batch.captions)
    assert torch.equal(by_family["prompt_embeds"], base["prompt_embeds"]), "the family's encoders are the base's"
    assert torch.equal(batch_of(data).cond["prompt_embeds"], base["prompt_embeds"]), "and so are cached texts"


def test_gradients_reach_only_the_adapters_of_both_encoders(made):
    module, data, layers = made
    move(module)
    module.training_step(batch_of(data), 0)["loss"].backward()
    assert len(layers) == len([name for name in layers if not name.startswith("text_encoder")]) + 2 * 2 * 6
    for name, p in module.text.encoders.named_parameters():
        last_of_first = name.startswith("text_encoder.") and ".layers.1." in name  # the UNet uses the output of the layer before
        assert ("lora_" in name) == p.requires_grad
        assert (p.grad is not None and bool(p.grad.any())) == ("lora_" in name and not last_of_first), name


def test_each_part_has_its_own_learning_rate(make):
    rules = "adapter.blocks=[{match: 'text_encoder_2.*layers\\.0', rank: 2, lr_ratio: 0.1}]"
    module, _, _ = make("optimizer.lr=1", "optimizer.lora_plus_ratio=4", "adapter.train_token=true", "adapter.token=q",
                        "dataset.instance_prompt='a photo of q dog'", rules)  # fmt: skip
    optimizer = module.configure_optimizers()["optimizer"]
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(module.trainable_parameters())
    for name, p in module.trainable_parameters().items():
        plus = 4 if "lora_B" in name else 1
        ruled = "text_encoder_2" in name and "layers.0" in name
        expected = 5.0 if "token" in name else plus * (0.5 if "text." in name else 1) * (0.1 if ruled else 1)
        assert rates[id(p)] == (pytest.approx(expected), 0.0 if "token" in name else 0.01), name
        if ruled and "lora_A" in name:
            assert p.shape[0] == 2


@pytest.mark.slow
def test_run_trains_validates_and_exports_text_encoders(small, tmp_path):
    run(lab.compose(*small, BOTH), tmp_path / "run")
    done = lab.load(tmp_path / "run")
    parts = {name.partition(".")[0] for name in load_file(done.folder.export / "pytorch_lora_weights.safetensors")}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    pipeline = done.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 5.0}
    image = pipeline("a photo of sks dog", generator=torch.Generator().manual_seed(0), **options).images[0]
    saved = Image.open(done.folder.image_folder / "step_0000006" / "00_00.png")
    difference = torch.tensor(list(image.tobytes())) - torch.tensor(list(saved.tobytes()))
    assert difference.abs().max() <= 1, "the export reproduces the validation image"
    more = lab.compose(
        *small, BOTH, f"adapter.init_from={done.folder.export}", "trainer.max_steps=1", "validation.every_n_steps=0"
    )
    run(more, tmp_path / "more")
    first = dict(lab.load(tmp_path / "more").series["train/loss_prior"])[1]
    assert first > 0, "it continues from the trained weights"


def test_resumed_run_continues_bit_for_bit(small, tmp_path):
    words = [*small, BOTH, "adapter.dropout=0.3", "validation.every_n_steps=0"]
    run(lab.compose(*words, "trainer.max_steps=4"), tmp_path / "whole")
    run(lab.compose(*words, "trainer.max_steps=2"), tmp_path / "part")
    run(lab.compose(*words, "trainer.max_steps=4", f"resume={tmp_path / 'part'}"), tmp_path / "part")
    whole, part = (lab.load(tmp_path / one) for one in ("whole", "part"))
    assert whole.series == part.series
    a, b = (torch.load(one.folder.newest()[0], weights_only=True)["state_dict"] for one in (whole, part))
    assert any(key.startswith("text.encoders.text_encoder_2.") for key in a) and all("lora_" in key for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=lokr", BOTH], "lokr does not support text encoders"),
        (["adapter.text_encoders=[1,1]"], "numbered from 1"),
        (["adapter.text_encoders=[0]"], "numbered from 1"),
        ([BOTH, "adapter.text_parts=[]"], "adapter.text_parts is empty"),
        ([BOTH, "model.encoder_dtype=float16"], "whose gradients underflow"),
        ([BOTH, "adapter=dora", "quant.text_encoder_2=int8", "model.encoder_dtype=bfloat16"], "which peft can't mix"),
    ],
)
def test_invalid_text_encoder_settings_are_refused(words, message):
    with pytest.raises(ConfigError) as error:
        check(lab.compose("dataset.path=.", *words))
    assert message in str(error.value)


def test_missing_encoder_and_unknown_group_are_refused(make, small):
    with pytest.raises(ConfigError, match=r"has \[3\]; the trainable text encoders of this model are \[1, 2\]"):
        build_family(lab.compose(*small, "adapter.text_encoders=[3]"))
    with pytest.raises(ConfigError, match=r"adapter\.text_parts has \['attn'\]; set adapter.text_parts to some of"):
        make("adapter.text_parts=[attn]")


@pytest.mark.parametrize("kind", ["int8", "int8_torchao", "nf4"])
def test_text_adapters_work_on_quantised_encoders(kind, make):
    module, data, _ = make(f"quant.text_encoder_1={kind}", f"quant.text_encoder_2={kind}", "quant.cache=false")
    batch = batch_of(data)
    assert_close(module.conditioning(batch)["pooled_prompt_embeds"], batch.cond["pooled_prompt_embeds"])
    move(module)
    module.training_step(batch, 0)["loss"].backward()
    assert sum(p.grad is not None for p in module.text.encoders.parameters()) > 20

"""Exports load in a fresh process with the other libraries alone, and answer the same; live weights and averaged ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_matrix import compose, question
from torch.testing import assert_close

from dreambooth_lab.callbacks.ema import Ema
from dreambooth_lab.callbacks.export import Export
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.run import attach, build_adapter, build_family, build_text
from dreambooth_lab.runfolder import RunFolder

PROMPT = "a photo of sks dog"
FRESH = """
import copy, json, sys, torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from lycoris import create_lycoris_from_weights
from peft import PeftModel
from safetensors.torch import load_file, save_file

base, jobs, file = sys.argv[1:]
x = load_file(file)
for how, export in json.loads(jobs):
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    if how == "diffusers":
        pipeline.load_lora_weights(export)
    elif how == "kohya":
        pipeline.load_lora_weights(export, weight_name="kohya.safetensors")
    elif how == "peft":
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, export + "/peft")
    elif how == "peft of all":
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, export + "/peft")
        for part in ("text_encoder", "text_encoder_2"):
            PeftModel.from_pretrained(getattr(pipeline, part), export + "/peft/" + part)
    elif how == "lycoris":
        create_lycoris_from_weights(1.0, export + "/lycoris.safetensors", pipeline.unet)[0].apply_to()
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(export, subfolder="unet")
    states, _, pooled, _ = pipeline.encode_prompt("PROMPT", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled.expand(2, -1), "time_ids": x["size"]}
    with torch.no_grad():
        answer = pipeline.unet.eval()(x["x"], x["t"], states.expand(2, -1, -1), added_cond_kwargs=added).sample
    save_file({"y": answer, "states": states.detach(), "pooled": pooled.detach()}, export + "/" + how + ".out")
assert not any(name.startswith("dreambooth_lab") for name in sys.modules)
""".replace("PROMPT", PROMPT)
LOADS = {
    "lora": ("diffusers", "kohya", "peft"), "dora": ("diffusers", "peft"), "locon": ("lycoris",), "loha": ("lycoris",),
    "lokr": ("lycoris",), "oft": ("lycoris",), "full": ("full",), "lora+text": ("diffusers", "kohya", "peft of all"),
    "dora+text": ("diffusers",),
}  # fmt: skip


def moved(module, seed):
    """Weights as after some training: every one somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    return {name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for name, p in module.learning().items()}


def answer(module, weights):
    with torch.no_grad():
        for name, p in module.learning().items():
            p.copy_(weights[name])
        x, t, cond = question()
        text = module.text.encode([PROMPT]) if module.text else module.family.encode_text([PROMPT])
        cond = cond.put(torch.arange(2), text.repeat(2))
        return module.eval().predict(x, t, cond), text


@pytest.fixture(scope="module")
def written(tiny_sdxl, tmp_path_factory):
    """(kind, live or ema) → our answer and the export, after a fresh process has loaded them all."""
    root, ours, jobs = tmp_path_factory.mktemp("exports"), {}, []
    for kind, hows in LOADS.items():
        cfg = compose(tiny_sdxl, kind.removesuffix("+text"))
        cfg.adapter.text_encoders = [1, 2] if kind.endswith("+text") else []
        family, adapter, text = build_family(cfg), build_adapter(cfg), build_text(cfg, build_family(cfg))
        attach(cfg, family, adapter, text)
        module, folder = DreamBooth(cfg, family, adapter, text), RunFolder(root / kind)
        before, live, average = dict(module.learning()), moved(module, 1), moved(module, 2)
        ours[kind, "base"] = answer(module, {name: p.detach().clone() for name, p in before.items()})
        ours[kind, "ema"], ours[kind, "live"] = answer(module, average), answer(module, live)
        ema = Ema(0.9, 1, "cpu")
        ema.shadow = average
        Export(cfg, folder, ema).on_train_end(At(3), module)
        jobs += [(how, str(export)) for how in hows for export in (folder.export, folder.export / "ema")]
    x, t, cond = question()
    given = {"x": x, "t": module.path.native(t), "size": cond["size"]}
    save_file(given, root / "in")
    words = [sys.executable, "-c", FRESH, str(tiny_sdxl), json.dumps(jobs), str(root / "in")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, ours


class At:
    """A Trainer, as far as the export looks at one."""

    def __init__(self, step):
        self.global_step = self.max_steps = step


@pytest.mark.parametrize("which", ["live", "ema"])
@pytest.mark.parametrize(("kind", "how"), [(kind, how) for kind, hows in LOADS.items() for how in hows])
def test_an_export_answers_the_same_without_us(kind, how, which, written):
    root, ours = written
    theirs = load_file(root / kind / "export" / ("ema" if which == "ema" else "") / f"{how}.out")
    y, text = ours[kind, which]
    assert_close(theirs["y"], y, atol=1e-4, rtol=1e-4)
    assert_close(theirs["pooled"], text["pooled_prompt_embeds"], atol=1e-4, rtol=1e-4)
    assert_close(theirs["states"], text["prompt_embeds"], atol=1e-4, rtol=1e-4)
    before, base_text = ours[kind, "base"]
    assert (y - before).abs().max() > 1e-3, "it learned"
    assert kind.endswith("+text") == bool((text["prompt_embeds"] - base_text["prompt_embeds"]).abs().max() > 1e-2)


@pytest.mark.parametrize("kind", LOADS)
def test_every_file_says_what_made_it(kind, written):
    files = list((written[0] / kind / "export").rglob("*.safetensors"))
    hashes = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        assert said["steps"] == "3" and said["format"] == "pt" and "adapter:" in said["config"]
        assert said["base_model"] and said["made_by"].startswith("dreambooth-lab ") and said["instance_prompt"]
        hashes.add((said["weights_sha256"], "ema" in file.parts))
    assert len(hashes) == 2, "one hash for the live weights, another for the averaged"

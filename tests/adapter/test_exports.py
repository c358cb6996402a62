"""Exports load in a fresh process without this package and predict the same, for live and averaged weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_matrix import build, compose, learned, question
from torch.testing import assert_close

from dreambooth_lab.adapter import Form
from dreambooth_lab.adapter.files import read as read_lora
from dreambooth_lab.callbacks.ema import Ema
from dreambooth_lab.callbacks.export import Export
from dreambooth_lab.config import enums
from dreambooth_lab.config.schema import BlockConfig
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family, build_trainable_text
from dreambooth_lab.runfolder import RunFolder

PROMPT, TAGS = "a photo of sks dog", {"photos": {"sks dog": 4}}
FRESH = """
import copy, json, sys, torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from lycoris import LycorisNetwork, create_lycoris_from_weights
from peft import PeftModel
from safetensors.torch import load_file, save_file

base, jobs, file = sys.argv[1:]
x = load_file(file)
for how, export in json.loads(jobs):
    name = "dreambooth_ema" if export.endswith("ema") else "dreambooth"
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    if how == "diffusers":
        pipeline.load_lora_weights(export)
    elif how == "kohya":
        pipeline.load_lora_weights(export, weight_name=name + ".safetensors")
    elif how == "peft":
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, export + "/peft")
    elif how == "peft of all":
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, export + "/peft")
        for part in ("text_encoder", "text_encoder_2"):
            PeftModel.from_pretrained(getattr(pipeline, part), export + "/peft/" + part)
    elif how == "lycoris for programs":
        LycorisNetwork.apply_preset({"lora_prefix": "lora_unet"})
        create_lycoris_from_weights(1.0, export + f"/{name}.safetensors", pipeline.unet)[0].apply_to()
        LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})
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
LYCORIS = ("lycoris", "lycoris for programs")
LOADS = {
    "lora": ("diffusers", "kohya", "peft"), "dora": ("diffusers", "peft"), "locon": LYCORIS, "loha": LYCORIS,
    "lokr": LYCORIS, "oft": LYCORIS, "full": ("full",), "lora+text": ("diffusers", "kohya", "peft of all"),
    "dora+text": ("diffusers",), "lora+ranks": ("diffusers", "kohya", "peft"),
}  # fmt: skip


def moved(module, seed):
    """Perturb every trainable weight, as training does."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for name, p in module.trainable_parameters().items()
    }


def prediction(module, weights):
    with torch.no_grad():
        for name, p in module.trainable_parameters().items():
            p.copy_(weights[name])
        x, t, cond = question()
        text = module.text.encode([PROMPT]) if module.text else module.family.encode_text([PROMPT])
        cond = cond.replace_rows(torch.arange(2), text.repeat(2))
        return module.eval().predict(x, t, cond), text


@pytest.fixture(scope="module")
def written(tiny_sdxl, tmp_path_factory):
    """(kind, live or ema) → our prediction and the export, after a fresh process has loaded them all."""
    root, ours, jobs = tmp_path_factory.mktemp("exports"), {}, []
    for kind, hows in LOADS.items():
        cfg = compose(tiny_sdxl, kind.partition("+")[0])
        if kind.endswith("+ranks"):
            cfg.adapter.blocks = [BlockConfig("down_blocks", 2, 1.0)]
        cfg.export.dtype, cfg.export.formats = enums.Dtype.float32, list(enums.Format)
        cfg.adapter.text_encoders = [1, 2] if kind.endswith("+text") else []
        family, adapter, text = build_family(cfg), build_adapter(cfg), build_trainable_text(cfg, build_family(cfg))
        attach(cfg, family, adapter, text)
        module, folder = DreamBooth(cfg, family, adapter, text), RunFolder(root / kind)
        before, live, average = dict(module.trainable_parameters()), moved(module, 1), moved(module, 2)
        ours[kind, "base"] = prediction(module, {name: p.detach().clone() for name, p in before.items()})
        ours[kind, "ema"], ours[kind, "live"] = prediction(module, average), prediction(module, live)
        ema = Ema(0.9, 1, "cpu")
        ema.shadow = average
        Export(cfg, folder, ema, TAGS).on_train_end(At(3), module)
        jobs += [(how, str(export)) for how in hows for export in (folder.export, folder.export / "ema")]
    x, t, cond = question()
    given = {"x": x, "t": module.path.native(t), "size": cond["size"]}
    save_file(given, root / "in")
    words = [sys.executable, "-c", FRESH, str(tiny_sdxl), json.dumps(jobs), str(root / "in")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, ours


class At:
    """The attributes of a Trainer that the export reads."""

    def __init__(self, step):
        self.global_step = self.max_steps = step


@pytest.mark.parametrize("which", ["live", "ema"])
@pytest.mark.parametrize(("kind", "how"), [(kind, how) for kind, hows in LOADS.items() for how in hows])
def test_export_predicts_the_same_without_this_package(kind, how, which, written):
    root, ours = written
    theirs = load_file(root / kind / "export" / ("ema" if which == "ema" else "") / f"{how}.out")
    y, text = ours[kind, which]
    assert_close(theirs["y"], y, atol=1e-4, rtol=1e-4)
    assert_close(theirs["pooled"], text["pooled_prompt_embeds"], atol=1e-4, rtol=1e-4)
    assert_close(theirs["states"], text["prompt_embeds"], atol=1e-4, rtol=1e-4)
    before, base_text = ours[kind, "base"]
    assert (y - before).abs().max() > 1e-3, "the weights changed"
    assert kind.endswith("+text") == bool((text["prompt_embeds"] - base_text["prompt_embeds"]).abs().max() > 1e-2)


@pytest.mark.parametrize("kind", LOADS)
def test_every_file_header_describes_its_run(kind, written):
    files = list((written[0] / kind / "export").rglob("*.safetensors"))
    hashes = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        assert header["steps"] == "3" and header["format"] == "pt" and "adapter:" in header["config"]
        assert header["base_model"] and header["made_by"].startswith("dreambooth-lab ") and header["instance_prompt"]
        hashes.add((header["weights_sha256"], "ema" in file.parts))
    assert len(hashes) == 2, "one hash for the live weights, another for the averaged"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lokr", "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_file_predicts_nearly_the_same_and_training_stays_float32(kind, dtype, tiny_sdxl, tmp_path):
    cfg = compose(tiny_sdxl, kind)
    module, _ = build(cfg)
    weights = moved(module, 1)
    trained, _ = prediction(module, weights)
    before = {name: p.detach().clone() for name, p in module.trainable_parameters().items()}
    form = Form("it", dtype, (enums.Format.diffusers, enums.Format.comfyui))
    files = module.adapter.export(tmp_path, learned(module)._replace(form=form))
    assert all(torch.equal(p, before[name]) and p.dtype is torch.float32 for name, p in module.trainable_parameters().items())
    for file in tmp_path.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values() if tensor.ndim} == {dtype}, file
    assert {path for path in files if (tmp_path / path).is_file()} <= {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
    again, _ = build(compose(tiny_sdxl, kind), seed=5)
    base, _ = prediction(again, dict(again.trainable_parameters()))
    again.adapter.load_weights(tmp_path)
    read, _ = prediction(again, {name: p.detach().clone() for name, p in again.trainable_parameters().items()})
    assert 0 < (read - trained).norm() < (0.01 if dtype is torch.float16 else 0.06) * (trained - base).norm()


def test_values_beyond_float16_are_written_in_float32_with_a_warning(tiny_sdxl, tmp_path, caplog):
    module, _ = build(compose(tiny_sdxl, "lora"))
    weights = {name: p.data.mul_(1e6) for name, p in module.trainable_parameters().items()}
    assert max(w.abs().max() for w in weights.values()) > 65504
    module.adapter.export(tmp_path, learned(module)._replace(form=Form("it", torch.float16, (enums.Format.diffusers,))))
    (file,) = tmp_path.glob("*.safetensors")
    assert all(tensor.isfinite().all() and tensor.dtype is torch.float32 for tensor in load_file(file).values())
    assert "is written in float32" in caplog.text and "export.dtype=bfloat16" in caplog.text


@pytest.mark.parametrize("name", ["kohya", "lycoris"])
def test_lycoris_files_have_kohya_names_and_lycoris_names(name, tiny_sdxl, tmp_path):
    module, layers = build(compose(tiny_sdxl, "lokr"))
    module.adapter.export(tmp_path, learned(module))
    prefix = {"kohya": "lora_unet", "lycoris": "lycoris"}[name]
    named = {key.partition(".")[0] for key in load_file(tmp_path / f"{name}.safetensors")}
    assert named == {f"{prefix}_{layer.replace('.', '_')}" for layer in layers}


def test_all_layers_of_a_lora_have_equal_scale(tiny_sdxl, tmp_path):
    """Layers of several ranks, with an alpha that differs from all of them."""
    cfg = compose(tiny_sdxl, "lora")
    cfg.adapter.blocks = [BlockConfig("down_blocks", 2, 1.0)]
    module, _ = build(cfg)
    module.adapter.export(tmp_path, learned(module))
    scales = [read_lora(tmp_path / name).parts["unet"] for name in ("pytorch_lora_weights.safetensors", "peft")]
    assert {layer.scale for layers in scales for layer in layers.values()} == {1.0}
    assert {layer.rank for layer in scales[0].values()} == {2, 4}
    alphas = {float(t) for key, t in load_file(tmp_path / "kohya.safetensors").items() if key.endswith(".alpha")}
    assert alphas == {4.0}, "one alpha, the adapter's rank"

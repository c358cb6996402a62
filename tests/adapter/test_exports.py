"""Exports load in a fresh process with the other libraries alone, and answer the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_matrix import build, compose, question
from torch.testing import assert_close

START = """
import sys, torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
base, export, file = sys.argv[1:]
pipeline = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
unet = pipeline.unet
"""
LOAD = {
    "diffusers": "pipeline.load_lora_weights(export)",
    "kohya": "pipeline.load_lora_weights(export, weight_name='kohya.safetensors')",
    "peft": "from peft import PeftModel; unet = PeftModel.from_pretrained(unet, export + '/peft')",
    "lycoris": (
        "from lycoris import create_lycoris_from_weights as c; n, _ = c(1.0, export + '/lycoris.safetensors', unet); n.apply_to()"
    ),
    "full": "unet = UNet2DConditionModel.from_pretrained(export, subfolder='unet')",
}
END = """
x = load_file(file)
assert not any(name.startswith("dreambooth_lab") for name in sys.modules)
added = {"text_embeds": x["pooled"], "time_ids": x["size"]}
save_file({"y": unet.eval()(x["x"], x["t"], x["states"], added_cond_kwargs=added).sample.detach()}, file + ".out")
"""


@pytest.mark.parametrize(
    ("adapter", "how"),
    [("lora", "diffusers"), ("lora", "kohya"), ("lora", "peft"), ("dora", "diffusers"), ("dora", "peft"),
     ("locon", "lycoris"), ("loha", "lycoris"), ("lokr", "lycoris"), ("full", "full")],
)  # fmt: skip
def test_an_export_answers_the_same_without_us(adapter, how, tiny_sdxl, tmp_path):
    module, _ = build(compose(tiny_sdxl, adapter))
    generator = torch.Generator().manual_seed(1)
    for p in module.learning().values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    module.eval()
    x, t, cond = question()
    own = {name.partition(".")[2]: p for name, p in module.learning().items()}
    files = module.adapter.export(tmp_path / "export", own, "unet", {"base_model": "b", "steps": "3"})
    with safe_open(next(f for f in files if f.suffix == ".safetensors"), "pt") as opened:
        assert opened.metadata()["base_model"] == "b" and opened.metadata()["steps"] == "3"
    given = {"x": x, "t": module.path.native(t), "states": cond.states, "pooled": cond.pooled, "size": cond.size}
    save_file(given, tmp_path / "in")
    words = [sys.executable, "-c", START + LOAD[how] + END, str(tiny_sdxl), str(tmp_path / "export"), str(tmp_path / "in")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        ours = module.predict(x, t, cond)
        with module.adapter.base():
            assert (ours - module.predict(x, t, cond)).abs().max() > 1e-3
    assert_close(load_file(tmp_path / "in.out")["y"], ours, atol=1e-4, rtol=1e-4)

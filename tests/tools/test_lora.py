"""LoRA files: the same update in every layout, resizing with optimal error, exact merges, and baked pipelines."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.adapter import ExportWeights, Form
from dreambooth_lab.adapter.files import read
from dreambooth_lab.config import enums
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family, build_trainable_text
from dreambooth_lab.tools.lora import main

ALL = Form("kohya", torch.float32, tuple(enums.Format))
DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"


def export(tiny_sdxl, folder, seed, *more):
    """Export a LoRA of the UNet and both text encoders with random weights."""
    cfg = lab.compose("model=sdxl", f"model.pretrained={tiny_sdxl}", "model.resolution=64", "dataset=folder", "dataset.path=.",
                      "model.dtype=float32", "adapter=lora", "adapter.alpha=3", "adapter.rank=4", "trainer.accelerator=cpu",
                      "adapter.text_encoders=[1,2]", "adapter.parts=[attention,feed_forward,convolution]", *more)  # fmt: skip
    family, adapter = build_family(cfg), build_adapter(cfg)
    text = build_trainable_text(cfg, family)
    attach(cfg, family, adapter, text)
    module = DreamBooth(cfg, family, adapter, text)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    owned = module.by_owner(module.trainable_parameters())
    adapter.export(folder, ExportWeights("unet", owned.pop("unet"), owned, {"steps": "3"}, family.kohya, ALL))
    return folder


@pytest.fixture(scope="module")
def exports(tiny_sdxl, tmp_path_factory):
    """Two exports, the second with another rank in some layers."""
    root = tmp_path_factory.mktemp("exports")
    other = "adapter.blocks=[{match: up_blocks, rank: 2, lr_ratio: 1}]"
    return export(tiny_sdxl, root / "a", 1), export(tiny_sdxl, root / "b", 2, other)


def dense(path):
    """Part and layer → s · B A, as a matrix."""
    parts = read(path).parts
    return {
        f"{part}.{name}": one.alpha / len(one.down) * one.up.flatten(1).double() @ one.down.flatten(1).double()
        for part, layers in parts.items()
        for name, one in layers.items()
    }


def pipe(base):
    return StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)


def prediction(pipeline):
    states, _, pooled, _ = pipeline.encode_prompt("a photo of sks dog", do_classifier_free_guidance=False)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    added = {"text_embeds": pooled, "time_ids": torch.full((1, 6), 64.0)}
    with torch.no_grad():
        return pipeline.unet.eval()(x, 300, states, added_cond_kwargs=added).sample


@pytest.fixture(scope="module")
def predictions(tiny_sdxl, exports):
    """Predictions of the base, and with each export's diffusers file loaded."""
    return [prediction(loaded(tiny_sdxl, path)) for path in (None, *(folder / DIFFUSERS for folder in exports))]


def loaded(base, path):
    pipeline = pipe(base)
    if path and path.is_dir():
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, path)
        for part in ("text_encoder", "text_encoder_2"):
            PeftModel.from_pretrained(getattr(pipeline, part), path / part)
    elif path:
        pipeline.load_lora_weights(path)
    return pipeline


@pytest.mark.parametrize("which", [0, 1])
def test_three_layouts_of_an_export_give_the_same_update(which, exports):
    folder = exports[which]
    ours = dense(folder / DIFFUSERS)
    for name, layout in ((KOHYA, "kohya"), ("peft", "peft")):
        assert read(folder / name).layout == layout
        theirs = dense(folder / name)
        assert theirs.keys() == ours.keys() and len(ours) > 40
        for layer in ours:
            assert_close(theirs[layer], ours[layer], atol=1e-6, rtol=0)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("source", [DIFFUSERS, KOHYA, "peft"])
@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_converted_file_gives_the_same_update_and_prediction(
    which, source, to, exports, predictions, tiny_sdxl, tmp_path, capsys
):
    output = tmp_path / ("folder" if to == "peft" else "out.safetensors")
    call("convert", exports[which] / source, "--to", to, "--output", output)
    ours, theirs = dense(exports[which] / DIFFUSERS), dense(output)
    assert theirs.keys() == ours.keys() and read(output).layout == to
    for layer in ours:
        assert_close(theirs[layer], ours[layer], atol=1e-6, rtol=0)
    assert_close(prediction(loaded(tiny_sdxl, output)), predictions[which + 1], atol=1e-4, rtol=1e-4)
    assert (predictions[which + 1] - predictions[0]).abs().max() > 1e-2, "the update changes the prediction"


def call(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code


def refused(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_headers_are_kept_except_outdated_fields(exports, tmp_path):
    call("convert", exports[0] / DIFFUSERS, "--to", "kohya", "--output", tmp_path / "k.safetensors", "--dtype", "float16")
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        header = file.metadata()
        assert {str(file.get_tensor(key).dtype) for key in file.keys() if "lora_" in key.partition(".")[2]} == {"torch.float16"}  # noqa: SIM118
    assert header["steps"] == "3" and header["ss_network_dim"] == "4" and "lora_adapter_metadata" not in header


@pytest.mark.parametrize("how", [("--rank", "2"), ("--keep", "0.9")])
def test_resized_file_has_the_optimal_error(how, exports, tmp_path, capsys):
    call("resize", exports[0] / KOHYA, *how, "--output", tmp_path / "small.safetensors")
    printed = capsys.readouterr().out.partition("error    ")[2].partition("\n")[0]
    before, after = dense(exports[0] / KOHYA), dense(tmp_path / "small.safetensors")
    whole = error = bound = 0.0
    for layer, full in before.items():
        squares = torch.linalg.svdvals(full).square()
        shares = squares.cumsum(0) / squares.sum()
        rank = 2 if how[0] == "--rank" else int((shares < 0.9).sum()) + 1
        assert torch.linalg.matrix_rank(after[layer], rtol=1e-5) <= rank
        bound += squares[rank:].sum().item()
        error, whole = error + (full - after[layer]).square().sum().item(), whole + squares.sum().item()
    error, bound = (error / whole) ** 0.5, (bound / whole) ** 0.5
    assert bound > 0.01 and abs(error - bound) < 1e-4 * bound
    values = [float(word) for word in printed.replace(";", " ").split() if word[0].isdigit()]
    assert values == pytest.approx([error, bound], rel=1e-4)


@pytest.mark.parametrize("rank", [None, 8])
def test_merge_is_the_weighted_sum(rank, exports, tmp_path):
    """Also when resized to a rank that keeps the whole update."""
    more = ["--rank", rank] if rank else []
    words = [exports[0] / KOHYA, exports[1] / DIFFUSERS, "--weights", "0.75", "-0.5", "--output", tmp_path / "m.safetensors"]
    call("merge", *words, *more)
    a, b, both = dense(exports[0] / DIFFUSERS), dense(exports[1] / DIFFUSERS), dense(tmp_path / "m.safetensors")
    for layer in a:
        assert_close(both[layer], 0.75 * a[layer] - 0.5 * b[layer], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("which", "name", "strength"), [(0, KOHYA, 1.0), (1, "peft", 0.5)])
def test_baked_pipeline_predicts_like_the_base_with_the_lora(which, name, strength, exports, predictions, tiny_sdxl, tmp_path):
    call("bake", exports[which] / name, "--base", tiny_sdxl, "--output", tmp_path / "baked", "--strength", strength)
    with_lora = pipe(tiny_sdxl)
    with_lora.load_lora_weights(exports[which] / DIFFUSERS, adapter_name="it")
    with_lora.set_adapters("it", strength)
    baked = pipe(tmp_path / "baked")
    assert not [key for key in baked.unet.state_dict() if "lora" in key]
    assert_close(prediction(baked), prediction(with_lora), atol=1e-4, rtol=1e-4)
    assert (prediction(baked) - predictions[0]).abs().max() > 1e-2


def test_lora_of_another_base_is_not_baked(exports, tiny_sdxl, tmp_path, capsys):
    one = {"unet.nosuch.to_q.lora_A.weight": torch.zeros(2, 8), "unet.nosuch.to_q.lora_B.weight": torch.zeros(8, 2)}
    save_file(one, tmp_path / "other.safetensors")
    output = refused(capsys, "bake", tmp_path / "other.safetensors", "--base", tiny_sdxl, "--output", tmp_path / "baked")
    assert "--base" in output and not (tmp_path / "baked").exists()


def test_ai_toolkit_file_uses_rank_as_alpha_with_a_notice(tmp_path, capsys):
    names = [f"diffusion_model.layers.{i}.attention.to_q" for i in (0, 1)]
    torch.manual_seed(0)
    weights = {
        f"{name}.lora_{end}.weight": torch.randn(3, 6) if end == "A" else torch.randn(5, 3) for name in names for end in "AB"
    }
    save_file(weights, tmp_path / "ai.safetensors")
    call("inspect", tmp_path / "ai.safetensors")
    output = capsys.readouterr()
    assert "2 layers" in output.err and "alpha = rank" in output.err and "comfyui" in output.out
    call("convert", tmp_path / "ai.safetensors", "--to", "diffusers", "--output", tmp_path / "d.safetensors")
    capsys.readouterr()
    call("inspect", tmp_path / "d.safetensors")
    assert "note" not in capsys.readouterr().err
    for i in (0, 1):
        down, up = (weights[f"{names[i]}.lora_{end}.weight"].double() for end in "AB")
        assert_close(dense(tmp_path / "d.safetensors")[f"transformer.layers.{i}.attention.to_q"], up @ down)


def test_rslora_and_rank_patterns_scale_as_in_peft(exports, tmp_path):
    file = exports[0] / "peft" / "adapter_model.safetensors"
    layer = next(key for key in load_file(file) if key.endswith("to_q.lora_A.weight"))
    layer = layer.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    (tmp_path / "adapter_model.safetensors").write_bytes(file.read_bytes())
    config = {"lora_alpha": 6, "r": 4, "use_rslora": True, "alpha_pattern": {layer: 10}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scales = {name: one.scale for name, one in read(tmp_path).parts["unet"].items()}
    assert scales.pop(layer) == pytest.approx(10 / 2) and list(scales.values()) == pytest.approx([6 / 2] * len(scales))


def test_inspect_reports_layers_ranks_and_norms(exports, capsys):
    call("inspect", exports[1] / KOHYA)
    output = capsys.readouterr().out
    update = dense(exports[1] / DIFFUSERS)
    block = [full for name, full in update.items() if name.startswith("unet.down_blocks.1.")]
    norm = sum(full.square().sum() for full in block).sqrt()
    row = next(line for line in output.splitlines() if "down_blocks.1 " in line)
    assert str(len(block)) in row and f"{norm:.4g}" in row
    assert "kohya" in output and "2 (" in output and "4 (" in output and "float32" in output


@pytest.mark.parametrize("file", ["lora.bin", "lora.safetensors"])
def test_pickle_is_refused_and_not_loaded(file, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    (tmp_path / file).write_bytes(pickle.dumps(Bomb()))
    torch.save({"a": torch.zeros(1)}, tmp_path / "torch.safetensors")
    for name in (file, "torch.safetensors"):
        output = refused(capsys, "inspect", tmp_path / name)
        assert name in output and "pickle" in output
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "message"),
    [("unet.conv.weight", "is not a LoRA"), ("lora_unet_a.hada_w1_a", "LoHa"), ("unet.a.lora_magnitude_vector", "DoRA"),
     ("unet.a.lora_A.weight", "lacks")],
)  # fmt: skip
def test_files_other_than_plain_loras_are_refused_by_name(key, message, tmp_path, capsys):
    save_file({key: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    output = refused(capsys, "inspect", tmp_path / "x.safetensors")
    assert "x.safetensors" in output and message in output


def test_invalid_options_are_named(exports, tmp_path, capsys):
    file, out = exports[0] / KOHYA, tmp_path / "o.safetensors"
    assert "--keep is 2" in refused(capsys, "resize", file, "--keep", "2", "--output", out)
    assert "--rank R or --keep" in refused(capsys, "resize", file, "--output", out)
    assert "--weights has 1" in refused(capsys, "merge", file, file, "--weights", "0.5", "--output", out)
    assert "does not exist" in refused(capsys, "inspect", tmp_path / "absent.safetensors")
    assert not out.exists()


def test_original_layout_is_inspected_and_not_converted(tmp_path, capsys):
    """FLUX in sd-scripts' layout: one matrix for q, k and v."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    one = {
        f"{name}.lora_down.weight": torch.ones(2, 4),
        f"{name}.lora_up.weight": torch.ones(12, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(one, tmp_path / "flux.safetensors")
    call("inspect", tmp_path / "flux.safetensors")
    assert "double_blocks.0" in capsys.readouterr().out
    for to in ("diffusers", "kohya", "peft"):
        output = refused(capsys, "convert", tmp_path / "flux.safetensors", "--to", to, "--output", tmp_path / "out")
        assert "double_blocks" in output and "save_lora_weights" in output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "layer"),
    [("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{}.weight", "attn1.to_out.0"),
     ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.{}.weight", "attn1.to_q"),
     ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight", "self_attn.q_proj")],
)  # fmt: skip
def test_old_diffusers_names_are_read(key, layer, tmp_path):
    save_file({key.format("down"): torch.ones(2, 4), key.format("up"): torch.ones(3, 2)}, tmp_path / "old.safetensors")
    ((found, one),) = (item for layers in read(tmp_path / "old.safetensors").parts.values() for item in layers.items())
    assert found.endswith(layer) and "processor" not in found and one.down.shape == (2, 4) and one.up.shape == (3, 2)


def test_half_precision_keeps_its_dtype_and_norms(exports, tmp_path):
    half = tmp_path / "half.safetensors"
    call("convert", exports[1] / KOHYA, "--to", "diffusers", "--output", half, "--dtype", "bfloat16")
    call("resize", half, "--rank", 4, "--output", tmp_path / "again.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "again.safetensors").values()} == {torch.bfloat16}
    ours, theirs = dense(exports[1] / KOHYA), dense(tmp_path / "again.safetensors")
    for layer in ours:
        assert (theirs[layer] - ours[layer]).norm() < 0.02 * ours[layer].norm()


def test_values_beyond_the_dtype_are_refused(tmp_path, capsys):
    one = {"unet.conv_in.lora_A.weight": torch.full((2, 4), 1e6), "unet.conv_in.lora_B.weight": torch.ones(3, 2)}
    save_file(one, tmp_path / "big.safetensors")
    words = [
        "convert",
        tmp_path / "big.safetensors",
        "--to",
        "kohya",
        "--output",
        tmp_path / "o.safetensors",
        "--dtype",
        "float16",
    ]
    assert "--dtype float16" in refused(capsys, *words) and not (tmp_path / "o.safetensors").exists()

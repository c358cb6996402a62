"""Quantised models: which layers, the error, and the cache."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, adapter_rules, check, enums
from dreambooth_lab.factory import build_family
from dreambooth_lab.fake_tensors import LiveBytes
from dreambooth_lab.quant import Quantiser, Source, backend, check_supported
from dreambooth_lab.quant.base import layers_to_quantize
from dreambooth_lab.run import run

LIBRARY = {"torchao": "torchao", "nf4": "bitsandbytes"}
# Largest relative error of a prediction, and bytes per weight at 1024 inputs, by the definition of the formats.
BOUNDS = {
    enums.QuantKind.int8: (0.01, 1.01),
    enums.QuantKind.int4: (0.12, 0.57),
    enums.QuantKind.int2: (0.6, 0.32),
    enums.QuantKind.fp8: (0.05, 1.01),
    enums.QuantKind.int8_torchao: (0.01, 1.01),
    enums.QuantKind.int4_torchao: (0.12, 1.17),
    enums.QuantKind.fp8_torchao: (0.05, 1.01),
    enums.QuantKind.nf4: (0.15, 0.57),
}


def need(kind: enums.QuantKind) -> None:
    library = LIBRARY.get(kind.value.rpartition("_")[2], "optimum.quanto")
    if not find_spec(library.partition(".")[0]) or not find_spec(library):
        pytest.skip(f"{library} is not installed")


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 1024), nn.SiLU(), nn.Linear(1024, 256, bias=False), nn.Linear(256, 40)).to(dtype)


def source(file: Path, dtype: torch.dtype, reads: list[int]) -> Source:
    file.write_text("weights")

    def read(device: torch.device) -> nn.Module:
        reads.append(1)
        return network(dtype)

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return network(dtype)

    return Source(read, on_meta, (file,), dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BOUNDS, ids=lambda k: k.value)
def test_error_is_within_its_bound_and_the_cache_is_bit_identical(kind, dtype, tmp_path):
    need(kind)
    x, reads = torch.randn(6, 32).to(dtype), []
    where = source(tmp_path / "weights", dtype, reads)
    exact = network(dtype)(x).float()
    first, second = Quantiser({"m": kind}, tmp_path / "c"), Quantiser({"m": kind}, tmp_path / "c")
    made, kept = first.load("m", where, ["0"]), second.load("m", where, ["0"])
    assert len(reads) == 1, "the second start reads no full-precision weights"
    error, bytes_a_weight = BOUNDS[kind]
    with torch.no_grad():
        output = made(x).float()
        assert torch.equal(output, kept(x).float())
    assert 1e-4 < (output - exact).norm() / exact.norm() < error
    done = second.done["m"]
    assert done.cached and not first.done["m"].cached and done.layers == 2 and done.left == ("0",)
    assert done.weights_size / done.weights <= bytes_a_weight
    assert done._replace(seconds=0, cached=False) == first.done["m"]._replace(seconds=0)
    assert type(kept[0]) is nn.Linear and kept[0].weight.dtype is dtype


@pytest.mark.parametrize("kind", BOUNDS, ids=lambda k: k.value)
def test_gradients_pass_through_after_an_evaluation(kind, tmp_path):
    """bitsandbytes once repacked its weights in evaluation mode, which made later training fail."""
    need(kind)
    model = Quantiser({"m": kind}, None).load("m", source(tmp_path / "w", torch.float32, []), [])
    x = torch.randn(6, 32)
    with torch.no_grad():
        before = model.eval()(x)
    y = x.clone().requires_grad_()
    after = model.train()(y)
    after.square().sum().backward()
    assert torch.equal(before, after) and y.grad.abs().sum() > 0


def test_changed_weights_and_damage_are_detected(tmp_path, caplog):
    need(enums.QuantKind.int8)
    reads: list[int] = []
    where = source(tmp_path / "weights", torch.float32, reads)
    Quantiser({"m": enums.QuantKind.int8}, tmp_path / "c").load("m", where, [])
    (tmp_path / "weights").write_text("other weights")
    Quantiser({"m": enums.QuantKind.int8}, tmp_path / "c").load("m", where, [])
    assert len(reads) == 2
    for file in (tmp_path / "c").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    Quantiser({"m": enums.QuantKind.int8}, tmp_path / "c").load("m", where, [])
    assert len(reads) == 3 and "quantising again" in caplog.text


def test_family_names_the_layers_to_skip(tiny_sdxl):
    family = build_family(lab.compose("model=sdxl", f"model.pretrained={tiny_sdxl}", "model.dtype=float32"))
    names, left = layers_to_quantize(family.denoiser, family.skip_quantization)
    assert {name.split(".")[0] for name in left if "time_emb_proj" not in name} == {"time_embedding", "add_embedding"}
    assert all("attentions" in name for name in names) and len(names) > 20


def test_simpletuner_spellings_are_aliases():
    cfg = lab.compose("quant=nf4-bnb", "quant.text_encoder_1=no_change", "quant.text_encoder_2=int8-quanto")
    assert (cfg.quant.kind, cfg.quant.text_encoder_1, cfg.quant.text_encoder_2) == (
        enums.QuantKind.nf4,
        enums.QuantKind.none,
        enums.QuantKind.int8,
    )


def test_missing_library_is_refused(monkeypatch):
    monkeypatch.setattr(adapter_rules, "installed", lambda name: False)
    with pytest.raises(ConfigError, match=r"quant\.text_encoder_2 is nf4, but bitsandbytes is not installed; pip install"):
        check(lab.compose("dataset.path=.", "quant=int8", "quant.text_encoder_2=nf4"))


def test_float8_on_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"needs CUDA capability 8\.9; this device has 8\.6"):
        check_supported(enums.QuantKind.fp8_torchao, torch.device("cuda"))
    check_supported(enums.QuantKind.fp8_torchao, torch.device("cpu"))


def test_int8_run_trains_and_its_second_start_reads_the_cache(small, tmp_path):
    need(enums.QuantKind.int8)
    words = [*small, "quant=int8", "quant.text_encoder_2=int8", "validation.every_n_steps=0", f"cache={tmp_path / 'cache'}"]
    for name, message in (("first", "quantised in"), ("second", "from the cache")):
        run(lab.compose(*words), tmp_path / name)
        text = " ".join(lab.load(tmp_path / name).folder.preflight.read_text().replace("│", " ").split())
        assert "unet in int8" in text and message in text
    assert lab.load(tmp_path / "first").series == lab.load(tmp_path / "second").series


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_frozen_layer_saves_no_input_for_backward(kind):
    layer = backend(enums.QuantKind(kind)).quantise(nn.Linear(128, 128, bias=False).requires_grad_(False))
    x = torch.randn(64, 128, requires_grad=True)
    with LiveBytes([*layer.parameters(), *layer.buffers()]) as live_bytes:
        y = layer(x * 2)  # a tensor without other references
        assert live_bytes.live < 1.5 * y.nbytes
    expected = 2 * torch.ones(64, 128) @ layer.weight.dequantize()
    y.sum().backward()
    assert torch.allclose(x.grad, expected, atol=1e-4)

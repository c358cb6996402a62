"""Blocks in the host's memory: the same numbers, and never more than one block's copies at once."""

import gc
import weakref

import pytest
import torch

import tiny_families
from dreambooth_lab import lab
from dreambooth_lab.batch import Text
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family
from dreambooth_lab.models import offload
from dreambooth_lab.profiling import memory
from dreambooth_lab.run import run

CPU = torch.device("cpu")
ON = ["model.gradient_checkpointing=true"]


def step(small, *words, offloaded):
    """Loss and gradients of one training step, and the family."""
    cfg = lab.compose(*small, *words)
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    if offloaded:
        family.blocks = offload.Blocks(family.denoiser, CPU)
    adapter = build_adapter(cfg)
    attach(cfg, family, adapter, None)
    module = DreamBooth(cfg, family, adapter).train()
    loss = module.training_step(data.build(data.schedule.batch(0)), 0)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.trainable_parameters().items()}, family


WORDS = [
    [], ["adapter=dora"], ["adapter=lokr"], ["adapter=locon"], ["model.dtype=bfloat16"], ["quant=int8"], ["quant=int8_torchao"],
    ["quant=int4"], ["rollout.enabled=true", "rollout.ramp_steps=0", "rollout.probability=1.0"],
]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(w, id=" ".join(w), marks=[] if w in ([], ["adapter=dora"], ["quant=int8"]) else [pytest.mark.slow])
        for w in WORDS
    ],
)
def test_a_step_is_the_same_to_the_bit(small, words, checkpointing):
    words = [*words, f"model.gradient_checkpointing={checkpointing}"]
    (loss, grads, _), (again, offloaded, family) = (step(small, *words, offloaded=on) for on in (False, True))
    assert family.blocks.order, "some block ran"
    assert torch.equal(loss, again)
    assert grads.keys() == offloaded.keys() and all(torch.equal(grads[name], offloaded[name]) for name in grads)


@pytest.mark.parametrize("name", [name for name in tiny_families.PIPELINES if name not in ("deepfloyd_1", "deepfloyd_2")])
def test_every_family_has_blocks_that_answer_the_same(folders, name, small):
    words = [f"model={tiny_families.model_of(name)}", f"model.pretrained={folders(name)}", *small[2:4], "model.resolution=64"]
    family = build_family(lab.compose(*words, "trainer.accelerator=cpu"))
    text = family.encode_text(["a photo of a dog"])
    cells = max(family.stride // family.factor, 8)
    texts = Text.stack([text] * 2)
    module = type("Asked", (), {"family": family})
    inputs = memory.probe(module, text, cells, cells, 2)
    assert texts.rows == len(inputs[0])
    with torch.no_grad():
        before = family.denoise(*inputs)
        blocks = offload.Blocks(family.denoiser, CPU)
        after = family.denoise(*inputs)
    assert torch.equal(before, after) and len(blocks.order) == len(blocks.homes)


def test_copies_are_gone_once_their_block_has_run(small, monkeypatch):
    alive, most = weakref.WeakSet(), []
    send = offload.Blocks._send

    def counted(self, number):
        gc.collect()
        most.append(len(alive))
        coming = send(self, number)
        alive.update(coming.weights.values())
        return coming

    monkeypatch.setattr(offload.Blocks, "_send", counted)
    _, _, family = step(small, *ON, offloaded=True)
    blocks = len(family.blocks.homes)
    assert blocks > 1 and len(most) >= 2 * blocks, "forward, and again for the gradient"
    assert not any(most), "nothing of the blocks before is there when another comes"


@pytest.mark.parametrize("kind", ["none", "int8", "int4", "fp8", "int8_torchao"])
def test_page_locked_weights_are_the_same_weights(small, kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    family = build_family(lab.compose(*small, f"quant={kind}"))
    (block, *_) = offload.repeated(family.denoiser)
    for parameter in block.parameters():
        pinned = offload._pin(parameter.detach())
        assert type(pinned) is type(parameter.detach())
        assert all(torch.equal(a, b) for a, b in zip(offload.parts(pinned), offload.parts(parameter), strict=True))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(offload.parts(pinned), offload.parts(parameter), strict=True))


def test_only_the_blocks_stay_when_a_model_moves(small):
    family = build_family(lab.compose(*small))
    blocks = offload.Blocks(family.denoiser, CPU)
    adapter = build_adapter(lab.compose(*small))
    adapter.attach(family.denoiser, family.target_modules, 0)
    own = {id(home) for homes in blocks.homes for home in homes.values()}
    family.denoiser.to(torch.float64)
    for name, parameter in family.denoiser.named_parameters():
        assert parameter.dtype is (torch.float32 if id(parameter) in own else torch.float64), name
    assert sum(blocks.sizes) == sum(4 * home.numel() for homes in blocks.homes for home in homes.values())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "model.offload is blocks without gradient checkpointing"),
        ([*ON, "trainer.accelerator=cpu"], "model.offload is blocks, but trainer.accelerator is cpu"),
        ([*ON, "model.compile=true"], "model.offload is blocks with model.compile=true"),
        ([*ON, "adapter=full"], "model.offload is blocks with adapter=full"),
        ([*ON, "quant=nf4"], "model.offload is blocks with quant.kind=nf4"),
    ],
)
def test_what_cannot_work_is_refused(small, words, why):
    with pytest.raises(ConfigError, match=why):
        check(lab.compose(*small, "trainer.accelerator=auto", "model.offload=blocks", *words))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["trainer.devices=1"], "trainer.strategy is fsdp with one process"),
        (["model.gradient_checkpointing=false"], "trainer.strategy is fsdp without gradient checkpointing"),
        (["model.offload=blocks"], "model.offload is blocks with trainer.strategy=fsdp"),
        (["model.compile=true"], "trainer.strategy is fsdp with model.compile=true"),
        (["adapter=full"], "trainer.strategy is fsdp with adapter=full"),
        (["quant=nf4"], "trainer.strategy is fsdp with quant.kind=nf4"),
    ],
)
def test_what_cannot_be_divided_is_refused(small, words, why):
    with pytest.raises(ConfigError, match=why):
        check(lab.compose(*small, *ON, "trainer.devices=2", "trainer.strategy=fsdp", *words))


def test_network_without_repeated_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.strategy=fsdp need .* which a Linear does not define; set"):
        offload.repeated(type("Linear", (torch.nn.Linear,), {"_repeated_blocks": (), "_no_split_modules": None})(2, 2))


def test_without_a_gpu_there_is_nowhere_to_offload_to(small, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="the run's device is the CPU"):
        run(lab.compose(*small, "trainer.accelerator=auto", "model.offload=blocks", *ON), tmp_path)


@pytest.mark.gpu
def test_on_cuda_blocks_come_and_go(small, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    words = ["trainer.accelerator=gpu", *ON, "validation.every_n_steps=0", "adapter.init_from=null"]
    plain = run(lab.compose(*small, *words), tmp_path / "plain")
    moved = run(lab.compose(*small, *words, "model.offload=blocks"), tmp_path / "moved")
    assert plain["train/loss"] == pytest.approx(moved["train/loss"], rel=1e-4)

"""A step never synchronises with the device: tested with the meta device, whose values can't be read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreambooth_lab import lab
from dreambooth_lab.batch import ON_HOST
from dreambooth_lab.callbacks.ema import Ema
from dreambooth_lab.callbacks.metrics import StepMetrics
from dreambooth_lab.data.module import Samples
from dreambooth_lab.tools.common.training import build_training
from test_objective import WALK, build, halves, strayed

META = torch.device("meta")
READS = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "unique_dim", "_unique2",
    "repeat_interleave",
}  # fmt: skip


def on_device(value):
    return isinstance(value, torch.Tensor) and value.device == META


class Waits(TorchDispatchMode):
    """Lists operations that would synchronise with a CUDA device: reading values, value-dependent sizes, blocking copies."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        masks = [value for value in given if on_device(value) and value.dtype in (torch.bool, torch.uint8)]
        if (name in READS and any(map(on_device, given))) or (name in ("index", "index_put", "index_put_") and masks):
            self.seen.append(name)
        made = func(*args, **kwargs)
        if name == "_to_copy" and on_device(given[0]) != on_device(made) and not kwargs.get("non_blocking"):
            self.seen.append(f"{name} from {given[0].device} to {made.device}")
        if name == "copy_" and on_device(args[0]) != on_device(args[1]) and not (len(args) > 2 and args[2]):
            self.seen.append(f"{name} from {args[1].device} to {args[0].device}")
        return made


@pytest.mark.parametrize("words", [
    ["prior=teacher", *WALK, "rollout.sampler=dpm", "mask.outside=teacher", "mask.normalize=true"],
    ["prior=bank", "objective.weight=min_snr", "objective.loss=huber", "objective.timesteps=logit_normal"],
    ["prior=teacher", "objective.weight=learned"],
    ["prior=noise", "rollout.enabled=true", "rollout.kind=input_perturbation", "rollout.ramp_steps=0"],
    ["prior=teacher", *WALK, "adapter=dora", "rollout.sampler=unipc", "rollout.target=original"],
    ["prior=teacher", *WALK, "adapter=lokr"],
    ["prior=teacher", "adapter.train_token=true", "dataset.instance_prompt=a photo of q dog", "adapter.token=q"],
    ["prior=teacher", "adapter.text_encoders=[1,2]"],
], ids=lambda words: " ".join(word for word in words if word not in WALK))  # fmt: skip
def test_step_does_not_synchronise(words, small):
    module, data = build_training(lab.compose(*small, *words))
    stream = iter(Samples(data, data.schedule, 0, 0, 1))
    torch.__future__.set_swap_module_params_on_conversion(True)  # shared parameters stay shared
    try:
        for part in (module, module.outside.network if module.outside else module):
            part.to(META)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    module.family.device = META
    optimizer = torch.optim.AdamW(module.trainable_parameters().values())
    trainer = SimpleNamespace(global_step=0, max_steps=100, world_size=1)
    watchers = [StepMetrics(50), Ema(0.99, 1, "meta")]
    for step, waits in enumerate((Waits(), Waits())):  # the first step also copies the noise schedule to the device
        batch = strayed(module, next(stream))
        batch = batch._replace(mask=halves(batch))
        trainer.global_step = step
        for watcher in watchers if step == 0 else ():
            watcher.on_train_start(trainer, module)
        with waits:
            batch = move_data_to_device(batch, META)
            module.on_train_batch_start(batch, step)
            outputs = module.training_step(batch, step)
            outputs["loss"].backward()
            torch.nn.utils.clip_grad_norm_(list(module.trainable_parameters().values()), 1.0)
            optimizer.step()
            trainer.global_step = step + 1
            for watcher in watchers:
                watcher.on_train_batch_end(trainer, module, outputs, batch, step)
    assert on_device(outputs["loss"]) and waits.seen == []


def test_synchronisation_is_detected():
    x, waits = torch.ones(3, device=META), Waits()
    host = torch.ones(3)
    with waits:
        for wait in (x.sum().item, x.nonzero, lambda: x[x > 0], lambda: x.cpu(), lambda: torch.equal(x, x)):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()
        host.to(META)
        assert len(waits.seen) >= 5
        before = len(waits.seen)
        host.to(META, non_blocking=True)
    assert len(waits.seen) == before


def test_control_values_stay_on_the_host(small):
    _, data = build(lab.compose(*small, "prior=teacher"))
    batch = next(iter(Samples(data, data.schedule, 0, 0, 1)))
    there = move_data_to_device(batch, META)
    for name, value in there._asdict().items():
        if isinstance(value, torch.Tensor):
            assert on_device(value) == (name not in ON_HOST), name
    assert all(on_device(value) for value in there.cond.values()) and type(there.cond) is type(batch.cond)

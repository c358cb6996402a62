"""objective.weight=learned: u(σ) becomes the logarithm of the expected loss, whatever the path."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check, enums
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.diffusion.path import RectifiedFlow, VariancePreserving
from dreambooth_lab.dreambooth import UNCERTAINTY, DreamBooth
from dreambooth_lab.factory import build_adapter, build_family
from dreambooth_lab.resuming import resume_config
from dreambooth_lab.run import run
from dreambooth_lab.uncertainty import Uncertainty

ALPHAS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
PATHS = {
    "epsilon": VariancePreserving(ALPHAS, enums.Prediction.epsilon),
    "zero terminal SNR": VariancePreserving(torch.cat([ALPHAS[:-1], torch.zeros(1)]), enums.Prediction.v_prediction),
    "flow": RectifiedFlow(1000),
}


@pytest.fixture
def made(small):
    def make(*overrides):
        cfg = lab.compose(*small, "objective.weight=learned", *overrides)
        family = build_family(cfg)
        data = DreamBoothData(cfg, family)
        data.prepare()
        adapter = build_adapter(cfg)
        adapter.attach(family.denoiser, family.target_modules, seed=0)
        return DreamBooth(cfg, family, adapter).train(), iter(Samples(data, data.schedule, 0, 0, 1))

    return make


def expected(t):
    """A loss that varies 200-fold with the time."""
    return 0.005 * torch.exp(torch.sin(3 * t) * 5.3)


def rows_of(path, generator, n=64):
    """Times, their SNR, and losses with known means: the mean of 8 squares, so its deviation is half its mean."""
    t = torch.rand(n, generator=generator)
    return t, path.snr(t), expected(t) * torch.randn(n, 8, generator=generator).square().mean(1)


@pytest.mark.parametrize("name", PATHS)
def test_u_is_the_logarithm_of_the_expected_loss_and_evens_the_gradients_out(name):
    path, generator, learned = PATHS[name], torch.Generator().manual_seed(0), Uncertainty()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.01)
    for step in range(3000):
        _, snr, error = rows_of(path, generator)
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 3000)
        optimizer.zero_grad()
        learned(error, snr, torch.arange(64)).mean().backward()
        optimizer.step()
    t = torch.linspace(0.02, 0.98, 49)
    with torch.no_grad():
        assert_close(learned.log_loss(path.snr(t)), expected(t).log(), atol=0.2, rtol=0)
    t, snr, error = rows_of(path, generator, 2**16)
    error.requires_grad_()
    learned(error, snr, torch.arange(2**16)).sum().backward()  # ∂/∂error is the weight
    weighted = torch.stack([(error * error.grad)[(t * 10).long() == k].mean() for k in range(10)])
    plain = torch.stack([error[(t * 10).long() == k].mean() for k in range(10)])
    assert plain.max() / plain.min() > 50
    assert weighted.max() / weighted.min() < 1.2 and (weighted - 1).abs().max() < 0.15


def test_the_ends_of_the_path_are_finite():
    learned = Uncertainty()
    torch.nn.init.normal_(learned.weight)
    for path in PATHS.values():
        assert learned.log_loss(path.snr(torch.tensor([0.0, 1.0, 0.99999]))).isfinite().all()


def test_it_starts_as_the_plain_loss(made, small):
    module, stream = made()
    batch = next(stream)
    plain = DreamBooth(lab.compose(*small), module.family, module.adapter).train()
    ours, theirs = module.training_step(batch, 0), plain.training_step(batch, 0)
    assert_close({k: v.detach() for k, v in ours.items()}, {k: v.detach() for k, v in theirs.items()}, rtol=0, atol=0)


def test_logged_errors_are_without_the_weight_and_class_rows_have_the_same_one(made):
    module, stream = made("prior=noise", "prior.weight=0.5")
    batch = next(stream)
    before = module.training_step(batch, 0)
    torch.nn.init.constant_(module.uncertainty.bias, 2.0)
    after = module.training_step(batch, 0)
    for name in ("instance", "prior"):
        assert torch.equal(after[name], before[name])
    instances = len(batch.instance_rows) / batch.row_counts.instances
    assert_close(after["loss"], before["loss"] * torch.exp(torch.tensor(-2.0)) + 2.0 * instances)


def test_class_rows_teach_u_nothing_but_every_parameter_has_a_gradient(made):
    """A fresh adapter's distance from its teacher is 0, whose logarithm is minus infinity; and DDP waits for all gradients."""
    module, stream = made("prior=teacher")
    batch = next(stream)
    everyone = torch.arange(len(batch.u))
    batch = batch._replace(instance_rows=everyone[:0], class_rows=everyone)
    module.training_step(batch, 0)["loss"].backward()
    grads = [p.grad for p in module.uncertainty.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_the_clipped_gradient_is_that_of_the_model_alone(made):
    module, stream = made()
    module.training_step(next(stream), 0)["loss"].backward()
    own = [p.grad.clone() for p in module.uncertainty.parameters()]
    module.configure_gradient_clipping(None, 1e-3)
    norm = torch.stack([p.grad.norm() for p in module.trainable_parameters().values()]).norm()
    assert norm < 1.01e-3
    assert all(torch.equal(a, p.grad) for a, p in zip(own, module.uncertainty.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "schedulefree", "adafactor"])
def test_a_run_learns_it_resumes_to_the_bit_and_exports_none_of_it(small, tmp_path, optimizer):
    words = [*small, "objective.weight=learned", f"optimizer={optimizer}", "optimizer.lr=1e-3", "validation.every_n_steps=0",
             *(["ema.enabled=false"] if optimizer == "schedulefree" else [])]  # fmt: skip
    run(lab.compose(*words), tmp_path / "whole")
    run(lab.compose(*words, "trainer.max_steps=4"), tmp_path / "parts")
    again = ["trainer.max_steps=6"]
    run(resume_config(lab.compose(f"resume={tmp_path / 'parts'}", *again), again), tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints/step_0000006.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        assert_close(whole[part], parts[part], rtol=0, atol=0)
    learned = {name: w for name, w in whole["state_dict"].items() if name.startswith(UNCERTAINTY)}
    assert len(learned) == 2 and all(w.any() for w in learned.values())
    if optimizer != "schedulefree":
        assert not any(name.startswith(UNCERTAINTY) for name in whole["callbacks"]["Ema"]["shadow"])
    for file in (tmp_path / "whole" / "export").rglob("*.safetensors"):
        assert not any("uncertainty" in key for key in load_file(file))
    rebuilt = lab.load(tmp_path / "whole").module()
    for name, w in learned.items():
        assert optimizer == "schedulefree" or torch.equal(dict(rebuilt.named_parameters())[name], w)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective.anchor=dco"], "objective.weight is learned with objective.anchor=dco"),
        (["optimizer=prodigy"], "objective.weight is learned with Prodigy"),
        (["checkpoint.monitor=train/loss"], "set checkpoint.monitor=train/loss_instance or eval/loss"),
        (["objective.uncertainty_lr=0"], "objective.uncertainty_lr is 0"),
    ],
)
def test_what_has_no_meaning_is_refused(small, words, said):
    with pytest.raises(ConfigError) as caught:
        check(lab.compose(*small, "objective.weight=learned", *words))
    assert said in str(caught.value)

"""Every optimiser's default settings train, resume from a checkpoint, and use each part's learning rate."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check, conf_dir, enums, set_schedule_length
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family
from dreambooth_lab.optimizer import Rate, build_optimizer, build_schedule, check_installed, learning_rate
from dreambooth_lab.resuming import resume_config
from dreambooth_lab.run import run

ALL = sorted(path.stem for path in (conf_dir() / "optimizer").glob("*.yaml"))


@cache
def config(name, *words):
    return lab.compose("dataset.path=.", f"optimizer={name}", *words)


class LowRank(nn.Module):
    """W = B A with B = 0 initially, as in LoRA."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lora_A = nn.Parameter(torch.randn(64, 96, generator=generator) / 8)
        self.lora_B = nn.Parameter(torch.zeros(64, 64))  # 4,096 elements, from which bitsandbytes uses 8 bits
        self.x = torch.randn(96, 32, generator=generator)
        self.y = torch.randn(64, 32, generator=generator) / 10

    def loss(self):
        return (self.lora_B @ self.lora_A @ self.x - self.y).square().mean()


def prepared(cfg, model):
    learning = dict(model.named_parameters())
    return build_optimizer(cfg.optimizer, learning, {name: Rate(1.0, True) for name in learning})


def train(model, optimizer, steps):
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ALL)
def test_default_settings_train_zero_initialised_weights(name):
    """100 steps reach at least a third of what AdamW reaches; Prodigy has to find its step size first."""
    gains = {}
    for one in (name, "adamw"):
        model = LowRank()
        before = model.loss().item()
        train(model, prepared(config(one), model), 300 if one == "prodigy" else 100)
        gains[one] = before - model.loss().item()
    assert gains[name] > gains["adamw"] / 3 > 0


@pytest.mark.parametrize("name", ALL)
def test_optimizer_continues_from_a_checkpoint_unchanged(name):
    cfg, whole, broken = config(name), LowRank(), LowRank()
    optimizer = prepared(cfg, whole)
    train(whole, optimizer, 5)
    buffer = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(whole, optimizer, 3)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    broken.load_state_dict(saved["model"])
    again = prepared(cfg, broken)
    again.load_state_dict(saved["optimizer"])
    train(broken, again, 3)
    assert torch.equal(whole.lora_B, broken.lora_B) and torch.equal(whole.lora_A, broken.lora_A)


def test_adamw8bit_state_is_8_bit():
    model = LowRank()
    optimizer = prepared(config("adamw8bit"), model)
    train(model, optimizer, 1)
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8}


def test_schedule_scales_all_groups_equally():
    cfg = config("adamw", "optimizer.schedule=cosine", "optimizer.warmup_steps=2", "trainer.max_steps=10", "optimizer.lr=1")
    learning = {"a": nn.Parameter(torch.zeros(1)), "b": nn.Parameter(torch.zeros(1))}
    optimizer = build_optimizer(cfg.optimizer, learning, {"a": Rate(1.0, True), "b": Rate(4.0, False)})
    schedule = build_schedule(cfg.optimizer, optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0], "the run's own rate takes precedence"
    assert all(b == pytest.approx(4 * a) for a, b in rates) and rates[0][0] == 0.5 and rates[2][0] == 1.0 > rates[9][0]


@pytest.mark.parametrize("cut", [["dataset.batch_size=2"], ["dataset.batch_size=1", "trainer.accumulate_grad_batches=2"]])
def test_logged_learning_rate_is_the_one_used(small, tmp_path, monkeypatch, cut):
    used, real = [], torch.optim.AdamW.step

    def spied(optimizer, closure=None):
        used.append(optimizer.param_groups[0]["lr"])
        return real(optimizer, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    words = ["optimizer.lr=1", "optimizer.warmup_steps=3", "optimizer.schedule=linear", "validation.every_n_steps=0"]
    run(lab.compose(*small, *words, *cut, "trainer.max_steps=5", "trainer.log_every_n_steps=2"), tmp_path / "run")
    logged = lab.load(tmp_path / "run").series["train/lr"]
    assert_close(used, [1 / 3, 2 / 3, 1.0, 1.0, 0.5])
    assert logged == [(2, used[1]), (4, used[3]), (5, used[4])]


@pytest.mark.parametrize("schedule", [pytest.param("linear", marks=pytest.mark.slow), "cosine"])
@pytest.mark.parametrize("what", ["hold", "stretch"])
def test_extended_run_holds_its_last_rate_or_stretches_its_schedule(small, tmp_path, caplog, schedule, what):
    words = [*small, "optimizer.lr=1e-3", f"optimizer.schedule={schedule}", "validation.every_n_steps=0"]
    root = tmp_path / "run"
    run(lab.compose(*words, "trainer.max_steps=4"), root)

    def resume(*more):
        overrides = [f"resume={root}", *more]
        cfg = resume_config(lab.compose(*overrides), overrides)
        check(cfg)
        run(cfg, root)
        return [rate for _, rate in lab.load(root).series["train/lr"]]

    with pytest.raises(ConfigError, match=r"trainer\.max_steps was 4 and is 7, but .* optimizer\.on_extend is refuse; set "):
        resume("trainer.max_steps=7")
    caplog.set_level("INFO")
    rates = resume("trainer.max_steps=7", f"optimizer.on_extend={what}")
    four, seven = (learning_rate(enums.Schedule[schedule], 0, total) for total in (4, 7))
    after = {"hold": [four(3)] * 3, "stretch": [seven(step) for step in (4, 5, 6)]}[what]
    assert_close(rates, [1e-3 * share for share in (*map(four, range(4)), *after)])
    assert "trainer.max_steps was 4 and is 7: the" in caplog.text
    assert ("then the last learning rate is kept" in caplog.text) is (what == "hold")
    if what == "hold":
        assert_close(resume("trainer.max_steps=8")[-1], rates[-1]), "and goes on holding it"


def test_run_resumed_at_equal_or_shorter_length_keeps_its_schedule():
    def settled(after, *words):
        before = lab.compose("dataset.path=.", "optimizer.schedule=cosine", "trainer.max_steps=10", *words)
        now = before.copy()
        now.trainer.max_steps = after
        return set_schedule_length(before, now), now.optimizer.schedule_steps

    assert settled(10) == (None, None) and settled(20, "optimizer.schedule=constant") == (None, None)
    overrides, length = settled(6)
    assert length == 10 and "lasts 10 steps as before" in overrides
    assert settled(20, "optimizer.schedule_steps=5")[1] == 5, "with a length of its own nothing is refused"
    assert settled(20, "optimizer.schedule_steps=5", "optimizer.on_extend=stretch")[1] is None


def test_block_rules_set_ranks_and_learning_rates(tiny_sdxl):
    blocks = "adapter.blocks=[{match: '^up_blocks.*to_q$', rank: 8, lr_ratio: 0.5}, {match: up_blocks, rank: null, lr_ratio: 2}]"
    for kind, end in (("lora", "lora_A.default.weight"), ("locon", ":lora_down:weight"), ("full", "weight")):
        words = [blocks if kind != "full" else blocks.replace("rank: 8", "rank: null"), f"adapter={kind}", "optimizer.lr=1"]
        more = ["adapter.rank=4", "adapter.alpha=2"] if kind != "full" else ["adapter.parts=[attention]"]
        base = [
            "dataset.path=.",
            "dataset.instance_prompt=a dog",
            "model=sdxl",
            f"model.pretrained={tiny_sdxl}",
            "model.dtype=float32",
        ]
        cfg = lab.compose(*base, *words, *more)
        check(cfg)
        family, adapter = build_family(cfg), build_adapter(cfg)
        attach(cfg, family, adapter, None)
        module = DreamBooth(cfg, family, adapter)
        optimizer = module.configure_optimizers()["optimizer"]
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        seen = set()
        for name, p in module.trainable_parameters().items():
            layer = adapter.layer_of(module.owner(name)[1])
            up, query = layer.startswith("up_blocks"), layer.endswith("to_q")
            assert rates[id(p)] == (0.5 if up and query else 2 if up else 1), (kind, name)
            if kind != "full" and name.endswith(end):
                assert p.shape[0] == (8 if up and query else 4), (kind, name)
            seen.add((up, query))
        assert len(seen) == 4


PRODIGY = "finds one rate for all"
PLUS = "optimizer.lora_plus_ratio=16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer=prodigy", PLUS], PRODIGY),
        (["optimizer=prodigy", "adapter.train_token=true"], PRODIGY),
        (["optimizer=prodigy", "adapter.text_encoders=[1]"], PRODIGY),
        (["optimizer=prodigy", "adapter.blocks=[{match: up, rank: null, lr_ratio: 2}]"], PRODIGY),
        (["optimizer=schedulefree", "optimizer.schedule=cosine"], "use optimizer.schedule=constant"),
        (["optimizer=schedulefree", "ema.enabled=true"], "has its own averaging"),
        (["optimizer.cycles=3"], "which only schedule=restarts has"),
        (["optimizer.warmup_steps=500"], "so the warm-up never ends"),
        (["optimizer._target_=nothing.Adam"], "nothing is not installed"),
        (["adapter=lokr", PLUS], "which has no A and B"),
        (["adapter=full", "model.dtype=float32", PLUS], "which has no A and B"),
        (["adapter.blocks=[{match: 'up(', rank: null, lr_ratio: 1}]"], "which is not a valid regular expression"),
        (["adapter.blocks=[{match: up, rank: 0, lr_ratio: 1}]"], "adapter.blocks.rank is 0"),
        (["adapter.blocks=[{match: up, rank: null, lr_ratio: -1}]"], "adapter.blocks.lr_ratio is -1"),
        (["adapter.targets=['re:to_(q']"], "which is not a valid regular expression"),
        (["adapter=full", "adapter.rank=4"], "it has no rank, dropout, options or ranks in blocks"),
        (["adapter=full", "adapter.dropout=0.1"], "it has no rank, dropout, options or ranks in blocks"),
        (["+adapter.options={init_lora_weights: olora}"], "which changes the base's predictions"),
        (["adapter.init_from=/no/such"], "which does not exist"),
        (["model.attention=cudnn", "trainer.accelerator=cpu"], "which only CUDA devices have"),
    ],
)
def test_invalid_settings_are_refused_before_loading(words, message):
    with pytest.raises(ConfigError) as error:
        check(lab.compose("dataset.path=.", *words))
    assert message in str(error.value)


def test_invalid_optimizer_is_refused_before_training(small, tmp_path):
    with pytest.raises(
        ConfigError, match=r"optimizer\.options has 'betta', which torch\.optim\.AdamW does not accept; similar: betas"
    ):
        run(lab.compose(*small, "+optimizer.options.betta=1"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"which can't be imported .*; see conf/optimizer/"):
        check_installed(config("adamw", "optimizer._target_=torch.optim.AdamX").optimizer)
    with pytest.raises(ConfigError, match=r"which is no torch\.optim\.Optimizer"):
        check_installed(config("adamw", "optimizer._target_=torch.nn.Linear").optimizer)
    for options in ("{betas: 5}", "{betas: [0.9, 7]}", "{eps: small}", "{fused: true, foreach: true}"):
        cfg = config("adamw").optimizer
        cfg.options = OmegaConf.create(options)
        with pytest.raises(ConfigError, match=r"optimizer\.options is .*, which torch\.optim\.AdamW refuses"):
            check_installed(cfg)
    assert [path.name for path in Path(tmp_path / "run").iterdir()] == [".lock"], "no file but the lock was written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter.blocks=[{match: donw_blocks, rank: 2, lr_ratio: 1}]"], "applies to no adapted layer"),
        (["adapter.blocks=[{match: up, rank: 2, lr_ratio: 1}, {match: up_b, rank: 3, lr_ratio: 1}]"], "'up_b'"),
        (["adapter.targets=[to_qq]"], "'to_qq' matches no layer of the model; similar: to_q"),
        (["adapter.targets=['re:.*attn3.*']"], "matches no layer"),
        (["+adapter.options={r: 3}"], "adapter.options has 'r'"),
        (["+adapter.options={bias: all}"], "adapter.options has 'bias'"),
    ],
)
def test_unmatched_targets_and_rules_are_refused(words, message, tiny_sdxl):
    cfg = lab.compose("dataset.path=.", "model=sdxl", f"model.pretrained={tiny_sdxl}", "model.dtype=float32", *words)
    family = build_family(cfg)
    with pytest.raises(ConfigError) as error:
        attach(cfg, family, build_adapter(cfg), None)
    assert message in str(error.value)


def test_regular_expressions_match_whole_names(tiny_sdxl):
    words = ["adapter.targets=['re:.*attn2\\.to_[kv]', conv_in]"]
    cfg = lab.compose("dataset.path=.", "model=sdxl", f"model.pretrained={tiny_sdxl}", "model.dtype=float32", *words)
    layers = attach(cfg, build_family(cfg), build_adapter(cfg), None)
    assert {layer.rpartition(".")[2] for layer in layers} == {"to_k", "to_v", "conv_in"}
    assert all("attn2" in layer for layer in layers if layer != "conv_in")


def test_rollout_with_schedule_free_keeps_training_weights(small, tmp_path):
    words = ["optimizer=schedulefree", "ema.enabled=false", "validation.every_n_steps=0", "rollout.enabled=true",
             "rollout.probability=1", "rollout.ramp_steps=0", "trainer.max_steps=3"]  # fmt: skip
    run(lab.compose(*small, *words), tmp_path / "run")
    assert lab.load(tmp_path / "run").steps == 3


@pytest.mark.parametrize("adapter", ["lora", "locon"])
def test_eval_mode_disables_dropout_and_restores_it(adapter, tiny_sdxl):
    words = ["model=sdxl", f"model.pretrained={tiny_sdxl}", f"adapter={adapter}", "adapter.dropout=0.5"]
    cfg = lab.compose("dataset.path=.", *words)
    family, ours = build_family(cfg), build_adapter(cfg)
    attach(cfg, family, ours, None)
    module = DreamBooth(cfg, family, ours).train()
    parts = ours.network.loras if adapter == "locon" else [part for part in module.modules() if isinstance(part, nn.Dropout)]
    with module.dropout_off():
        assert not any(part.training for part in parts)
    assert parts and all(part.training for part in parts)


def test_clipping_bounds_the_step(small, tmp_path):
    """Plain gradient descent with learning rate 1 moves by the gradient."""
    sgd = ["optimizer._target_=torch.optim.SGD", *(f"~optimizer.options.{key}" for key in ("betas", "eps", "fused"))]
    words = [*small, *sgd, "optimizer.lr=1", "optimizer.weight_decay=0", "validation.every_n_steps=0", "ema.enabled=false"]
    weights = []
    for steps in (1, 2):
        run(lab.compose(*words, f"trainer.max_steps={steps}", "trainer.gradient_clip_norm=1e-3"), tmp_path / str(steps))
        weights.append(torch.load(lab.load(tmp_path / str(steps)).folder.newest()[0], weights_only=True)["state_dict"])
    moved = torch.stack([(weights[1][key] - weights[0][key]).square().sum() for key in weights[0]]).sum().sqrt()
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["schedulefree", "prodigy"])
def test_resumed_run_continues_bit_for_bit(name, small, tmp_path):
    words = [*small, f"optimizer={name}", "ema.enabled=false", "validation.every_n_steps=0", "trainer.gradient_clip_norm=0.5"]
    run(lab.compose(*words, "trainer.max_steps=4"), tmp_path / "whole")
    run(lab.compose(*words, "trainer.max_steps=2"), tmp_path / "part")
    run(lab.compose(*words, "trainer.max_steps=4", f"resume={tmp_path / 'part'}"), tmp_path / "part")
    whole, part = (lab.load(tmp_path / one) for one in ("whole", "part"))
    assert whole.series == part.series
    a, b = (torch.load(one.folder.newest()[0], weights_only=True)["state_dict"] for one in (whole, part))
    assert all(torch.equal(a[key], b[key]) for key in a)

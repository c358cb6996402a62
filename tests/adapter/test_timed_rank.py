"""T-LoRA: rank by timestep, and orthogonal initialisation."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from test_matrix import ALL
from torch.testing import assert_close
from typer.testing import CliRunner

from dreambooth_lab import lab
from dreambooth_lab.adapter import ExportWeights, timed_rank
from dreambooth_lab.adapter.files import read
from dreambooth_lab.adapter.timed_rank import least_rank, rank_at, tail_values
from dreambooth_lab.config import ConfigError, check, saved
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.factory import build_family, build_method
from dreambooth_lab.tools.lora import app as tool
from dreambooth_lab.trained import TrainedPipeline

TIMED, ORTHO = ["adapter.rank_schedule=tlora"], ["+adapter.options.init=ortho_tail"]
RANK = 4


@pytest.fixture
def made(small):
    def make(*words):
        cfg = lab.compose(*small, f"adapter.rank={RANK}", *words)
        family = build_family(cfg)
        data = DreamBoothData(cfg, family)
        data.prepare()
        return build_method(cfg, family)[0], iter(Samples(data, data.schedule, 0, 0, 1))

    return make


def move(module, scale=0.2):
    generator = torch.Generator().manual_seed(5)
    for p in module.trainable_parameters().values():
        p.data += scale * torch.randn(p.shape, generator=generator)


def prediction(module, batch, t):
    with torch.no_grad():
        return module.predict(batch.latents(), torch.full((len(batch.u),), t, dtype=torch.float64), batch.cond)


@torch.no_grad()
def cut_to(module, rank):
    """Set all ranks beyond the first `rank` to 0."""
    for name, p in module.trainable_parameters().items():
        if ".lora_B." in name:
            p[:, rank:] = 0


def test_rank_formula_matches_the_paper():
    t = torch.tensor([0.0, 0.2, 0.5, 0.999, 1.0])
    assert rank_at(t, 64, 32).tolist() == [64, 57, 48, 32, 32]
    assert rank_at(t, 4, 1).tolist() == [4, 3, 2, 1, 1]
    assert (least_rank(None, 64), least_rank(None, 1), least_rank(3, 64), least_rank(8, 4)) == (32, 1, 3, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("t", "rank"), [(0.0, 4), (0.3, 3), (0.6, 2), (0.999, 1)])
def test_only_the_first_ranks_act_at_a_time(made, t, rank, dtype):
    module, stream = made(*TIMED, "adapter.min_rank=1", f"model.dtype={dtype}")
    plain, _ = made(f"model.dtype={dtype}")
    batch = next(stream)
    move(module), move(plain)
    cut_to(plain, rank)
    apart = (prediction(module, batch, t) - prediction(plain, batch, t)).abs().mean()
    cut_to(plain, rank - 1)
    assert (
        apart < (1e-3 if dtype == "float32" else 0.2) * (prediction(module, batch, t) - prediction(plain, batch, t)).abs().mean()
    )


def test_each_row_uses_the_ranks_of_its_own_time(made):
    module, stream = made(*TIMED, "adapter.min_rank=1")
    move(module)
    batch, t = next(stream), torch.tensor([0.05, 0.95, 0.4, 0.7], dtype=torch.float64)
    x = batch.latents()
    rows = torch.arange(len(t)) % len(x)
    with torch.no_grad():
        together = module.predict(x[rows], t, batch.cond.select(rows))
        for i in range(len(t)):
            one = module.predict(x[rows[i : i + 1]], t[i : i + 1], batch.cond.select(rows[i : i + 1]))
            assert_close(together[i : i + 1], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", [[], ["rollout.enabled=true", "rollout.probability=1", "rollout.ramp_steps=0"]])
def test_gradients_match_under_checkpointing_and_are_zero_for_inactive_ranks(made, words):
    """Checkpointed blocks run again after the teacher ran at other timesteps."""
    words = [*TIMED, "adapter.min_rank=1", "objective.min_time=0.9", "prior=teacher", *words]
    grads = []
    for checkpointing in ("false", "true"):
        module, stream = made(*words, f"model.gradient_checkpointing={checkpointing}")
        move(module)
        module.training_step(next(stream), 0)["loss"].backward()
        grads.append({name: p.grad for name, p in module.trainable_parameters().items()})
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-4)
        beyond = grad[1:] if ".lora_A." in name else grad[:, 1:]
        assert (beyond == 0).all(), "(4 - 1)(1 - t) < 1 beyond .9: one rank is active"
        assert name.endswith("to_k.lora_A.default.weight") or grad.abs().max() > 0


def test_no_schedule_adds_no_hooks(made):
    module, _ = made()
    variants = {type(v) for layer in timed_rank.layers_of(module.denoiser).values() for v in layer.lora_variant.values()}
    assert timed_rank.TimedRank not in variants and not module.denoiser._forward_pre_hooks


def test_images_of_run_and_export_follow_the_schedule(made, tmp_path):
    """Records the active ranks in the sampler's own network calls."""
    module, _ = made(*TIMED, "adapter.min_rank=1")
    move(module)
    family = module.family
    clock = next(v.clock for layer in timed_rank.layers_of(module.denoiser).values() for v in layer.lora_variant.values())
    seen = []
    layer = next(iter(timed_rank.layers_of(module.denoiser).values()))
    layer.register_forward_hook(lambda *_: seen.append(int(clock.masks[RANK].sum(1)[0])))
    text = family.encode_text(["a photo of sks dog"])
    ours = family.generate(text, family.encode_text([None]), height=64, width=64, num_inference_steps=6, guidance_scale=3.0,
                           generator=torch.Generator().manual_seed(0))[0]  # fmt: skip
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] >= 3, "few ranks at high noise, more towards the image"
    owned = module.by_owner(module.trainable_parameters())
    module.adapter.export(tmp_path, ExportWeights("unet", owned["unet"], {}, {}, family.kohya, ALL))
    theirs = TrainedPipeline(module.cfg, tmp_path)
    drawn = theirs.draw("a photo of sks dog", "", 64, 6, 3.0, 0)[0]
    assert drawn.tobytes() == ours.tobytes()
    plain = lab.compose("model=toybox").adapter
    module.cfg.adapter.rank_schedule, module.cfg.adapter.min_rank = plain.rank_schedule, None
    full = TrainedPipeline(module.cfg, tmp_path).draw("a photo of sks dog", "", 64, 6, 3.0, 0)[0]
    assert full.tobytes() != ours.tobytes(), "the image of other programs"


def test_header_and_card_state_the_rank_schedule(made, tmp_path):
    module, _ = made(*TIMED)
    owned = module.by_owner(module.trainable_parameters())
    files = module.adapter.export(tmp_path, ExportWeights("unet", owned["unet"], {}, {}, module.family.kohya, ALL))
    for file in (tmp_path / path for path in files if path.suffix == ".safetensors"):
        with safe_open(file, "pt") as opened:
            assert "2 of 4 ranks" in opened.metadata()["rank_schedule"].replace("+ 2 of", "2 of")


def test_resized_file_has_no_schedule_and_a_converted_one_keeps_it(made, tmp_path):
    """The ranks of a resized file are new ones, ordered by singular value."""
    module, _ = made(*TIMED, "adapter.min_rank=1")
    move(module)
    owned = module.by_owner(module.trainable_parameters())
    header = {"config": saved.dump(module.cfg), "other": "kept"}
    module.adapter.export(tmp_path, ExportWeights("unet", owned["unet"], {}, header, module.family.kohya, ALL))
    for word, schedule in (("resize", "none"), ("convert", "tlora")):
        made_file = tmp_path / f"{word}.safetensors"
        more = ["--rank", "4"] if word == "resize" else ["--to", "diffusers"]
        done = CliRunner().invoke(tool, [word, str(tmp_path / "kohya.safetensors"), "--output", str(made_file), *more])
        assert done.exit_code == 0, done.output
        with safe_open(made_file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["other"] == "kept" and ("rank_schedule" in metadata) is (schedule == "tlora")
        adapter = saved.load(metadata["config"], "it").adapter
        assert (adapter.rank_schedule.name, adapter.min_rank) == (schedule, 1 if schedule == "tlora" else None)


def test_orthogonal_init_is_orthogonal_and_does_not_change_predictions(made):
    module, stream = made(*ORTHO)
    batch = next(stream)
    base = build_family(module.cfg).denoise(batch.latents(), batch.u, batch.cond)
    with torch.no_grad():
        assert torch.equal(module.predict(batch.latents(), batch.u, batch.cond), base)
    for layer in timed_rank.layers_of(module.denoiser).values():
        a, b = layer.lora_A["default"].weight.flatten(1), layer.lora_B["default"].weight.flatten(1)
        assert_close(a @ a.T, torch.eye(len(a)), atol=1e-5, rtol=0)
        gram = b.T @ b
        assert_close(gram, torch.diag(gram.diagonal()), atol=1e-5, rtol=0)
    assert module.training_step(batch, 0)["prior"] < 1e-9
    module.training_step(batch, 0)["loss"].backward()
    assert all(p.grad.abs().max() > 0 for n, p in module.trainable_parameters().items() if "to_q" in n or "to_v" in n)


def test_tail_singular_values_follow_random_matrices():
    import numpy as np

    random = np.random.default_rng(0)
    ours = torch.stack([tail_values(24, 16, 4, random) for _ in range(400)])
    theirs = torch.stack([torch.linalg.svdvals(torch.from_numpy(random.standard_normal((16, 24)) / 4))[-4:] for _ in range(400)])
    assert_close(ours.double().mean(0), theirs.mean(0), atol=0.02, rtol=0)
    assert_close(ours.double().std(0), theirs.std(0), atol=0.015, rtol=0)
    assert (ours.diff(dim=1) < 0).all()


@pytest.mark.parametrize("words", [ORTHO, [*ORTHO, *TIMED]], ids=["start", "start and schedule"])
def test_export_of_an_orthogonal_init_matches_the_runs_images(made, tmp_path, words):
    module, _ = made(*words, "adapter.alpha=3", 'adapter.blocks=[{match: "to_v", rank: 2, lr_ratio: 1.0}]')
    move(module)
    family, owned = module.family, module.by_owner(module.trainable_parameters())
    module.adapter.export(tmp_path, ExportWeights("unet", owned["unet"], {}, {}, family.kohya, ALL))
    ranks = {layer.rank for layer in read(tmp_path / "kohya.safetensors").parts["unet"].values()}
    assert ranks == {2 * RANK, 4}
    text = family.encode_text(["a photo of sks dog"])
    ours = family.generate(text, family.encode_text([None]), height=64, width=64, num_inference_steps=4, guidance_scale=3.0,
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
    theirs = TrainedPipeline(module.cfg, tmp_path).draw("a photo of sks dog", "", 64, 4, 3.0, 0)
    pairs = zip(ours[0].tobytes(), theirs[0].tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 2, "up to rounding: the file contains the start that the run subtracts"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter.min_rank=2"], "which only a schedule reads"),
        ([*TIMED, "adapter=dora"], "with adapter.algorithm=dora, which can't follow it"),
        ([*TIMED, "adapter=lokr"], "with adapter.algorithm=lokr, which can't follow it"),
        ([*TIMED, "adapter=full"], "with adapter.algorithm=full, which can't follow it"),
        ([*TIMED, "adapter.text_encoders=[1]"], "which know no time"),
        ([*TIMED, "adapter.min_rank=4"], "which leaves no rank out"),
        ([*TIMED, "adapter.rank=1"], "which leaves no rank out"),
        (["+adapter.options.init=pissa"], "it must be ortho_tail, of adapter=lora"),
        ([*ORTHO, "adapter=dora"], "it must be ortho_tail, of adapter=lora"),
        ([*ORTHO, "adapter.init_from=."], "leave one of them out"),
        ([*ORTHO, "+adapter.options.init_lora_weights=true"], "leave one out"),
    ],
)
def test_contradictory_settings_are_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        check(lab.compose("adapter.rank=4", *words))
    assert message in str(caught.value)


def test_layer_smaller_than_its_rank_is_refused_by_name(made):
    with pytest.raises(ConfigError, match=r"ortho_tail, but .* is .* and its rank 64; set adapter.rank"):
        made(*ORTHO, "adapter.rank=64")


def test_model_without_known_timesteps_is_refused(tiny_sdxl):
    cfg = lab.compose("model=diffusers", f"model.pretrained={tiny_sdxl}", "dataset=folder", "dataset.path=.", *TIMED,
                      "adapter.rank=4", "trainer.accelerator=cpu")  # fmt: skip
    with pytest.raises(ConfigError, match="has a clock not known here"):
        build_family(cfg)

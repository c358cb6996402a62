"""The pretraining stages with settings that take seconds."""

import json
import shutil

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch.testing import assert_close

from dreambooth_lab.config import ConfigError, conf_dir
from dreambooth_lab.models.feature_extractors import Dino
from dreambooth_lab.tools.pretrain_toybox import dino, export, latents, scorer, unet, vae
from dreambooth_lab.tools.pretrain_toybox.__main__ import timed
from dreambooth_lab.tools.pretrain_toybox.card import minutes
from dreambooth_lab.tools.pretrain_toybox.evaluator import found_partner
from dreambooth_lab.tools.pretrain_toybox.runner import fit
from dreambooth_lab.tools.pretrain_toybox.text import give_free_tokens_an_embedding, new_text_encoders
from dreambooth_lab.tools.pretrain_toybox.textures import texture
from dreambooth_lab.toybox import base_folder
from dreambooth_lab.toybox.captions import FREE_TOKENS
from dreambooth_lab.toybox.evaluator import Evaluator
from dreambooth_lab.toybox.tokenizer import build_tokenizer
from dreambooth_lab.toybox.world import BUCKETS

TINY_VAE = ["vae.channels=[8,8,8,8]", "vae.batch=4", "vae.workers=0", "vae.precision=32-true", "vae.warmup=2"]
TINY_UNET = ["unet.channels=[16,16,16]", "unet.text_widths=[8,8]", "unet.heads=2", "unet.batch=4", "unet.warmup=2"]


def config(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("pretrain_toybox", [*TINY_VAE, *TINY_UNET, *overrides])


class Memory:
    """The contents of `Cache`, without files."""

    def __init__(self, n=6):
        views = [latents.view(i) for i in range(40)]
        self.views = {s: [v for v in views if v.size == s][:n] for s in BUCKETS}
        random = torch.Generator().manual_seed(0)
        self.latents = {(h, w): torch.randn(len(self.views[h, w]), 16, h // 8, w // 8, generator=random) for h, w in BUCKETS}
        self.share = np.array([0.6, 0.2, 0.2])


def train_unet(folder, cfg, show=None):
    torch.manual_seed(cfg.seed)
    stage = unet.UnetStage(cfg.unet)
    fit(stage, unet.Draw(Memory(), cfg.unet, cfg.seed), folder, show)
    return stage.state_dict()


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_same_seed_is_bit_identical(tmp_path):
    cfg = config("unet.steps=3", "unet.keep_every=3")
    assert same(train_unet(tmp_path / "a", cfg), train_unet(tmp_path / "b", cfg))


def power_cut(stage, step):
    if step == 2:
        raise InterruptedError


def test_resumed_run_is_bit_identical(tmp_path):
    cfg = config("unet.steps=4", "unet.keep_every=2")
    straight = train_unet(tmp_path / "a", cfg)
    with pytest.raises(InterruptedError):
        train_unet(tmp_path / "b", cfg, power_cut)
    assert same(train_unet(tmp_path / "b", cfg), straight)


def test_batch_is_a_function_of_the_step():
    cfg = config()
    draw = unet.Draw(Memory(), cfg.unet, cfg.seed)
    assert all(torch.equal(a, b) for a, b in zip(draw(7), draw(7), strict=True))
    assert torch.equal(vae.draw_batch(7, cfg.vae, 0).image, vae.draw_batch(7, cfg.vae, 0).image)


def test_dropped_captions_become_zero_embeddings(tmp_path):
    """As StableDiffusionXLPipeline's force_zeros_for_empty_prompt: a dropped caption has no effect."""
    cfg = config()
    stage, batch = unet.UnetStage(cfg.unet), unet.Draw(Memory(), cfg.unet, 0)(0)
    dropped = batch._replace(kept=torch.zeros(4))
    other = dropped._replace(ids=batch.ids.flip(0))
    x = batch.latents
    assert_close(stage.predict(stage.nets, x, dropped), stage.predict(stage.nets, x, other))
    assert not torch.allclose(stage.predict(stage.nets, x, batch), stage.predict(stage.nets, x, dropped))


def test_folding_statistics_is_exact():
    """z' = (z - mean) / (std · scale), with the log-variance shifted accordingly, and the decoder inverts it."""
    cfg = config()
    torch.manual_seed(0)
    net = vae.new_vae(cfg.vae).double().eval()
    mean, std = torch.randn(16).double(), torch.rand(16).double() + 0.5
    x = torch.rand(2, 3, 32, 32).double()
    folded = latents.fold(net, mean, std)
    before, after = net.encode(x).latent_dist, folded.encode(x).latent_dist
    m, s = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    assert_close(after.mean * vae.SDXL_SCALE, (before.mean - m) / s)
    assert_close(after.std * vae.SDXL_SCALE, before.std / s)
    assert_close(folded.decode(after.mean).sample, net.decode(before.mean).sample)


def test_vae_with_large_reconstruction_error_stops_training():
    torch.manual_seed(0)
    net = vae.new_vae(config().vae).eval()
    latents.gate(net, 0.0)
    with pytest.raises(ConfigError, match=r"under latents.least_psnr=28.0; train it longer"):
        latents.gate(net, 28.0)


def test_views_report_their_crop():
    views = [latents.view(i) for i in range(300)]
    cropped = [v for v in views if v.crop != (0, 0)]
    assert len(cropped) > 20
    for v in cropped[:5]:
        top, left = v.crop
        whole = np.asarray(latents.render(v.scene, v.original).image)
        assert (np.asarray(latents.photograph(v)) == whole[top : top + v.size[0], left : left + v.size[1]]).all()


@pytest.mark.parametrize("size", BUCKETS)
def test_textures_fill_the_image(size):
    pixels = texture(3, size)
    assert pixels.shape == (*size, 3) and pixels.std() > 5


def test_unused_tokens_get_the_norm_of_trained_words():
    tokenizer, cfg = build_tokenizer(), config()
    nets = new_text_encoders(tokenizer, cfg.unet)
    before = nets["text_encoder"].get_input_embeddings().weight.detach().clone()
    give_free_tokens_an_embedding(nets, tokenizer, seed=0)
    after = nets["text_encoder"].get_input_embeddings().weight.detach()
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert sorted(tokenizer.convert_ids_to_tokens(changed)) == sorted(f"{t}</w>" for t in FREE_TOKENS)


def test_found_partner_is_the_share_of_matching_images():
    features = torch.eye(6)[[0, 1, 2, 0, 1, 2]]  # images i and 3 + i are equal
    assert found_partner(features) == 1
    assert found_partner(features[[0, 1, 2, 1, 2, 0]]) == 0


def test_card_sums_the_time_of_all_runs_of_a_stage(tmp_path):
    records = [("vae", 1800), ("export", 12), ("unet", 3000), ("vae", 600)]
    path = tmp_path / "times.jsonl"
    path.write_text("".join(f'{{"stage": "{stage}", "wall_s": {seconds}}}\n' for stage, seconds in records))
    assert minutes(path) == "vae 40, unet 50"


def test_continued_unet_is_exported_beside_the_shipped_parts(tmp_path):
    """The autoencoder and the judges stay, and the card says how the UNet was continued, once."""
    base = tmp_path / "base"
    shutil.copytree(base_folder(), base)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words = ["seed=1", "unet.from_shipped=true", "latents.shipped_vae=true", f"base={base}", f"out={tmp_path / 'out'}"]
        cfg = compose("pretrain_toybox", words)
    stage = unet.UnetStage(cfg.unet)
    (tmp_path / "out/unet").mkdir(parents=True)
    torch.save({"state_dict": stage.state_dict(), "global_step": 7}, tmp_path / "out/unet/last.ckpt")
    export.run(cfg)
    export.run(cfg)
    for part in ("evaluator", "scorer", "dino"):
        files = sorted(path for path in (base_folder() / part).iterdir())
        assert all((base / part / path.name).read_bytes() == path.read_bytes() for path in files)
    assert not any("_name_or_path" in path.read_text() for path in base.glob("*/config.json"))
    before, after = (load_file(where / "vae/diffusion_pytorch_model.safetensors") for where in (base_folder(), base))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    written = load_file(base / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(written, stage.ema["unet"].conv_in.weight.half())
    assert (base / "README.md").read_text().count(", then 7 more of 40 at a rate of 0.001 (seed 1)") == 1


def test_interrupted_stage_records_its_time(tmp_path):
    with pytest.raises(KeyboardInterrupt), timed("unet", tmp_path):
        raise KeyboardInterrupt
    (line,) = (tmp_path / "times.jsonl").read_text().splitlines()
    assert json.loads(line)["stage"] == "unet" and json.loads(line)["peak_mb"] > 0


def test_progress_is_printed_when_logged(tmp_path, capsys):
    train_unet(tmp_path / "unet", config("unet.steps=2", "unet.keep_every=2", "unet.log_every=1"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith('unet: {"step": 1,') and "of 2, about" in first and '"step": 2,' in second
    assert (tmp_path / "unet/log.jsonl").read_text().count("\n") == 2


def test_captions_match_their_images():
    scenes = [scorer.scene(i) for i in range(3)]
    fits = scorer.fitting(scenes, ["a photo of a thing", *(f"a {s.who.colour} {s.who.kind}" for s in scenes[1:])])
    assert fits[:, 0].all() and fits.diagonal().all()


def test_saved_evaluator_predicts_the_same(tmp_path):
    net = Evaluator((8, 8))
    net.save(tmp_path)
    x = torch.rand(2, 3, 128, 128) * 2 - 1
    assert_close(Evaluator.load(tmp_path).features(x), net.features(x), atol=2e-2, rtol=2e-2)
    assert len(net.judge(x).kind) == 2


def test_saved_dino_embeds_the_same_and_all_parameters_train(tmp_path):
    cfg = config("dino.width=16", "dino.layers=1", "dino.batch=4").dino
    torch.manual_seed(0)
    net = dino.new_dino(cfg).eval()
    batch = dino.draw_batch(3, cfg, 0)
    assert all(torch.equal(a, b) for a, b in zip(batch, dino.draw_batch(3, cfg, 0), strict=True))
    assert batch.cover.shape == (4, 64) and 0 < batch.cover.mean() < 1
    token, patches = dino.features(net, batch)
    (token.sum() + patches.sum()).backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if "mask_token" not in name)
    dino.save(net, cfg, tmp_path / "vit")
    export.export_judge(tmp_path / "vit", tmp_path / "dino")
    shipped = Dino(str(tmp_path / "dino"), "eval.dino_model", torch.device("cpu"), 4)
    assert_close(torch.nn.functional.normalize(shipped._features(batch.images), dim=-1), token.detach(), atol=2e-3, rtol=2e-2)

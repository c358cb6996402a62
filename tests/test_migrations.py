"""Runs and files of earlier versions are read, resumed and sampled under the current names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from commands import call
from dreambooth_lab import lab
from dreambooth_lab.callbacks.csv_log import CsvLog
from dreambooth_lab.callbacks.eval_loss import EvalRow
from dreambooth_lab.compare.shared import eval_rows
from dreambooth_lab.config import ConfigError, check, migrations, saved
from dreambooth_lab.config.migrations import Added, NewValue, Removed, Rename, migrate
from dreambooth_lab.runfolder import RunFolder
from dreambooth_lab.tools.generate import config_from_header

OLD = Path(__file__).parent / "old_runs"
PACKAGE = Path(lab.__file__).parent


@pytest.fixture(params=sorted(path.name for path in OLD.iterdir()))
def old(request, tmp_path) -> Path:
    """A run of an earlier version, with the paths of this machine in it."""
    run = shutil.copytree(OLD / request.param, tmp_path / "runs" / "2026-11-27_00-00-00_old")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("PACKAGE", str(PACKAGE)).replace("HERE", str(tmp_path)))
    return run


def test_old_run_loads_with_all_current_keys(old):
    """Fails for a new key of the schema: add an `Added` to `config/migrations.py`, with the value that earlier runs had."""
    run = lab.load(old)
    assert OmegaConf.missing_keys(run.config) == set()
    check(run.config)
    assert run.steps == 2


def test_old_run_resumes(old, tmp_path):
    done = call(f"resume={old}", "trainer.max_steps=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lab.load(old).steps == 4 and RunFolder(old).newest()[1] == 4
    assert f"{saved.KEY}: {migrations.VERSION}" in (old / "config.yaml").read_text()


def test_old_export_header_gives_its_training_config(old):
    cfg = config_from_header(old / "export", str(PACKAGE / "toybox" / "base"))
    assert cfg.adapter.rank == 1 and cfg.dataset.instance_prompt == "a photo of sks robot"


STEPS = (
    (Rename("ema.kept_on", "ema.device"), Rename("walk", "rollout"), NewValue("checkpoint.mode", "least", "min")),
    (Rename("trainer.steps", "trainer.max_steps"), Added("ema.decay", 0.5), NewValue("prior", "without", "none"),
     Removed("trainer.speed")),
)  # fmt: skip


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr(migrations, "VERSIONS", STEPS)
    migrations.notice.cache_clear()
    yield
    migrations.notice.cache_clear()


def test_migration_renames_adds_and_removes_keys_groups_and_values(steps):
    tree = {"ema": {"kept_on": "cuda"}, "walk": {"enabled": True}, "checkpoint": {"mode": "least"}}
    made = migrate(tree | {"trainer": {"steps": 3, "speed": 1}})
    assert made == {"ema": {"device": "cuda", "decay": 0.5}, "rollout": {"enabled": True}, "checkpoint": {"mode": "min"},
                    "trainer": {"max_steps": 3}}  # fmt: skip
    assert migrate({"ema": {"kept_on": "cuda"}}, 1) == {"ema": {"kept_on": "cuda", "decay": 0.5}}, "only later metrics"
    assert migrate({"name": "x"}) == {"name": "x"}, "an omitted group stays omitted"


def test_old_names_on_the_command_line_are_accepted_with_one_notice_each(steps, caplog):
    words = ["ema.kept_on=cuda", "walk.enabled=true", "walk.max_step_offset=3", "checkpoint.mode=least", "prior=without"]
    for _ in range(2):
        cfg = lab.compose(*words)
    assert (cfg.ema.device, cfg.rollout.enabled, cfg.rollout.max_step_offset) == ("cuda", True, 3)
    assert cfg.checkpoint.mode.value == "min" and cfg.prior.kind.name == "none"
    notices = [record.getMessage() for record in caplog.records]
    assert "ema.kept_on was renamed to ema.device; the old name is still accepted" in notices
    assert len(notices) == len(set(notices)) == 5


def test_old_names_in_experiment_and_group_files_are_accepted(steps, tmp_path, caplog):
    folder = tmp_path / "experiment"
    folder.mkdir(), (tmp_path / "walk").mkdir(), (tmp_path / "ema").mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /prior: without\n  - override /ema: mine\nname: x_${ema.kept_on}\n"
        "walk:\n  enabled: true\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      ema.kept_on: cpu,cuda\n"
    )
    (tmp_path / "ema" / "mine.yaml").write_text("defaults: [default]\nkept_on: cuda\n")
    cfg = lab.compose("experiment=mine", f"hydra.searchpath=[{tmp_path}]")
    assert (cfg.ema.device, cfg.rollout.enabled, cfg.name, cfg.prior.kind.name) == ("cuda", True, "x_cuda", "none")
    tree = OmegaConf.to_container(OmegaConf.load(folder / "mine.yaml"))
    assert migrations.migrate_file(tree)["hydra"]["sweeper"]["params"] == {"ema.device": "cpu,cuda"}


def test_later_version_and_damaged_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"x was written by a later version .* update this project"):
        saved.load(f"{saved.KEY}: {migrations.VERSION + 1}\n", "x")
    for text in ("a: [", "- 1", "not_a_key: 3", f"{saved.KEY}: one"):
        with pytest.raises(ConfigError, match="x is damaged or of another version"):
            saved.load(text, "x")


@pytest.mark.parametrize("prompt", ["a ${seed} dog", "a \\${dog", "${oc.env:HOME}", 'it\'s "quoted" \\'])
def test_saved_values_are_literal_and_not_interpolated(prompt):
    cfg = lab.compose()
    cfg.dataset.instance_prompt = saved.literal(prompt)
    text = saved.dump(cfg)
    again = saved.load(text, "x")
    assert again.dataset.instance_prompt == prompt and saved.dump(again) == text


def test_images_and_eval_losses_under_old_names_are_found(tmp_path):
    (tmp_path / "old" / "pictures").mkdir(parents=True)
    assert RunFolder(tmp_path / "old").image_folder.name == "pictures"
    assert RunFolder(tmp_path / "new").image_folder.name == "images"
    folder = RunFolder(tmp_path / "old")
    folder.eval.write_text("step,weights,dataset,picture,t,loss,stratum\n3,live,eval,a.png,0.5,1.25,0.5\n")
    assert CsvLog(folder.eval, EvalRow).read() == [EvalRow(3, "live", "eval", "a.png", 0.5, 1.25, 0.5)]
    assert eval_rows(folder)["image"].tolist() == ["a.png"]

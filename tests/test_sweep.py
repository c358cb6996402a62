import gc
import json
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import hydra
import pandas as pd
import pytest
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf

import tiny
from commands import call, start
from dreambooth_lab import __main__ as cli
from dreambooth_lab import lab, pages, sweep
from dreambooth_lab.config import ConfigError, check, conf_dir, resolve_paths
from dreambooth_lab.config.hydra_errors import explain
from dreambooth_lab.runfolder import RunFolder
from dreambooth_lab.sweep import Job, State, recorded

SWEEPS = sorted((conf_dir().parent / "experiments" / "sweep").glob("*.yaml"))


def hydra_of(*words, number=0):
    """The Hydra settings of a job that a sweep reads."""
    return {"hydra": {"overrides": {"task": list(words)}, "job": {"num": number}}}


def job(*words, number=0):
    cfg = lab.compose(*words)
    OmegaConf.set_struct(cfg, False)
    return OmegaConf.create({**{key: cfg._get_node(key) for key in cfg}, **hydra_of(*words, number=number)})


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_sweep_states_its_question_and_each_job_composes(path):
    head = path.read_text().split("name:")[0]
    assert all(f"# {word}" in head for word in ("Question:", "Cost:", "Expected:", "Start:"))
    params = OmegaConf.load(path).hydra.sweeper.params
    assert params.seed.startswith("0,1,2")
    for key in params.keys() - {"seed"}:
        values = params[key].split(",")
        for value in (values[0], values[-1]):
            cfg = lab.compose("experiment=demo", f"sweep={path.stem}", f"{key}={value}")
            assert cfg.resume == "auto" and cfg.name == path.stem
            cfg.resume = None  # as for a starting job
            check(cfg)


def test_job_folder_depends_on_its_configuration(tmp_path):
    (tmp_path / sweep.KEYS).write_text('["dataset.instance_prompt", "seed"]')
    words = ['dataset.instance_prompt="sks / robot"', "seed=1", "trainer.max_steps=7"]
    name = sweep.job_folder(str(tmp_path), 3, _root_=job(*words))
    assert name.startswith("3_instance_prompt-sks-robot_seed-1_") and len(name.rpartition("_")[2]) == 8
    (tmp_path / name).mkdir()
    moved = job(*words, "runs=elsewhere", "trainer.progress=false", "resume=auto")
    assert sweep.job_folder(str(tmp_path), 0, _root_=moved) == name, "another number and folder, the same job"
    for other in ("seed=2", "trainer.max_steps=8", "validation.num_images=1"):
        assert sweep.job_folder(str(tmp_path), 3, _root_=job(*words, other)) != name


def test_job_folder_does_not_depend_on_where_the_package_is_installed(monkeypatch):
    here = lab.compose("experiment=demo")
    elsewhere = here.copy()
    for key in ("model.pretrained", "dataset.path", "prior.path", "eval.clip_model", "eval.dino_model"):
        path = str(Path(OmegaConf.select(resolve_paths(here), key)).relative_to(sweep.PACKAGE))
        OmegaConf.update(elsewhere, key, f"/elsewhere/dreambooth_lab/{path}")
    before = sweep.digest(here)
    assert sweep.digest(elsewhere) != before
    monkeypatch.setattr(sweep, "PACKAGE", Path("/elsewhere/dreambooth_lab"))
    assert sweep.digest(elsewhere) == before


def test_unreadable_configuration_has_a_folder_too(tmp_path):
    cfg = job()
    cfg.dataset.path = "${nowhere}"
    assert sweep.job_folder(str(tmp_path), 0, _root_=cfg)


def test_sweep_folder_depends_on_its_command(tmp_path):
    first = sweep.sweep_folder("auto", str(tmp_path), "s", "seed=0,sweep=prompts,resume=auto")
    assert first == sweep.sweep_folder("auto", str(tmp_path), "s", "sweep=prompts,seed=0")
    assert first != sweep.sweep_folder("auto", str(tmp_path), "s", "sweep=prompts,seed=1")
    assert sweep.sweep_folder(None, str(tmp_path), "s", "sweep=prompts,seed=0") != first


@pytest.fixture
def member(tmp_path, monkeypatch):
    """Runs `cli._member` in a folder with a fake of the training."""

    def run(work, number=0, **more):
        folder = tmp_path / f"job_{number}"
        hydra_cfg = OmegaConf.create({**hydra_of(number=number)["hydra"], "runtime": {"output_dir": str(folder)}})
        monkeypatch.setattr(cli.HydraConfig, "get", lambda: hydra_cfg)
        monkeypatch.setattr(cli, "job", work)
        return cli._member(OmegaConf.create({"resume": None, "preflight": "run"} | more))

    return run


def test_failed_job_frees_its_memory(member, tmp_path):
    class Weights:
        def __init__(self):
            self.module = self  # modules may refer to each other

    references = []

    def work(cfg):
        weights = Weights()
        references.append(weakref.ref(weights))
        gc.freeze()  # as an import does, see heap.imports
        raise RuntimeError("out of memory")

    with pytest.raises(sweep.JobFailed, match="RuntimeError: out of memory") as caught:
        member(work)
    gc.disable()
    try:
        assert references[0]() is None and caught.value.__context__ is None
    finally:
        gc.enable()
    assert sweep.recorded(RunFolder(tmp_path / "job_0")).state == State.failed


def test_outcome_of_each_job_is_reported(member, tmp_path):
    def refused(cfg):
        raise ConfigError("dataset.path is '/x', which is not a folder")

    def stopped(cfg):
        raise KeyboardInterrupt

    assert member(lambda cfg: {"train/loss": 1.0}, 2) == {"train/loss": 1.0}
    with pytest.raises(sweep.JobFailed):
        member(refused, 0)
    with pytest.raises(SystemExit) as ended:
        member(stopped, 1)
    assert ended.value.code == 128 + signal.SIGINT
    assert [job.state for _, job in sweep.jobs(tmp_path)] == [State.failed, State.stopped, State.done]
    assert list(sweep.table(tmp_path).columns[4].cells) == ["dataset.path is '/x', which is not a folder", "", ""]


def test_finished_job_is_not_run_again(member, tmp_path):
    def never(cfg):
        raise AssertionError

    folder = RunFolder(tmp_path / "job_0")
    folder.root.mkdir()
    folder.metrics.write_text("step,name,value\n1,train/loss,3.0\n2,train/loss,2.0\n")
    folder.environment.write_text('[{"started": "a"}, {"started": "b", "cost": {}}]')
    assert member(never, resume="auto") == {"train/loss": 2.0}
    folder.environment.write_text('[{"started": "a", "cost": {}}, {"started": "b"}]')  # extended, then killed
    with pytest.raises(sweep.JobFailed):
        member(never, resume="auto")


def words(small, *more):
    """A sweep over three seeds on the tiny model with resume=auto."""
    return ["-m", *small, "validation.every_n_steps=0", "checkpoint.every_n_steps=1", "resume=auto", "seed=0,1,2", *more]


def wait_for_job(number, cwd, process, steps=2):
    """The folder of a sweep's job, as soon as it has made some steps."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for path in cwd.glob(f"runs/*/{number}_*/metrics.csv"):
            if RunFolder(path.parent).newest() and max(s for s, *_ in RunFolder(path.parent).read_metrics()) >= steps:
                return path.parent
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    raise AssertionError("too slow")


@pytest.mark.slow
def test_stopped_and_killed_sweep_runs_only_missing_jobs(small, tmp_path):
    """SIGTERM in job 0, SIGKILL in job 1, then to the end; compared with the same sweep without interruption."""
    overrides = words(small, "trainer.max_steps=16")
    process = start(*overrides, cwd=tmp_path)
    first = wait_for_job(0, tmp_path, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(120)
    assert process.returncode == 128 + signal.SIGTERM and "the same command resumes it" in err
    assert sweep.recorded(RunFolder(first)).state == State.stopped

    process = start(*overrides, cwd=tmp_path)
    second = wait_for_job(1, tmp_path, process)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.name in ("metrics.csv", "report.html")}

    done = call(*overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "job 0 is already done" in done.stdout and "job 1 is already done" not in done.stdout
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert len(RunFolder(first).starts()) == len(RunFolder(second).starts()) == 2, "each was resumed once"
    table = pd.read_csv(first.parent / "compare.csv")
    assert sorted(table["seed"]) == [0, 1, 2] and (first.parent / "compare.html").read_text().count("</html>") == 1

    whole = tmp_path / "whole"
    whole.mkdir()
    assert call(*overrides, cwd=whole).returncode == 0
    for ours, theirs in zip(sorted(first.parent.glob("*/metrics.csv")), sorted(whole.glob("runs/*/*/metrics.csv")), strict=True):
        assert ours.read_text() == theirs.read_text(), "bit for bit"


def test_job_that_lost_the_race_ends_and_is_not_run_again(small, tmp_path):
    """A learning rate too small to train, after one that trains; the losing job can be resumed by itself."""
    held_out = [f"eval.path={tiny.save_photos(tmp_path / 'held', [(80, 80)] * 4, seed=7)}", "eval.every_n_steps=2"]
    overrides = ["-m", *small, *held_out, "validation.every_n_steps=0", "trainer.max_steps=10", "race=2", "optimizer.lr=0.5,1e-4"]
    done = call(*overrides, "resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (winner, kept), (loser, lost) = sweep.jobs(next(tmp_path.glob("runs/*")))
    assert (kept.state, lost.state) == (State.done, State.lost)
    steps = max(step for step, *_ in loser.read_metrics())
    assert 4 <= steps < 10 and loser.newest() is not None and f"stopped at step {steps} and saved" in lost.message
    assert sweep.finished(winner) is not None and (loser.export / "pytorch_lora_weights.safetensors").is_file()
    page = (winner.root.parent / "compare.html").read_text()
    assert "lost the race: behind" in page and len(pd.read_csv(winner.root.parent / "compare.csv")) == 1

    again = call(*overrides, "resume=auto", cwd=tmp_path)
    assert "job 1 has lost the race already" in again.stdout and len(loser.starts()) == 1
    assert call("hydra.mode=RUN", f"resume={loser.root}", "race=0", cwd=tmp_path).returncode == 0
    assert max(step for step, *_ in loser.read_metrics()) == 10


@pytest.mark.parametrize("key", ["message", "told"])
def test_record_of_an_earlier_version_is_read(tmp_path, key):
    folder = RunFolder(tmp_path)
    folder.job.write_text(json.dumps({"number": 3, "words": ["seed=1"], "state": "failed", key: "out of memory"}))
    assert recorded(folder) == Job(3, ["seed=1"], "failed", "out of memory")


def test_race_requires_a_sweep_and_an_eval_loss(small, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="race is 3, but runs have no eval loss to race by"):
        check(lab.compose(*small, "race=3"))
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: OmegaConf.create({"mode": RunMode.RUN}))
    with pytest.raises(ConfigError, match=r"race is 3, but this is a single run; start a sweep \(-m, or sweep=NAME\)"):
        cli._check_race(OmegaConf.create({"race": 3}), RunFolder(tmp_path))
    folder = RunFolder(tmp_path)
    folder.job.write_text('{"number": 0, "words": [], "state": "began", "message": ""}')
    cli._check_race(OmegaConf.create({"race": 3}), folder)
    hydra_cfg = {
        "mode": RunMode.MULTIRUN,
        "sweeper": {"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"},
    }
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: OmegaConf.create(hydra_cfg))
    with pytest.raises(ConfigError, match="Optuna needs the whole of each run"):
        cli._check_race(OmegaConf.create({"race": 3}), folder)


def test_invalid_jobs_are_named_before_the_first_starts(tmp_path, monkeypatch):
    (tmp_path / sweep.KEYS).write_text('["trainer.max_steps"]')
    monkeypatch.setattr(pages.Pages, "started", tmp_path)
    target = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    sweeper = {"_target_": target, "params": {"trainer.max_steps": "0,2"}}
    config = {"hydra": {"sweeper": sweeper, "overrides": {"task": ["seed=3"]}, "job": {"config_name": "config"}}}
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        ((words, message),) = pages.refused(OmegaConf.create(config))
    assert words == ["trainer.max_steps=0"] and "trainer.max_steps is 0; it must be at least 1" in message


LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "ray": "ray"}  # launcher → its plugin's package


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_in_other_processes_are_bit_identical(launcher, small, tmp_path):
    """Jobs run concurrently and start with empty caches."""
    pytest.importorskip(f"hydra_plugins.hydra_{LAUNCHERS[launcher]}_launcher")
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    for name, how in (("plain", []), (launcher, [f"hydra/launcher={launcher}", *more])):
        overrides = [
            "-m",
            *small,
            "seed=0,1",
            "trainer.max_steps=3",
            "validation.every_n_steps=0",
            f"cache={tmp_path / name}_cache",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "dreambooth_lab", *overrides, f"runs={tmp_path / name}", *how],
            cwd=tmp_path,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()
    ours, theirs = (sorted((tmp_path / name).glob("*/*/metrics.csv")) for name in ("plain", launcher))
    assert len(ours) == 2 and [path.read_text() for path in ours] == [path.read_text() for path in theirs]
    assert len(pd.read_csv(next((tmp_path / launcher).glob("*/compare.csv")))) == 2


def test_missing_plugin_is_named_with_its_extra():
    for place, extra in (("hydra/launcher/joblib", "joblib"), ("hydra/sweeper/optuna", "optuna")):
        error = MissingConfigException("", place, ["basic"])
        assert f"pip install 'dreambooth-lab[{extra}]'" in explain(error)


def test_search_receives_the_metric_shown_on_the_page(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save_config(lab.compose("trainer.max_steps=20"))
    lines = [f"{step},train/loss,{float(step)}" for step in range(1, 21)]
    folder.metrics.write_text("\n".join(["step,name,value", *lines, "10,eval/loss,3.0", "20,eval/loss,2.0"]) + "\n")
    sweeper = {"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"}
    hydra_cfg = {
        "mode": RunMode.MULTIRUN,
        "runtime": {"output_dir": str(tmp_path)},
        "sweeper": sweeper,
        "overrides": {"task": []},
    }
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: OmegaConf.create(hydra_cfg))
    monkeypatch.setattr(cli, "_member", lambda cfg: {"train/loss": 20.0})
    assert cli.task(lab.compose("search_metric=eval/loss")) == 2.0
    assert cli.task(lab.compose("search_metric=train/loss")) == 19.5, "the mean over the last tenth"
    assert cli.task(lab.compose()) == {"train/loss": 20.0}
    with pytest.raises(
        sweep.JobFailed,
        match="is 'x', which this run does not log; it logs eval/loss, eval/lowest_loss, eval/step_of_lowest_loss, train/loss",
    ):
        cli.task(lab.compose("search_metric=x"))
    with pytest.raises(ConfigError, match="hydra/sweeper is optuna, but search_metric is null"):
        cli.job(lab.compose())


@pytest.mark.parametrize("resume", ["latest", "runs/x"])
def test_sweep_resumes_only_by_its_command(resume, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: OmegaConf.create({"mode": RunMode.MULTIRUN}))
    with pytest.raises(ConfigError, match="resume=auto resumes the sweep of the same command"):
        cli.with_saved_config(OmegaConf.create({"resume": resume}), RunFolder(tmp_path), [])

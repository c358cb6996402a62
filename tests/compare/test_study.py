import json
import re
from itertools import product
from math import isnan

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs
from scipy import stats as scipy_stats

from dreambooth_lab import compare, lab
from dreambooth_lab.compare import arms, document, stats, tradeoff
from dreambooth_lab.compare.conclusions import conclusion
from dreambooth_lab.compare.runs import Run, run_of
from dreambooth_lab.config import ConfigError
from dreambooth_lab.runfolder import RunFolder
from dreambooth_lab.tools.compare import application

RANKS, SEEDS = (4, 8, 16), (0, 1, 2)


def save(root, cfg, series, ended=True):
    """The files of a run that a comparison reads."""
    folder = RunFolder(root)
    folder.save_config(cfg)
    lines = [f"{step},{name},{value!r}" for name, values in series.items() for step, value in values]
    folder.metrics.write_text("\n".join(["step,name,value", *lines]) + "\n")
    cost = {"cost": {"training": {"seconds": 2.0, "memory_mib": 100, "device_memory_mib": 0}}} if ended else {}
    folder.environment.write_text(json.dumps([{"started": f"2026-01-01T00:00:00 {root.name}"} | cost]))
    return folder


@pytest.fixture(scope="module")
def base():
    return lab.compose()


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Three ranks × three seeds; rank 16 is better by .1 in each seed, rank 8 by nothing detectable."""
    root, noise = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    for rank in RANKS:
        for seed in SEEDS:
            cfg = base.copy()
            cfg.adapter.rank, cfg.seed, cfg.runs = rank, seed, f"elsewhere_{seed}"  # its path is not a difference
            end = 0.5 + 0.2 * seed - 0.1 * (rank == 16) + 0.01 * noise.standard_normal()
            losses = [(step, 1 - step / 100 + 0.1 * noise.random()) for step in range(1, 41)]
            save(root / f"{rank:02d}_{seed}", cfg, {"train/loss": losses, "eval/loss": [(0, 1.0), (40, end)]})
    return root


@pytest.fixture(scope="module")
def study(runs):
    return arms.read([runs])


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    assert compare.write([runs], out) == out / "compare.html"
    return out


def test_intervals_match_scipy(page):
    table, found = pd.read_csv(page / "compare.csv"), pd.read_csv(page / "differences.csv", dtype={"arm": str})
    text = (page / "compare.html").read_text()
    for metric in ("eval/loss", "train/loss"):
        by = table.pivot(index="seed", columns="adapter.rank", values=metric)
        for rank in RANKS:
            n, mean, error = len(by), by[rank].mean(), scipy_stats.sem(by[rank])
            low, high = scipy_stats.t.interval(0.95, n - 1, loc=mean, scale=error)
            assert f"<td>{mean:.4g}<br><small>{low:.4g} to {high:.4g}</small></td>" in text
        for rank in RANKS[1:]:
            (row,) = found[(found.metric == metric) & (found.arm == str(rank))].itertuples()
            apart = by[rank] - by[4]
            low, high = scipy_stats.t.interval(0.95, 2, loc=apart.mean(), scale=scipy_stats.sem(apart))
            assert (row.mean, row.low, row.high) == pytest.approx((apart.mean(), low, high), rel=1e-9)
            assert row.p == pytest.approx(scipy_stats.ttest_rel(by[rank], by[4]).pvalue, rel=1e-9) and row.pairing == "seed"


def test_training_losses_are_means_of_the_last_tenth(runs, page):
    table = pd.read_csv(page / "compare.csv")
    losses = [value for _, name, value in RunFolder(runs / "08_1").read_metrics() if name == "train/loss"]
    logged = table[(table["adapter.rank"] == 8) & (table.seed == 1)]["train/loss"].item()
    assert logged == pytest.approx(np.mean(losses[-4:]), rel=1e-12)


def test_csv_and_parquet_have_equal_values(page):
    for stem in ("compare", "differences"):
        csv, parquet = pd.read_csv(page / f"{stem}.csv"), pd.read_parquet(page / f"{stem}.parquet")
        for name in csv.select_dtypes("number").columns.intersection(parquet.select_dtypes("number").columns):
            np.testing.assert_array_equal(csv[name], parquet[name])
        assert list(csv.columns) == list(parquet.columns) and len(csv) == len(parquet)


def test_only_real_differences_are_reported(study):
    assert set(study.differing) == {"adapter.rank", "adapter.alpha"}, "alpha follows the rank"
    assert [arm.name for arm in study.arms] == ["4", "8", "16"] and study.seeds == [0, 1, 2]


def test_pairing_by_seed_reduces_the_interval(page):
    """Seeds differ by .2, arms by .1."""
    found = pd.read_csv(page / "differences.csv", dtype={"arm": str})
    row = found[(found.metric == "eval/loss") & (found.arm == "16")].iloc[0]
    table = pd.read_csv(page / "compare.csv").pivot(index="seed", columns="adapter.rank", values="eval/loss")
    assert row.p_holm < 0.05 < scipy_stats.ttest_ind(table[16], table[4]).pvalue
    text = (page / "compare.html").read_text()
    assert re.search(r"“16” is lower by 0\.\d+ \(95 % interval [^(]*, paired by seed, 3 pairs; p = ", text)
    assert "no significant difference for “8”" in text


def test_holm_correction():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    corrected = stats.holm([float("nan"), 0.02])
    assert isnan(corrected[0]) and corrected[1] == 0.02, "untested metrics are not counted"


def study_of(values):
    """Arm → seed → the metric's value."""
    made = []
    for name, by_seed in values.items():
        series = {s: {"m": [(1, v)]} if v is not None else {} for s, v in by_seed.items()}
        runs = {arms.Draw(s): Run(RunFolder(name), {"seed": s}, one, None) for s, one in series.items()}
        made.append(arms.Arm(name, runs))
    return arms.Study(made, [], [], [], [], [])


def test_unpaired_seeds_use_welchs_test():
    a, b = [1.0, 2.0, 4.0], [5.0, 5.5]
    (found,) = stats.differences(study_of({"a": dict(enumerate(a)), "b": {7: b[0], 8: b[1]}}), ["m"], {})
    expected = scipy_stats.ttest_ind(b, a, equal_var=False)
    assert found.pairing == "none" and found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_one_run_per_arm_compares_images_only():
    study = study_of({"a": {0: 1.0}, "b": {0: 2.0}})
    (bare,) = stats.differences(study, ["m"], {})
    assert bare.pairing == "too few" and "no conclusion is possible" in conclusion("m", [bare])
    (difference,) = stats.differences(study, ["m"], {("m", "b"): [1.0, 1.1, 0.9, 1.0]})
    assert difference.n == 4 and "one training seed, so other seeds may differ" in conclusion("m", [difference])


def test_duplicate_metrics_are_listed_once():
    study = study_of({"a": {0: 1.0}, "b": {0: 2.0}})
    for arm in study.arms:
        arm.first().series["n"] = list(arm.first().series["m"])
        arm.first().series["train/lr"] = [(1, 0.1)]
    assert stats.results(study) == ["m"]
    study.arms[0].first().series["n"] = [(1, 7.0)]
    assert stats.results(study) == ["m", "n"]


def test_equal_runs_have_no_difference():
    (found,) = stats.differences(study_of({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.0}}), ["m"], {})
    assert (found.low, found.high, found.p) == (0, 0, 1) and "exactly equal in all 2 pairs" in conclusion("m", [found])


def test_unfinished_runs_are_named_and_excluded(base, runs, tmp_path):
    save(tmp_path / "half", base, {"eval/loss": [(1, 9.0)]}, ended=False)
    save(tmp_path / "torn", base, {"eval/loss": [(1, 9.0)]}).config.write_text("a: [1")
    study = arms.read([runs, tmp_path])
    assert study.absent[0] == (str(tmp_path / "half"), "it has not finished")
    assert study.absent[1][0] == str(tmp_path / "torn") and "damaged" in study.absent[1][1] and len(study.absent) == 2
    assert sum(len(arm.runs) for arm in study.arms) == 9
    assert compare.write([tmp_path], tmp_path) is None


def test_images_with_equal_prompt_and_noise_are_side_by_side(base, tmp_path):
    for rank, grey in ((4, 50), (8, 200)):
        cfg = base.copy()
        cfg.adapter.rank, cfg.dataset.instance_prompt = rank, "a photo of <i>sks</i> robot"
        folder = save(tmp_path / str(rank), cfg, {"eval/loss": [(1, 0.1 * rank)]})
        for step, shade in ((0, 0), (9, grey)):
            (folder.image_folder / f"step_{step:07d}").mkdir(parents=True)
            for image in (0, 1):
                Image.new("RGB", (32, 32), (shade,) * 3).save(folder.image_folder / f"step_{step:07d}" / f"00_{image:02d}.png")
    (row,) = compare.shared.strips(arms.read([tmp_path]), arms.Draw(0))
    assert [strip.arm for strip in row] == ["base model", "4", "8"]
    assert [strip.picture.getpixel((5, 5))[0] for strip in row] == [0, 50, 200]
    text = compare.write([tmp_path], tmp_path).read_text()
    assert text.count('alt="images of') == 3 and "<i>sks" not in text


def test_page_is_self_contained(page):
    text = (page / "compare.html").read_text()
    assert get_plotlyjs() in text
    assert not re.search(r'<[^>]*\b(src|href)=["\']?(?!"?data:)', text.replace(get_plotlyjs(), ""))


def test_time_of_a_killed_process_is_unknown(base, tmp_path):
    folder = save(tmp_path / "run", base, {"train/loss": [(1, 1.0), (2, 1.0)]})
    finished = folder.starts()[0]
    killed, finished["flops_per_step"] = {"started": "2025-01-01"}, 7.0
    stopped = {
        "started": "2025-06-01",
        "cost_until_stopped": {"training": {"seconds": 3.0, "memory_mib": 400, "device_memory_mib": 7}},
    }
    folder.environment.write_text(json.dumps([killed, stopped, finished]))
    cost = run_of(folder).cost()
    assert cost == {"seconds": 5.0, "flops": 14.0, "killed_starts": 1, "process_peak_mib": 400, "device_peak_mib": 7}
    made = compare.write([tmp_path], tmp_path / "page")
    assert "<td>≥ 5.0</td>" in made.read_text(encoding="utf-8")


def test_reference_arm_can_be_chosen(study):
    assert [arm.name for arm in compare.led_by(study, "16").arms] == ["16", "4", "8"]
    with pytest.raises(ConfigError, match="reference is '7', which matches 0 arms; use one of '4', '8', '16'"):
        compare.led_by(study, "7")


def test_command_writes_the_comparison(runs, tmp_path, capsys):
    application([str(runs), "--out", str(tmp_path / "made")], standalone_mode=False)
    assert capsys.readouterr().out.strip() == str(tmp_path / "made" / "compare.html")
    with pytest.raises(ConfigError, match="--out"):
        application([str(runs), str(runs)], standalone_mode=False)
    with pytest.raises(ConfigError, match="contains no run"):
        application([str(tmp_path / "nowhere")], standalone_mode=False)


SUBJECTS = {"robot": 0.0, "cat": 0.3, "car": 0.5}


def subject_runs(root, base, effect, lacking=()):
    """Two arms × three subjects × three seeds. The base value depends on the subject, the effect of the second arm on it too."""
    for (subject, level), kind, seed in product(SUBJECTS.items(), ("none", "teacher"), SEEDS):
        if (subject, kind, seed) in lacking:
            continue
        cfg = base.copy()
        cfg.dataset.subject, cfg.prior.kind, cfg.seed = subject, kind, seed
        cfg.dataset.path, cfg.prior.path = f"photos/{subject}", None if kind == "none" else f"classes/{subject}"
        end = level + 0.01 * seed + (effect[subject] if kind == "teacher" else 0)
        series = {"subject/dino": [(0, 0.1), (40, end)], "class/pres_dino": [(0, 0.05), (40, 0.4 if kind == "none" else 0.1)]}
        save(root / f"{kind}_{subject}_{seed}", cfg, series)


@pytest.fixture
def toy(tmp_path):
    return lab.compose("dataset=toybox"), tmp_path / "runs"


def test_each_seed_is_averaged_over_subjects(toy):
    """Each subject has its own folders, which do not split the arms; the pairs are seeds."""
    base, root = toy
    subject_runs(root, base, {"robot": -0.1, "cat": 0.0, "car": 0.4})
    study = arms.read([root], ["dataset.subject"])
    assert [arm.name for arm in study.arms] == ["none", "teacher"] and study.differing == ["prior.kind"]
    assert {"dataset.path", "dataset.class_prompt", "prior.path"} <= set(study.following)
    (found,) = [one for one in compare.compared(study) if one.metric == "subject/dino"]
    assert (found.n, found.pairing) == (3, "seed") and found.mean == pytest.approx(0.1)
    assert stats.at_end(study.arms[0], "subject/dino")[1] == pytest.approx(np.mean(list(SUBJECTS.values())) + 0.01)
    assert len(arms.read([root]).arms) == 6, "without averaging each subject has arms of its own"


def test_seed_without_a_subject_is_left_out(toy, tmp_path):
    base, root = toy
    subject_runs(root, base, dict.fromkeys(SUBJECTS, 0.1), lacking=[("cat", "teacher", 2)])
    study = arms.read([root], ["dataset.subject"])
    assert sorted({draw.seed for draw in study.arms[1].runs}) == [0, 1]
    assert study.absent == [("teacher, seed 2", "there is no run with dataset.subject = cat")]
    page = compare.write([root], tmp_path / "page", average=["dataset.subject"]).read_text()
    assert "there is no run with dataset.subject = cat" in page and "means over dataset.subject: car; cat; robot" in page


@pytest.mark.parametrize(
    ("key", "message"), [("dataset.subjct", "dataset.subject"), ("dataset.batch_size", "differ in dataset.path")]
)
def test_key_that_cannot_be_averaged_is_refused(toy, key, message):
    base, root = toy
    subject_runs(root, base, dict.fromkeys(SUBJECTS, 0.1))
    for path in ("photos/a", "photos/b"):
        other = base.copy()
        other.dataset.batch_size, other.dataset.path = 2, path
        save(root / path, other, {"subject/dino": [(0, 0.1), (40, 0.5)]})
    with pytest.raises(ConfigError, match=message):
        arms.read([root], [key])


def test_pareto_front_holds_arms_that_no_other_dominates(toy, tmp_path):
    base, root = toy
    subject_runs(root, base, dict.fromkeys(SUBJECTS, -0.1))
    study = arms.read([root], ["dataset.subject"])
    none, teacher = tradeoff.places(study, "subject/dino", "class/pres_dino")
    assert (none.best, teacher.best) == (True, True), "more likeness with more drift: neither dominates"
    subject_runs(root / "better", base, dict.fromkeys(SUBJECTS, 0.1))
    none, teacher = tradeoff.places(arms.read([root / "better"], ["dataset.subject"]), "subject/dino", "class/pres_dino")
    assert (none.best, teacher.best) == (False, True)
    page = compare.write([root / "better"], tmp_path / "page", average=["dataset.subject"]).read_text()
    assert "On the Pareto front, by means: teacher. Dashed: the base model." in page


def test_images_of_a_page_are_limited(base, tmp_path, monkeypatch):
    monkeypatch.setattr(document, "MOST_STRIPS", 3)
    for seed in SEEDS:
        cfg = base.copy()
        cfg.seed, cfg.validation.prompts = seed, ["a robot"]
        folder = save(tmp_path / f"runs/{seed}", cfg, {"clip/mean": [(0, 0.1), (40, 0.2)]})
        for step in (0, 40):
            (folder.image_folder / f"step_{step:07d}").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder.image_folder / f"step_{step:07d}/00_0.png")
    page = compare.write([tmp_path / "runs"], tmp_path / "page").read_text()
    assert page.count("by all runs at step") == 2, "two seeds have four strips; the third has none"
    assert "further images are in the runs&#x27; folders" in page


def test_start_of_overfitting_is_compared(base, tmp_path):
    """The lowest eval loss and its step; a loss that was evaluated once has none."""
    for rank, losses in ((4, [(0, 3.0), (50, 1.0), (100, 2.0)]), (8, [(0, 3.0), (50, 2.5), (100, 2.0)])):
        cfg = base.copy()
        cfg.adapter.rank = rank
        save(tmp_path / str(rank), cfg, {"eval/loss": losses})
    study = arms.read([tmp_path])
    assert "eval/lowest_loss" in stats.results(study) and "eval/step_of_lowest_loss" not in stats.results(study)
    found = [arm.first().metrics for arm in study.arms]
    assert [(one["eval/lowest_loss"], one["eval/step_of_lowest_loss"]) for one in found] == [(1.0, 50.0), (2.0, 100.0)]
    assert "eval/lowest_loss" not in run_of(save(tmp_path / "once", base, {"eval/loss": [(0, 3.0)]})).metrics

"""Early stopping of a sweep's trailing runs, and its rate of false positives."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from dreambooth_lab.compare import race
from dreambooth_lab.runfolder import RunFolder

STEPS = (0, 10, 20, 30, 40)


def run(sweep, rate, seed, error, number, steps=STEPS, spread=0.01):
    """The files of a job that racing reads: error(step) above a loss that all runs share, plus noise of its own."""
    folder = RunFolder(sweep / f"{number}_x")
    folder.root.mkdir(parents=True)
    folder.config.write_text(yaml.safe_dump({"seed": seed, "optimizer": {"lr": rate}, "name": f"n{number}"}))
    record = {"number": number, "words": [f"optimizer.lr={rate}", f"seed={seed}"], "state": "done", "message": ""}
    folder.job.write_text(json.dumps(record))
    rows = []
    for step in steps:
        own = np.random.default_rng([seed, step, int(1e6 * rate)])
        for image in range(4):
            for i in range(8):
                loss = 1 + image + 0.3 * i + error(step) + spread * own.standard_normal()
                rows.append((step, "live", "eval", f"{image}.png", i / 8, loss, i / 8))
    pd.DataFrame(rows, columns=["step", "weights", "dataset", "image", "t", "loss", "stratum"]).to_csv(folder.eval, index=False)
    return folder


def table(*folders):
    return {folder.saved_values()["seed"]: pd.read_csv(folder.eval) for folder in folders}


def test_trailing_run_is_stopped_unless_it_catches_up(tmp_path):
    run(tmp_path, 1e-3, 0, lambda step: -0.001 * step, 0)
    behind = run(tmp_path, 1e-4, 0, lambda step: 0.0, 1)
    why = race.lost(behind, 40, 3, 4)
    assert why and "'optimizer.lr=0.001'" in why and "step 40" in why
    late = run(tmp_path, 1e-5, 0, lambda step: -0.001 * step + (0.05 if step in (10, 30) else 0.0), 2)
    assert race.lost(late, 30, 2, 4) is None, "at step 20 it was not behind"
    assert race.lost(late, 40, 3, 4) is None


def test_leading_and_single_runs_continue(tmp_path):
    lone = run(tmp_path / "one", 1e-3, 0, lambda step: 0.0, 0)
    assert race.lost(lone, 40, 1, 4) is None
    best = run(tmp_path / "two", 1e-3, 0, lambda step: -0.01 * step, 0)
    run(tmp_path / "two", 1e-4, 0, lambda step: 0.0, 1)
    run(tmp_path / "two", 1e-3, 1, lambda step: -1.0, 2)  # of the same arm, so not a competitor
    assert race.lost(best, 40, 1, 4) is None


def test_too_few_evaluations_stop_no_run(tmp_path):
    run(tmp_path, 1e-3, 0, lambda step: -1.0, 0)
    young = run(tmp_path, 1e-4, 0, lambda step: 0.0, 1, steps=(0, 10, 20))
    assert race.lost(young, 20, 3, 4) is None
    assert race.lost(young, 20, 2, 4)


def test_interval_matches_scipy_on_paired_rows_at_the_corrected_level(tmp_path):
    leading = run(tmp_path, 1e-3, 0, lambda step: -0.02, 0)
    other = run(tmp_path, 1e-2, 0, lambda step: 0.01, 1)
    own = run(tmp_path, 1e-4, 0, lambda step: 0.0, 2)
    lead = race.leader(table(own), {"leading": table(leading), "other": table(other)}, 20, evaluations=4)
    losses = [pd.read_csv(folder.eval).query("step == 20")["loss"].to_numpy() for folder in (own, leading)]
    expected = stats.ttest_rel(*losses).confidence_interval(1 - 0.05 / (4 * 2))
    assert lead.arm == "leading"
    assert (lead.low, lead.high) == pytest.approx((expected.low, expected.high))


def test_shared_seeds_are_averaged(tmp_path):
    leading = [run(tmp_path, 1e-3, seed, lambda step: 0.0, seed, spread=0.1) for seed in (0, 1, 2)]
    own = [run(tmp_path, 1e-4, seed, lambda step: 0.0, 3 + seed, spread=0.1) for seed in (0, 1, 5)]
    lead = race.leader(table(*own), {"leading": table(*leading)}, 20, evaluations=1)
    rows = [[pd.read_csv(f.eval).query("step == 20")["loss"].to_numpy() for f in arm[:2]] for arm in (own, leading)]
    apart = np.mean(rows[0], axis=0) - np.mean(rows[1], axis=0)
    assert lead.mean == pytest.approx(apart.mean())
    assert (lead.low, lead.high) == pytest.approx(tuple(stats.ttest_1samp(apart, 0).confidence_interval(0.95)))


def test_equal_arms_are_stopped_in_less_than_5_percent_of_sweeps(tmp_path):
    """One evaluation in a row is the strictest setting; the correction covers repeated testing."""
    stopped = 0
    for sweep in range(20):
        run(tmp_path / str(sweep), 1e-3, 2 * sweep, lambda step: 0.0, 0)
        own = run(tmp_path / str(sweep), 1e-4, 2 * sweep, lambda step: 0.0, 1)
        stopped += any(race.lost(own, step, 1, 4) for step in STEPS[1:])
    assert stopped <= 3, "1 of 20 is expected at most; more than 3 have a chance of .02"

"""The report's eval loss by timestep: bins, counts, intervals over images, pairing."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch
from scipy import stats

from dreambooth_lab.callbacks.csv_log import CsvLog
from dreambooth_lab.callbacks.eval_loss import EvalRow
from dreambooth_lab.report import by_time
from dreambooth_lab.runfolder import RunFolder


def rows_of(step, images=4, times=8, weights="live", gain=0.0, shift=1.0):
    """Losses that differ much between images, and a change that differs little."""
    draws = torch.Generator().manual_seed(images)
    loss = torch.rand(images, times, generator=draws) + 0.5
    made = []
    for i in range(images):
        for k in range(times):
            even = (k + 0.5) / times
            s = shift if i % 2 else 1.0  # images of two sizes
            t = s * even / (1 + (s - 1) * even)
            made.append(EvalRow(step, weights, "eval", f"{i}.png", t, float(loss[i, k]) - gain * even - 0.001 * i * gain, even))
    return made


def test_every_draw_is_in_one_bin_and_sizes_share_theirs():
    rows = rows_of(0, images=3, times=25, shift=3.0)
    groups = by_time.groups_of(rows)
    found = by_time.bins(by_time.curves(rows, None)[0].draws, groups)
    assert len(found) == by_time.BINS and sum(one.draws for one in found.values()) == len(rows) == 75
    assert {one.images for one in found.values()} == {3} and {one.draws for one in found.values()} == {6, 9}
    by_stratum = {}
    for row in rows:
        by_stratum.setdefault(row.stratum, set()).add(groups[row.t])
    assert all(len(numbers) == 1 for numbers in by_stratum.values())
    order = [min(numbers) for _, numbers in sorted(by_stratum.items())]
    assert order == sorted(order), "from data to noise"


def test_a_bin_is_the_mean_of_its_draws_with_an_interval_over_images():
    rows = rows_of(0, images=5, times=2)
    one = by_time.bins(by_time.curves(rows, None)[0].draws, dict.fromkeys((0.25, 0.75), 0))[0]
    means = [fmean(row.loss for row in rows if row.image == f"{i}.png") for i in range(5)]
    known = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
    assert one.mean == pytest.approx(fmean(row.loss for row in rows)) and one.interval == pytest.approx(tuple(known))
    two = by_time.bins(by_time.curves(rows_of(0, images=2), None)[0].draws, by_time.groups_of(rows_of(0)))
    assert all(one.interval[0] != one.interval[0] for one in two.values()), "no interval of two images"


def test_the_change_is_paired():
    """Images differ by half their loss, the changes by a thousandth: pairing keeps the interval narrow."""
    rows = rows_of(0) + rows_of(10, gain=0.2)
    base, last = by_time.curves(rows, None)
    for one in by_time.bins(by_time.change(last.draws, base.draws), by_time.groups_of(rows)).values():
        assert one.mean == pytest.approx(-0.2 * one.middle - 0.0003, abs=1e-6)
        assert one.interval[1] - one.interval[0] < 0.002 < abs(one.mean) and one.interval[0] < one.mean < one.interval[1]


def test_base_best_last_and_average_are_shown_once_each():
    rows = [row for step in (0, 5, 10) for kind in ("live", "ema") for row in rows_of(step, weights=kind, gain=step / 10)]
    names = [one.name for one in by_time.curves(rows, (Path(), 5))]
    assert names == ["step 0", "step 5", "step 10", "step 10, ema"]
    assert [one.name for one in by_time.curves(rows, (Path(), 10))] == ["step 0", "step 10", "step 10, ema"]
    averaged = [row for row in rows if row.weights == "ema"]
    assert [one.name for one in by_time.curves(averaged, None)] == ["step 0", "step 10, ema"]


@pytest.mark.parametrize(("later", "figures"), [({}, 2), ({"images": 2}, 2), ({"times": 3}, 1)])
def test_the_section_stands_whatever_was_recorded(tmp_path, later, figures):
    """A resumed run may have another number of images, or other times, which no pair shares."""
    folder = RunFolder(tmp_path)
    assert by_time.section(folder) == ("", ""), "a run without an eval loss"
    log = CsvLog(folder.eval, EvalRow)
    log.add(0, rows_of(0))
    assert by_time.section(folder) == ("", ""), "only the base model"
    log.add(10, rows_of(10, gain=0.1, **later))
    page = "".join(by_time.section(folder))
    assert page.count('class="plot"') == figures and page.count("<tr>") == 9
    assert "8 bins of 4 draws from 4 images; bands: 95 %" in page

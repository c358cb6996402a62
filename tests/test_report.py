import re

import pytest

from dreambooth_lab import lab, report
from dreambooth_lab.run import run


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("report") / "run"
    run(lab.compose(*small, 'dataset.instance_prompt="a <b>sks</b> & dog"', "trainer.max_steps=4"), root)
    return lab.load(root).folder


def test_the_page_is_self_contained(folder):
    page = folder.report.read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/jpeg;base64,") == 4  # before and after; steps 0, 3 and 4
    assert page.count("<svg") == 3  # loss and its two parts


def test_what_users_type_is_escaped(folder):
    page = folder.report.read_text()
    assert "a &lt;b&gt;sks&lt;/b&gt; &amp; dog" in page and "<b>sks" not in page


def test_the_curve_shows_the_values():
    drawn = report._curve("train/loss", [(1, 0.0), (2, 1.0), (4, 0.5)])
    assert "M250.0 210.0L500.0 10.0L1000.0 110.0" in drawn


def test_the_page_says_what_it_took(folder):
    assert re.search(r"<td>training</td><td>\d+\.\d</td><td>[\d,]+</td>", folder.report.read_text())

import re

import pytest
from plotly.offline import get_plotlyjs

import browser
import tiny
from dreambooth_lab import lab
from dreambooth_lab.plots import Line, chart, smoothed
from dreambooth_lab.report import sections
from dreambooth_lab.run import run


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    held = tiny.save_photos(root / "held", [(80, 80)], seed=7)
    words = ['dataset.instance_prompt="a <b>sks</b> & dog"', "trainer.max_steps=4", f"eval.path={held}", "eval.every_n_steps=2",
             "eval.timesteps=2", "checkpoint.monitor=eval/loss", "ema.validation=comparison", "validation.every_n_steps=2",
             f"eval.clip_model={tiny.save_clip(root / 'clip')}"]  # fmt: skip
    run(lab.compose(*small, *words), root / "run")
    return lab.load(root / "run").folder


def test_the_page_is_self_contained(folder):
    page = folder.report.read_text()
    assert not re.search(r'<[^>]*\b(src|href)="(?!data:)', page.replace(get_plotlyjs(), ""))
    shown = {"before and after", "step 0", "step 2", "step 4", "compared at 2", "compared at 4"}
    shown |= {"the step kept"} if folder.best()[1] == 2 else set()  # else it is among the before and after
    assert page.count("data:image/jpeg;base64,") == len(shown)
    for name in ("train/loss", "train/loss_instance", "train/loss_prior", "eval/loss", "eval/loss by timestep", "clip/mean"):
        assert re.search(f'<figure class="plot" role="img" aria-label="{name}[ ;,]', page), name


def test_what_users_type_is_escaped(folder):
    page = folder.report.read_text()
    assert "a &lt;b&gt;sks&lt;/b&gt; &amp; dog" in page and "<b>sks" not in page


def test_it_tells_what_the_run_took(folder):
    assert "<td>images</td>" in folder.report.read_text()


def test_it_says_which_step_to_keep_and_how_to_use_it(folder):
    page, step = folder.report.read_text(), folder.best()[1]
    assert f"keep step {step}: eval/loss is " in page
    for said in (f"resume={folder.root} trainer.max_steps=8", f"generate run={folder.root}", str(folder.best_export)):
        assert said in page
    assert "<th>ema</th>" in page and "compared with the base model" in page


def test_the_verdict_is_honest_about_the_base_model():
    values = {0: 0.5, 10: 0.6, 20: 0.7}
    assert sections._chosen("eval/loss", values, 10, True).startswith(
        "keep step 10: eval/loss is 0.6 there, 0.5 for the base model (which"
    )
    assert "(which" not in sections._chosen("clip/mean", values, 20, False)
    assert sections._lowest("eval/loss", values) == "eval/loss was never lower than the base model's."


def test_the_curve_shows_the_values():
    drawn = chart("a", [Line([(1, 1.0), (2, 3.0)], "</script><b>x")], level=0.5, mark=2)
    assert '"x":[1,2],"y":[1.0,3.0]' in drawn and '"log"' in drawn
    assert '"y0":0.5,"y1":0.5' in drawn and '"x0":2,"x1":2' in drawn
    assert drawn.count("</script>") == 1 and "<b>x" not in drawn
    assert '"log"' not in chart("a", [Line([(1, 0.0), (2, 3.0)])]), "nothing of 0 or less on a logarithmic axis"


def test_smoothing_keeps_a_level():
    assert smoothed([(0, 2.0), (1, 2.0)]) == [(0, 2.0), (1, 2.0)]


@pytest.mark.parametrize("size", [browser.DESKTOP, browser.PHONE], ids=["desktop", "phone"])
def test_the_page_in_a_browser(folder, tmp_path, size):
    with browser.chromium(tmp_path / "profile") as page:
        page.get(folder.report.as_uri())
        for closed in page.find_elements("css selector", "details:not([open])"):
            page.execute_script("arguments[0].open = true", closed)
        found = browser.look(page, size, tmp_path / "report.png")
        assert page.execute_script("return document.querySelectorAll('.plotly-graph-div .main-svg').length") > 8
        assert not browser.complaints(page)
        assert found["broken"] == 0 and found["pictures"] >= 6 and found["wide"] <= size[0], found
        assert browser.complaints(page) == []
        assert len(page.find_elements("tag name", "svg")) >= 6

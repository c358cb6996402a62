import io

import pytest
from rich.console import Console

import samples
from dreambooth_lab import lab, preflight
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.run import build_family


@pytest.fixture
def data(small, photos, tmp_path):
    """A dataset file with long names, two notices and a rejected picture."""
    long = "a-dataset-with-a-rather-long-name-1024px"
    entries = [
        samples.entry(photos, id=long, crop_style="random", minimum_image_size=85),
        samples.entry(photos, id="b", scan_for_errors=True),
    ]
    path = samples.save(tmp_path / "a.json", *entries)
    words = [w for w in small if not w.startswith(("dataset", "prior"))]
    cfg = lab.compose("dataset=simpletuner", f"dataset.path={path}", *words)
    made = DreamBoothData(cfg, build_family(cfg))
    made.prepare()
    return made


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_show_everything_at_any_width(data, width):
    tables = [
        preflight._datasets(data),
        preflight._mixture(data),
        preflight._rejected(data.summaries()),
        preflight._notices(data),
    ]
    console = Console(width=width, file=io.StringIO())
    for table in tables:
        console.print(table)
    shown = console.file.getvalue()
    joined = "".join(c for c in shown if c not in "│\n ")
    headings = ("dataset", "use", "pictures", "rejected", "masks", "buckets", "rows/epoch", "share", "cached", "encoded")
    assert all(word in shown for word in headings) and "…" not in shown
    for notice in data.notices:
        assert notice.split()[-1] in joined and len(data.notices) == 2
    assert "a-dataset-with-a-rather-long-name-1024px" in joined and "minimum_image_size=85" in joined

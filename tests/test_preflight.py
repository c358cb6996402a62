import io
import re

import pytest
from PIL import Image
from rich.console import Console

import samples
from dreambooth_lab import lab, sheet
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.factory import build_family
from dreambooth_lab.preflight import overview, tables
from dreambooth_lab.run import run
from dreambooth_lab.runfolder import RunFolder
from dreambooth_lab.terminal import show


@pytest.fixture(scope="module")
def data(small, photos, tmp_path_factory):
    """A dataset file with long names, two notices and a rejected image."""
    long = "a-dataset-with-a-rather-long-name-1024px"
    entries = [
        samples.entry(photos, id=long, crop_style="random", minimum_image_size=85),
        samples.entry(photos, id="b", scan_for_errors=True),
    ]
    path = samples.save(tmp_path_factory.mktemp("data") / "a.json", *entries)
    words = [w for w in small if not w.startswith(("dataset", "prior"))]
    cfg = lab.compose("dataset=simpletuner", f"dataset.path={path}", *words)
    made = DreamBoothData(cfg, build_family(cfg))
    made.prepare()
    return made


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_show_everything_at_any_width(data, width):
    shown = [
        tables.datasets(data),
        tables.mixture(data),
        tables.rejected(data.summaries()),
        tables.notices(data),
    ]
    console = Console(width=width, file=io.StringIO())
    for table in shown:
        console.print(table)
    output = console.file.getvalue()
    joined = "".join(c for c in output if c not in "│\n ")
    headings = ("dataset", "use", "images", "rejected", "masks", "buckets", "rows/epoch", "share", "cached", "encoded")
    assert all(word in output for word in headings) and "…" not in output
    for notice in data.notices:
        assert notice.split()[-1] in joined and len(data.notices) == 2
    assert "a-dataset-with-a-rather-long-name-1024px" in joined and "minimum_image_size=85" in joined


@pytest.fixture(scope="module")
def ready(small, tmp_path_factory):
    """A run whose preflight was shown: its folder."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    run(lab.compose(*small, "preflight=only", "dataset.instance_prompt=a photo of [sks] dog", "ema.enabled=false"), folder.root)
    return folder


def test_preflight_shows_prompts_sizes_files_and_memory(ready):
    text = ready.preflight.read_text()
    output = " ".join(text.split())
    wanted = ["photos a photo of [sks] dog", "class images a photo of a dog", "the rare word sks", "crops.png", "report.html"]
    for words in (*wanted, "3 checkpoints", "exports", "available on the device", "fits yes"):
        assert words in output, words
    assert not set("┃│━") & set(text), "a file has no boxes"


def test_crop_sheet_shows_each_photo_and_class_image_once(ready):
    with Image.open(ready.crops) as image:
        pixels = image.convert("RGB")
    side = pixels.height // 2 - sheet.TITLE - sheet.GAP
    middles = [(sheet.GAP + place * (side + sheet.GAP) + 20, (row + 1) * (side + sheet.TITLE + sheet.GAP) - side // 2)
               for row, many in ((0, 5), (1, 3)) for place in range(many)]  # fmt: skip
    for left, top in middles:
        colours = {pixels.getpixel((left + x, top)) for x in range(8)}
        assert colours != {(255, 255, 255)}, "an image is drawn"
    after = sheet.GAP + 3 * (side + sheet.GAP) + 20
    assert {pixels.getpixel((after + x, middles[-1][1])) for x in range(8)} == {(255, 255, 255)}, "three class images"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("terminal", [True, False])
def test_tables_are_complete_at_any_width_and_encoding(data, width, terminal):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="replace")
    on = Console(width=width, file=file, force_terminal=terminal, no_color=True)
    wanted = [tables.datasets(data), tables.mixture(data), tables.crops(data), tables.notices(data), tables.buckets(data)]
    show(*wanted, overview.captions(data), on=on)
    file.flush()
    output = raw.getvalue().decode()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert max(map(len, plain.splitlines())) <= width and "…" not in plain
    assert ("|" in plain) == terminal or not terminal
    assert "rows/epoch" in plain and "instance" in plain

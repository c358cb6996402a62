"""The built wheel contains all files that a run needs, and runs without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[1]
INSIDE = {
    "src/dreambooth_lab": "",
    "conf": "conf/",
    "experiments/experiment": "experiments/experiment/",
    "experiments/remedy": "experiments/remedy/",
    "experiments/rollout_arm": "experiments/rollout_arm/",
    "experiments/sweep": "experiments/sweep/",
}


def build(kind: str, folder: Path, source: Path = ROOT) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return next(folder.iterdir())


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if name.startswith("dreambooth_lab/")}


def test_wheel_contains_all_package_and_configuration_files(tmp_path):
    expected = {
        f"dreambooth_lab/{inside}{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in INSIDE.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files(build("wheel", tmp_path)) == expected
    assert "dreambooth_lab/conf/config.yaml" in expected and "dreambooth_lab/toybox/base/model_index.json" in expected


@pytest.mark.slow
def test_wheel_from_the_sdist_runs_the_demo_in_an_empty_folder(tmp_path):
    """In a separate virtual environment with access to this one's libraries but not to the checkout."""
    with tarfile.open(build("sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    wheel = build("wheel", tmp_path / "wheel", next((tmp_path / "source").iterdir()))
    assert files(wheel) == files(build("wheel", tmp_path / "direct"))
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    (Path(own.stdout.strip()) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    words = ["experiment=demo", "trainer.max_steps=5", "validation.num_images=1", "validation.num_inference_steps=2"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import dreambooth_lab; print(dreambooth_lab.__file__)"],
        cwd=empty,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "venv") in where.stdout
    done = subprocess.run(
        [python, "-m", "dreambooth_lab", *words], cwd=empty, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (run,) = (empty / "runs").iterdir()
    assert (run / "report.html").is_file() and (run / "export" / "demo.safetensors").is_file()

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from dreambooth_lab import lab
from dreambooth_lab.run import run

NOTEBOOKS = sorted((Path(__file__).parents[1] / "experiments" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_runs_and_is_kept_without_outputs(path, small, tmp_path, monkeypatch):
    run(lab.compose(*small, "trainer.max_steps=1"), tmp_path / "run")
    monkeypatch.setenv("RUN", str(tmp_path / "run"))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)

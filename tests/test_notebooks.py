import ast
import shutil
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient

import dreambooth_lab
from dreambooth_lab import lab

PACKAGE = Path(dreambooth_lab.__file__).parent
NOTEBOOKS = Path(__file__).parents[1] / "experiments" / "notebooks"
LEAST = "validation.num_inference_steps=2 validation.num_images=1 trainer.progress=false logger=none"
ALL = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def at(root):
    """Overrides of the smallest run, with few class images and the caches in a folder."""
    return f"{LEAST} cache={root / 'cache'} prior.path={root / 'class'}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step, and a sweep's folder with it under two seeds."""
    root = tmp_path_factory.mktemp("notebooks")
    (root / "class").mkdir()
    for path in sorted((PACKAGE / "toybox/pictures/classes/robot").glob("*.png"))[:4]:
        shutil.copy(path, root / "class")
    words = ["experiment=demo", "eval=none", "trainer.max_steps=1", *at(root).split()]
    run = lab.train(lab.compose(*words), root / "run")
    for seed in (0, 1):
        shutil.copytree(run.folder.root, root / "sweep" / str(seed))
        config = root / "sweep" / str(seed) / "config.yaml"
        config.write_text(config.read_text().replace("\nseed: 0\n", f"\nseed: {seed}\n"))
    return root


def execute(name):
    """Execute a notebook's cells in this process; returns their outputs as mime type → data."""
    shell, shown = InteractiveShell(), []
    for cell in read(name).cells:
        if cell.cell_type == "code":
            with capture_output() as output:
                done = shell.run_cell(cell.source)
            done.raise_error()
            shown += [bundle.data for bundle in output.outputs]
            if done.result is not None and ends_in_expression(cell.source):
                shown.append(shell.display_formatter.format(done.result)[0])
    return shown


def ends_in_expression(source):
    return isinstance(ast.parse(source).body[-1], ast.Expr)


@pytest.mark.parametrize("name", ALL)
def test_notebook_runs_with_few_steps_and_shows_images(name, trained, tmp_path, monkeypatch):
    settings = {"RUN": trained / "run", "SWEEP": trained / "sweep", "ROOT": tmp_path, "STEPS": 1}
    for key, value in (settings | {"WORDS": at(trained)}).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.chdir(tmp_path)
    shown = execute(name)
    pages = " ".join(data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown) or "data:image/jpeg" in pages


@pytest.mark.parametrize("name", ALL)
def test_notebook_is_stored_without_outputs(name):
    for cell in read(name).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_notebook_runs_from_scratch_at_full_size(name, tmp_path, monkeypatch):
    for key in ("RUN", "SWEEP", "ROOT", "STEPS", "WORDS"):
        monkeypatch.delenv(key, raising=False)
    notebook = read(name)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)

"""One self-contained HTML page per run: prompt, curves, images over the steps, and how to use the result."""

from __future__ import annotations

import json
import shlex
from html import escape
from pathlib import Path
from string import Template

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from .. import plots
from ..callbacks.card import HERE, usage
from ..callbacks.header import public
from ..callbacks.image_grids import beside
from ..config import LOCAL
from ..page import picture
from ..runfolder import RunFolder
from . import sections
from .sections import Metrics
from .summary import lines

PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
USAGE = Template("""# generate images with several adapter strengths (0: the base model):
python -m dreambooth_lab.tools.generate run=$root $prompt strengths=[0,0.5,1]
$kept
# train for more steps:
python -m dreambooth_lab resume=$root trainer.max_steps=$more

# with diffusers only:
$code""")


def write(folder: RunFolder) -> None:
    """Write the page from the files in the folder."""
    cfg, numbers = folder.saved_config(), read_numbers(folder)
    steps = int(max((values[-1][0] for values in numbers.values()), default=0))
    page = PAGE.substitute(
        title=escape(folder.root.resolve().name),
        prompt=escape(cfg.dataset.instance_prompt),
        steps=f"{steps:,}",
        verdict=sections.verdict(folder, numbers),
        pictures=_images(folder, list(cfg.validation.prompts)),
        curves=sections.losses(folder, numbers),
        metrics=sections.metrics(numbers),
        changes=sections.changed(folder),
        values="".join(f"<tr><td>{escape(name)}</td><td>{v[-1][1]:.6g}</td></tr>" for name, v in numbers.items()),
        cost=_cost(folder),
        preflight=escape(folder.preflight.read_text(encoding="utf-8")),
        usage=escape(_usage(folder, steps)),
        config=escape(OmegaConf.to_yaml(cfg)),
        script=plots.script(),
        theme=plots.THEME,
    )
    folder.report.write_text(page, encoding="utf-8")


def read_numbers(folder: RunFolder) -> Metrics:
    """Name → (step, value), in order."""
    numbers: Metrics = {}
    for step, name, value in folder.read_metrics():
        numbers.setdefault(name, []).append((step, value))
    return numbers


def summary_lines(folder: RunFolder) -> list[str]:
    """The summary at the end of a run: what changed, which step to keep, how to use it."""
    return lines(folder, read_numbers(folder))


def _usage(folder: RunFolder, steps: int) -> str:
    """Shell commands and Python code, ready to paste."""
    cfg = folder.saved_config()
    prompt_text, root = cfg.dataset.instance_prompt, shlex.quote(str(folder.root))
    prompt = shlex.quote(f"prompt='{prompt_text}'" if "'" not in prompt_text else f'prompt="{prompt_text}"')
    kept = f"python -m dreambooth_lab.tools.generate file={shlex.quote(str(folder.best_export))} {prompt}   # the best step\n"
    return USAGE.substitute(
        root=root, prompt=prompt, kept=kept if folder.best() else "", more=2 * steps,
        code=_code(folder, cfg) if folder.export.is_dir() else "there is no export yet",
    )  # fmt: skip


def _code(folder: RunFolder, cfg: DictConfig) -> str:
    """The code on the export's card, with this machine's paths, which the card may omit."""
    code, shown = usage(folder.export), public(cfg).model
    code = code.replace(f'export = "{HERE}"', f'export = "{folder.export.as_posix()}"')
    for key in ("pretrained", "config"):
        if str(shown[key]).startswith(LOCAL):
            exported, own = (json.dumps(value, ensure_ascii=False) for value in (shown[key], cfg.model[key]))
            code = code.replace(exported, own)
    return code


def _images(folder: RunFolder, prompts: list[str]) -> str:
    """Per prompt the base model's images beside the last ones, with the same noise in each column; every step's grid below."""
    grids = sorted(folder.image_folder.glob("step_*.png"))
    if not grids:
        return "<p>There are no validation images.</p>"
    beside([Image.open(grids[i]) for i in (0, -1)], len(prompts)).save(folder.before_after)
    best = folder.best()
    kept = folder.image_folder / f"step_{best[1]:07d}.png" if best else None
    rows = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    pair = f"left: {_step(grids[0])}; right: {_step(grids[-1])}; the same column on both sides starts from the same noise"
    compared = sorted(folder.compared.glob("step_*.png"))
    average = f"base, live weights and their average, {_step(compared[-1])}" if compared else ""
    return (
        f"<p>Rows from top to bottom:</p><ol>{rows}</ol>{_figure(folder.before_after, pair)}"
        + (_figure(kept, f"the best step, {_step(kept)}") if kept in grids[1:-1] else "")
        + (_figure(compared[-1], average) if compared else "")
        + f"<details><summary>every step</summary>{''.join(_figure(path, _step(path)) for path in grids)}</details>"
        + (f"<details><summary>base, live, average: every step</summary>{_all(compared[:-1])}</details>" if compared[1:] else "")
    )


def _all(paths: list[Path]) -> str:
    return "".join(_figure(path, _step(path)) for path in paths)


def _cost(folder: RunFolder) -> str:
    """Time and memory of every start that finished or was stopped, by phase."""
    rows = "".join(
        f"<tr><td>{escape(started)}</td><td>{escape(phase)}</td><td>{took['seconds']:.1f}</td>"
        f"<td>{took['memory_mib']:,.0f}</td><td>{took['device_memory_mib'] or '-'}</td></tr>"
        for started, cost in folder.costs()
        for phase, took in cost.items()
    )
    head = "<tr><th>started</th><th>phase</th><th>seconds</th><th>process, peak MiB</th><th>device, peak MiB</th></tr>"
    return f'<div class="wide"><table>{head}{rows}</table></div>' if rows else "<p>The run has not finished yet.</p>"


def _step(path: Path) -> str:
    step = int(path.stem.removeprefix("step_"))
    return f"step {step:,}" if step else "step 0: the base model"


def _figure(path: Path, caption: str, widest: int = 1600) -> str:
    """A grid as an embedded JPEG; the full images are in the run's folder."""
    grid = Image.open(path).convert("RGB")
    grid.thumbnail((widest, 10 * widest))
    return f"<figure>{picture(grid, caption)}<figcaption>{escape(caption)}</figcaption></figure>"

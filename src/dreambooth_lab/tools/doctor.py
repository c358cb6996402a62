"""`python -m dreambooth_lab.tools.doctor [--report FILE]`: a description of this machine for training.

Versions, devices, quantisation libraries, attention kernels, disk space, caches, downloaded models, and relevant environment
variables; for secrets only whether they are set. A report contains the same without local paths, user and host
names, so that it can be shared.
"""

from __future__ import annotations

import getpass
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..data.caching.cache import KINDS, Store
from ..models.kernels import KERNELS
from ..storage import durable
from ..storage.disk import free_bytes
from .common import cli

app = cli.app(help=__doc__)
NEEDED = (
    "lightning", "hydra-core", "diffusers", "transformers", "peft", "lycoris-lora", "safetensors", "huggingface-hub", "numpy",
    "pillow",
)  # fmt: skip
EXTRAS = ("datasets", "pyarrow", "triton", "prodigyopt", "schedulefree", "lion-pytorch", "starlette")
QUANT = {"quanto": "optimum.quanto", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}
PATHS = ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME", "TMPDIR", "CUDA_HOME", "VIRTUAL_ENV")
PLAIN = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
         "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "TOKENIZERS_PARALLELISM", "WORLD_SIZE",
         "LOCAL_RANK")  # fmt: skip
SECRET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "DREAMBOOTH_WATCH_TOKEN", "HF_ENDPOINT", "HTTP_PROXY",
          "HTTPS_PROXY", "ALL_PROXY")  # fmt: skip  # URLs may contain a password
GB = 1e9


class Fact(NamedTuple):
    """One line."""

    topic: str
    name: str
    value: str
    path: bool = False  # whether the name or value is a local path
    bad: bool = False  # whether it is a problem for training


@app.command()
def doctor(
    report: Annotated[Path | None, typer.Option(help="A file for a report without local paths and names.")] = None,
    runs: Annotated[Path, typer.Option(help="The parent of the run folders.")] = Path("runs"),
    cache: Annotated[Path, typer.Option(help="The cache folder.")] = Path(".cache"),
) -> None:
    """Describe this machine for training; exits with 1 if a required library is missing."""
    facts = [*versions(), *devices(), *libraries(), *kernels(), *disks(runs, cache), *models(), *variables()]
    print(as_text(facts))
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(report, scrubbed(facts))
        print(f"\nreport: {report}")
    raise typer.Exit(int(any(fact.bad for fact in facts)))


def versions() -> Iterator[Fact]:
    """Versions of Python, torch, and the imported libraries."""
    yield Fact("versions", "system", f"{platform.system()} {platform.machine()}")
    yield Fact("versions", "python", platform.python_version())
    yield Fact("versions", "torch", torch.__version__)
    yield Fact("versions", "cuda of torch", torch.version.cuda or "none")
    for name in ("dreambooth-lab", *NEEDED, *EXTRAS):
        try:
            yield Fact("versions", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Fact("versions", name, "not installed", bad=name in NEEDED)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    yield Fact("versions", "chromium", _answer([browser, "--version"]) if browser else "not installed")


def _answer(words: list[str]) -> str:
    try:
        message = subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not available ({type(error).__name__})"
    return message.splitlines()[0] if message else "not available"


def devices() -> Iterator[Fact]:
    """Processor and accelerators with their memory."""
    memory = psutil.virtual_memory()
    cores = f"{len(os.sched_getaffinity(0))} of " if hasattr(os, "sched_getaffinity") else ""
    yield Fact("devices", "cpu", f"{cores}{os.cpu_count()} cores, {memory.available / GB:.1f} of {memory.total / GB:.1f} GB free")
    for i in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        what = f"{known.name}, {free / GB:.1f} of {total / GB:.1f} GB free, capability {known.major}.{known.minor}"
        yield Fact("devices", f"cuda:{i}", what)
    if not torch.cuda.is_available():
        yield Fact("devices", "cuda", "none usable by torch")
    if torch.backends.mps.is_available():
        yield Fact("devices", "mps", f"{torch.mps.recommended_max_memory() / GB:.1f} GB")


def libraries() -> Iterator[Fact]:
    """Which quantisation libraries import."""
    for name, module in QUANT.items():
        try:
            importlib.import_module(module)
            yield Fact("quant", name, f"imports, {importlib.metadata.version(module.replace('.', '-'))}")
        except Exception as error:  # a compiled extension may raise anything
            yield Fact("quant", name, f"no: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def kernels() -> Iterator[Fact]:
    """Which attention kernels work, tried with 64 tokens."""
    kinds = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    kinds += [("cuda", dtype) for dtype in (torch.float32, torch.bfloat16) if torch.cuda.is_available()]
    for device, dtype in kinds:
        works = [
            kind.name for kind, kernel in KERNELS.items() if _runs(kernel, torch.zeros(1, 2, 64, 64, device=device, dtype=dtype))
        ]
        yield Fact("attention", f"{device} {str(dtype).removeprefix('torch.')}", ", ".join(works))


def _runs(kernel: SDPBackend, x: torch.Tensor) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"), sdpa_kernel(kernel):
            scaled_dot_product_attention(x, x, x)
    except RuntimeError:
        return False
    return True


def disks(runs: Path, cache: Path) -> Iterator[Fact]:
    """Free disk space for runs and caches, and the caches' sizes."""
    for name, folder in (("runs", runs), ("cache", cache)):
        yield Fact("disk", f"free for {name}", f"{free_bytes(folder) / GB:,.1f} GB")
        yield Fact("disk", f"{name} folder", str(folder.expanduser().absolute()), path=True)
    for kind in KINDS:
        if (cache.expanduser() / kind).is_dir():
            store = Store(cache.expanduser(), kind)
            sizes = [store.path(key).stat().st_size for key in [*store.keys()]]
            yield Fact("disk", f"cache of {kind}", f"{len(sizes):,} entries, {sum(sizes) / 1e6:,.1f} MB")


def models() -> Iterator[Fact]:
    """The models in the hub's cache."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    yield Fact("models", "hub's cache", str(constants.HF_HUB_CACHE), path=True)
    try:
        repos = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
    except (CacheNotFound, OSError, ValueError):
        repos = []
    for repo in repos:
        if repo.repo_type == "model":
            yield Fact("models", repo.repo_id, f"{repo.size_on_disk / GB:,.2f} GB")


def variables() -> Iterator[Fact]:
    """Environment variables that affect a run."""
    for name in (*PLAIN, *PATHS, *SECRET):
        if name in os.environ:
            yield Fact("environment", name, "set" if name in SECRET else os.environ[name], path=name in PATHS)


def as_text(facts: list[Fact]) -> str:
    """A paragraph for each topic."""
    lines, last = list[str](), ""
    for fact in facts:
        lines += ["", fact.topic] if fact.topic != last else []
        lines.append(f"  {fact.name:<24} {fact.value}{'  ← required' if fact.bad else ''}")
        last = fact.topic
    return "\n".join(lines[1:])


def scrubbed(facts: list[Fact]) -> str:
    """The same without paths, user and host names."""
    text = as_text([fact._replace(value="(a path)") if fact.path else fact for fact in facts])
    home = str(Path.home())
    text = re.sub(rf"(?<![\w.)])(?:{re.escape(home)}|~)?(?:/[^\s,:;'\"()]+)+", "(a path)", text)
    for name, instead in ((_user(), "(user)"), (socket.gethostname(), "(host)"), (platform.node(), "(host)")):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", instead, text) if name else text
    return text + "\n"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def main(words: list[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: app(words))


if __name__ == "__main__":
    main()

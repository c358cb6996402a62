"""The program's command line in processes of its own, started by `multiprocessing`'s fork server.

The server imports torch and the libraries once, so a forked process starts immediately. Nothing else is shared: each has its own
arguments, folder, environment, signal handlers and output.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dreambooth_lab.runfolder import RunFolder

PRELOADED = [
    "dreambooth_lab.run",
    "dreambooth_lab.callbacks.builders",
    "diffusers.pipelines.stable_diffusion_xl",
    "transformers.models.clip",
    "peft",
    "lightning.pytorch.loggers",
]


class Process:
    """A running command, with the interface of `subprocess.Popen`."""

    def __init__(self, words: tuple[str, ...], cwd: Path, env: Mapping[str, str], module: str):
        self._folder = tempfile.TemporaryDirectory(prefix="command")
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(PRELOADED)
        self._process = server.Process(target=_main, args=(words, str(cwd), dict(env), module, *map(str, self._files)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative: the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Its stdout and stderr, after it has ended."""
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in self._files)
        return out, err


def start(*words: str, cwd: Path, env: Mapping[str, str] | None = None, module: str = "dreambooth_lab") -> Process:
    """Start `python -m MODULE ARGUMENTS` in a folder."""
    return Process(words, cwd, os.environ if env is None else env, module)


def call(*words: str, cwd: Path, timeout: float = 300, module: str = "dreambooth_lab") -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    process = start(*words, cwd=cwd, module=module)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.wait(), out, err)


def wait_for(step: int, cwd: Path, process: Process) -> Path:
    """The folder of the run in `cwd`, as soon as its log shows a step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for path in cwd.glob("runs/*"):
            if any(line[0] >= step for line in RunFolder(path).read_metrics()):
                return path
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.kill()
    raise AssertionError("too slow")


def kill_at(step: int, words: Sequence[str], cwd: Path) -> Path:
    """Start a run and SIGKILL it as soon as its log shows a step; its folder."""
    process = start(*words, cwd=cwd)
    path = wait_for(step, cwd, process)
    process.kill()
    process.wait()
    return path


def assert_same(a: Any, b: Any) -> None:
    """Assert that all tensors are bit-identical."""
    assert a.keys() == b.keys() and a
    for key in a:
        if isinstance(a[key], dict):
            assert_same(a[key], b[key])
        else:
            assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), key


def _main(words: tuple[str, ...], cwd: str, env: dict[str, str], module: str, out: str, err: str) -> None:
    """Run the command in the new process."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for path, fd in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)
        os.close(file)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", encoding="utf-8", closefd=False),
        os.fdopen(2, "w", encoding="utf-8", closefd=False),
    )
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
